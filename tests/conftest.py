"""What the tests share: tokenizers in the shape of the real ones, a random model of two layers, instruct data."""

import fcntl
import functools
import io
import os
import shutil
import signal
from contextlib import contextmanager

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from harness import ROOT, lora_settings, make_records, run_script, training_options, write_jsonl

# Under nohup SIGHUP is ignored, which the commands respect; what is tested is what they do without it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Two adapters are trained, the README's blocks are run, a browser is opened, the embedded model is converted and merged.
SLOW_FIXTURES = {"workspace", "copy", "browser", "embedded"}


def pytest_collection_modifyitems(items):
    """slow: what uses those fixtures or runs a command with run_script of harness.py; a few tests carry the mark themselves.

    These come first, so that no worker has a long test left when the others have ended.
    """
    for item in items:
        called = item.function.__code__.co_names
        runs = "run_script" in called and item.function.__globals__["run_script"].__module__ == "harness"
        if runs or SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker("slow")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file that has a fixture for all of its tests goes to one worker, in its order; other tests go anywhere."""
    from xdist.scheduler import LoadScopeScheduling

    @functools.cache
    def has_common_fixture(file):
        return '(scope="module"' in (ROOT / file).read_text(encoding="utf-8")

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if has_common_fixture(file) else nodeid

    return Scheduling(config, log)


@contextmanager
def for_all_workers(tmp_path_factory, name):
    """(folder, whether it is to be filled): a session's folder of this name, which the first worker fills for all."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, filled = base / name, base / f"{name}.filled"
    with (base / f"{name}.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not filled.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed half way
            folder.mkdir()
        yield folder, not filled.exists()
        filled.touch()


# English, digits, punctuation and a few single Chinese characters, as in LLaMA's own vocabulary.
BASE_TEXT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.
### Instruction:
### Response:
The quick brown fox jumps over the lazy dog, and the dog sleeps on.
She sells 1234567890 sea shells; is that right? Yes! (It is "right".)
def add(left, right): return left + right  # spaces and signs: <>[]{}=-*/\\_~'
一 二 三 人 名 地 大 小 中 国 的 是 在 有 和 了 ， 。 、 “ ” ： ！ ？
""".splitlines()

# Added without scores of their own, as in Chinese-LLaMA. With every score 0, which of two overlapping words wins is
# decided by position alone (北京大学生: 北京, 京大, 大学, 学生), and that is where tokenizer implementations part.
CHINESE_CHARACTERS = "北京上海学生文本：实体识别没结果机构王李张明华伟长江沙公司银行教授去年我们被评为市日报新闻记者说"
CHINESE_WORDS = (
    "北京 京大 大学 学生 北京大学 大学生 上海 海大 长江 长沙 沙市 江大 中国 国人 北京市 人名 地名 机构 机构名 构名 "
    "文本 文本： 实体 识别 没有 结果 王明 李华 明华 银行 中国银行 国银 公司 教授 去年 我们 们被 新闻 闻记 记者 日报"
).split()


def _base_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(BASE_TEXT * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _add_pieces(model: bytes, pieces) -> bytes:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    known = {piece.piece for piece in proto.pieces}
    for piece in dict.fromkeys(pieces):
        if piece not in known:
            proto.pieces.add(piece=piece, score=0.0)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString()


@pytest.fixture(scope="session")
def tokenizer_models(tmp_path_factory):
    """A folder with base.model, merged.model (base + Chinese pieces, all of score 0) and alpaca.model (+ [PAD])."""
    with for_all_workers(tmp_path_factory, "tokenizers") as (folder, empty):
        if empty:
            base = _base_model()
            merged = _add_pieces(base, [*CHINESE_WORDS, *CHINESE_CHARACTERS])
            alpaca = _add_pieces(merged, ["[PAD]"])
            for name, model in {"base": base, "merged": merged, "alpaca": alpaca}.items():
                (folder / f"{name}.model").write_bytes(model)
    return folder


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory, tokenizer_models):
    """A Hugging Face folder with a random LLaMA of two layers and the alpaca tokenizer."""
    with for_all_workers(tmp_path_factory, "base") as (folder, empty):
        if empty:
            save_random_llama(folder, tokenizer_models)
    return folder


def save_random_llama(folder, tokenizer_models):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from alpaca.models.tokenizer import load_tokenizer, save_tokenizer

    save_tokenizer(tokenizer_models / "alpaca.model", folder)
    config = LlamaConfig(
        vocab_size=load_tokenizer(folder).vocab_size,
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 16: FlexAttention takes no smaller ones
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).half().save_pretrained(folder)


@pytest.fixture
def lora_model(base_dir):
    """A float32 model whose adapters are not zero, so that no gradient is."""
    import torch

    from alpaca.models.base_weights import load_base
    from alpaca.training.lora import add_lora, lora_weights

    model = add_lora(load_base(base_dir, torch.float32, "cpu"), lora_settings())
    torch.manual_seed(1)
    for name, weight in lora_weights(model, model.lora.data).items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model


@pytest.fixture(scope="session")
def instruct_data(tmp_path_factory):
    """A folder with train.txt (205 records: no multiple of a batch) and dev.txt (31)."""
    with for_all_workers(tmp_path_factory, "instruct_data") as (folder, empty):
        if empty:
            write_jsonl(folder / "train.txt", make_records(205, 1))
            write_jsonl(folder / "dev.txt", make_records(31, 2))
    return folder


@pytest.fixture(scope="session")
def workspace(tmp_path_factory, base_dir, instruct_data):
    """A folder as a user has it, with data/mine/instruct_data/ and both trainers' 50-step adapters in float32."""
    with for_all_workers(tmp_path_factory, "workspace") as (folder, empty):
        if empty:
            (folder / "data" / "mine").mkdir(parents=True)
            shutil.copytree(instruct_data, folder / "data" / "mine" / "instruct_data")
            for script in ("train_deepspeed.py", "train_trainer.py"):
                run_script(script, *training_options(base_dir), "--tensorboard", cwd=folder)
    return folder

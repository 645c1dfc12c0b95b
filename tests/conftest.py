"""What the tests share: tokenizers in the shape of the real ones, a random model of two layers, instruct data."""

import functools
import io
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

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
    folder = tmp_path_factory.mktemp("tokenizers")
    base = _base_model()
    merged = _add_pieces(base, [*CHINESE_WORDS, *CHINESE_CHARACTERS])
    alpaca = _add_pieces(merged, ["[PAD]"])
    for name, model in {"base": base, "merged": merged, "alpaca": alpaca}.items():
        (folder / f"{name}.model").write_bytes(model)
    return folder


INSTRUCTION = (
    "你现在是一个实体识别模型，你需要提取文本里面的人名、地名、机构名，如果存在结果，返回'实体_实体类型'，"
    "不同实体间用\n分隔。如果没有结果，回答'没有'。"
)


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory, tokenizer_models):
    """A Hugging Face folder with a random LLaMA of two layers and the alpaca tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from alpaca.models.tokenizer import load_tokenizer, save_tokenizer

    folder = tmp_path_factory.mktemp("models") / "base"
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
    return folder


def lora_settings(gradient_checkpointing=False, lora_dropout=0.0):
    """What add_lora reads of a trainer's args."""
    return SimpleNamespace(
        gradient_checkpointing=gradient_checkpointing,
        deepspeed={},
        seed=42,
        lora_r=4,
        lora_alpha=8,
        lora_dropout=lora_dropout,
        lora_target_modules=["q_proj", "o_proj", "down_proj"],
    )


@pytest.fixture
def lora_model(base_dir):
    """A float32 model whose adapters are not zero, so that no gradient is."""
    import torch

    from alpaca.models.base import load_base
    from alpaca.training.lora import add_lora, lora_weights

    model = add_lora(load_base(base_dir, torch.float32, "cpu"), lora_settings())
    torch.manual_seed(1)
    for name, weight in lora_weights(model, model.lora.data).items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model


def make_records(count, seed):
    """Instruct data of our own: one sentence each with a person and a place, or with neither."""
    draw = random.Random(seed)
    records = []
    for _ in range(count):
        person, place = draw.choice(["王明", "李华", "张伟"]), draw.choice(["北京", "上海", "长沙"])
        if draw.random() < 0.25:
            text, entities = "我们去年说" + "新闻" * draw.randint(1, 8) + "。", []
        else:
            text = f"{person}去年在{place}说" + "新闻" * draw.randint(0, 8) + "。"
            entities = [
                {"entity": entity, "type": kind, "begin": text.index(entity), "end": text.index(entity) + len(entity)}
                for entity, kind in ((person, "人名"), (place, "地名"))
            ]
        answer = "\n".join(f"{e['entity']}_{e['type']}" for e in entities) or "没有"
        records.append(
            {"instruct": INSTRUCTION, "query": f"文本：{text}", "answer": answer, "text": text, "entities": entities}
        )
    return records


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def instruct_data(tmp_path_factory):
    """A folder with train.txt (205 records: no multiple of a batch) and dev.txt (31)."""
    folder = tmp_path_factory.mktemp("instruct_data")
    write_jsonl(folder / "train.txt", make_records(205, 1))
    write_jsonl(folder / "dev.txt", make_records(31, 2))
    return folder


ROOT = Path(__file__).resolve().parent.parent


# Importing the libraries takes longer than most scripts' own work: a process does it once, and forks for each script. What
# is ours is imported by the fork, which starts and ends like any process.
FORKING = """
import gc, json, os, runpy, signal, sys
import deepspeed, llguidance, matplotlib.figure, peft, torch, transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, SentencePieceBackend, Trainer
gc.freeze()  # else a fork looks at all of it once more when it ends, which takes longer than its work
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if not pid:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()
signal.alarm(300)
for number, name in enumerate(("stdin", "stdout", "stderr")):
    os.dup2(os.open(order[name], os.O_RDWR), number)
sys.stdin = open(0, encoding="utf-8", errors="surrogateescape")
os.chdir(order["cwd"])
os.environ.clear()
os.environ.update(order["env"])
sys.argv = order["argv"]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@functools.cache
def forking():
    command = [sys.executable, "-c", FORKING]
    env = {**os.environ, "PYTHONUTF8": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)


def run_forked(argv, cwd, env, stdin):
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in ("stdin", "stdout", "stderr")}
        for name, path in files.items():
            path.write_text(stdin if name == "stdin" else "", encoding="utf-8", errors="surrogateescape")
        order = {"argv": argv, "cwd": str(cwd), "env": env, **{name: str(path) for name, path in files.items()}}
        print(json.dumps(order), file=forking().stdin, flush=True)
        code = int(forking().stdout.readline())
        out, err = (files[name].read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(argv, code, out, err)


def free_port():
    """A port for a process that must be told one. Another may take it before it is bound; nothing else is to be had."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_script(script, *options, cwd, launcher=None, check=True, env=None, stdin=""):
    """Run a script of the project as a user would; with check, a failure shows what it printed.

    launcher: another command than python to run it with. A process that is to use CUDA cannot be a fork.
    """
    argv = [str(ROOT / script), *map(str, options)]
    env = {**os.environ, "PYTHONUTF8": "1", **(env or {})}
    if launcher or os.path.exists("/dev/nvidiactl"):
        command = [*map(str, launcher or [sys.executable]), *argv]
        result = subprocess.run(
            command,
            cwd=cwd,
            env=env,
            input=stdin,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=300,
        )
    else:
        result = run_forked(argv, cwd, env, stdin)
    assert not check or result.returncode == 0, f"{script} {options}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result


@pytest.fixture(scope="session")
def workspace(tmp_path_factory, base_dir, instruct_data):
    """A folder as a user has it, with data/mine/instruct_data/ and both trainers' 50-step adapters in float32."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "data" / "mine").mkdir(parents=True)
    shutil.copytree(instruct_data, folder / "data" / "mine" / "instruct_data")
    for script in ("train_deepspeed.py", "train_trainer.py"):
        run_script(script, *training_options(base_dir), "--tensorboard", cwd=folder)
    return folder


def training_options(base_dir):
    """50 steps with warm-up over an epoch boundary: 205 examples are 35 steps of 6."""
    return [
        "--data_name=mine",
        f"--model_dir={base_dir}",
        "--precision=fp32",
        "--lora_dropout=0.1",
        "--deepspeed_optimizer_params_lr=1e-3",
        "--max_steps=50",
        "--warmup_ratio=0.1",
        "--train_batch_size=6",
        "--log_steps=1",
        "--eval_steps=25",
        "--save_steps=20",
    ]


def assert_same_rows(rows, expected):
    """Rows of train_log.jsonl: bit for bit on a CPU. A GPU's kernels are tuned in each process, and round differently."""
    import torch

    if not torch.cuda.is_available():
        assert rows == expected
        return
    for row, other in zip(rows, expected, strict=True):
        memory = {key: value for key, value in row.items() if key == "peak_gib"}  # also of what was captured before
        assert row == pytest.approx({**other, **memory}, rel=2e-5)


def assert_same_adapter(run, expected):
    """The adapters of two runs, in the same way."""
    import torch
    from safetensors.torch import load_file

    ours, theirs = (load_file(path / "adapter_model" / "adapter_model.safetensors") for path in (run, expected))
    assert ours.keys() == theirs.keys()
    share = 1e-3 if torch.cuda.is_available() else 0
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= share * tensor.norm(), name


def read_log(run_dir):
    """train_log.jsonl without the speed, which no two runs share."""
    lines = (Path(run_dir) / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "examples_per_second"} for line in lines]

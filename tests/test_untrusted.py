"""Files and texts from strangers: nothing in them is run, and what is wrong with them is one line.

python -m pytest tests/test_untrusted.py
FUZZ=30000 python -m pytest tests/test_untrusted.py -k fuzz       # cases a test; 300 without it
"""

import ast
import contextlib
import io
import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca.common.errors import UserError
from alpaca.models.adapter_files import read_adapter
from alpaca.models.templates import TEMPLATES, encode_examples, encode_prompts
from alpaca.models.tokenizer import EOS, load_tokenizer
from config_utils import ALIASES, Config, load_config, options_of, parse_config
from dataset import format_answer, parse_answer, read_examples
from harness import ROOT, free_port, make_records, run_script, write_jsonl
from tools.config_tables import config_of

CASES = int(os.environ.get("FUZZ", "300"))
fuzz = settings(max_examples=CASES, deadline=None, database=None)
SCRIPTS = ("train_trainer", "train_deepspeed", "test", "predict", "chat_ner", "web_ner", "process")


# ---------------------------------------------------------------------------------------------------------------------
# command lines and DeepSpeed files


CONFIGS = {script: config_of(f"{script}.py") for script in SCRIPTS}
AWKWARD = "True|none|auto|1e-4|1,2|,|1e999|nan|\0|\ud800|.|-1|0x10|１|1_0|../..".split("|") + ["9" * 5000]
VALUES = st.one_of(st.text(max_size=12), st.integers().map(str), st.floats().map(str), st.sampled_from(AWKWARD))
NAMES = st.sampled_from(
    sorted(
        {name for config in CONFIGS.values() for name in options_of(config)}
        | {f"deepspeed_{name}" for name in ("optimizer_params_lr", "optimizer_params_betas", "bf16_enabled")}
        | {"deepspeed_zero_optimization_stage", "deepspeed_train_micro_batch_size_per_gpu", "help", *ALIASES}
    )
)
TOKENS = st.one_of(
    st.text(max_size=10),
    VALUES,
    NAMES.map("--{}".format),
    st.builds(
        lambda dash, name, value: f"{dash}{name}={value}", st.sampled_from(["--", "-", "---", ""]), NAMES, VALUES
    ),
)


def assert_config_or_exit_2(script, argv):
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            args = parse_config(CONFIGS[script], str(ROOT / f"{script}.py"), argv)
            assert isinstance(args, Config) and str(args)
        except SystemExit as end:
            assert end.code == 2 or (end.code == 0 and {"--help", "-h"} & set(argv))
            err.seek(0)
            assert end.code == 0 or err.read().count("\n") == 1


@fuzz
@given(st.sampled_from(SCRIPTS), st.lists(TOKENS, max_size=6))
def test_fuzz_argv_is_a_config_or_one_line_and_exit_2(script, argv):
    assert_config_or_exit_2(script, argv)


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(["auto", 1e-4, 1, 12])
)
KEYS = st.sampled_from(["enabled", "params", "lr", "betas", "type", "stage", "x", "a_b", ""])
NESTED = st.recursive(LEAVES, lambda c: st.lists(c, max_size=3) | st.dictionaries(KEYS, c, max_size=3), max_leaves=6)
SECTIONS = (
    "train_micro_batch_size_per_gpu gradient_accumulation_steps train_batch_size optimizer scheduler bf16 fp16 "
    "zero_optimization gradient_clipping lora optimizer_params"
).split()
SETTINGS = st.dictionaries(st.sampled_from(["", *SECTIONS]), NESTED, max_size=5)
GOOD = {"optimizer": {"type": "Adam", "params": {"lr": 1e-4}}}
CONTENTS = st.one_of(
    st.binary(max_size=20),
    SETTINGS.map(lambda value: json.dumps(value).encode()),
    SETTINGS.map(lambda value: json.dumps({**value, **GOOD}).encode()),
    st.sampled_from([b"[" * 10**5, b'{"a":' * 10**5, b'{"a":' + b"1" * 5000 + b"}", b"\xef\xbb\xbf{}"]),
)


@fuzz
@given(CONTENTS, st.lists(TOKENS, max_size=2))
def test_fuzz_deepspeed_file_is_a_config_or_one_line_and_exit_2(tmp_path_factory, content, argv):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_bytes(content)
    assert_config_or_exit_2("train_deepspeed", [*argv, f"--deepspeed_json_path={path}"])
    with contextlib.suppress(UserError):
        load_config(path)


def test_deepspeed_file_with_bom_and_crlf(tmp_path):
    text = (ROOT / "deepspeed.json").read_text(encoding="utf-8").replace("\n", "\r\n")
    (tmp_path / "ds.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    args = parse_config(CONFIGS["train_trainer"], "train_trainer.py", [f"--deepspeed_json_path={tmp_path}/ds.json"])
    assert args.deepspeed_optimizer_params_lr == "auto" and args.deepspeed_optimizer_params_weight_decay == 5e-4


# ---------------------------------------------------------------------------------------------------------------------
# data files


@fuzz
@given(st.lists(st.one_of(st.binary(max_size=30), NESTED.map(lambda v: json.dumps(v).encode())), max_size=4))
def test_fuzz_instruct_data_is_read_or_refused(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "fuzzed.txt"
    good = {"instruct": "a", "query": "b", "answer": "c", "entities": None}
    path.write_bytes(b"\n".join([json.dumps(good).encode(), *lines]))
    with contextlib.suppress(UserError):
        assert read_examples(path)
    if not any(b"\0" in line for line in lines):  # with one it is no text at all, and refused whole
        assert read_examples(path, malformed=[])[0]["query"] == "b"


# ---------------------------------------------------------------------------------------------------------------------
# texts

SPECIAL = [
    "<s>",
    "</s>",
    "<unk>",
    "[PAD]",
    "<pad>",
    "▁",
    "<0x0A>",
    "### Response:",
    "### Instruction:",
    "{instruction}",
]
TEXTS = st.lists(st.one_of(st.sampled_from(SPECIAL), st.text(max_size=8)), max_size=6).map("".join)
TEXTS = TEXTS.filter(lambda text: not any("\ud800" <= char <= "\udfff" for char in text))  # dataset refuses those


@fuzz
@given(instruct=TEXTS, query=TEXTS, answer=TEXTS)
def test_fuzz_text_injects_no_special_token_and_moves_no_part_of_the_prompt(base_dir, instruct, query, answer):
    tokenizer = tokenizer_of(base_dir)
    message = f"{instruct}\n{query}" if query else instruct
    (example,) = encode_examples(tokenizer, [{"instruct": instruct, "query": query, "answer": answer}])
    assert encode_prompts(tokenizer, [message]) == [example.prompt_ids]
    assert tokenizer.sp_model.decode(example.prompt_ids) == TEMPLATES["alpaca"].prompt(message).replace("▁", " ")
    inner = [*example.prompt_ids[1:], *example.answer_ids[:-1]]
    # unknown, bos, eos: with byte fallback a text has none of them, whatever it spells
    assert example.prompt_ids[0] == 1 and example.answer_ids[-1] == EOS and not {0, 1, 2} & set(inner)


TOKENIZERS = {}


def tokenizer_of(folder):
    return TOKENIZERS.setdefault(folder, TOKENIZERS.get(folder) or load_tokenizer(folder))


@fuzz
@given(st.text(min_size=1, max_size=12).filter(lambda t: not {"\n", "\r"} & set(t) and t.strip()), TEXTS)
def test_fuzz_an_entity_of_any_spelling_survives_the_answer(entity, around):
    text = around + entity
    entities = [{"entity": entity, "type": "人名", "begin": len(around), "end": len(text)}]
    parsed = parse_answer(format_answer(entities), text, ["人名"])
    assert parsed.entities == [(entity, "人名")] and not (parsed.malformed or parsed.unknown_type or parsed.not_in_text)


# ---------------------------------------------------------------------------------------------------------------------
# weights


class Malicious:
    """What a pickle may hold: a command that runs when it is loaded."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


def test_the_malicious_pickle_is_one(tmp_path):
    torch.save({"a": Malicious(tmp_path / "ran")}, tmp_path / "bad.bin")
    with contextlib.suppress(Exception):
        torch.load(tmp_path / "bad.bin", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_no_bare_pickle_is_run(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({"a": Malicious(tmp_path / "ran")}))
    with pytest.raises(UserError, match="adapter_model.bin: damaged, or no file of weights"):
        read_adapter(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_no_pickle_is_run(tmp_path, workspace, base_dir):
    """An adapter's .bin for predict, a base's .bin for train, .bin and .pth for merge and convert."""
    marker = tmp_path / "ran"
    adapter = tmp_path / "adapter_model"
    shutil.copytree(workspace / "checkpoint" / "mine" / "train_deepspeed" / "adapter_model", adapter)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"a": Malicious(marker)}, adapter / "adapter_model.bin")
    base = tmp_path / "base"
    shutil.copytree(base_dir, base, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"a": Malicious(marker)}, base / "pytorch_model.bin")
    raw = tmp_path / "raw"
    raw.mkdir()
    torch.save({"a": Malicious(marker)}, raw / "consolidated.00.pth")
    shutil.copy(base_dir / "tokenizer.model", tmp_path)
    (raw / "params.json").write_text('{"dim": 32, "n_heads": 2, "n_layers": 2, "multiple_of": 8, "norm_eps": 1e-5}')
    shutil.copy(base_dir / "tokenizer.model", adapter)
    data = workspace / "data" / "mine" / "instruct_data"
    merge = ["--output_type=huggingface", f"--output_dir={tmp_path}/out", f"--lora_model={adapter}"]
    for script, options in {
        "predict.py": [f"--base_model={base_dir}", f"--lora_model={adapter}", "--text=王明。"],
        "train_deepspeed.py": [
            f"--model_dir={base}",
            f"--train_path={data}/train.txt",
            f"--dev_path={data}/dev.txt",
            f"--save_dir={tmp_path}/run",
        ],
        "model_hub/merge_llama_with_chinese_lora.py": [f"--base_model={base_dir}", *merge],
        "model_hub/convert_llama_weights_to_hf.py": [
            f"--input_dir={tmp_path}",
            "--model_size=raw",
            f"--output_dir={tmp_path}/hf",
        ],
    }.items():
        result = run_script(script, *options, cwd=tmp_path, check=False)
        assert not marker.exists(), script
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.returncode == 2 and len(errors) == 1, f"{script}\n{result.stderr}"
        assert any(name in errors[0] for name in (str(adapter), str(base), "consolidated.00.pth")), errors


def test_no_code_of_a_model_folder_is_run(tmp_path, base_dir, instruct_data):
    """A config.json that names a class of its own beside it."""
    model = tmp_path / "model"
    shutil.copytree(base_dir, model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "own", "auto_map": {n: f"own.{n}" for n in ("AutoConfig", "AutoModelForCausalLM")}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    options = [f"--model_dir={model}", f"--train_path={instruct_data}/train.txt", f"--dev_path={instruct_data}/dev.txt"]
    result = run_script("train_deepspeed.py", *options, cwd=tmp_path, check=False)
    assert not (tmp_path / "ran").exists()
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(errors) == 1 and str(model) in errors[0], result.stderr


def test_no_source_opens_a_file_or_a_pickle_carelessly():
    """What ruff (S301, S307, PLW1514) does not see: how weights are loaded, and files opened by a path of unknown type."""
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, text=True)
    names = [name for name in listed.splitlines() if not name.startswith("tests/") and (ROOT / name).is_file()]
    found = []
    for name in names:
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            called = ast.unparse(node.func)
            opens = called.endswith((".read_text", ".write_text")) or (
                called.endswith(".open")
                and called not in ("tokenize.open", "os.open", "archive.open")
                and not any(isinstance(arg, ast.Constant) and "b" in str(arg.value) for arg in node.args)
            )
            if opens and "encoding" not in given:
                found.append((name, node.lineno, called))
            if called in ("torch.load", "load_torch") and given.get("weights_only") is not True:
                found.append((name, node.lineno, called))
            if given.get("trust_remote_code", False) is not False:
                found.append((name, node.lineno, called))
    assert len(names) > 20 and found == []


# ---------------------------------------------------------------------------------------------------------------------
# paths


def test_paths_with_blanks_and_chinese_characters(tmp_path, base_dir):
    """Through the launcher, and a prediction with the adapter."""
    folder = tmp_path / "我的 实验"
    data = folder / "data" / "实体 识别" / "instruct_data"
    data.mkdir(parents=True)
    shutil.copytree(base_dir, folder / "中文 模型")
    for name in ("train", "dev"):
        write_jsonl(data / f"{name}.txt", make_records(8, 1))
    options = ["--data_name=实体 识别", "--model_dir=./中文 模型", "--max_steps=2", "--precision=fp32"]
    options += ["--train_batch_size=4", "--save_dir=结果 一"]
    launcher = [shutil.which("deepspeed"), "--num_accelerators=1", f"--master_port={free_port()}"]
    run_script("train_trainer.py", *options, cwd=folder, launcher=launcher)
    adapter = Path("结果 一") / "adapter_model"
    run_script("predict.py", f"--lora_model={adapter}", "--text=王明。", "--max_new_tokens=4", cwd=folder)

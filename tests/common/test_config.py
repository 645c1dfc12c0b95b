"""python -m pytest tests/common/test_config.py: every row of the Config and deepspeed.json rules."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from alpaca.common import start
from alpaca.common.errors import ConfigError, UserError
from config_utils import Config, load_config, parse_config, run_script, save_config

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

CONFIG = {
    "data_name": "demo",
    "name": "a",
    "path": None,
    "lora": {"r": 8, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]},
    "flag": False,
    "on": True,
    "ratios": [0.1, 0.2],
    "counts": [1, 2],
    "max_steps": -1,
    "resume": "False",
    "compile": "auto",
    "local_rank": -1,
}

TRAIN = {
    "data_name": "demo",
    "lora": {"r": 8},
    "train_batch_size": 12,
    "gradient_accumulation_steps": 1,
    "warmup_ratio": 0.03,
    "precision": "auto",
    "deepspeed_json_path": None,
    "local_rank": -1,
}

SETTINGS = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "optimizer": {"type": "Adam", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0, "torch_adam": True}},
    "gradient_clipping": 1.0,
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 2e8},
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fails(capsys):
    """Check that a call exits with 2 after exactly one line on stderr, and return that line."""

    def check(call, *args):
        with pytest.raises(SystemExit) as stop:
            call(*args)
        out, err = capsys.readouterr()
        assert stop.value.code == 2
        assert out == ""
        assert err.count("\n") == 1 and err.startswith("error: ")
        return err[len("error: ") :].rstrip("\n")

    return check


def parse(*argv, config=CONFIG):
    return parse_config(config, "no_such_script.py", list(argv))


# Options


@pytest.mark.parametrize(
    "argv, name, value",
    [
        (["--lora_r=16"], "lora_r", 16),
        (["--lora_r", "16"], "lora_r", 16),
        (["--lora_r=1", "--lora_r=2"], "lora_r", 2),
        (["--name=a=b"], "name", "a=b"),
        (["--name", "a=b"], "name", "a=b"),
        (["--name=007"], "name", "007"),
        (["--name=-x"], "name", "-x"),
        (["--name="], "name", ""),
        (["--name=None"], "name", "None"),
        (["--path=x"], "path", "x"),
        (["--path=3"], "path", "3"),
        (["--path=x", "--path=None"], "path", None),
        (["--flag"], "flag", True),
        (["--flag=True"], "flag", True),
        (["--flag=true"], "flag", True),
        (["--flag", "true"], "flag", True),
        (["--on=false"], "on", False),
        (["--on", "False"], "on", False),
        (["--flag", "--lora_r=2"], "flag", True),
        (["--max_steps=-5"], "max_steps", -5),
        (["--lora_dropout=1"], "lora_dropout", 1.0),
        (["--lora_dropout=1e-4"], "lora_dropout", 1e-4),
        (["--lora_dropout=-1e-4"], "lora_dropout", -1e-4),
        (["--lora_target_modules=k_proj"], "lora_target_modules", ["k_proj"]),
        (["--lora_target_modules=a, b,c"], "lora_target_modules", ["a", "b", "c"]),
        (["--lora_target_modules="], "lora_target_modules", []),
        (["--ratios=1,2e-1"], "ratios", [1.0, 0.2]),
        (["--counts=3"], "counts", [3]),
        (["--resume"], "resume", "True"),
        (["--resume", "--flag"], "resume", "True"),
        (["--resume=300"], "resume", "300"),
        (["--resume", "out/checkpoint-3"], "resume", "out/checkpoint-3"),
        (["--compile"], "compile", "True"),
        (["--local_rank=1", "--lora_r=2"], "local_rank", 1),
    ],
)
def test_value(argv, name, value):
    got = getattr(parse(*argv), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--lora_r=abc"], "--lora_r: expected int, got 'abc'"),
        (["--lora_r=8.0"], "--lora_r: expected int, got '8.0'"),
        (["--lora_r=1_0"], "--lora_r: expected int, got '1_0'"),
        (["--lora_r="], "--lora_r: expected int, got ''"),
        (["--lora_dropout=x"], "--lora_dropout: expected float, got 'x'"),
        (["--lora_dropout=nan"], "--lora_dropout: expected float, got 'nan'"),
        (["--flag=1"], "--flag: expected bool (True or False), got '1'"),
        (["--flag", "yes"], "--flag: expected bool (True or False), got 'yes'"),
        (["--counts=1,x"], "--counts: expected list of int, got '1,x'"),
        (["--lora_target_modules=a,,b"], "--lora_target_modules: expected list of str, got 'a,,b'"),
        (["--lorar"], "unknown option --lorar, did you mean --lora_r?"),
        (["--lorar=8"], "unknown option --lorar, did you mean --lora_r?"),
        (["--lora-r=8"], "unknown option --lora-r, did you mean --lora_r?"),
        (["-lora_r=8"], "unknown option -lora_r, did you mean --lora_r?"),
        (["--lora_target=a"], "unknown option --lora_target, did you mean --lora_target_modules?"),
        (["--zzz", "3"], "unknown option --zzz; --help lists the options"),
        (["--learning_rate=1"], "unknown option --learning_rate; --help lists the options"),
        (["x.txt"], "unexpected argument 'x.txt'; options are written --name=value"),
    ],
)
def test_refused(argv, message, fails):
    assert fails(parse, *argv) == message


@pytest.mark.parametrize("argv", [["--lora_r"], ["--lora_r", "-3"], ["--name", "--flag"], ["--lora_dropout", "-1e-5"]])
def test_missing_value_names_the_equals_sign(argv, fails):
    assert fails(parse, *argv).startswith(f"{argv[0]}: expected a value; one that starts with - needs the =")


def test_config_is_not_changed():
    before = copy.deepcopy(CONFIG)
    args = parse("--lora_r=3", "--counts=9")
    args.counts.append(1)
    args.nested["lora"]["r"] = 4
    assert before == CONFIG
    assert args.lora_r == 3 and args.counts == [9]


@pytest.mark.parametrize(
    "config, paths",
    [
        ({"a_b": 1, "a": {"b": 2}}, ["'a_b'", "'a.b'"]),
        ({"a": {"b": 2}, "a_b": 1}, ["'a_b'", "'a.b'"]),
        ({"a_b": 1, "a": {"b": {"c": 2}}}, ["'a_b'", "'a.b'"]),
        ({"a": {"b_c": 1}, "a_b": {"c": 2}}, ["'a.b_c'", "'a_b.c'"]),
    ],
)
def test_ambiguous_names_are_a_value_error(config, paths):
    with pytest.raises(ValueError) as error:
        parse(config=config)
    assert all(path in str(error.value) for path in paths)


@pytest.mark.parametrize("config", [{"nested": 1}, {"deepspeed": "x"}, {"_a": 1}, {"a": (1, 2)}])
def test_impossible_keys(config):
    with pytest.raises(ConfigError):
        parse(config=config)


# Config


def test_config_is_frozen_and_suggests():
    args = parse()
    with pytest.raises(AttributeError, match="did you mean 'lora_r'"):
        args.lora_rr  # noqa: B018
    with pytest.raises(AttributeError, match="frozen"):
        args.lora_r = 3
    with pytest.raises(AttributeError):
        del args.lora_r
    assert getattr(args, "no_such_thing", 5) == 5
    assert args.deepspeed is None


def test_config_copies_pickles_and_compares():
    args = parse("--lora_r=3")
    pickled = pickle.loads(pickle.dumps(args))  # noqa: S301, these bytes are our own
    for other in (copy.copy(args), copy.deepcopy(args), pickled):
        assert other == args and other.lora_r == 3
    assert args != parse()
    assert args.nested["lora"]["r"] == 3


def test_listing_is_aligned():
    lines = str(parse()).splitlines()
    assert "lora_r               8" in lines
    assert "lora_target_modules  q_proj,v_proj" in lines


# Help, scripts


SCRIPT = '''"""Do a thing, 100% sure.

    python script.py
"""

from alpaca.common.errors import UserError
from config_utils import run_script

CONFIG = {
    "text": "a",  # 文本, 50% of it
    "lora": {
        "r": 8,  # rank
        "names": [  # which layers
            "q",
            "v",
        ],
    },
    "path": None,  # None = follow
    "what": "ok",
}


def main(args):
    if args.what == "user":
        raise UserError("x.txt:3: broken\\nline; mend it")
    if args.what == "stop":
        raise KeyboardInterrupt
    if args.what == "full":
        with open("/dev/full", "w") as file:
            file.write("a")
    if args.what == "bug":
        raise KeyError("a bug keeps its traceback")
    print(args.lora_r)


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)
'''


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")

    def run(*argv):
        env = {**os.environ, "PYTHONPATH": ROOT, "PYTHONUTF8": "1"}
        return subprocess.run([sys.executable, str(path), *argv], capture_output=True, text=True, env=env, cwd=tmp_path)

    return run


def test_help(script):
    done = script("--help")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0] == "Do a thing, 100% sure."
    assert "--text str 文本, 50% of it [a]" in lines
    assert "--lora_r int rank [8]" in lines
    assert "--lora_names list of str which layers [q,v]" in lines
    assert "--path str or None None = follow [None]" in lines
    assert "--what str [ok]" in lines


def test_help_without_source(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--lora_r=1", "--help")
    assert stop.value.code == 0
    assert "--lora_r" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, code, out, err",
    [
        (["--lora_r=9"], 0, "9\n", ""),
        (["--lora_r=abc"], 2, "", "error: --lora_r: expected int, got 'abc'\n"),
        (["--lorar"], 2, "", "error: unknown option --lorar, did you mean --lora_r?\n"),
        (["--what=user"], 2, "", "error: x.txt:3: broken line; mend it\n"),
        (["--what=stop"], 130, "", ""),
        (["--what=full"], 2, "", "error: output: No space left on device; free some space there and run it again\n"),
    ],
)
def test_script(argv, code, out, err, script):
    done = script(*argv)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


@pytest.mark.parametrize("option", ["--help", "--lora_r=9"])
def test_a_reader_that_has_gone(option, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(tmp_path / "script.py"), option]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": ROOT})
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_bug_keeps_its_traceback(script):
    done = script("--what=bug")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_ambiguous_config_of_a_script_is_one_line(fails):
    message = fails(run_script, print, {"a_b": 1, "a": {"b": 2}}, "script.py", [])
    assert "'a_b'" in message and "'a.b'" in message


# The DeepSpeed file


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Parse TRAIN for a script beside deepspeed.json and data/demo/deepspeed.json, which hold SETTINGS."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "demo").mkdir(parents=True)

    def write(settings, path="data/demo/deepspeed.json"):
        (tmp_path / path).write_text(json.dumps(settings), encoding="utf-8")

    def parse_train(*argv, config=TRAIN):
        return parse_config(config, str(tmp_path / "train.py"), list(argv))

    write(SETTINGS)
    write({**SETTINGS, "gradient_clipping": 2.0}, "deepspeed.json")
    parse_train.write = write
    return parse_train


def test_deepspeed_file_of_the_data_set(train, capsys):
    args = train()
    assert capsys.readouterr().err == f"DeepSpeed 配置: {os.path.join('data', 'demo', 'deepspeed.json')}\n"
    assert args.deepspeed["gradient_clipping"] == 1.0
    assert args.deepspeed["train_micro_batch_size_per_gpu"] == 12
    assert args.deepspeed["gradient_accumulation_steps"] == 1
    assert args.deepspeed["bf16"] == {"enabled": "auto"}
    assert args.deepspeed_optimizer_params_lr == 1e-4


def test_deepspeed_file_beside_the_script(train, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert train("--data_name=other").deepspeed["gradient_clipping"] == 2.0
    assert train("--data_name", "other").deepspeed["gradient_clipping"] == 2.0
    assert capsys.readouterr().err == ""  # only rank 0 says which


def test_deepspeed_file_is_found_from_another_folder(train, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train().deepspeed["gradient_clipping"] == 1.0


def test_deepspeed_file_by_name(train):
    train.write({**SETTINGS, "gradient_clipping": 3, "extra": {"deep": 7}}, "mine.json")
    args = train("--deepspeed_extra_deep=8", "--deepspeed_gradient_clipping=0.5", "--deepspeed_json_path=mine.json")
    assert args.deepspeed["extra"] == {"deep": 8}
    assert args.deepspeed["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    "option, path, value",
    [
        ("--deepspeed_optimizer_params_lr=3e-3", ("optimizer", "params", "lr"), 3e-3),
        ("--deepspeed_optimizer_params_lr=1", ("optimizer", "params", "lr"), 1.0),
        ("--deepspeed_optimizer_params_weight_decay=0.01", ("optimizer", "params", "weight_decay"), 0.01),
        ("--deepspeed_optimizer_params_betas=0.8,0.9", ("optimizer", "params", "betas"), [0.8, 0.9]),
        ("--deepspeed_optimizer_params_torch_adam=false", ("optimizer", "params", "torch_adam"), False),
        ("--deepspeed_optimizer_type=AdamW", ("optimizer", "type"), "AdamW"),
        ("--deepspeed_zero_optimization_stage=3", ("zero_optimization", "stage"), 3),
        ("--deepspeed_zero_optimization_reduce_bucket_size=1000", ("zero_optimization", "reduce_bucket_size"), 1000.0),
        ("--deepspeed_bf16_enabled=true", ("bf16", "enabled"), True),
        ("--deepspeed_fp16_enabled=auto", ("fp16", "enabled"), "auto"),
        ("--deepspeed_gradient_accumulation_steps=1", ("gradient_accumulation_steps",), 1),
        ("--deepspeed_gradient_accumulation_steps=auto", ("gradient_accumulation_steps",), 1),
    ],
)
def test_deepspeed_option(option, path, value, train):
    got = train(option).deepspeed
    for key in path:
        got = got[key]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--learning_rate=1e-3"], ["--learning_rate", "--deepspeed_optimizer_params_lr", "0.0001"]),
        (["--lr", "1e-3"], ["--lr;", "--deepspeed_optimizer_params_lr"]),
        (["--weight_decay=0"], ["--deepspeed_optimizer_params_weight_decay"]),
        (["--fp16"], ["--precision"]),
        (["--bf16=true"], ["--precision"]),
        (["--batch_size=3"], ["--train_batch_size"]),
        (["--max_grad_norm=3"], ["--deepspeed_gradient_clipping"]),
        (["--deepspeed_optimizer_params_lrr=3"], ["did you mean --deepspeed_optimizer_params_lr?"]),
        (["--deepspeed_zero_optimization_stage=x"], ["expected int, got 'x'"]),
        (["--deepspeed_bf16_enabled=1"], ["expected auto or bool (True or False), got '1'"]),
        (["--deepspeed_gradient_accumulation_steps=x"], ["expected auto or int, got 'x'"]),
        (["--deepspeed_optimizer_params_lr=auto"], ["expected float, got 'auto'"]),
        (["--deepspeed_gradient_accumulation_steps=2"], ["gradient_accumulation_steps", "is 2", "is 1"]),
        (["--deepspeed_json_path=none.json"], ["none.json", "--deepspeed_json_path"]),
        (["--precision=bf61"], ["--precision", "bf16, fp16, fp32", "'bf61'"]),
    ],
)
def test_deepspeed_option_refused(argv, parts, train, fails):
    message = fails(train, *argv)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "change, argv, parts",
    [
        (
            {"train_micro_batch_size_per_gpu": 4},
            [],
            ["train_micro_batch_size_per_gpu", "4", "--train_batch_size", "12"],
        ),
        ({"gradient_accumulation_steps": 4}, [], ["gradient_accumulation_steps", "4", "--gradient_accumulation_steps"]),
        ({"train_batch_size": 13}, [], ["train_batch_size", "13", "12"]),
        ({"scheduler": {"type": "WarmupLR"}}, [], ["scheduler", "--warmup_ratio"]),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, [], ["bf16.enabled", "fp16.enabled"]),
        ({"bf16": {"enabled": True}}, ["--precision=fp16"], ["bf16.enabled", "true", "--precision is fp16"]),
        ({"fp16": {"enabled": True}}, ["--precision=fp32"], ["fp16.enabled", "true", "--precision is fp32"]),
        ({"bf16": {"enabled": False}}, ["--precision=bf16"], ["bf16.enabled", "false", "--precision is bf16"]),
        ({"bf16": {"enabled": "yes"}}, [], ["bf16", "yes"]),
        ({"gradient_clipping": "auto"}, [], ["gradient_clipping", "--deepspeed_gradient_clipping"]),
        ({"optimizer": {"type": "Adam", "params": {"lr": "best"}}}, [], ["optimizer.params.lr"]),
        ({}, ["--deepspeed_zero_optimization_stage=4"], ['"zero_optimization.stage" must be 0, 1, 2 or 3, got 4']),
        ({"optimizer": {"type": "Adam", "params": {}}}, [], ["optimizer.params.lr", "learning rate"]),
        ({"gradient": {"clipping": 1}}, [], ["'deepspeed.gradient_clipping'", "'deepspeed.gradient.clipping'"]),
        ({"json_path": "x"}, [], ["'json_path'", "'deepspeed_json_path'"]),
    ],
)
def test_deepspeed_file_refused(change, argv, parts, train, fails):
    train.write({**SETTINGS, **change})
    message = fails(train, *argv)
    assert all(part in message for part in [os.path.join("data", "demo", "deepspeed.json"), *parts]), message


@pytest.mark.parametrize(
    "change, argv",
    [
        ({"train_micro_batch_size_per_gpu": 4}, ["--train_batch_size=4"]),
        ({"bf16": {"enabled": True}}, []),
        ({"bf16": {"enabled": True}}, ["--precision=bf16"]),
        ({"fp16": {"enabled": False}}, ["--precision=bf16"]),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": False}}, ["--precision=fp32"]),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": False}}, []),
    ],
)
def test_precision_is_left_to_the_device(change, argv, train):
    train.write({**SETTINGS, **change})
    settings = train(*argv).deepspeed
    for name in ("bf16", "fp16"):
        assert settings[name] == {**SETTINGS, **change}[name]


def test_absent_keys_are_auto(train):
    train.write({"optimizer": SETTINGS["optimizer"]})
    settings = train("--train_batch_size=3", "--gradient_accumulation_steps=2", "--precision=fp16").deepspeed
    assert (settings["train_micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"]) == (3, 2)
    assert "bf16" not in settings and "fp16" not in settings


def test_total_batch_counts_the_ranks(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    train.write({**SETTINGS, "train_batch_size": 24})
    assert train().deepspeed["train_batch_size"] == 24
    train.write({**SETTINGS, "train_batch_size": "auto"})
    assert "train_batch_size" not in train().deepspeed


def test_malformed_deepspeed_file(train, tmp_path, fails):
    (tmp_path / "bad.json").write_text('{\n  "a": 1\n  "b": 2}', encoding="utf-8")
    message = fails(train, "--deepspeed_json_path=bad.json")
    assert message.startswith("bad.json: line 3, column 3:")
    (tmp_path / "bad.json").write_text("[1]", encoding="utf-8")
    assert "expected a JSON object" in fails(train, "--deepspeed_json_path=bad.json")


def test_help_lists_deepspeed_options(train, capsys):
    with pytest.raises(SystemExit):
        train("--help")
    out, err = capsys.readouterr()
    assert "--deepspeed_optimizer_params_lr" in out and err == ""


def test_the_deepspeed_file_of_the_original(train):
    """Its file as published: batch 12 and fp16 stated, no clipping, CPU-offloaded Adam."""
    train.write(
        {
            "train_micro_batch_size_per_gpu": 12,
            "optimizer": {
                "type": "Adam",
                "params": {"lr": 1e-05, "betas": [0.9, 0.95], "eps": 1e-08, "weight_decay": 0.0005},
            },
            "fp16": {"enabled": True},
            "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        }
    )
    settings = train("--deepspeed_zero_optimization_offload_optimizer_device=none").deepspeed
    assert settings["fp16"] == {"enabled": True} and settings["optimizer"]["params"]["lr"] == 1e-5
    assert settings["zero_optimization"]["offload_optimizer"]["device"] == "none"


@pytest.mark.parametrize("data_name", ["demo", "other"])
def test_our_own_deepspeed_files(data_name):
    args = parse_config(TRAIN, os.path.join(ROOT, "train.py"), [f"--data_name={data_name}"])
    assert args.deepspeed_optimizer_params_lr == "auto"
    args = parse_config(TRAIN, os.path.join(ROOT, "train.py"), ["--deepspeed_optimizer_params_lr=1"])
    assert args.deepspeed_optimizer_params_lr == 1.0
    assert args.deepspeed["optimizer"]["params"]["torch_adam"] is True
    assert args.deepspeed["zero_optimization"]["stage"] == 1
    assert args.deepspeed["bf16"] == args.deepspeed["fp16"] == {"enabled": "auto"}


# Saving


def test_save_and_load(train, tmp_path):
    args = train("--lora_r=3", "--local_rank=0", "--data_name=demo")
    path = tmp_path / "train_args.json"
    save_config(args, path, step=7, labels=["人名"])
    assert "人名" in path.read_text(encoding="utf-8")
    loaded, facts = load_config(path)
    assert facts == {"step": 7, "labels": ["人名"]}
    expected = args.nested
    del expected["local_rank"]
    assert loaded == Config(expected, args.deepspeed)
    assert loaded.lora_r == 3 and loaded.deepspeed["train_micro_batch_size_per_gpu"] == 12
    assert not hasattr(loaded, "local_rank")
    save_config(args, path, deepspeed={"bf16": {"enabled": True}}, step=7)
    assert load_config(path)[0].deepspeed_bf16_enabled is True


def test_save_without_deepspeed(tmp_path):
    save_config(parse(), tmp_path / "a.json")
    assert load_config(tmp_path / "a.json")[0].deepspeed is None


@pytest.mark.parametrize(
    "text, parts",
    [
        ('{"lora_r": 8, "data_name": "msra", "deepspeed_jaon_path": "x"}', ["original", "bos", "retrained"]),
        ('{"a": 1}', ["train_args.json", "deepspeed train_trainer.py"]),
        ('{"config": 1}', ["train_args.json", "deepspeed train_trainer.py"]),
        ('{"config": ', ["train_args.json: line 1, column 12", "deepspeed train_trainer.py"]),
        ("[]", ["JSON object", "deepspeed train_trainer.py"]),
        (None, ["train_args.json", "No such file", "deepspeed train_trainer.py"]),
    ],
)
def test_load_refuses(text, parts, tmp_path):
    path = tmp_path / "train_args.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_config(path)
    assert all(part in str(error.value) for part in parts), error.value


# ---------------------------------------------------------------------------------------------------------------------
# versions


@pytest.mark.parametrize(
    "name, found, wanted",
    [
        ("torch", "2.11.0+cu130", None),
        ("torch", "2.13.1", None),
        ("torch", "2.10.2", "2.11 to 2.13"),
        ("torch", "2.14.0a0+git1234", "2.11 to 2.13"),
        ("torch", "3.0", "2.11 to 2.13"),
        ("transformers", "5.17.0", None),
        ("transformers", "5.23.4", None),
        ("transformers", "4.57.3", "5.17 to 5.23"),
        ("transformers", "5.24.0.dev0", "5.17 to 5.23"),
        ("peft", "0.21.9", None),
        ("peft", "0.22.0", "0.21"),
    ],
)
def test_versions(name, found, wanted, monkeypatch):
    good = {name: first for name, (first, _) in start.VERSIONS.items()}
    monkeypatch.setattr(start, "version", lambda library: {**good, name: found}[library])
    if wanted is None:
        start.check_versions()
        return
    with pytest.raises(UserError) as error:
        start.check_versions()
    assert str(error.value).startswith(f"{name} {found}: this needs {wanted}; `pip install -r requirements.txt`")


def test_an_old_python_is_named_before_a_library_is_missed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # start sets it
    monkeypatch.setattr(start, "OLDEST_PYTHON", (4, 0))
    monkeypatch.setitem(sys.modules, "alpaca.common.console", None)  # as where tqdm is missing
    with pytest.raises(SystemExit, match="2"):
        start.start()
    assert re.fullmatch(r"error: Python 3\.\S+: this needs 3.11 or 3.12; make .*\n", capsys.readouterr().err)


SCRIPTS = (
    "train_trainer train_deepspeed test predict chat_ner web_ner process "
    "model_hub/convert_llama_weights_to_hf model_hub/merge_llama_with_chinese_lora"
).split()


@pytest.mark.parametrize("script", SCRIPTS)
def test_another_version_ends_the_start_before_a_library_is_imported(script, tmp_path):
    (tmp_path / "peft-0.20.0.dist-info").mkdir()
    (tmp_path / "peft-0.20.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.20.0\n")
    for library in ("torch", "transformers", "peft", "deepspeed"):
        (tmp_path / f"{library}.py").write_text("raise ImportError('too early')\n")
    done = subprocess.run(
        [sys.executable, Path(ROOT) / f"{script}.py", "--help"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: peft 0.20.0: this needs 0.21; ") and done.stderr.count("\n") == 1


def test_every_command_takes_the_number_that_a_launcher_gives():
    """Also one whose CONFIG has no such key: it is of this run alone and no option."""
    args = parse_config({"lora": {"r": 8}}, __file__, ["--local_rank=1", "--lora_r=2", "--local_rank", "3"])
    assert args.nested == {"lora": {"r": 2}}
    with pytest.raises(SystemExit):
        parse_config({"lora": {"r": 8}}, __file__, ["--local_rank=x"])

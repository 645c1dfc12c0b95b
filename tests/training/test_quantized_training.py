"""A training run on a quantized base, from its first step to an answer.     python -m pytest tests/training/test_quantized_training.py"""

import json

import pytest
import torch
from safetensors.torch import load_file

import train_deepspeed
from alpaca.common.errors import UserError
from alpaca.training.lora import check_options
from config_utils import parse_config
from harness import ROOT, assert_same_adapter, assert_same_rows, read_log, run_script


def options(base_dir, instruct_data, run, *more):
    data = [f"--{name}_path={instruct_data}/{name}.txt" for name in ("train", "dev")]
    settings = ["--precision=fp32", "--lora_dropout=0.1", "--deepspeed_optimizer_params_lr=1e-3", "--max_steps=8"]
    often = ["--train_batch_size=6", "--log_steps=1", "--eval_steps=4", "--save_steps=4", "--eval_examples=3"]
    return [f"--model_dir={base_dir}", *data, *settings, *often, f"--save_dir={run}", "--base_weights=nf4", *more]


def test_both_trainers_learn_the_same_on_nf4_and_go_on_exactly(base_dir, instruct_data, tmp_path):
    """A run that evaluates with answers in between, one that is resumed, and what it leaves for test.py."""
    for trainer in ("train_deepspeed", "train_trainer"):
        run = options(base_dir, instruct_data, tmp_path / trainer)
        result = run_script(f"{trainer}.py", *run, cwd=tmp_path)
        assert "bitsandbytes" not in result.stderr and "Warning" not in result.stderr, result.stderr
    first, second = tmp_path / "train_deepspeed", tmp_path / "train_trainer"
    log = read_log(first)
    assert_same_rows(read_log(second), log)
    assert_same_adapter(second, first)

    config = json.loads((first / "adapter_model" / "train_args.json").read_text(encoding="utf-8"))["config"]
    assert config["base_weights"] == "nf4"
    for run in (first, second):
        for file in (run / "checkpoint-8").rglob("*model_states.pt"):
            state = torch.load(file, weights_only=False)["module"]
            assert state and not [name for name in state if "proj" in name and "lora" not in name]

    (resumed := tmp_path / "resumed").mkdir()
    again = options(base_dir, instruct_data, resumed, f"--resume={first}/checkpoint-4")
    run_script("train_deepspeed.py", *again, cwd=tmp_path)
    assert_same_rows([row for row in read_log(resumed) if row["step"] > 4], [row for row in log if row["step"] > 4])
    assert_same_adapter(resumed, first)

    with pytest.raises(UserError, match="was written with base_weights nf4, this run has full"):
        train_deepspeed.main(
            parse_config(train_deepspeed.CONFIG, train_deepspeed.__file__, [*again, "--base_weights=full"])
        )

    test = [f"--dev_path={instruct_data}/dev.txt", f"--lora_model={first}/adapter_model", "--max_examples=3"]
    f1 = {}
    for weights in ("auto", "full"):  # the adapter fits both
        run_script("test.py", *test, f"--base_weights={weights}", "--precision=fp32", cwd=tmp_path)
        f1[weights] = json.loads((first / "metrics.json").read_text(encoding="utf-8"))["string"]["micro"]["f1"]
    assert f1["auto"] == log[-1]["eval_f1"]
    full = load_file(first / "adapter_model" / "adapter_model.safetensors")
    assert len(full) == 28 and all(name.startswith("base_model.model.model.layers.") for name in full)


@pytest.mark.parametrize(
    "option, message",
    [
        (
            "--deepspeed_zero_optimization_stage=3",
            "--base_weights=nf4: ZeRO-3 cannot split a quantized base; use stage",
        ),
        ("--base_weights=int8", "--base_weights=int8: expected full, nf4, fp8"),
    ],
)
def test_a_base_that_no_run_can_have_is_refused(base_dir, option, message):
    given = [f"--model_dir={base_dir}", "--base_weights=nf4", option]
    with pytest.raises(UserError, match=message):
        check_options(parse_config(train_deepspeed.CONFIG, str(ROOT / "train_deepspeed.py"), given))

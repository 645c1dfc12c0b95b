"""What an earlier version wrote, in fixtures/, is loaded and resumed, or refused in one line.

python -m pytest tests/training/test_earlier_runs.py

fixtures/bff124a: of commit bff124a, both trainers with training_options of harness.py on the base and the data of
conftest.py; checkpoint-40, and what the run of 50 steps left.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from harness import assert_same_rows, read_log, run_script, training_options

FIXTURES = Path(__file__).parent / "fixtures"
TRAINERS = ("train_deepspeed", "train_trainer")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_adapter_of_bff124a_answers(base_dir, instruct_data, tmp_path, trainer):
    adapter = tmp_path / "adapter_model"
    shutil.copytree(FIXTURES / "bff124a" / trainer / "adapter_model", adapter)
    options = [f"--lora_model={adapter}", f"--base_model={base_dir}", f"--dev_path={instruct_data}/dev.txt"]
    run_script("test.py", *options, "--max_examples=3", "--max_new_tokens=9", cwd=tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["examples"] == 3
    rows = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 3 and all(json.loads(row)["prediction"] is not None for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the fixture was written on a CPU")
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_checkpoint_of_bff124a_goes_on_bit_for_bit(base_dir, instruct_data, tmp_path, trainer):
    """The losses that the old version logged for steps 41 to 50, and the dev loss at the end."""
    shutil.copytree(FIXTURES / "bff124a" / trainer, tmp_path / "run")
    data = [f"--{name}_path={instruct_data}/{name}.txt" for name in ("train", "dev")]
    options = [*training_options(base_dir), *data, f"--save_dir={tmp_path}/run", "--resume"]
    run_script(f"{trainer}.py", *options, cwd=tmp_path)
    old = read_log(FIXTURES / "bff124a" / trainer)
    rows = read_log(tmp_path / "run")[len(old) :]
    expected = [row for row in old if row["step"] > 40]
    assert len(expected) == 11
    assert_same_rows(rows, expected)

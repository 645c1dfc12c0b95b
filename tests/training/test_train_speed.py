"""benchmarks/train_speed.py --gpus, rehearsed with two processes on the CPU.

python -m pytest tests/training/test_train_speed.py
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from alpaca.common.errors import UserError
from alpaca.training import cuda_graphs
from config_utils import parse_config
from harness import ROOT, needs_two_gpus

sys.path.insert(0, str(ROOT / "benchmarks"))
import limited
import train_speed


@pytest.mark.slow
@needs_two_gpus
def test_two_processes_are_measured_and_compared(base_dir, tmp_path, monkeypatch, capsys):
    """A row for one and a row for two, behind what was measured before; both runs have learnt what one process learns."""
    monkeypatch.setattr(train_speed, "RESULTS", tmp_path)
    lines = (ROOT / "data" / "demo" / "ori_data" / "train.txt").read_text(encoding="utf-8").splitlines()[:30]
    (tmp_path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    again = {"how": "prefix", "shape": base_dir.name, "batch": 3, "gpus": 2, "zero": 1, "examples": 30}
    earlier = [again, again | {"options": "--precision=fp32", "loss_gap": 1}]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    file = tmp_path / f"train_speed-{device.replace(' ', '_')}.json"
    file.write_text(json.dumps(earlier), encoding="utf-8")
    options = [f"--shape={base_dir}", f"--corpus={tmp_path}/corpus.txt", f"--work_dir={tmp_path}/work", "--gpus=2"]
    options += ["--batch=3", "--zero=1", "--how=peft,prefix", "--steps=3", "--options=--precision=fp32"]
    train_speed.main(parse_config(train_speed.CONFIG, train_speed.__file__, options))

    kept, one, two = json.loads(file.read_text(encoding="utf-8"))
    assert kept == earlier[0]
    assert [[row[key] for key in ("how", "batch", "gpus", "zero")] for row in (one, two)] == [
        ["prefix", 3, 1, 1],
        ["prefix", 3, 2, 1],
    ]
    assert one["linear_share"] == 1 and one["loss_gap"] == one["adapter_gap"] == 0
    ratio = two["examples_per_second"] / one["examples_per_second"] / 2
    assert two["linear_share"] == pytest.approx(ratio, rel=0.01)
    assert two["loss_gap"] < 1e-4 and 0 < two["adapter_gap"] < 1e-3  # not the same run, but the same training
    measured = f"| --precision=fp32 | {two['date']} | {two['examples_per_second']} |"
    assert f"| prefix | {base_dir.name} | 3 | 2 | 1 | 30 {measured}" in capsys.readouterr().out

    work = tmp_path / "work"
    alone, run, reference = (work / f"prefix-3x{k}-gpus{n}-zero1" for k, n in ((1, 1), (1, 2), (2, 1)))
    assert " × 2, 精度" in (run / "output.txt").read_text(encoding="utf-8")
    different = train_speed.gaps(alone, reference)  # of another batch size
    assert different["loss_gap"] > 1e-4 and different["adapter_gap"] > 1e-2
    broken = shutil.copytree(run, tmp_path / "broken")
    weights = load_file(run / "adapter_model" / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, broken / "adapter_model" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="broken/adapter_model: not the same tensors"):
        train_speed.gaps(broken, reference)


@pytest.mark.parametrize(
    "said, error", [("torch.OutOfMemoryError: CUDA out of memory", MemoryError), ("no", UserError)]
)
def test_what_does_not_fit_is_told_from_what_fails(said, error):
    with pytest.raises(error):
        train_speed.check_ran(subprocess.CompletedProcess([], 1, "", said), "prefix")


def test_fewer_row_lengths_keep_the_spare_one(monkeypatch):
    monkeypatch.setattr(cuda_graphs.choose_lengths, "__defaults__", cuda_graphs.choose_lengths.__defaults__)
    limited.limit({"row_lengths": 2})
    assert cuda_graphs.choose_lengths([100, 300, 500, 1000]) == [1024, 1152]
    assert cuda_graphs.choose_lengths([100, 300, 500, 1000], spare=False) == [512, 1024]

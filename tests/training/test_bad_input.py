"""What both trainers refuse, in the same line, before they move or load anything.     python -m pytest tests/training/test_bad_input.py"""

import json

import pytest

import train_deepspeed
import train_trainer
from config_utils import run_script


@pytest.mark.parametrize(
    "option, error",
    [
        ("lora_dropout=1.5", "--lora_dropout=1.5: expected 0 or more and less than 1"),
        ("lora_target_modules=q_projj", "has no linear layer 'q_projj'; did you mean q_proj?"),
        ("train_path=nowhere.txt", "nowhere.txt: no such file"),
        ("max_seq_length=8", "no example fits into max_seq_length=8"),
        ("dev_path=mine/mine.txt", "or train without the dev loss, --eval_steps=-1: test.py answers long texts"),
        ("resume=7", "checkpoint-7 is not a complete checkpoint"),
        ("save_dir=mine", "mine: holds other files than a training run's"),
    ],
)
def test_both_trainers_refuse(base_dir, instruct_data, tmp_path, monkeypatch, capsys, option, error):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.txt").write_text(json.dumps({"instruct": "找", "query": "雨" * 600, "answer": "没有"}))
    given = [f"--model_dir={base_dir}", "--save_dir=run"]
    given += [f"--{name}_path={instruct_data}/{name}.txt" for name in ("train", "dev")]
    for trainer in (train_deepspeed, train_trainer):
        with pytest.raises(SystemExit) as ended:
            run_script(trainer.main, trainer.CONFIG, trainer.__file__, [*given, f"--{option}"])
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert ended.value.code == 2 and error in line, trainer.__name__
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]

"""What a file of rows says of how it was made.     python -m pytest tests/answering/test_row_file.py"""

import json
import re
import resource
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from alpaca.answering.row_file import made_with, row_file
from alpaca.common.errors import FULL, UserError
from alpaca.models.base import load_base_tokenizer


@pytest.fixture
def facts(tmp_path, tokenizer_models):
    for name, file in (("adapter", "adapter_model"), ("base", "model")):
        (tmp_path / name).mkdir()
        save_file({"weight": torch.zeros(750_000)}, tmp_path / name / f"{file}.safetensors")
    shutil.copyfile(tokenizer_models / "base.model", tmp_path / "base" / "tokenizer.model")
    LlamaConfig().save_pretrained(tmp_path / "base")
    (tmp_path / "in.txt").write_text("一\n二\n三\n", encoding="utf-8")
    return facts_of(tmp_path)


def facts_of(folder, base="base"):
    args = {"max_new_tokens": 8, "constrained": "auto", "tokenizer_path": None, "base_weights": "auto"}
    args = SimpleNamespace(**args, template="auto", precision="fp32", base_model=folder / base)
    tokenizer = load_base_tokenizer(None, None, {}, args.base_model, args.tokenizer_path, args.template)
    return made_with(args, folder / "adapter", None, tokenizer, folder / "in.txt", labels=["人名"])


def write(path, facts, rows, resume=False, total=3):
    with row_file(path, facts, total, resume) as file:
        for row in rows:
            file.write(row)
        return file.first


def test_a_file_goes_on_behind_its_last_whole_row(tmp_path, facts):
    path = tmp_path / "out" / "rows.jsonl"
    assert write(path, facts, [{"n": 1}, {"n": 2}], resume=True) == 0  # nothing to go on with is no error
    with path.open("ab") as file:
        file.write(b'{"n": "\xe4')
    assert write(path, facts, [{"n": 3}], resume=True) == 2
    assert path.read_text() == '{"n": 1}\n{"n": 2}\n{"n": 3}\n'
    with pytest.raises(UserError, match="holds 3 rows, the input 2"):
        write(path, facts, [], resume=True, total=2)
    assert write(path, facts, [{"n": 9}]) == 0 and path.read_text() == '{"n": 9}\n'
    assert sorted(p.name for p in path.parent.iterdir()) == ["rows.jsonl", "rows.jsonl.run.json"]


@pytest.mark.parametrize("key", ["adapter", "base", "tokenizer", "input", "max_new_tokens", "template"])
def test_another_run_is_refused_with_both_values(tmp_path, facts, key, tokenizer_models):
    path = tmp_path / "rows.jsonl"
    write(path, facts, [{"n": 1}])
    if key == "input":
        (tmp_path / "in.txt").write_text("一\n四\n三\n", encoding="utf-8")
    elif key == "tokenizer":
        shutil.copyfile(tokenizer_models / "merged.model", tmp_path / "base" / "tokenizer.model")
    elif key in ("adapter", "base"):
        with next((tmp_path / key).glob("*.safetensors")).open("r+b") as file:
            file.seek(2_999_000)
            file.write(b"y")
    named = f"{key}_sha256" if f"{key}_sha256" in facts else key
    now = facts_of(tmp_path) if named != key else {**facts, key: "other"}
    with pytest.raises(UserError) as error:
        write(path, now, [{"n": 2}], resume=True)
    assert all(str(value[named])[:12] in str(error.value) for value in (facts, now)), error.value
    assert re.search(rf"were made with {key} .*, this run has {key} ", str(error.value))
    assert path.read_text() == '{"n": 1}\n'


def test_the_same_files_elsewhere_are_the_same(tmp_path, facts):
    path = tmp_path / "rows.jsonl"
    write(path, facts, [{"n": 1}])
    (tmp_path / "base").rename(tmp_path / "moved")
    now = facts_of(tmp_path, "moved")
    assert write(path, now, [], resume=True) == 1
    (tmp_path / "rows.jsonl.run.json").unlink()
    with pytest.raises(UserError, match="rows.jsonl.run.json beside it, .* is missing"):
        write(path, now, [], resume=True)


def test_what_ends_early_says_how_to_go_on(tmp_path, facts, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["predict.py", "--input_path=a b", "--resume", "--local_rank=0"])
    path = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt), row_file(path, facts, 3, False) as file:
        file.write({"n": 1})
        assert json.loads(path.read_text()) == {"n": 1}  # on disk at once
        raise KeyboardInterrupt
    assert f"{path} 里有 1 条，接着做: python predict.py '--input_path=a b' --resume" in capsys.readouterr().err


def test_what_ends_before_its_first_row_has_lost_nothing(tmp_path, facts, capsys):
    """As where the first step finds NaN in a base, or Ctrl-C comes while the weights load."""
    path, metrics = tmp_path / "rows.jsonl", tmp_path / "metrics.json"
    write(path, facts, [{"n": 1}])
    metrics.write_text("{}")
    note = path.with_name("rows.jsonl.run.json").read_bytes()
    with pytest.raises(UserError, match="NaN"), row_file(path, {**facts, "x": 1}, 3, False, outdated=[metrics]):
        raise UserError("the model computes NaN")
    assert path.read_text() == '{"n": 1}\n' and path.with_name("rows.jsonl.run.json").read_bytes() == note
    assert metrics.exists() and "--resume" not in capsys.readouterr().err
    with row_file(path, facts, 3, False, outdated=[metrics]) as file:
        file.write({"n": 2})
        assert not metrics.exists()
    assert path.read_text() == '{"n": 2}\n'


def test_a_full_disk_is_named(tmp_path, facts, request):
    """No file may be larger than 3000 bytes; what could not be written is written once more where the file is closed."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    with pytest.raises(OSError) as error, row_file(tmp_path / "rows.jsonl", facts, 3, False) as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        file.write({"n": "1"})
        file.write({"n": "2" * 4000})
    assert error.value.filename == str(tmp_path / "rows.jsonl") and error.value.errno in FULL


def test_where_there_is_no_room_for_a_run_the_rows_before_stay(tmp_path, facts):
    path, metrics = tmp_path / "rows.jsonl", tmp_path / "metrics.json"
    write(path, facts, [{"n": 1}])
    metrics.write_text("{}")
    path.with_name("rows.jsonl.run.json.new").symlink_to("/dev/full")
    with pytest.raises(OSError) as error, row_file(path, facts, 3, False, outdated=[metrics]) as file:
        file.write({"n": 2})
    assert error.value.filename == str(path) + ".run.json"
    assert path.read_text() == '{"n": 1}\n' and metrics.exists()

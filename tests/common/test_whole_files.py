"""Results on a full disk, which /dev/full stands for.     python -m pytest tests/common/test_whole_files.py"""

import errno
import os
import shutil
from types import SimpleNamespace

import pytest

from alpaca.answering.row_file import rewrite
from alpaca.common.errors import UserError
from alpaca.common.locks import locked
from alpaca.common.whole_files import written_whole
from alpaca.corpora import export
from alpaca.models.tokenizer import save_tokenizer
from alpaca.scoring.calibration import CALIBRATION, Calibration, rate_confidence, write_calibration
from alpaca.scoring.metrics import score
from alpaca.scoring.report import write_report
from config_utils import run_script
from process import write_examples

ROW = {"text": "北京", "answer": "没有", "prediction": "没有", "entities": [], "gold": []}


def write_export(path, tool):
    (path.parent / "predictions.jsonl").write_text('{"text": "京", "entities": []}\n', encoding="utf-8")
    export.export_predictions(tool, path.parent / "predictions.jsonl", {"LOC": "地名"})


def write_copy(path):
    path.with_name("source").write_text("a")
    with written_whole(path) as new:
        shutil.copyfile(path.with_name("source"), new)


WRITERS = {
    "dev.txt": lambda path: write_examples({path.with_name("train.txt"): [ROW], path: [ROW]}),
    "rows.jsonl": lambda path: rewrite(path, [ROW]),
    "report.html": lambda path: write_report(path, [ROW], score([ROW], ["地名"]), rate_confidence([ROW]), "", ""),
    CALIBRATION: lambda path: write_calibration(path.parent, Calibration(1.0, 0.0), "a1", [ROW]),
    "predictions.doccano.jsonl": lambda path: write_export(path, "doccano"),
    "predictions.labelstudio.json": lambda path: write_export(path, "labelstudio"),
    "copy": write_copy,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_named_and_loses_nothing(tmp_path, capsys, name):
    path = tmp_path / name
    if "predictions" not in name:  # no export is written over
        path.write_text("of before")
    path.with_name(f"{name}.new").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match="2"):
        run_script(lambda args: WRITERS[name](path), {"text": "a"}, __file__, [])
    line = f"error: {path}: No space left on device; free some space there and run it again\n"
    assert capsys.readouterr().err == line
    assert "predictions" in name or path.read_text() == "of before"
    assert {file.name for file in tmp_path.iterdir()} <= {name, "source", "predictions.jsonl"}


def test_a_tokenizer_meets_a_full_disk(tmp_path, tokenizer_models):
    """A tokenizer_config.json that ends early would be no JSON."""
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json.new").symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        save_tokenizer(tokenizer_models / "base.model", tmp_path)
    assert error.value.filename == str(tmp_path / "tokenizer_config.json")
    assert (tmp_path / "tokenizer_config.json").read_text() == "{}"


def test_a_folder_goes_where_it_cannot_be_finished(tmp_path):
    def fill(new):
        new.mkdir()
        (new / "0001.txt").symlink_to("/dev/full")
        (new / "0001.txt").write_text("a")

    (tmp_path / "a.new").mkdir()  # of an export that was killed
    with pytest.raises(OSError) as error, written_whole(tmp_path / "a", folder=True) as new:
        fill(new)
    assert error.value.filename == str(tmp_path / "a") and not [*tmp_path.iterdir()]


def test_what_a_link_points_to_is_replaced(tmp_path):
    (tmp_path / "link").symlink_to("file")
    with written_whole(tmp_path / "link") as new:
        new.write_text("a")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "a"


def test_a_lock_that_has_no_room(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("alpaca.common.locks.os", SimpleNamespace(**{**vars(os), "write": full}))
    with pytest.raises(UserError, match="out.lock: cannot be made .No space left on device.; free some space"):
        with locked(tmp_path / "out"):
            pass
    assert not [*tmp_path.iterdir()]

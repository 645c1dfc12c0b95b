"""predict.py and test.py as several processes.     python -m pytest tests/answering/test_several_processes.py"""

import json
import shutil

import pytest

from harness import ROOT, make_records, run_ranks, run_script, write_jsonl

pytestmark = pytest.mark.slow
CPU = {"CUDA_VISIBLE_DEVICES": ""}  # there the rows are equal to the last digit
TEXTS = 60


@pytest.fixture(scope="module")
def work(tmp_path_factory, base_dir):
    """(folder, options of predict.py without the output, the rows that one process writes)."""
    folder = tmp_path_factory.mktemp("processes")
    texts = [record["text"] for record in make_records(TEXTS, 9)]
    texts[3], texts[5], texts[40] = "", "王明去年在北京说。" * 120, "王明"  # blank, cut into windows, short
    write_jsonl(folder / "texts.jsonl", [{"id": i, "text": text} for i, text in enumerate(texts)])
    options = ["--lora_model=none", f"--base_model={base_dir}", f"--input_path={folder}/texts.jsonl"]
    options += ["--precision=fp32", "--max_new_tokens=12", "--batch_size=4", "--constrained=True"]
    run_script("predict.py", *options, f"--output_path={folder}/one.jsonl", cwd=folder, env=CPU)
    rows = (folder / "one.jsonl").read_bytes()
    assert [json.loads(line)["id"] for line in rows.splitlines()] == list(range(TEXTS))
    return folder, options, rows


def test_two_processes_write_the_file_of_one(work):
    folder, options, rows = work
    output = folder / "two.jsonl"
    launcher = [shutil.which("torchrun"), "--standalone", "--nproc_per_node=2"]
    run_script("predict.py", *options, f"--output_path={output}", cwd=folder, launcher=launcher, env=CPU)
    assert output.read_bytes() == rows


def test_a_killed_rank_loses_no_row(work):
    """Rank 1 near the beginning, rank 0 in the middle and near the end; then 1, 2 and 3 processes go on."""
    folder, options, rows = work
    output = folder / "killed.jsonl"
    kills = [(2, 1, 1, []), (3, 0, 25, ["--resume"]), (1, 0, 45, ["--resume"])]
    runs = [{"count": count, "kill": {"rank": rank, "rows": at}, "more": more} for count, rank, at, more in kills]
    runs += [{"count": 2, "kill": None, "more": ["--resume"]}]
    ended, log = run_ranks("predict.py", options, output, runs, folder)
    for run, was in zip(runs[:-1], ended, strict=False):
        assert was["codes"][run["kill"]["rank"]] == -9 and run["kill"]["rows"] <= was["rows"] < TEXTS
        assert run["kill"]["rank"] == 0 or was["codes"][0]  # others may have ended before, with nothing left to take
    assert ended[-1]["codes"] == [0, 0] and output.read_bytes() == rows, log[-3000:]
    assert "Traceback" not in log and f"{output} 里有 " in log  # rank 0 was told to end, and said how to go on


def test_one_dying_process_ends_the_run_with_its_message(work):
    folder, options, _ = work
    script = folder / "dying.py"
    script.write_text(
        f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import alpaca.answering.texts as texts
def row_of_text(*args):
    if os.environ["RANK"] == "1":
        raise RuntimeError("what process 1 died of")
    return earlier(*args)
earlier, texts.row_of_text = texts.row_of_text, row_of_text
runpy.run_path({str(ROOT / "predict.py")!r}, run_name="__main__")
""",
        encoding="utf-8",
    )
    run = {"count": 2, "kill": None, "more": ["--local_rank=1"]}  # which the deepspeed launcher gives
    (ended,), log = run_ranks(script, options, folder / "dying.jsonl", [run], folder)
    assert ended["codes"][0] and ended["codes"][1] == 1 and "what process 1 died of" in log

"""What the audit of instruct data finds, and that it comes before the weights.     python -m pytest tests/training/test_audit.py"""

import io
import json
import re
import shutil
import time

import pytest

from alpaca.common.errors import UserError
from alpaca.models.templates import encode_prompts, message_of
from alpaca.models.tokenizer import load_tokenizer
from alpaca.training.audit import audit, describe_lengths
from harness import make_records, run_script, write_jsonl


def record(text, answer, instruct="找出文本里的人名、地名"):
    return {"instruct": instruct, "query": f"文本：{text}", "answer": answer}


@pytest.fixture
def report(tmp_path, base_dir):
    """audit() of two lists of records -> its lines."""

    def run(train, dev, max_seq_length=512):
        paths = [write_jsonl(tmp_path / f"{name}.txt", rows) for name, rows in (("train", train), ("dev", dev))]
        out = io.StringIO()
        audit(paths, load_tokenizer(base_dir), max_seq_length, out=out)
        return out.getvalue().replace(f"{tmp_path}/", "").splitlines()

    return run


CLEAN = [record("王明在北京。", "王明_人名\n北京_地名"), record("新闻。", "没有")]


def test_clean_data_has_no_warning(report):
    lines = report(CLEAN, [record("李华。", "李华_人名")])
    assert [line.strip() for line in lines if "警告" in line or "错误" in line] == []
    assert lines[0] == "数据检查 train.txt: 2 条" and lines[3] == "数据检查 dev.txt: 1 条"
    assert lines[1] == "  没有 1（50.0%）；实体 2：人名 1（50.0%），地名 1（50.0%）"


@pytest.mark.parametrize(
    "train, dev, warning, place",
    [
        ([record("上海。", " ")], [], "空答案: 1 条", "train.txt:3: 上海。"),
        ([CLEAN[0]], [], "重复的样本: 1 条", "train.txt:3: 同第 1 行: 王明在北京。"),
        ([record("新闻。", "新闻_人名")], [], "提示词相同而答案不同: 1 条", "train.txt:3: 同第 2 行: 新闻。"),
        ([], [CLEAN[0]], "文本在训练集中也有: 1 条", "dev.txt:2: 王明在北京。"),
        ([record("上海。", "上海")], [], "答案里不是 实体_类型 的行: 1 条", "train.txt:3: 上海"),
        ([record("上海。", "上海_地点")], [], "指令没有写出、或训练集没有的类型: 1 条", "train.txt:3: 上海_地点"),
        ([], [record("中国。", "中国_国名", "国名")], "指令没有写出、或训练集没有的类型: 1 条", "dev.txt:2: 中国_国名"),
        ([record("上海。", "长沙_地名")], [], "文本里没有的实体: 1 条", "train.txt:3: 长沙_地名"),
    ],
)
def test_each_warning(report, train, dev, warning, place):
    lines = report([*CLEAN, *train], [record("李华。", "李华_人名"), *dev])
    assert [line for line in lines if "警告" in line] == [f"  警告 {warning}"]
    assert f"    {place}" in lines


def test_another_instruction_asks_something_else_and_need_not_list_types(report):
    rows = [
        record("王明在北京。", answer, f"找出{what}") for what, answer in (("谁", "王明_人名"), ("哪里", "北京_地名"))
    ]
    assert not [line for line in report(rows, [record("李华。", "李华_人名", "找出谁")]) if "警告" in line]


def test_warnings_show_three_places_and_count_the_rest(report):
    lines = report([record(f"新闻{i}。", "") for i in range(7)] + CLEAN * 4, CLEAN[:0] + [record("李。", "没有")])
    start = lines.index("  警告 空答案: 7 条")
    assert [line.split(": ")[0].strip() for line in lines[start + 1 : start + 4]] == [
        "train.txt:1",
        "train.txt:2",
        "train.txt:3",
    ]
    assert "train.txt:4" not in "".join(lines)


def test_answers_of_another_task_are_not_taken_for_entities(report):
    rows = [record(f"新闻{i}。", f"这是第{i}条新闻") for i in range(3)]
    lines = report(rows, [record("李华。", "好的")])
    assert not [line for line in lines if "警告" in line]
    assert lines[1] == "  答案大多不是 实体_类型，不检查实体"


def test_rehearsal_is_not_taken_for_entities(report):
    """Its types and lines would be warnings, and its types known ones in dev."""
    own = [{**row, "entities": []} for row in CLEAN]
    others = [record("三月五日下雨", "三月五日_日期\n下雨", "找日期"), record("晴", "天", "说")]
    lines = report(own + others, [{**record("李华。", "李华_人名"), "text": "李华。"}])
    assert not [line for line in lines if "警告" in line]
    rest = "；另有 2 条别的任务，不检查实体"
    assert lines[1] == "  没有 1（50.0%）；实体 2：人名 1（50.0%），地名 1（50.0%）" + rest
    lines = report(
        own + others + others[:1] + [record("雨", "", "说")], [{**record("三月", "三月_日期"), "entities": []}]
    )
    warnings = ["空答案: 1 条", "重复的样本: 1 条", "指令没有写出、或训练集没有的类型: 1 条"]
    assert [line for line in lines if "警告" in line] == [f"  警告 {warning}" for warning in warnings]


def test_lengths_against_counting_by_hand(report, base_dir):
    rows = make_records(500, 3)
    tokenizer = load_tokenizer(base_dir)
    lengths = sorted(
        len(encode_prompts(tokenizer, [message_of(r["instruct"], r["query"])])[0][1:])
        + len(tokenizer.encode_texts([r["answer"]])[0])
        + 2
        for r in rows
    )
    limit = lengths[400]
    line = next(line for line in report(rows, CLEAN, limit) if "token" in line)
    form = (
        r"  token 数 p50 (\d+)，p90 (\d+)，p99 (\d+)，最长 (\d+)；max_seq_length=\d+ 去掉 (\d+) 条，保留 99.9% 要 (\d+)"
    )
    p50, p90, p99, longest, dropped, kept = map(int, re.fullmatch(form, line).groups())
    assert (p50, p90, p99, longest) == (lengths[249], lengths[449], lengths[494], lengths[-1])
    assert dropped == sum(n > limit for n in lengths) > 0
    assert sum(n <= kept for n in lengths) >= 0.999 * 500 > sum(n < kept for n in lengths)
    line = describe_lengths([*range(1, 1001)], 900)
    assert [int(n) for n in re.fullmatch(form, line).groups()] == [500, 900, 990, 1000, 100, 999]


def test_malformed_lines_are_all_counted_and_three_are_shown(tmp_path, base_dir):
    good = json.dumps(CLEAN[0], ensure_ascii=False).encode()
    bad = [b"{", b"[1]", b'{"instruct": "a"}', b"\xff\xfe", b'{"instruct": 1, "query": "", "answer": ""}']
    (tmp_path / "train.txt").write_bytes(b"\n".join([good, *bad, good]))
    write_jsonl(tmp_path / "dev.txt", CLEAN)
    out = io.StringIO()
    with pytest.raises(UserError, match=r"train.txt:2: not valid JSON .*\(malformed lines in all: 5\)"):
        audit((tmp_path / "train.txt", tmp_path / "dev.txt"), load_tokenizer(base_dir), 512, out=out)
    lines = out.getvalue().splitlines()
    assert "  错误 5 行不能用:" in lines and "train.txt: 2 条" in lines[0]
    start = lines.index("  错误 5 行不能用:")
    shown = [re.search(r"train.txt:(\d)", line)[1] for line in lines[start + 1 : start + 4]]
    assert shown == ["2", "3", "4"] and not lines[start + 4].startswith("    ")


@pytest.mark.parametrize("trainer", ["train_deepspeed.py", "train_trainer.py"])
def test_trainers_audit_before_any_weight_loads(tmp_path, base_dir, trainer):
    """The model cannot be loaded, though its tensors have names, and it is the data that is complained of."""
    shutil.copytree(base_dir, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "hidden_size": 31}), encoding="utf-8")
    write_jsonl(tmp_path / "train.txt", [*CLEAN, record("上海。", "长沙_地名")])
    (tmp_path / "dev.txt").write_text("{}\n[]\n", encoding="utf-8")
    options = ["--model_dir=model", "--train_path=train.txt", "--dev_path=dev.txt", "--save_dir=run"]
    result = run_script(trainer, *options, cwd=tmp_path, check=False)
    assert result.returncode == 2 and "error: dev.txt:1: no column 'instruct'" in result.stderr, result.stderr
    assert "警告 文本里没有的实体: 1 条" in result.stderr and "数据检查 dev.txt" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


def test_audit_alone_writes_nothing(tmp_path, base_dir):
    folder = tmp_path / "data" / "mine" / "instruct_data"
    folder.mkdir(parents=True)
    for name in ("train", "dev"):
        write_jsonl(folder / f"{name}.txt", CLEAN)
    options = ["--audit_only=True", "--data_name=mine", f"--model_dir={base_dir}"]
    result = run_script("process.py", *options, cwd=tmp_path)
    assert "数据检查" in result.stdout and "文本在训练集中也有: 2 条" in result.stdout
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["dev.txt", "train.txt"]


@pytest.mark.slow
def test_43000_rows_take_less_than_15_seconds(tmp_path, base_dir):
    rows = make_records(1000, 5)
    train, dev = write_jsonl(tmp_path / "train.txt", rows * 43), write_jsonl(tmp_path / "dev.txt", rows[:100])
    start = time.process_time()  # of all threads, so that others on the machine do not count
    audit((train, dev), load_tokenizer(base_dir), 512, out=io.StringIO())
    assert time.process_time() - start < 15

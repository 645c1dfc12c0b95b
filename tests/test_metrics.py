"""python -m pytest tests/test_metrics.py: scores of rows counted by hand."""

import json
import unicodedata

import pytest

from metrics import errors, score, table

LABELS = ["人名", "地名", "机构名"]


def entity(name, kind, *spans):
    return {"entity": name, "type": kind, "spans": [list(span) for span in spans]}


def row(text, predicted, gold, **problems):
    made = {"text": text, "answer": "", "prediction": "", "entities": predicted, "gold": gold}
    return {**made, "problems": problems} if problems else made


ROWS = [
    # right: 1 string, 2 spans
    row("北京人爱北京", [entity("北京", "地名", (0, 2), (4, 6))], [entity("北京", "地名", (0, 2), (4, 6))]),
    # 李四 is given the wrong type, 上海 is missed
    row(
        "李四去上海", [entity("李四", "地名", (0, 2))], [entity("李四", "人名", (0, 2)), entity("上海", "地名", (3, 5))]
    ),
    # 王五 is not in the text, 时间 is no known type; the gold marks only the second 中
    row(
        "中国和中国",
        [entity("王五", "人名"), entity("中国", "地名", (0, 2), (3, 5)), entity("和", "时间", (2, 3))],
        [entity("中国", "地名", (3, 5))],
        not_in_text=1,
        unknown_type=1,
    ),
    # never parsed
    {
        "text": "x公司",
        "answer": "x公司_机构名",
        "prediction": None,
        "entities": [],
        "gold": [entity("x公司", "机构名", (0, 3))],
    },
    # nothing to find, a line that is no answer
    row("今天晴", [], [], malformed=2),
]


def rates(hits, predicted, gold):
    precision, recall = hits / predicted if predicted else 0.0, hits / gold if gold else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"precision": precision, "recall": recall, "f1": pytest.approx(f1), "support": gold}


def test_string_view():
    assert score(ROWS, LABELS)["string"] == {
        "micro": rates(2, 5, 5),
        "人名": rates(0, 1, 1),
        "地名": rates(2, 3, 3),
        "机构名": rates(0, 0, 1),
    }


def test_span_view():
    assert score(ROWS, LABELS)["span"] == {
        "micro": rates(3, 7, 6),
        "人名": rates(0, 1, 1),
        "地名": rates(3, 5, 4),
        "机构名": rates(0, 0, 1),
    }


def test_counts():
    metrics = score(ROWS, LABELS)
    assert {name: metrics[name] for name in ("malformed", "unknown_type", "not_in_text", "examples")} == {
        "malformed": 2,
        "unknown_type": 1,
        "not_in_text": 1,
        "examples": 5,
    }
    assert list(metrics) == ["string", "span", "malformed", "unknown_type", "not_in_text", "examples"]


def test_rows_survive_json():
    rows = [json.loads(json.dumps(row)) for row in ROWS]
    assert score(iter(rows), LABELS) == score(ROWS, LABELS)


def test_nothing_is_zero():
    zero = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert score([], ["人名"])["string"] == {"micro": zero, "人名": zero}


def test_perfect_and_wrong():
    gold = [entity("北京", "地名", (0, 2))]
    assert score([row("北京", gold, gold)], LABELS)["span"]["micro"] == rates(1, 1, 1)
    wrong = [entity("北", "地名", (0, 1))]
    assert score([row("北京", wrong, gold)], LABELS)["string"]["micro"] == rates(0, 1, 1)


def test_types_of_gold_alone_follow_the_labels():
    rows = [row("甲乙", [], [entity("甲", "时间", (0, 1)), entity("乙", "人名", (1, 2))])]
    assert list(score(rows, ["地名", "人名"])["span"]) == ["micro", "地名", "人名", "时间"]


def test_entity_inside_a_longer_one_is_no_false_span():
    """北京 occurs, but only inside 北京大学, which is named too: no span, and not outside the text either."""
    predicted = [entity("北京大学", "机构名", (0, 4)), entity("北京", "地名")]
    metrics = score([row("北京大学", predicted, [entity("北京大学", "机构名", (0, 4))])], LABELS)
    assert metrics["span"]["micro"] == rates(1, 1, 1)
    assert metrics["string"]["micro"] == rates(1, 2, 1)


def columns(line):
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in line)


def test_table():
    lines = table(score(ROWS, LABELS)).splitlines()
    assert [line.split() for line in lines] == [
        ["按实体", "按位置"],
        ["类型", "P", "R", "F1", "支持数", "P", "R", "F1", "支持数"],
        ["人名", "0.00", "0.00", "0.00", "1", "0.00", "0.00", "0.00", "1"],
        ["地名", "66.67", "66.67", "66.67", "3", "60.00", "75.00", "66.67", "4"],
        ["机构名", "0.00", "0.00", "0.00", "1", "0.00", "0.00", "0.00", "1"],
        ["总计", "40.00", "40.00", "40.00", "5", "42.86", "50.00", "46.15", "6"],
        ["句子数", "5，格式错误", "2，未知类型", "1，不在原文", "1"],
    ]
    assert len({columns(line) for line in lines[1:6]}) == 1


def test_table_names_the_score_of_perfect_answers():
    perfect = score([row(r["text"], r["gold"], r["gold"]) for r in ROWS], LABELS)
    assert "标准答案自身的得分：按实体 F1 100.00%，按位置 F1 100.00%" in table(score(ROWS, LABELS), perfect)


def test_errors():
    worst = errors(ROWS, 2)
    assert worst == [
        {"text": "李四去上海", "missed": [["上海", "地名"], ["李四", "人名"]], "spurious": [["李四", "地名"]]},
        {"text": "中国和中国", "missed": [], "spurious": [["和", "时间"], ["王五", "人名"]]},
    ]
    assert [error["text"] for error in errors(ROWS, 9)] == ["李四去上海", "中国和中国", "x公司"]

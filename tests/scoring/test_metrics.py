"""python -m pytest tests/scoring/test_metrics.py: scores of rows counted by hand, and the report that shows them."""

import json
import math
import random
import re
import unicodedata
from html.parser import HTMLParser

import pytest

from alpaca.scoring.calibration import Bin, Rated, rate_confidence
from alpaca.scoring.errors import confusion, errors, precision_recall, suspects
from alpaca.scoring.metrics import PROBLEMS, Span, exact, score, score_table
from alpaca.scoring.report import marked_pieces, times_text, write_report

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


def view(metrics, name):
    """A view without the interval, which has a test of its own."""
    micro = {key: value for key, value in metrics[name]["micro"].items() if key != "f1_interval"}
    return {**metrics[name], "micro": micro}


def test_string_view():
    assert view(score(ROWS, LABELS), "string") == {
        "micro": rates(2, 5, 5),
        "人名": rates(0, 1, 1),
        "地名": rates(2, 3, 3),
        "机构名": rates(0, 0, 1),
    }


def test_span_view():
    assert view(score(ROWS, LABELS), "span") == {
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
    assert list(metrics) == ["string", "span", *PROBLEMS, "examples"]


def test_rows_survive_json():
    rows = [json.loads(json.dumps(row)) for row in ROWS]
    assert score(iter(rows), LABELS) == score(ROWS, LABELS)


def test_nothing_is_zero():
    zero = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert score([], ["人名"])["string"] == {"micro": {**zero, "f1_interval": [0.0, 0.0]}, "人名": zero}


def test_perfect_and_wrong():
    gold = [entity("北京", "地名", (0, 2))]
    assert view(score([row("北京", gold, gold)], LABELS), "span")["micro"] == rates(1, 1, 1)
    wrong = [entity("北", "地名", (0, 1))]
    assert view(score([row("北京", wrong, gold)], LABELS), "string")["micro"] == rates(0, 1, 1)


def test_types_of_gold_alone_follow_the_labels():
    rows = [row("甲乙", [], [entity("甲", "时间", (0, 1)), entity("乙", "人名", (1, 2))])]
    assert list(score(rows, ["地名", "人名"])["span"]) == ["micro", "地名", "人名", "时间"]


def test_a_type_does_not_take_the_place_of_the_total():
    rows = [row("甲乙", [], [entity("甲", "micro", (0, 1)), entity("乙", "人名", (1, 2))])]
    assert view(score(rows, ["人名"]), "span") == {"micro": rates(0, 0, 2), "人名": rates(0, 0, 1)}
    assert "总计" in score_table(score(rows, ["人名"]))


def test_entity_inside_a_longer_one_is_no_false_span():
    """北京 occurs, but only inside 北京大学, which is named too: no span, and not outside the text either."""
    predicted = [entity("北京大学", "机构名", (0, 4)), entity("北京", "地名")]
    metrics = score([row("北京大学", predicted, [entity("北京大学", "机构名", (0, 4))])], LABELS)
    assert view(metrics, "span")["micro"] == rates(1, 1, 1)
    assert view(metrics, "string")["micro"] == rates(1, 2, 1)


def columns(line):
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in line)


def test_table():
    metrics = score(ROWS, LABELS)
    lines = score_table(metrics).splitlines()
    intervals = [metrics[name]["micro"]["f1_interval"] for name in ("string", "span")]
    bounds = [f"{100 * low:.2f}–{100 * high:.2f}" for low, high in intervals]
    assert [line.split() for line in lines] == [
        ["按实体", "按位置"],
        ["类型", "P", "R", "F1", "支持数", "P", "R", "F1", "支持数"],
        ["人名", "0.00", "0.00", "0.00", "1", "0.00", "0.00", "0.00", "1"],
        ["地名", "66.67", "66.67", "66.67", "3", "60.00", "75.00", "66.67", "4"],
        ["机构名", "0.00", "0.00", "0.00", "1", "0.00", "0.00", "0.00", "1"],
        ["总计", "40.00", "40.00", "40.00", "5", "42.86", "50.00", "46.15", "6"],
        [
            "总计",
            "F1",
            "的",
            "95%",
            "区间：按实体",
            bounds[0] + "，按位置",
            bounds[1] + "（对句子重采样",
            "1000",
            "次）",
        ],
        ["句子数", "5，格式错误", "2，未知类型", "1，不在原文", "1，重复", "0，放弃", "0，截断", "0"],
    ]
    assert len({columns(line) for line in lines[1:6]}) == 1


def test_table_names_the_score_of_perfect_answers():
    perfect = score([row(r["text"], r["gold"], r["gold"]) for r in ROWS], LABELS)
    assert "标准答案自身的得分：按实体 F1 100.00%，按位置 F1 100.00%" in score_table(score(ROWS, LABELS), perfect)


def test_interval():
    """Sentences that are all alike leave nothing open; else F1 lies inside, and more sentences make it narrower."""
    gold = [entity("北京", "地名", (0, 2))]
    right, wrong = row("北京", gold, gold), row("北京", [], gold)
    assert score([right] * 9, LABELS)["span"]["micro"]["f1_interval"] == [1.0, 1.0]
    widths = []
    for count in (10, 100):
        micro = score([right, right, wrong] * count, LABELS)["string"]["micro"]
        low, high = micro["f1_interval"]
        assert low < micro["f1"] < high and micro["f1"] == pytest.approx(0.8)
        widths.append(high - low)
    # F1 = 2 h / (1 + h) of a share h of right sentences with standard deviation sqrt(2/9 / n), slope 2 / (1 + h)^2
    assert (
        widths[1] == pytest.approx(2 * 1.96 * (2 / 9 / 300) ** 0.5 * 2 / (5 / 3) ** 2, rel=0.1)
        and widths[1] < widths[0]
    )


def test_exact():
    """As a share, with the normal approximation of its interval."""
    rows = [{"prediction": "a", "answer": "a" if i % 4 else "a "} for i in range(400)]
    rows[0] = {"prediction": None, "answer": "a", "problems": {}}
    scores = exact(rows)
    low, high = scores["exact"].pop("interval")
    assert scores == {"exact": {"share": 0.75}, "cut": 0, "examples": 400}
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert abs(low - 0.75 + half) < 0.01 and abs(high - 0.75 - half) < 0.01


def test_against_seqeval():
    """The span view on 300 random rows without overlapping spans, of which the answers get some wrong."""
    seqeval = pytest.importorskip("seqeval.metrics")
    from seqeval.scheme import IOB2

    draw, rows, tags = random.Random(0), [], {"entities": [], "gold": []}
    for _ in range(300):
        size, spans = 30, {"gold": [], "entities": []}
        for begin in range(0, size, 5):
            if draw.random() < 0.5:
                span = (begin, begin + draw.randint(1, 5), draw.choice(LABELS))
                spans["gold"].append(span)
                other = (begin, begin + draw.randint(1, 5), draw.choice(LABELS))
                spans["entities"] += draw.choice([[span], [span], [other], []])
        # every character is another one, so that a string has one place
        text = "".join(chr(0x4E00 + i) for i in range(size))
        rows.append(
            row(text, *([entity(text[b:e], t, (b, e)) for b, e, t in spans[key]] for key in ("entities", "gold")))
        )
        for key, found in spans.items():
            line = ["O"] * size
            for begin, end, kind in found:
                line[begin:end] = [f"B-{kind}"] + [f"I-{kind}"] * (end - begin - 1)
            tags[key].append(line)
    report = seqeval.classification_report(tags["gold"], tags["entities"], output_dict=True, mode="strict", scheme=IOB2)
    ours = score(rows, LABELS)["span"]
    for name, theirs in (("micro", "micro avg"), *((label, label) for label in LABELS)):
        expected = {key: report[theirs][key] for key in ("precision", "recall", "support")}
        assert {key: ours[name][key] for key in expected} == pytest.approx(expected)
        assert ours[name]["f1"] == pytest.approx(report[theirs]["f1-score"])


def sure(entities, confidence=0.9):
    """log_probability: such that rating it raw finds the same."""
    return [{**item, "confidence": confidence, "log_probability": math.log(confidence)} for item in entities]


WRONG = [
    # right; a wrong type in the right place; missing
    {
        **row(
            "李四去上海和天津",
            sure([entity("李四", "人名", (0, 2)), entity("上海", "机构名", (3, 5))]),
            [entity("李四", "人名", (0, 2)), entity("上海", "地名", (3, 5)), entity("天津", "地名", (6, 8))],
        ),
        "log_probability": -0.5,
        "margin": -0.5,
    },
    # too long, with the wrong type too; what overlaps the same gold span a second time is spurious
    {
        **row(
            "在北京大学说",
            sure([entity("北京大学说", "地名", (1, 6)), entity("在北", "地名", (0, 2))], 0.2),
            [entity("北京大学", "机构名", (1, 5))],
        ),
        "log_probability": -3.0,
        "margin": 2.5,
    },
    # a line without a type, an entity that is not in the text
    {
        **row("天晴", sure([entity("王五", "人名")]), [], malformed=1, not_in_text=1),
        "prediction": "天晴\n王五_人名",
        "log_probability": -0.1,
    },
    # never answered
    {**row("长江", [], [entity("长江", "地名", (0, 2))]), "prediction": None},
]


def test_errors():
    assert errors(WRONG) == [
        ("type", 0, (3, 5, "机构名"), (3, 5, "地名")),
        ("missing", 0, None, (6, 8, "地名")),
        ("boundary", 1, (1, 6, "地名"), (1, 5, "机构名")),
        ("spurious", 1, (0, 2, "地名"), None),
        ("malformed", 2, "天晴", None),
        ("not_in_text", 2, "王五_人名", None),
        ("missing", 3, None, (0, 2, "地名")),
    ]


def test_confusion():
    assert confusion(WRONG) == {
        ("人名", "人名"): 1,
        ("地名", "机构名"): 1,
        ("地名", None): 2,
        ("机构名", None): 1,
        (None, "地名"): 2,
    }


def test_precision_recall():
    rows = [
        row("甲", sure([entity("甲", "人名", (0, 1))], 1.0), [entity("甲", "人名", (0, 1))]),
        row("乙", sure([entity("乙", "人名", (0, 1))], 0.5), []),
        row("丙", sure([entity("丙", "人名", (0, 1))], 0.5), [entity("丙", "人名", (0, 1))]),
        row("丁", [], [entity("丁", "人名", (0, 1))]),
    ]
    assert precision_recall(rows) == [(1.0, 1.0, 1 / 3), (0.5, 2 / 3, 2 / 3)]


def test_suspects():
    """Where the answer differs from gold, the largest margin to gold's own probability first, a sure 没有 behind others;
    not where nothing was answered, nor where gold's could not be computed. First what no answer can state."""
    gold = [entity("北京", "地名", (0, 2))]
    right = {**row("北京", sure(gold), gold), "log_probability": 0.0}
    surest = {**row("北京", [], gold), "log_probability": -0.001, "margin": 1.0}
    impossible = {**row("北京", [], gold), "log_probability": -2.0, "margin": None}
    unknown = {**row("北京", [], gold), "log_probability": -0.1}
    assert suspects([right, surest, unknown, impossible, *WRONG]) == [3, 5, 1, 4]


def test_report(tmp_path):
    more = {"log_probability": -0.01, "margin": 0.1}
    rows = [*WRONG, {**row("<b>&", sure([entity("<b>", "人名", (0, 3))]), []), **more}]
    rows += [{**row("海", sure([entity("海", "地名", (0, 1))]), []), **more}]
    write_report(tmp_path / "report.html", rows, score(rows, LABELS), rate_confidence(rows), "试 <1>", "a & b")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>试 &lt;1&gt;</title>" in page and "<b>" not in page and "http" not in page.replace("xmlns", "")
    for title, count in (("漏掉", 2), ("多报", 3), ("边界错", 1), ("类型错", 1), ("格式错误", 1), ("不在原文", 1)):
        assert f"<summary>{title} {count}</summary>" in page
    assert "<svg" in page and "4 句" in page and '<span class="predicted">&lt;b&gt;</span>&amp;' in page
    HTMLParser().feed(page)


def test_report_shows_white_space(tmp_path):
    text = "甲\n\n  乙\t丙    丁"
    rows = [{**row(text, [], [entity("丁", "人名", (12, 13))]), "log_probability": -0.1, "margin": 1.0}]
    write_report(tmp_path / "report.html", rows, score(rows, LABELS), rate_confidence(rows), "试", "")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.search(r"^li \{[^}]*white-space: pre-wrap", page, re.M)
    # what is shown of white space is the text's, and none of the page's own
    assert re.findall("<li>(.*?)<br>", page, re.S)[0] == text[:12] + '<span class="gold">丁</span>'


class Tables(HTMLParser):
    """The cells of every table of a page, line by line."""

    def __init__(self):
        super().__init__()
        self.tables, self.inside = [], False

    def handle_starttag(self, tag, attributes):
        self.inside = tag in ("td", "th")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif self.inside:
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.tables[-1][-1][-1] += data


def test_report_shows_the_figures(tmp_path):
    metrics = score(WRONG, LABELS)
    write_report(tmp_path / "report.html", WRONG, metrics, rate_confidence(WRONG), "试", "")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    parser = Tables()
    parser.feed(page)
    scores, curve, confidence, types = parser.tables
    assert scores == [
        ["", "按实体", "按位置"],
        ["类型", *["P", "R", "F1", "支持数"] * 2],
        ["人名", "50.00", "100.00", "66.67", "1", "50.00", "100.00", "66.67", "1"],
        ["地名", "0.00", "0.00", "0.00", "3", "0.00", "0.00", "0.00", "3"],
        ["机构名", "0.00", "0.00", "0.00", "1", "0.00", "0.00", "0.00", "1"],
        ["总计", "20.00", "20.00", "20.00", "5", "20.00", "20.00", "20.00", "5"],
    ]
    low, high = metrics["span"]["micro"]["f1_interval"]
    assert f"按位置 {100 * low:.2f}–{100 * high:.2f}。" in page and "句子 4，格式错误 1，" in page
    # of the two thresholds, three of five entities have the first
    assert [line[0] for line in curve[1:]] == ["0.9000", "0.9000", *["0.2000"] * 3]
    assert curve[1] == ["0.9000", "33.33", "20.00", "25.00"] and curve[-1] == ["0.2000", "20.00", "20.00", "20.00"]
    # of five entities one is right: 0.2 twice and 0.9 twice in vain, 0.9 once rightly, each in a group of its own
    loss = -(2 * math.log(0.8) + 2 * math.log(0.1) + math.log(0.9)) / 5
    assert "未校准" in page and confidence[1][1] == "0.460" and confidence[1][3] == f"{loss:.3f}"
    assert "5 个预测的实体" in page and "没有校准。" in page
    assert types == [
        ["标准 \\ 预测", "人名", "地名", "机构名", "（漏掉）"],
        ["人名", "1", "0", "0", "0"],
        ["地名", "0", "0", "1", "2"],
        ["机构名", "0", "0", "0", "1"],
        ["（多报）", "0", "2", "0", ""],
    ]
    assert "标准 上海（地名）；预测 上海（机构名），置信度 0.9000" in page
    assert "标准 北京大学_机构名；预测 北京大学说_地名、在北_地名；预测的概率是标准的 12.2 倍" in page
    found = [times_text(margin) for margin in (-0.5, 13.8, 13.9, None)]
    assert found[:2] == ["预测的概率是标准的 0.6 倍", "预测的概率是标准的 984,609.1 倍"]
    assert found[2].endswith("一百万倍以上") and "原文没有的实体" in found[3]


def test_report_shows_confidences_before_and_after(tmp_path):
    """Each figure in its place, and of each group a point: how sure, how often right."""
    before, after = (
        dict(zip(("error", "error_interval", "log_loss"), figures, strict=True))
        for figures in ((0.111, [0.101, 0.122], 0.444), (0.022, [0.011, 0.033], 0.333))
    )
    figures = after | {f"{name}_raw": value for name, value in before.items()} | {"n": 77}
    points = [Bin(0.25, 0.5, 7)], [Bin(0.5, 0.25, 7)]
    for own, said in ((True, "由另外九折数据得出"), (False, "来自 LoRA 自己的验证集，不是这份数据")):
        rated = Rated(figures, *points, own)
        write_report(tmp_path / "report.html", WRONG, score(WRONG, LABELS), rated, "试", "")
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        parser = Tables()
        parser.feed(page)
        cells = [[cell for cell in line if cell][-3:] for line in parser.tables[2][1:]]
        assert cells == [["0.111", "0.101–0.122", "0.444"], ["0.022", "0.011–0.033", "0.333"]]
        assert said in page and "77 个预测的实体" in page
        # the square begins at (40, 10) and is 320 wide
        lines = re.findall(r'<polyline points="(\S+)" fill="none" stroke="(#[0-9a-f]+)"', page)
        assert lines == [("120.0,170.0", "#d64530"), ("200.0,250.0", "#2667c9")]
        assert page.index("未校准</td>") < page.index("0.111") < page.index("校准后</td>") < page.index("0.022")


def test_report_without_entities(tmp_path):
    rows = [{**row("长江", [], [entity("长江", "地名", (0, 2))]), "log_probability": -0.1}]
    write_report(tmp_path / "report.html", rows, score(rows, LABELS), rate_confidence(rows), "试", "")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "没有预测出实体。" in page and "<svg" not in page


def test_marked_pieces():
    assert marked_pieces("甲乙丙丁", [Span(0, 2, "人名")], [Span(1, 3, "人名")]) == [
        ("甲", ["gold"]),
        ("乙", ["gold", "predicted"]),
        ("丙", ["predicted"]),
        ("丁", []),
    ]

"""Precision, recall and F1 of predicted entities.

Works on the rows of predictions.jsonl alone, so that all of it can be recomputed from the file:

    {"text", "answer", "prediction": raw string or None (counts as missed), "log_probability": of the whole answer,
     "entities": [{"entity", "type", "spans", "confidence"}], "gold": [{"entity", "type", "spans"}],
     "problems": {"malformed": n, …}}

Spans are [begin, end) in characters of text; "problems" holds only the counts (keys of PROBLEMS) that are not 0.
"""

import unicodedata
from collections import Counter

import numpy

PROBLEMS = {
    "malformed": "格式错误",
    "unknown_type": "未知类型",
    "not_in_text": "不在原文",
    "repeated": "重复",
    "abandoned": "放弃",
    "cut": "截断",
}
VIEWS = {"string": "按实体", "span": "按位置"}
RESAMPLES = 1000


def score(rows, labels):
    """Rows, names of the known types -> what metrics.json holds; fractions, 0 where nothing can be divided.

    "string" compares the sets of (entity, type) of a sentence, "span" every occurrence with its offsets. A predicted
    entity that does not occur in the text is one false positive in both. Types that neither `labels` nor gold knows
    are false positives of "micro" and get no entry of their own; nor does a type of that name, which dataset.labels_of
    refuses. "micro" has an "f1_interval", see `_interval`.
    """
    rows = list(rows)
    types = list(dict.fromkeys([*labels, *(entity["type"] for row in rows for entity in row.get("gold") or [])]))
    metrics = {"string": _view(rows, types, strings_of), "span": _view(rows, types, spans_of)}
    for name in PROBLEMS:
        metrics[name] = sum(row.get("problems", {}).get(name, 0) for row in rows)
    return {**metrics, "examples": len(rows)}


def strings_of(row, key):
    """{(entity, type)} of a row's "entities" or "gold"; the type comes last in the items of both views."""
    return {(entity["entity"], entity["type"]) for entity in row.get(key) or []}


def spans_of(row, key):
    """{(begin, end, type)}, and {(entity, type)} for a predicted entity that is not in the text."""
    entities = row.get(key) or []
    absent = [entity for entity in entities if key == "entities" and entity["entity"] not in row["text"]]
    items = {(*span, entity["type"]) for entity in entities for span in entity["spans"]}
    return items | {(entity["entity"], entity["type"]) for entity in absent}


def _view(rows, types, items):
    hits, predicted, gold, sentences = Counter(), Counter(), Counter(), []
    for row in rows:
        found, right = items(row, "entities"), items(row, "gold")
        hits.update(item[-1] for item in found & right)
        predicted.update(item[-1] for item in found)
        gold.update(item[-1] for item in right)
        sentences.append((len(found & right), len(found), len(right)))
    micro = _rates(hits.total(), predicted.total(), gold.total()) | {"f1_interval": _interval(sentences)}
    by_type = {name: _rates(hits[name], predicted[name], gold[name]) for name in types if name != "micro"}
    return {"micro": micro} | by_type


def _rates(hits, predicted, gold):
    precision, recall = hits / predicted if predicted else 0.0, hits / gold if gold else 0.0
    return {"precision": precision, "recall": recall, "f1": _f1(hits, predicted, gold), "support": gold}


def _f1(hits, predicted, gold):
    return 2 * hits / (predicted + gold) if predicted + gold else 0.0


def _interval(sentences):
    """95 % bootstrap interval of micro-F1, [low, high]: percentiles over RESAMPLES draws of as many sentences with
    replacement (Efron and Tibshirani 1993, chapter 13). sentences: (hits, predicted, gold) of each."""
    if not sentences:
        return [0.0, 0.0]
    counts, draw = numpy.array(sentences), numpy.random.default_rng(0)
    scores = [_f1(*counts[draw.integers(len(counts), size=len(counts))].sum(axis=0)) for _ in range(RESAMPLES)]
    return [float(bound) for bound in numpy.percentile(scores, [2.5, 97.5])]


def exact(rows):
    """Rows -> {"exact": {"share", "interval"}, "cut", "examples"}: how many answers are, to the character, the right one."""
    rows = list(rows)
    hits = [row["prediction"] == row["answer"] for row in rows]
    share = sum(hits) / len(hits) if hits else 0.0
    interval = _interval([(hit, 1, 1) for hit in hits])  # of one predicted and one right answer each, F1 is the share
    cut = sum(row.get("problems", {}).get("cut", 0) for row in rows)
    return {"exact": {"share": share, "interval": interval}, "cut": cut, "examples": len(rows)}


def table(metrics, perfect=None):
    """Metrics as an aligned table in Chinese, rates in percent.

    `perfect`: metrics of the gold answers themselves. They say what, why offsets must be guessed from strings for an
    answer without offsets, is the most that the span view can reach.
    """
    head = ["P", "R", "F1", "支持数"]
    lines = [["类型", *head, *head]]
    for name in [*(name for name in metrics["string"] if name != "micro"), "micro"]:
        cells = [cell for view in VIEWS for cell in _cells(metrics[view][name])]
        lines.append(["总计" if name == "micro" else name, *cells])
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    text = [_pad(line[0], widths[0]) + _right(line[1:], widths[1:]) for line in lines]
    half = _width(text[0]) - sum(widths[5:]) - 2 * len(head)
    text.insert(0, _pad(_pad("", widths[0] + 2) + VIEWS["string"], half + 2) + VIEWS["span"])
    bounds = [f"{title} {percents(metrics[view]['micro']['f1_interval'])}" for view, title in VIEWS.items()]
    text.append(f"总计 F1 的 95% 区间：{'，'.join(bounds)}（对句子重采样 {RESAMPLES} 次）")
    if perfect:
        rates = [f"{title} F1 {perfect[view]['micro']['f1']:.2%}" for view, title in VIEWS.items()]
        text.append(f"标准答案自身的得分：{'，'.join(rates)}")
    counts = [("句子数", metrics["examples"]), *((title, metrics[name]) for name, title in PROBLEMS.items())]
    return "\n".join([*text, "，".join(f"{title} {count}" for title, count in counts)])


def percents(bounds):
    """[low, high] as fractions -> text."""
    return "–".join(f"{100 * bound:.2f}" for bound in bounds)


def _cells(rates):
    return [f"{100 * rates[name]:.2f}" for name in ("precision", "recall", "f1")] + [str(rates["support"])]


def _right(cells, widths):
    return "".join(" " * (2 + width - _width(cell)) + cell for cell, width in zip(cells, widths, strict=True))


def _pad(text, width):
    return text + " " * (width - _width(text))


def _width(text):
    """Columns of a terminal: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)

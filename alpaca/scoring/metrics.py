"""Precision, recall and F1 of predicted entities.

Works on the rows of predictions.jsonl alone, so that all of it can be recomputed from the file:

    {"text", "answer", "prediction": raw string or None (counts as missed), "log_probability": of the whole answer,
     "entities": [{"entity", "type", "spans", "log_probability", "confidence"}], "calibrated": whether a calibration made
     the confidences, "gold": [{"entity", "type", "spans"}], "problems": {"malformed": n, …},
     "margin": log-probability of the prediction less that of the right answer, where the two differ; None: nothing can
     state that answer}

Spans are [begin, end) in characters of text; "problems" holds only the counts (keys of PROBLEMS) that are not 0.
"entities" is what the model said, "gold" what is right.
"""

import unicodedata
from collections import Counter
from typing import NamedTuple

import numpy

from dataset import locate, parse_answer

PROBLEMS = {
    "malformed": "格式错误",
    "unknown_type": "未知类型",
    "not_in_text": "不在原文",
    "repeated": "重复",
    "abandoned": "放弃",
    "cut": "截断",
}
VIEWS = {"string": "按实体", "span": "按位置"}
RESAMPLES = 1000  # of the sentences, for an interval


class Entity(NamedTuple):
    """What the string view counts: each once in a sentence, wherever it stands."""

    entity: str
    type: str


class Span(NamedTuple):
    """What the span view counts: one occurrence."""

    begin: int  # characters of the row's text, from 0
    end: int  # exclusive
    type: str


class Counts(NamedTuple):
    """Of one sentence, or of many."""

    hits: int  # predicted and right
    predicted: int
    gold: int


def score(rows, labels):
    """What metrics.json holds. rows: those of predictions.jsonl; labels: the names of the known types.

    "string" compares the sets of (entity, type) of a sentence, "span" every occurrence with its offsets; rates are
    fractions, 0 where nothing can be divided. A predicted entity that does not occur in the text is one false positive
    in both. A type that stands neither in `labels` nor in gold counts as false positives of "micro" and has no entry of
    its own. A type named "micro" has no entry either, since "micro" is the total (dataset.labels_of refuses such data).
    "micro" also has an "f1_interval", see `_interval`.
    """
    rows = list(rows)
    types = list(dict.fromkeys([*labels, *(entity["type"] for row in rows for entity in row.get("gold") or [])]))
    metrics = {"string": _view(rows, types, strings_of), "span": _view(rows, types, spans_of)}
    for name in PROBLEMS:
        metrics[name] = sum(row.get("problems", {}).get(name, 0) for row in rows)
    return {**metrics, "examples": len(rows)}


def strings_of(row, key):
    """The set of Entity of a row; key: "entities" or "gold"."""
    return {Entity(entity["entity"], entity["type"]) for entity in row.get(key) or []}


def spans_of(row, key):
    """The set of Span of a row, key: "entities" or "gold"; an Entity for each predicted one that is not in the text."""
    entities = row.get(key) or []
    spans = {Span(*span, entity["type"]) for entity in entities for span in entity["spans"]}
    if key == "entities":
        spans |= {item for item in strings_of(row, key) if item.entity not in row["text"]}
    return spans


def _view(rows, types, items_of):
    """The scores of one view. items_of: strings_of or spans_of."""
    hits, predicted, gold, sentences = Counter(), Counter(), Counter(), []
    for row in rows:
        found, right = items_of(row, "entities"), items_of(row, "gold")
        hits.update(item.type for item in found & right)
        predicted.update(item.type for item in found)
        gold.update(item.type for item in right)
        sentences.append(Counts(len(found & right), len(found), len(right)))
    total = Counts(hits.total(), predicted.total(), gold.total())
    micro = _rates(total) | {"f1_interval": _interval(sentences)}
    by_type = {name: _rates(Counts(hits[name], predicted[name], gold[name])) for name in types if name != "micro"}
    return {"micro": micro} | by_type


def _rates(counts):
    return {
        "precision": counts.hits / counts.predicted if counts.predicted else 0.0,
        "recall": counts.hits / counts.gold if counts.gold else 0.0,
        "f1": _f1(*counts),
        "support": counts.gold,
    }


def _f1(hits, predicted, gold):
    return 2 * hits / (predicted + gold) if predicted + gold else 0.0


def _interval(sentences):
    """95 % interval of micro-F1, [low, high]; sentences: the Counts of each.

    A percentile bootstrap (Efron and Tibshirani 1993, chapter 13): RESAMPLES times as many sentences are drawn, with
    replacement, as there are.
    """
    if not sentences:
        return [0.0, 0.0]
    counts, draw = numpy.array(sentences), numpy.random.default_rng(0)
    scores = [_f1(*counts[draw.integers(len(counts), size=len(counts))].sum(axis=0)) for _ in range(RESAMPLES)]
    return [float(bound) for bound in numpy.percentile(scores, [2.5, 97.5])]


def exact(rows):
    """How many answers are, to the character, the right one: {"exact": {"share", "interval"}, "cut", "examples"}."""
    rows = list(rows)
    hits = [row["prediction"] == row["answer"] for row in rows]
    share = sum(hits) / len(hits) if hits else 0.0
    interval = _interval([Counts(hit, 1, 1) for hit in hits])  # one answer predicted and one right: F1 is the share
    cut = sum(row.get("problems", {}).get("cut", 0) for row in rows)
    return {"exact": {"share": share, "interval": interval}, "cut": cut, "examples": len(rows)}


def as_answered_perfectly(rows, nested):
    """The rows as if each had been answered with gold. The answer format has no offsets, so even then spans can be wrong."""
    return [
        {**row, "entities": locate(row["text"], parse_answer(row["answer"]).entities, nested), "problems": {}}
        for row in rows
    ]


def score_table(metrics, perfect=None):
    """Metrics as an aligned table in Chinese, rates in percent.

    perfect: the metrics of the gold answers themselves. An answer has no offsets, they are found by searching the text
    for its strings; so even a perfect answer can have wrong spans, and `perfect` says how many the span view loses.
    """
    head = ["P", "R", "F1", "支持数"]
    lines = [["类型", *head, *head]]
    for name in types_and_total(metrics):
        cells = [cell for view in VIEWS for cell in rate_texts(metrics[view][name])]
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
    """Two fractions, [low, high], as text in percent."""
    return "–".join(f"{100 * bound:.2f}" for bound in bounds)


def types_and_total(metrics):
    """The names of the rows of a table of scores: the types, then "micro"."""
    return [*(name for name in metrics["string"] if name != "micro"), "micro"]


def rate_texts(rates):
    """Precision, recall, F1 in percent and the support, as a table shows them."""
    return [f"{100 * rates[name]:.2f}" for name in ("precision", "recall", "f1")] + [str(rates["support"])]


def _right(cells, widths):
    return "".join(" " * (2 + width - _width(cell)) + cell for cell, width in zip(cells, widths, strict=True))


def _pad(text, width):
    return text + " " * (width - _width(text))


def _width(text):
    """Columns of a terminal: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)

"""metrics and rows of predictions.jsonl -> report.html: one file to look at in a browser, without network or scripts.

What the page says and how it looks stands in report.html.jinja; here is computed what it shows.
"""

import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from alpaca.common.whole_files import written_whole
from alpaca.scoring.errors import KINDS, confusion, errors, precision_recall, suspects
from alpaca.scoring.metrics import PROBLEMS, VIEWS, Span, percents, rate_texts, types_and_total

SHOWN = 200  # errors of one kind, and suspects, that are listed; the rest is only counted
SIZE, LEFT, TOP = 320, 40, 10  # of the curve's square and its place in the picture, in pixels
SHARES = (0.25, 0.5, 0.75, 0.9, 1)  # of the entities, the surest first, that a line of the curve's table keeps
GREEN, RED = "42,157,74", "214,69,48"
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,  # a name that the template has and the values lack is an error, not an empty place
    trim_blocks=True,
    lstrip_blocks=True,
)


class Piece(NamedTuple):
    """A stretch of a text that is marked in one way."""

    text: str
    sides: list  # "gold" where it lies in a gold span, "predicted" where it lies in a predicted one


def write_report(path, rows, metrics, rated, title, subtitle):
    """Write report.html. rows: with gold; metrics: what metrics.score says of them; rated: of calibration.rate_confidence."""
    page = TEMPLATES.get_template("report.html.jinja").render(
        title=title,
        subtitle=subtitle,
        scores=score_values(metrics),
        curve=curve_values(rows),
        calibration=calibration_values(rated),
        confusion=confusion_values(rows, [name for name in types_and_total(metrics) if name != "micro"]),
        errors=error_values(rows),
        suspects=suspect_values(rows),
    )
    with written_whole(path) as new:
        new.write_text(page + "\n", encoding="utf-8")


def score_values(metrics):
    lines = [
        {
            "name": "总计" if name == "micro" else name,
            "is_total": name == "micro",
            "views": [rate_texts(metrics[view][name]) for view in VIEWS],
        }
        for name in types_and_total(metrics)
    ]
    return {
        "views": list(VIEWS.values()),
        "lines": lines,
        "intervals": [f"{title} {percents(metrics[view]['micro']['f1_interval'])}" for view, title in VIEWS.items()],
        "problems": [f"{title} {metrics[name]}" for name, title in PROBLEMS.items()],
        "examples": metrics["examples"],
    }


def curve_values(rows):
    """Precision over recall, both 0 to 1, as a picture, and a table of some of its points; None without entities."""
    points = precision_recall(rows)
    if not points:
        return None

    def place(precision, recall):
        return f"{LEFT + SIZE * recall:.1f}", f"{TOP + SIZE * (1 - precision):.1f}"

    lines = []
    for share in SHARES:
        point = points[math.ceil(share * len(points)) - 1]
        threshold, precision, recall = point
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        rates = [f"{100 * rate:.2f}" for rate in (precision, recall, f1)]
        x, y = place(precision, recall)
        lines.append({"x": x, "y": y, "values": [f"{threshold:.4f}", *rates]})
    return {
        **_square(),
        "path": " ".join(",".join(place(point.precision, point.recall)) for point in points),
        "lines": lines,
    }


def calibration_values(rated):
    """Share of right entities over confidence, as points and bars, before and after; None without entities."""
    if not rated.raw:
        return None
    rates, series = rated.figures, []
    for name, suffix, found in (("未校准", "_raw", rated.raw), ("校准后", "", rated.calibrated)):
        if not found:
            continue
        points = [{"x": f"{LEFT + SIZE * b.confidence:.1f}", "y": f"{TOP + SIZE * (1 - b.right):.1f}"} for b in found]
        series.append(
            {
                "name": name,
                "points": points,
                "path": " ".join(f"{point['x']},{point['y']}" for point in points),
                "error": f"{rates['error' + suffix]:.3f}",
                "interval": "–".join(f"{bound:.3f}" for bound in rates["error_interval" + suffix]),
                "log_loss": f"{rates['log_loss' + suffix]:.3f}",
            }
        )
    return {**_square(), "series": series, "count": rates["n"], "own": rated.own}


def _square():
    """The frame of a picture whose two axes go from 0 to 1."""
    ticks = (0, 0.2, 0.4, 0.6, 0.8, 1)
    return {
        "size": SIZE,
        "left": LEFT,
        "right": LEFT + SIZE,
        "top": TOP,
        "bottom": TOP + SIZE,
        "ticks": [{"x": LEFT + SIZE * t, "y": TOP + SIZE * (1 - t), "name": f"{t:g}"} for t in ticks],
    }


def confusion_values(rows, types):
    """A line for each gold type and one for what is predicted in vain; a cell for each predicted type and for missed."""
    counts = confusion(rows)
    types = [*types, *sorted({kind for pair in counts for kind in pair if kind} - {*types})]
    lines = []
    for gold in [*types, None]:
        total = sum(counts[gold, kind] for kind in [*types, None]) or 1
        cells = [
            {
                "count": "" if gold is kind is None else counts[gold, kind],
                "color": GREEN if gold == kind else RED,
                "strength": f"{0.6 * counts[gold, kind] / total if gold else 0:.2f}",
            }
            for kind in [*types, None]
        ]
        lines.append({"name": gold or "（多报）", "cells": cells})
    return {"types": types, "lines": lines}


def marked_pieces(text, gold, predicted):
    """A text as a list of Piece; gold, predicted: lists of Span, which may overlap."""
    edges = sorted({0, len(text), *(edge for span in (*gold, *predicted) for edge in (span.begin, span.end))})
    pieces = []
    for begin, end in zip(edges, edges[1:], strict=False):
        sides = [
            side
            for side, spans in (("gold", gold), ("predicted", predicted))
            if any(span.begin <= begin and end <= span.end for span in spans)
        ]
        pieces.append(Piece(text[begin:end], sides))
    return pieces


def error_values(rows):
    """For each kind of error how many there are, and the first of them."""
    found = errors(rows)
    counts = Counter(error.kind for error in found)
    return [
        {
            "title": title,
            "count": counts[kind],
            "shown": [_error(error, rows[error.row]) for error in found if error.kind == kind][:SHOWN],
        }
        for kind, title in KINDS.items()
    ]


def _error(error, row):
    if isinstance(error.predicted, str):  # a line of the answer: it has no place in the text
        return {"pieces": marked_pieces(row["text"], [], []), "line": error.predicted}
    gold, predicted = ([span] if span else [] for span in (error.gold, error.predicted))
    why = [f"标准 {_quoted(row, span)}" for span in gold]
    why += [f"预测 {_quoted(row, span)}，置信度 {_confidence(row, span):.4f}" for span in predicted]
    return {"pieces": marked_pieces(row["text"], gold, predicted), "line": None, "why": why}


def _quoted(row, span):
    return f"{row['text'][span.begin : span.end]}（{span.type}）"


def _confidence(row, span):
    entity = row["text"][span.begin : span.end]
    return next(e["confidence"] for e in row["entities"] if (e["entity"], e["type"]) == (entity, span.type))


def suspect_values(rows):
    found = suspects(rows)
    shown = []
    for row in (rows[i] for i in found[:SHOWN]):
        spans = {
            key: [Span(*span, entity["type"]) for entity in row[key] for span in entity["spans"]]
            for key in ("gold", "entities")
        }
        shown.append(
            {
                "pieces": marked_pieces(row["text"], spans["gold"], spans["entities"]),
                "gold": _answer(row["gold"]),
                "predicted": _answer(row["entities"]),
                "times": times_text(row["margin"]),
            }
        )
    return {"count": len(found), "shown": shown}


def times_text(margin):
    """What a margin of log-probabilities says of the answer and gold."""
    if margin is None:
        return "标准里有原文没有的实体，或没有的类型"
    times = f"{math.exp(margin):,.1f} 倍" if margin < math.log(1e6) else "一百万倍以上"
    return f"预测的概率是标准的 {times}"


def _answer(entities):
    """Entities on one line, as an answer states them."""
    return "、".join(f"{entity['entity']}_{entity['type']}" for entity in entities) or "没有"

"""What went wrong in rows of predictions.jsonl (described in metrics.py): errors by kind, type confusion, suspects."""

import math
from collections import Counter
from typing import NamedTuple

from alpaca.scoring.metrics import Span, spans_of, strings_of

KINDS = {
    "missing": "漏掉",
    "spurious": "多报",
    "boundary": "边界错",
    "type": "类型错",
    "malformed": "格式错误",
    "not_in_text": "不在原文",
}


class Error(NamedTuple):
    kind: str  # a key of KINDS
    row: int  # its index, from 0
    predicted: Span | str | None  # of the kinds malformed and not_in_text the line of the answer
    gold: Span | None


class Point(NamedTuple):
    """What is right if only the entities with at least this confidence are kept; precision and recall are fractions."""

    threshold: float
    precision: float
    recall: float


def errors(rows):
    """Every Error, in the order of the rows. Each wrong and each missed span is in one alone.

    A wrong span is paired with a missed one in the same place ("type"), else with one that it overlaps ("boundary"); the
    pairs that overlap most are made first. What is left is "spurious" or "missing".
    """
    found = []
    for i, row in enumerate(rows):
        wrong, missed = _wrong_spans(row)
        for kind, common in (("type", _same), ("boundary", _overlap)):
            pairs = ((common(span, other), span, other) for span in wrong for other in missed)
            for _, span, other in sorted((pair for pair in pairs if pair[0]), key=lambda pair: -pair[0]):
                if span in wrong and other in missed:
                    found.append(Error(kind, i, span, other))
                    wrong.remove(span)
                    missed.remove(other)
        found += [Error("spurious", i, span, None) for span in wrong]
        found += [Error("missing", i, None, span) for span in missed]
        lines = [f"{entity['entity']}_{entity['type']}" for entity in row["entities"]]
        said = [line for line in (row["prediction"] or "").replace("\r", "").split("\n") if line.strip()]
        if row.get("problems", {}).get("malformed"):
            found += [Error("malformed", i, line, None) for line in said if line not in lines]
        absent = [entity["entity"] not in row["text"] for entity in row["entities"]]
        found += [Error("not_in_text", i, line, None) for line, out in zip(lines, absent, strict=True) if out]
    return found


def _wrong_spans(row):
    """(predicted spans that are not gold, gold spans that are not predicted), each sorted."""
    found, right = ({item for item in spans_of(row, key) if isinstance(item, Span)} for key in ("entities", "gold"))
    return sorted(found - right), sorted(right - found)


def _same(span, other):
    return (span.begin, span.end) == (other.begin, other.end)


def _overlap(span, other):
    """How many characters they have in common."""
    return max(0, min(span.end, other.end) - max(span.begin, other.begin))


def confusion(rows):
    """{(gold type, predicted type): how many spans stand in the same place}.

    A missed span has None as its predicted type, one that stands where gold has nothing None as its gold type.
    """
    counts = Counter()
    for row in rows:
        counts.update((span.type, span.type) for span in spans_of(row, "entities") & spans_of(row, "gold"))
    for error in errors(rows):
        if error.kind == "type":
            counts[error.gold.type, error.predicted.type] += 1
        elif error.kind not in ("malformed", "not_in_text"):
            counts.update([(error.gold.type, None)] if error.gold else [])
            counts.update([(None, error.predicted.type)] if error.predicted else [])
    return counts


def precision_recall(rows):
    """A Point for each confidence that occurs, the highest first; entities count as in the string view."""
    gold = sum(len(strings_of(row, "gold")) for row in rows)
    items = [
        (entity["confidence"], (entity["entity"], entity["type"]) in strings_of(row, "gold"))  # (confidence, right?)
        for row in rows
        for entity in row["entities"]
    ]
    curve, hits = [], 0
    for count, (confidence, hit) in enumerate(sorted(items, reverse=True), 1):
        hits += hit
        if curve and curve[-1].threshold == confidence:
            curve.pop()
        curve.append(Point(confidence, hits / count, hits / gold if gold else 0.0))
    return curve


def suspects(rows):
    """Indices of the rows that differ from gold and have a margin, the largest first, before them those of None.

    Where the model finds its own answer far likelier than gold's, gold may be wrong; where no answer can state gold at
    all, it names what is not in the text. The answer's own probability would put every confident `没有` first.
    """
    margins = {i: rows[i]["margin"] for i in different(rows) if "margin" in rows[i]}
    return sorted(margins, key=lambda i: -math.inf if margins[i] is None else -margins[i])


def different(rows):
    """Indices of the rows that were answered and whose spans are not gold's."""
    return [i for i, row in enumerate(rows) if row["prediction"] is not None and any(_wrong_spans(row))]

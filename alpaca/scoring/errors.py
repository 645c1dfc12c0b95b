"""What went wrong in the rows of predictions.jsonl (metrics.py says what a row holds): errors by kind, type confusion, suspects."""

from collections import Counter, namedtuple

from alpaca.scoring.metrics import spans_of, strings_of

KINDS = {
    "missing": "漏掉",
    "spurious": "多报",
    "boundary": "边界错",
    "type": "类型错",
    "malformed": "格式错误",
    "not_in_text": "不在原文",
}


# row: index. predicted, gold: (begin, end, type) or None; of a malformed line, or of an entity that is not in the text,
# predicted is the line.
Error = namedtuple("Error", "kind row predicted gold")


def errors(rows):
    """Every error as an Error, in the order of the rows; by spans, each span of either side in at most one.

    A wrong span is paired with an unmatched gold span in the same place ("type"), else with one that it overlaps
    ("boundary"), those first that overlap most.
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
    found, right = ({item for item in spans_of(row, key) if len(item) == 3} for key in ("entities", "gold"))
    return sorted(found - right), sorted(right - found)


def _same(span, other):
    return span[:2] == other[:2]


def _overlap(span, other):
    return max(0, min(span[1], other[1]) - max(span[0], other[0]))


def confusion(rows):
    """{(gold type, predicted type): spans in the same place}; None instead of a type: missed, or predicted in vain."""
    counts = Counter()
    for row in rows:
        counts.update((kind, kind) for *_, kind in spans_of(row, "entities") & spans_of(row, "gold"))
    for error in errors(rows):
        if error.kind == "type":
            counts[error.gold[2], error.predicted[2]] += 1
        elif error.kind not in ("malformed", "not_in_text"):
            counts.update([(error.gold[2], None)] if error.gold else [])
            counts.update([(None, error.predicted[2])] if error.predicted else [])
    return counts


def precision_recall(rows):
    """[(threshold, precision, recall)] of the entities with at least that confidence, by string, the surest first."""
    gold = sum(len(strings_of(row, "gold")) for row in rows)
    items = [
        (entity["confidence"], (entity["entity"], entity["type"]) in strings_of(row, "gold"))
        for row in rows
        for entity in row["entities"]
    ]
    curve, hits = [], 0
    for count, (confidence, hit) in enumerate(sorted(items, reverse=True), 1):
        hits += hit
        if curve and curve[-1][0] == confidence:
            curve.pop()
        curve.append((confidence, hits / count, hits / gold if gold else 0.0))
    return curve


def suspects(rows):
    """Indices of the rows whose answer differs from gold, the one that the model is surest of first.

    Where model and gold disagree and the model has no doubt, it is worth a look whether gold is right.
    """
    different = [i for i, row in enumerate(rows) if row["prediction"] is not None and any(_wrong_spans(row))]
    return sorted(different, key=lambda i: -rows[i]["log_probability"])

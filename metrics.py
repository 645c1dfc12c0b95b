"""Precision, recall and F1 of predicted entities, and the sentences that went worst.

Works on the rows of predictions.jsonl alone, so that scores can be recomputed from the file:

    {"text", "answer", "prediction": raw string or None (counts as missed), "entities": [{"entity", "type", "spans"}],
     "gold": [{"entity", "type", "spans"}], "problems": {"malformed": n, "unknown_type": n, "not_in_text": n}}

Spans are [begin, end) in characters of text; "problems" holds only the counts that are not 0.
"""

import unicodedata

PROBLEMS = {"malformed": "格式错误", "unknown_type": "未知类型", "not_in_text": "不在原文"}
VIEWS = {"string": "按实体", "span": "按位置"}


def score(rows, labels):
    """Rows, names of the known types -> what metrics.json holds; fractions, 0 where nothing can be divided.

    "string" compares the sets of (entity, type) of a sentence, "span" every occurrence with its offsets. A predicted
    entity that does not occur in the text is one false positive in both. Types that neither `labels` nor gold knows
    are false positives of "micro" and get no entry of their own.
    """
    rows = list(rows)
    types = list(dict.fromkeys([*labels, *(entity["type"] for row in rows for entity in row.get("gold") or [])]))
    metrics = {"string": _view(rows, types, _strings), "span": _view(rows, types, _spans)}
    for name in PROBLEMS:
        metrics[name] = sum(row.get("problems", {}).get(name, 0) for row in rows)
    return {**metrics, "examples": len(rows)}


def _strings(row, key):
    """{(entity, type)} of a row's "entities" or "gold"; the type comes last in the items of both views."""
    return {(entity["entity"], entity["type"]) for entity in row.get(key) or []}


def _spans(row, key):
    """{(begin, end, type)}, and {(entity, type)} for a predicted entity that is not in the text."""
    entities = row.get(key) or []
    absent = [entity for entity in entities if key == "entities" and entity["entity"] not in row["text"]]
    items = {(*span, entity["type"]) for entity in entities for span in entity["spans"]}
    return items | {(entity["entity"], entity["type"]) for entity in absent}


def _view(rows, types, items):
    hits, predicted, gold = [], [], []  # the type of every item
    for row in rows:
        found, right = items(row, "entities"), items(row, "gold")
        hits += [item[-1] for item in found & right]
        predicted += [item[-1] for item in found]
        gold += [item[-1] for item in right]
    rates = {"micro": _rates(len(hits), len(predicted), len(gold))}
    return rates | {name: _rates(hits.count(name), predicted.count(name), gold.count(name)) for name in types}


def _rates(hits, predicted, gold):
    precision, recall = hits / predicted if predicted else 0.0, hits / gold if gold else 0.0
    f1 = 2 * hits / (predicted + gold) if predicted + gold else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "support": gold}


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
    if perfect:
        rates = [f"{title} F1 {perfect[view]['micro']['f1']:.2%}" for view, title in VIEWS.items()]
        text.append(f"标准答案自身的得分：{'，'.join(rates)}")
    counts = [("句子数", metrics["examples"]), *((title, metrics[name]) for name, title in PROBLEMS.items())]
    return "\n".join([*text, "，".join(f"{title} {count}" for title, count in counts)])


def _cells(rates):
    return [f"{100 * rates[name]:.2f}" for name in ("precision", "recall", "f1")] + [str(rates["support"])]


def _right(cells, widths):
    return "".join(" " * (2 + width - _width(cell)) + cell for cell, width in zip(cells, widths, strict=True))


def _pad(text, width):
    return text + " " * (width - _width(text))


def _width(text):
    """Columns of a terminal: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def errors(rows, limit):
    """The `limit` sentences with most wrong entities: [{"text", "missed": [[entity, type], …], "spurious": [...]}]."""
    found = []
    for row in rows:
        predicted, gold = _strings(row, "entities"), _strings(row, "gold")
        if predicted != gold:
            missed, spurious = (sorted(map(list, items)) for items in (gold - predicted, predicted - gold))
            found.append({"text": row["text"], "missed": missed, "spurious": spurious})
    return sorted(found, key=lambda error: -len(error["missed"]) - len(error["spurious"]))[:limit]

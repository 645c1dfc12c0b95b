"""Rows of predictions.jsonl as gradio's components show them."""

PREVIEWED = 100  # texts of a file whose entities the page shows
COLOURS = ["#dc2626", "#2563eb", "#15803d", "#b45309", "#7c3aed", "#be185d", "#0f766e"]  # white letters stand on them
HEADS = ["实体", "类型", "位置（起–止，不含止）", "置信度"]
UNCALIBRATED = [*HEADS[:-1], "置信度（未校准）"]


def pieces_of(row):
    """A row's text as [(part, type of the entity that it is, or None)]; of two that overlap, only the first is marked."""
    text, pieces, end = row["text"], [], 0
    spans = [(begin, last, entity["type"]) for entity in row["entities"] for begin, last in entity["spans"]]
    for begin, last, kind in sorted(spans, key=lambda span: (span[0], -span[1], span[2])):
        if begin >= end:
            pieces += (text[end:begin], None), (text[begin:last], kind)
            end = last
    return [piece for piece in [*pieces, (text[end:], None)] if piece[0]]


def colours_of(labels):
    """{entity type: colour}."""
    return {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels or [])}


def entity_lines(row):
    """The lines of a row's table."""
    lines = []
    for entity in row["entities"]:
        places = "，".join(f"{begin}–{end}" for begin, end in entity["spans"])
        places = places or ("在更长的实体里" if entity["entity"] in row["text"] else "不在原文")
        lines.append([entity["entity"], entity["type"], places, f"{entity['confidence']:.1%}"])
    return lines


def heads_of(row):
    """The heads of that table."""
    return HEADS if row["calibrated"] else UNCALIBRATED


def odd_answer(row, labels):
    """What the model said, where that is not shown as entities; None where it is."""
    if labels is None:
        return row["prediction"] or ""
    # impossible where a grammar holds the answer
    is_odd = row.get("problems", {}).keys() & {"malformed", "unknown_type", "not_in_text"}
    return row["prediction"] if is_odd else None

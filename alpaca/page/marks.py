"""Rows of predictions.jsonl and exchanges of the chat as HTML: here is computed what marks.html.jinja shows."""

from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

PREVIEWED = 5  # texts of a file that the page shows
COLOURS = 8  # page.css has so many, c0 to c7; the last is for types that the adapter does not know


class Piece(NamedTuple):
    """A stretch of a text."""

    text: str
    type: str | None  # of the entity that it is; None: of none
    colour: str | None


class Exchange(NamedTuple):
    """A question of the chat, the name of the choice that it was put to, and what the model said."""

    question: str
    name: str
    answer: str


def escape(value):
    """A value as HTML shows it. gradio reads braces, $, ` and \\ in HTML as its own signs, so they are escaped too."""
    if isinstance(value, Markup):
        return value
    return Markup("".join(f"&#{ord(char)};" if char in "&<>\"'{}$`\\" else char for char in str(value)))


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    finalize=escape,  # every value passes here; autoescape then leaves it as it is
    undefined=StrictUndefined,  # a name that the template has and the values lack is an error, not an empty place
    trim_blocks=True,
    lstrip_blocks=True,
)
HTML = TEMPLATES.get_template("marks.html.jinja").module  # its macros, as functions


def row_html(row, labels):
    """A row in full. labels: the adapter's entity types; None: it was trained on another task than NER."""
    problems = row.get("problems", {})
    is_odd = problems.keys() & {
        "malformed",
        "unknown_type",
        "not_in_text",
    }  # impossible where a grammar holds the answer
    if labels is None:
        shown = HTML.text_box(row["prediction"] or "")
    else:
        shown = HTML.marked_text(pieces_of(row, labels)) + HTML.entity_table(
            entity_lines(row, labels), row["calibrated"]
        )
    return str(shown + HTML.row_notes(row, problems.get("cut"), is_odd))


def pieces_of(row, labels):
    """A row's text as a list of Piece; of two entities that overlap, only the first is marked."""
    text, pieces, end = row["text"], [], 0
    spans = [(begin, last, entity["type"]) for entity in row["entities"] for begin, last in entity["spans"]]
    for begin, last, kind in sorted(spans, key=lambda span: (span[0], -span[1], span[2])):
        if begin >= end:
            pieces += Piece(text[end:begin], None, None), Piece(text[begin:last], kind, colour_of(kind, labels))
            end = last
    return [*pieces, Piece(text[end:], None, None)]


def colour_of(kind, labels):
    """The class of page.css that an entity type has."""
    return f"c{labels.index(kind) % COLOURS if kind in labels else COLOURS - 1}"


def entity_lines(row, labels):
    """The lines of a row's table; the confidence is the probability that an entity is right."""
    lines = []
    for entity in row["entities"]:
        places = "，".join(f"{begin}–{end}" for begin, end in entity["spans"])
        lines.append(
            {
                "entity": entity["entity"],
                "type": entity["type"],
                "colour": colour_of(entity["type"], labels),
                "places": places or ("在更长的实体里" if entity["entity"] in row["text"] else "不在原文"),
                "confidence": f"{entity['confidence']:.1%}",
            }
        )
    return lines


def file_html(rows, labels):
    """How much was found in a file, and its first texts; labels: as for row_html."""
    first, is_more = rows[:PREVIEWED], len(rows) > PREVIEWED
    if labels is None:
        previews = [HTML.text_box(row["prediction"] or "") for row in first]
        return str(HTML.file_summary(len(rows), None, previews, is_more))
    counts = {}
    for entity in (entity for row in rows for entity in row["entities"]):
        counts[entity["type"]] = counts.get(entity["type"], 0) + len(entity["spans"])
    kinds = [{"name": kind, "count": count, "colour": colour_of(kind, labels)} for kind, count in counts.items()]
    kinds.sort(key=lambda kind: kind["colour"])
    previews = [HTML.marked_text(pieces_of(row, labels)) for row in first]
    return str(HTML.file_summary(len(rows), kinds, previews, is_more))


def chat_html(exchanges):
    """The exchanges of a chat, the last below."""
    return str(HTML.exchanges(exchanges))


def progress_html(done, total):
    """A bar: so many of the windows of texts are answered."""
    return str(HTML.progress_bar(done, total))


def note_html(text):
    return str(HTML.note(text))


def head_html(base):
    """The head of the page; base: the folder of the model."""
    return str(HTML.page_head(base))

"""doccano's export, JSON lines.

    {"id": 1, "text": "…", "label": [[4, 7, "PER"]], "Comments": []}
    {"id": 1, "text": "…", "entities": [{"id": 1, "label": "PER", "start_offset": 4, "end_offset": 7}],
     "relations": [{"id": 1, "from_id": 1, "to_id": 2, "type": "…"}], "Comments": []}      where relations are on

The ends are exclusive. Projects of older versions write `labels`, some of 2021 the text as `data`; intent detection
writes `entities` as triples and `cats`. Source: backend/data_export of the doccano repository, read on 2026-11-27, and
its issue 1522.
"""

from alpaca.common.errors import UserError
from alpaca.corpora.records import checked_mark, checked_text, marked_spans, read_sentences
from alpaca.corpora.sentences import Sentence

KEYS = ("label", "labels", "entities")


def is_doccano(head):
    return any(isinstance(record, dict) and _is_record(record) for record in head.records)


def _is_record(record):
    if any(isinstance(span, dict) and "start_offset" in span for span in _listed(record, "annotations")):
        return True
    spans = [span for key in KEYS for span in _listed(record, key)]
    if not spans:
        return _text_key(record) in record and (
            record.get("label") == [] or "relations" in record and "entities" in record
        )
    return all(isinstance(s, list) and len(s) == 3 or isinstance(s, dict) and "start_offset" in s for s in spans)


def _text_key(record):
    return "data" if "data" in record and "text" not in record else "text"


def _listed(record, key):
    return record[key] if isinstance(record.get(key), list) else []


def read_doccano(path, problems):
    """Yield each Sentence; relations, comments and whole-text categories are counted."""
    yield from read_sentences(path, problems, _sentence)


def _sentence(path, line, record, problems):
    if "annotations" in record:
        raise UserError(f"{path}:{line}: the labels are numbers; let doccano export JSONL with text labels")
    text = checked_text(path, line, record[_text_key(record)])
    marks = []
    for span in marked_spans(path, line, record, KEYS):
        if isinstance(span, dict):
            begin, end, tag = span["start_offset"], span["end_offset"], span["label"]
        else:
            begin, end, tag = span
        marks.append(checked_mark(path, line, text, begin, end, tag))
    for kind, key in (("relation", "relations"), ("attribute", "Comments"), ("choice", "cats")):
        problems[kind] += len(record.get(key) or ())
    return Sentence(line, text, marks)

"""CMeEE's JSON: {"text", "entities": [{"start_idx", "end_idx", "type", "entity"}]}; end_idx is the last character."""

from alpaca.corpora.records import checked_mark, checked_text, read_sentences
from alpaca.corpora.sentences import Sentence


def is_cmeee(head):
    return any(
        isinstance(record, dict)
        and isinstance(record.get("entities"), list)
        and any(isinstance(entity, dict) and "start_idx" in entity for entity in record["entities"])
        for record in head.records
    )


def read_cmeee(path, problems):
    """Yield each Sentence; nested entities stay."""
    yield from read_sentences(path, problems, _sentence)


def _sentence(path, line, record, problems):
    text = checked_text(path, line, record["text"])
    marks = [
        checked_mark(path, line, text, e["start_idx"], e["end_idx"] + 1, e["type"], e.get("entity"))
        for e in record["entities"]
    ]
    return Sentence(line, text, marks)

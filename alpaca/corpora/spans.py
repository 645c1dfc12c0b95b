"""Prodigy's, spaCy's and yidu-s4k's JSON, ends exclusive.

{"text": "…", "spans": [{"start": 4, "end": 7, "label": "PER"}], "answer": "accept"}      Prodigy; spaCy: `ents`
["…", {"entities": [[4, 7, "PER"]]}]                                                       spaCy's training data
{"originalText": "…", "entities": [{"start_pos": 4, "end_pos": 7, "label_type": "PER"}]}     yidu-s4k (CCKS 2019)
"""

from alpaca.corpora.records import checked_mark, checked_text, marked_spans, read_sentences
from alpaca.corpora.sentences import Sentence

KEYS = ("spans", "ents", "entities")
ENDS = (("start", "end"), ("start_pos", "end_pos"))


def is_spans(head):
    return any(_is_pair(record) or isinstance(record, dict) and _is_record(record) for record in head.records)


def _is_pair(record):
    return isinstance(record, list) and len(record) == 2 and isinstance(record[0], str) and isinstance(record[1], dict)


def _is_record(record):
    if "text" in record and isinstance(record.get("spans"), list):
        return True
    spans = [span for key in KEYS if isinstance(record.get(key), list) for span in record[key]]
    return any(isinstance(span, dict) and any(span.keys() >= set(ends) for ends in ENDS) for span in spans)


def read_spans(path, problems):
    """Yield each Sentence; what was rejected, ignored or comes from another annotator is left out and counted."""
    seen = set()

    def read_one(path, line, record, problems):
        if _is_pair(record):
            text, spans = record[0], record[1]["entities"]
            return Sentence(line, text, [checked_mark(path, line, text, *span) for span in spans])
        if record.get("answer", "accept") != "accept":
            problems.add("skipped", path, line, f"answer {record['answer']!r}")
            return None
        example = record.get("_input_hash")  # the same for every annotator of a text
        if example is not None and example in seen:
            problems.add("annotators", path, line, f"_annotator_id {record.get('_annotator_id')!r}")
            return None
        seen.add(example)
        text = checked_text(path, line, record["originalText" if "originalText" in record else "text"])
        unmarked = "answer" in record and not record.keys() & set(KEYS)  # Prodigy leaves the key out then
        spans = [] if unmarked else marked_spans(path, line, record, KEYS)
        problems["relation"] += len(record.get("relations") or ())
        problems["choice"] += len(record.get("accept") or ())
        return Sentence(line, text, [_mark(path, line, text, span) for span in spans])

    yield from read_sentences(path, problems, read_one)


def _mark(path, line, text, span):
    tag = next((span[key] for key in ("label", "type", "entity_type", "label_type") if key in span), None)
    stated = next((span[key] for key in ("text", "entity", "word") if key in span), None)
    begin, end = next((ends for ends in ENDS if ends[0] in span), ENDS[0])
    return checked_mark(path, line, text, span[begin], span[end], tag, stated)

"""CMeEE's JSON, and the lines that CHIP 2020 published it as; the end is the last character.

{"text": "…", "entities": [{"start_idx": 3, "end_idx": 7, "type": "pro", "entity": "…"}]}      or an array of these
text|||3    7    pro|||9    13    pro|||
"""

import re

from alpaca.common.errors import UserError
from alpaca.common.text_files import read_lines
from alpaca.corpora.records import checked_mark, checked_text, read_sentences
from alpaca.corpora.sentences import Sentence

MARK = re.compile(r"\s*(\d+)\s+(\d+)\s+(\S+)\s*")
LINE = re.compile(rf".*?\|\|\|({MARK.pattern}\|\|\|)*\s*")


def is_cmeee(head):
    return bool(LINE.fullmatch(head.line)) or any(
        isinstance(record, dict)
        and isinstance(record.get("entities"), list)
        and any(isinstance(entity, dict) and "start_idx" in entity for entity in record["entities"])
        for record in head.records
    )


def read_cmeee(path, problems):
    """Yield each Sentence; nested entities stay."""
    first = next((line for _, line in read_lines(path) if line.strip()), "")
    if first.lstrip()[:1] in ("{", "["):
        yield from read_sentences(path, problems, _sentence)
        return
    for number, line in read_lines(path):
        if line.strip():
            yield _sentence_of_line(path, number, line)


def _sentence_of_line(path, number, line):
    text, *marks = line.split("|||")
    while marks and not marks[-1].strip():
        marks.pop()
    found = [MARK.fullmatch(mark) for mark in marks]
    if None in found or "|||" not in line:
        raise UserError(f"{path}:{number}: expected text|||begin end type|||…, got {line[-60:]!r}; correct the line")
    places = [(int(mark[1]), int(mark[2]) + 1, mark[3]) for mark in found]
    return Sentence(number, text, [checked_mark(path, number, text, *place) for place in places])


def _sentence(path, line, record, problems):
    text = checked_text(path, line, record["text"])
    marks = [
        checked_mark(path, line, text, e["start_idx"], e["end_idx"] + 1, e["type"], e.get("entity"))
        for e in record["entities"]
    ]
    return Sentence(line, text, marks)

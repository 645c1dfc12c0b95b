"""JSON corpora: records one a line, or in one array; and the marks in them, checked."""

import json
import re
from itertools import islice
from typing import NamedTuple

from alpaca.common.errors import UserError
from alpaca.common.text_files import read_jsonl, read_lines
from alpaca.corpora.sentences import Mark

BLANK = re.compile(r"\s*")


class Head(NamedTuple):
    """What a format is recognised by."""

    path: object  # pathlib.Path: a file or a folder
    line: str  # the first line that is neither empty nor a heading
    records: list  # the first JSON records, none of any other file


def read_records(path):
    """Yield (line number, record) of JSON lines or of one JSON array; UserError names file and line."""
    first = next((line for _, line in read_lines(path) if line.strip()), "")
    yield from _read_array(path) if first.lstrip().startswith("[") else read_jsonl(path)


def _read_array(path):
    text = "\n".join(line for _, line in read_lines(path))
    decoder, position = json.JSONDecoder(), text.index("[") + 1
    line, counted = 1, 0
    while True:
        start = BLANK.match(text, position).end()
        line, counted = line + text.count("\n", counted, start), start
        if text.startswith("]", start) and text[:start].strip() == "[":  # an empty array
            break
        try:
            record, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno}); export it again"
            ) from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets a thousand deep
            raise UserError(f"{path}:{line}: not JSON that can be read ({error}); correct the record") from None
        yield line, record
        after = BLANK.match(text, end).end()
        line, counted = line + text.count("\n", counted, after), after
        if text.startswith("]", after):
            start = after
            break
        if not text.startswith(",", after):
            raise UserError(f"{path}:{line}: the array is not closed behind this record; is the file cut off?")
        position = after + 1
    if text[start + 1 :].strip():
        raise UserError(f"{path}:{line}: something stands behind the array's end; one array a file")


def first_records(path, count=100):
    """The first records of a JSON file as a list; what cannot be read ends it, and is the reader's to report."""
    records = []
    try:
        for _, record in islice(read_records(path), count):
            records.append(record)
    except UserError:
        pass
    return [record for record in records if isinstance(record, dict | list)]


def read_sentences(path, problems, read_one):
    """Yield read_one(path, line, record, problems) for each record; None leaves it out, wrong nesting is a UserError."""
    for line, record in read_records(path):
        try:
            sentence = read_one(path, line, record, problems)
        except KeyError as error:
            raise UserError(f"{path}:{line}: no key {error}; docs/zh/data.md shows the format") from None
        except (TypeError, AttributeError, ValueError):
            raise UserError(f"{path}:{line}: wrong nesting; docs/zh/data.md shows the format") from None
        if sentence is not None:
            yield sentence


def marked_spans(path, line, record, keys):
    """The list that a record holds under one of the keys; UserError where two hold some, KeyError where there is none."""
    found = [key for key in keys if record.get(key)] or [key for key in keys if key in record]
    if len(found) > 1 and record[found[0]] != record[found[1]]:
        raise UserError(f"{path}:{line}: both {found[0]!r} and {found[1]!r} hold entities; leave one out")
    return record[found[0] if found else keys[0]]


def checked_text(path, line, text):
    """A record's text, as it is; UserError where it is none."""
    if not isinstance(text, str):
        raise UserError(f"{path}:{line}: the text must be a string, got {str(text)[:40]!r}")
    return text


def checked_mark(path, line, text, begin, end, tag, entity=None):
    """A Mark; UserError for offsets that are no integers or strings that are none. entity=None: what stands there."""
    if type(begin) is not int or type(end) is not int:
        raise UserError(f"{path}:{line}: begin and end must be integers, got {begin!r} and {end!r}")
    entity = text[max(begin, 0) : max(end, 0)] if entity is None else entity
    if not isinstance(tag, str) or not isinstance(entity, str):
        raise UserError(f"{path}:{line}: type and entity must be strings, got {tag!r} and {entity!r}")
    return Mark(begin, end, tag, entity, line)

"""The texts that a user asks a model about: plain lines, JSON lines, a JSON array, CSV, or an Excel workbook."""

import json
import re
import zipfile
from itertools import islice
from pathlib import Path

from alpaca.common.console import say
from alpaca.common.errors import UserError
from alpaca.common.file_kinds import zip_kind
from alpaca.common.text_files import parse_json, read_jsonl, read_lines
from alpaca.corpora.sheets import csv_delimiter, read_csv, read_workbook
from alpaca.corpora.tagged_columns import split_columns
from dataset import ROW_KEYS, example_of_input, optional_columns

ASKED = ("text", "query", "instruct")  # the keys or columns that a question is made of; one of them must be there
FEWEST_TAGGED = 3  # so many first lines that all end in a tag are no texts
ARRAY = re.compile(r'\[\s*([\[{"\]]|$)')  # a line of text may begin with [ too, as in [1]


def read_inputs(path):
    """The lines of a text file that are not blank; UserError where there is none."""
    lines = [line for _, line in read_lines(path) if line.strip()]
    if not lines:
        raise UserError(f"{path}: the file holds only blank lines")
    return lines


def read_texts(path):
    """Yield texts to answer, one for each row of the file in order, as dicts.

    Each has a `text`, perhaps empty, and what else its row has: `query`, `instruct`, `answer`, or keys of the user's own.
    A row is a line, blank or not, an object of JSON lines or of a JSON array, or a row of a table with a column `text`,
    `query` or `instruct`. Lines are read as they are asked for; an array and a workbook must be held whole. UserError for
    a file that is none of these and, at its end, for one of which no row asks anything.
    """
    if zipfile.is_zipfile(path) and zip_kind(path)[0] == "an Excel workbook":
        records = (record_of(f"{path}, row {number}", strings(row)) for number, row in read_workbook(path, ASKED))
    else:
        begin = list(islice((line for _, line in read_lines(path) if line.strip()), FEWEST_TAGGED))
        records = records_of(path, begin)
    asks = False
    for record in records:
        asks = asks or any(record[key].strip() for key in ASKED if record.get(key))
        yield record
    if not asks:
        raise UserError(f"{path}: the file holds only blank lines")


def look_through(records):
    """Read all of read_texts -> (how many there are, whether one has no instruction of its own); say what is left out."""
    total, blank, taken, without_instruct = 0, 0, set(), False
    for record in records:
        total += 1
        without_instruct = without_instruct or not record.get("instruct")
        blank += not example_of_input(record, "", "")["asks"]
        taken.update(key for key in ROW_KEYS[2:] if record.get(key) is not None)
    if blank:
        say(f"{blank} 行是空的，不提问，结果里各占一行")
    if taken:
        say(f"输入的 {'、'.join(sorted(taken))} 与结果的键同名，不写进结果")
    return total, without_instruct


def records_of(path, begin):
    """The rows of a text file, an iterator. begin: its first lines that are not blank."""
    first = begin[0] if begin else ""
    start = first.lstrip()
    if ARRAY.match(start):
        whole = parse_json(path, "\n".join(line for _, line in read_lines(path)))
        return (
            record_of(f"{path}, item {n}", {"text": item} if isinstance(item, str) else item)
            for n, item in enumerate(whole, 1)
        )
    if start.rstrip() == "{":
        raise UserError(f"{path}: an object over several lines; give one object a line, or a list [{{…}}, {{…}}]")
    if start.startswith("{"):
        return (record_of(f"{path}:{number}", record) for number, record in read_jsonl(path))
    delimiter = csv_delimiter(first, ASKED)
    if delimiter is None and Path(path).suffix.lower() in (".csv", ".tsv"):
        if start.strip('"') not in ASKED:  # else: one column
            raise UserError(
                f"{path}: no column {', '.join(ASKED)} in the header {first[:60]!r}; name that of the texts text"
            )
        delimiter = ","
    if delimiter:
        return (record_of(f"{path}:{number}", row) for number, row in read_csv(path, delimiter))
    tagged = [split_columns(line) for line in begin]
    if len(tagged) == FEWEST_TAGGED and all(tagged):
        raise UserError(f"{path}: a corpus of characters and tags, {first!r}, not of texts; process.py reads those")
    return ({"text": checked_line(f"{path}:{number}", path, line)} for number, line in read_lines(path))


def checked_line(where, path, line):
    """A line of plain text."""
    if line.lstrip().startswith("{") and is_object(line):
        raise UserError(f"{where}: a JSON object among lines of plain text; give one kind")
    if "\r" in line:
        raise UserError(f"{where}: a carriage return in the line; make it a line end: tr '\\r' '\\n' < {path}")
    return line


def strings(row):
    """A row of a workbook with what is asked as text: a cell that holds 110 is a number there."""
    return row | {key: str(row[key]) for key in (*ASKED, "answer") if row.get(key) is not None}


def is_object(line):
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def record_of(where, record):
    """A row of a file, its question checked. An empty cell of a table (None) is no value."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object or a text, got {type(record).__name__}")
    if not record.keys() & set(ASKED):
        raise UserError(
            f"{where}: needs a `text`, a `query` or an `instruct`; there are {', '.join(record) or 'no keys'}"
        )
    for key in ("query", "instruct", "answer"):
        if not isinstance(record.get(key), str | None):
            raise UserError(f"{where}: `{key}` must be a string, got {record[key]!r}")
    return {**record, **optional_columns(where, record, record.get("query") or "")}

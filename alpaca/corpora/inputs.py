"""The texts that a user asks a model about: plain lines, JSON lines, a JSON array, CSV, or an Excel workbook."""

import json
import re
import zipfile
from pathlib import Path

from alpaca.common.errors import UserError
from alpaca.common.file_kinds import zip_kind
from alpaca.common.text_files import parse_json, read_jsonl, read_lines
from alpaca.corpora.sheets import csv_delimiter, read_csv, read_workbook
from alpaca.corpora.tagged_columns import split_columns
from dataset import optional_columns

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
    """Texts to answer, one for each row of the file in order, as a list of dicts.

    Each has a `text`, perhaps empty, and what else its row has: `query`, `instruct`, `answer`, or keys of the user's own.
    A row is a line, blank or not, an object of JSON lines or of a JSON array, or a row of a table with a column `text`,
    `query` or `instruct`. UserError for a file that is none of these, or of which no row asks anything.
    """
    if zipfile.is_zipfile(path) and zip_kind(path)[0] == "an Excel workbook":
        records = [record_of(f"{path}, row {number}", strings(row)) for number, row in read_workbook(path, ASKED)]
    else:
        lines = list(read_lines(path))
        records = records_of(path, lines, next((line for _, line in lines if line.strip()), ""))
    if not any(record[key].strip() for record in records for key in ASKED if record.get(key)):
        raise UserError(f"{path}: the file holds only blank lines")
    return records


def records_of(path, lines, first):
    """The rows of a text file. lines: [(number, line)]; first: the first that is not blank."""
    start = first.lstrip()
    if ARRAY.match(start):
        whole = parse_json(path, "\n".join(line for _, line in lines))
        return [
            record_of(f"{path}, item {n}", {"text": item} if isinstance(item, str) else item)
            for n, item in enumerate(whole, 1)
        ]
    if start.rstrip() == "{":
        raise UserError(f"{path}: an object over several lines; give one object a line, or a list [{{…}}, {{…}}]")
    if start.startswith("{"):
        return [record_of(f"{path}:{number}", record) for number, record in read_jsonl(path)]
    delimiter = csv_delimiter(first, ASKED)
    if delimiter:
        return [record_of(f"{path}:{number}", row) for number, row in read_csv(path, delimiter)]
    if Path(path).suffix.lower() in (".csv", ".tsv"):
        if start.strip('"') in ASKED:  # one column
            return [record_of(f"{path}:{number}", row) for number, row in read_csv(path, ",")]
        raise UserError(
            f"{path}: no column {', '.join(ASKED)} in the header {first[:60]!r}; name that of the texts text"
        )
    tagged = [split_columns(line) for _, line in lines if line.strip()][:FEWEST_TAGGED]
    if len(tagged) == FEWEST_TAGGED and all(tagged):
        raise UserError(f"{path}: a corpus of characters and tags, {first!r}, not of texts; process.py reads those")
    for number, line in lines:
        if line.lstrip().startswith("{") and is_object(line):
            raise UserError(f"{path}:{number}: a JSON object among lines of plain text; give one kind")
        if "\r" in line:
            raise UserError(
                f"{path}:{number}: a carriage return in the line; make it a line end: tr '\\r' '\\n' < {path}"
            )
    return [{"text": line} for _, line in lines]


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

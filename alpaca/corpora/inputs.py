"""The texts that a user asks a model about: a file of plain lines or of JSON lines."""

from alpaca.common.errors import UserError
from alpaca.common.text_files import read_jsonl, read_lines
from dataset import optional_columns


def read_inputs(path):
    """The lines of a text file that are not blank; UserError where there is none."""
    lines = [line for _, line in read_lines(path) if line.strip()]
    if not lines:
        raise UserError(f"{path}: the file holds only blank lines")
    return lines


def read_texts(path):
    """Texts to answer, as a list of dicts with `text` or `query`, and `instruct` and `answer` where given.

    The file holds plain text, one a line, or JSON lines.
    """
    lines = read_inputs(path)
    if not lines[0].lstrip().startswith("{"):
        return [{"text": line} for line in lines]
    records = []
    for number, record in read_jsonl(path):
        for key in ("query", "instruct", "answer"):
            if not isinstance(record.get(key), str | None):
                raise UserError(f"{path}:{number}: `{key}` must be a string, got {record[key]!r}")
        record |= optional_columns(path, number, record, record.get("query") or "")
        if not record["text"] and not record.get("query") and not record.get("instruct"):
            raise UserError(f"{path}:{number}: needs a `text`, a `query` or an `instruct`")
        records.append(record)
    return records

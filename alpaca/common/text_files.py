"""UTF-8 files of lines and of JSON lines; whatever cannot be read is named by file and line."""

import json
import re
from pathlib import Path

from alpaca.common.errors import UserError
from alpaca.common.file_kinds import other_encoding, refuse_other_kinds
from alpaca.common.folders import hint_of_folders

SURROGATE = re.compile("[\ud800-\udfff]")  # json reads it, but it is no character: no file or tokenizer takes it


def read_lines(path, malformed=None):
    """Yield (line number, text without line end) of a UTF-8 file; UserError for a missing, empty or other file.

    A line ends with \\n or \\r\\n and nothing else. The byte order mark that a line begins with (of files that were
    joined, too) is no part of it. An undecodable line is a UserError too, or, where there is a list `malformed`, is left
    out and appended to it.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # most files are read twice
        raise UserError(f"{path}: is a {'folder' if path.is_dir() else 'pipe or device'}; name a file")
    if not path.is_file():
        raise UserError(f"{path}: no such file{hint_of_folders(path)}")
    refuse_other_kinds(path)
    number, decoded = 0, False  # whether a line before was UTF-8 and more than ASCII
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8").rstrip("\r\n").removeprefix("\ufeff")
            except UnicodeDecodeError as error:
                remedy = None if decoded else other_encoding(path)
                remedy = remedy or "re-encode it"
                message = f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start}); {remedy}"
                keep_or_raise(message, malformed)
                continue
            decoded = decoded or not line.isascii()
            yield number, line
    if not number:
        raise UserError(f"{path}: the file is empty; name another")


def keep_or_raise(message, malformed):
    """Raise the message as a UserError or, where there is a list `malformed`, append it to that."""
    if malformed is None:
        raise UserError(message) from None
    malformed.append(message)


def read_jsonl(path, malformed=None):
    """Yield (line number, object) of a JSON-lines file; blank lines are skipped. UserError names file and line.

    `malformed`: as in read_lines.
    """
    found = False
    for number, line in read_lines(path, malformed):
        if not line.strip():
            continue
        found = True
        try:
            record = parse_record(f"{path}:{number}", line)
        except UserError as error:
            keep_or_raise(str(error), malformed)
        else:
            yield number, record
    if not found:
        raise UserError(f"{path}: the file holds no record")


def parse_record(where, line):
    """One line -> its JSON object. `where`: file and line, for the UserError of anything else."""
    record = parse_json(where, line, "; one object a line")
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(record).__name__}; one object a line")
    return record


def parse_json(where, text, remedy="; correct it"):
    """JSON text -> its value. UserError for what is not JSON, for half a character, for a key that stands twice."""
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise UserError(f"{where}: not valid JSON ({error.msg} at {line}column {error.colno}){remedy}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets a thousand deep
        raise UserError(f"{where}: not JSON that can be read ({error}); correct the line") from None
    for item in value if isinstance(value, list) else [value]:
        for part in item.values() if isinstance(item, dict) else [item]:
            if isinstance(part, str) and SURROGATE.search(part):
                raise UserError(f"{where}: half a character (a lone surrogate) in {part[:40]!r}; correct the text")
    return value


def _without_repeats(pairs):
    """json.loads keeps the last of two equal keys and says nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise UserError(f"the key {repeated[:40]!r} stands twice in one object; leave one out")
    return found

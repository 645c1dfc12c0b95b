"""A file of rows that is written as they come, and what `--resume` must know of it."""

import hashlib
import json
import os
import shlex
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from alpaca.common.console import end_bars, say
from alpaca.common.devices import pick_precision
from alpaca.common.errors import UserError
from alpaca.common.locks import locked
from alpaca.common.whole_files import named, written_whole
from alpaca.models.adapter_files import adapter_sha256
from alpaca.models.adapters import open_output
from alpaca.models.base import base_folder
from alpaca.models.base_files import tensors_sha256

ROWS = "entities with log_probability and confidence"  # earlier ones had only a confidence, the mean of a token
DECIDES = ("max_new_tokens", "constrained", "base_weights")  # options that the rows depend on
KNOWN_BY_CONTENT = ("adapter", "base", "tokenizer", "input")  # these may stand elsewhere when a run goes on


def made_with(args, adapter, train_args, tokenizer, input_path, **more):
    """What decides the rows, as <output>.run.json holds it. args: of test.py or predict.py; more: what else does."""
    base = base_folder(adapter, train_args, args.base_model)
    return {
        "rows": ROWS,
        "adapter": adapter and str(adapter),
        "adapter_sha256": adapter and adapter_sha256(adapter),
        "base": str(base),
        "base_sha256": tensors_sha256(base),
        "tokenizer": str(args.tokenizer_path or base),
        "tokenizer_sha256": tokenizer.sha256,
        "template": tokenizer.template.sha256,
        "input": input_path and str(input_path),
        "input_sha256": input_path and _sha256(Path(input_path)),
        **{name: getattr(args, name) for name in DECIDES},
        "precision": pick_precision(args.precision, "cuda" if torch.cuda.is_available() else "cpu"),
        **more,
    }


def _sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RowFile:
    """A file of rows on rank 0. `first`: how many it holds already."""

    def __init__(self, path, file, facts, first, outdated):
        self.path, self.file, self.facts, self.first, self.outdated = Path(path), file, facts, first, outdated
        self.count, self.begun = first, False

    def begin(self):
        """What was in it goes now, unless it goes on, and what was made of its rows. A failure up to here has lost
        nothing."""
        with ExitStack() as stack:
            if not self.first:
                note = stack.enter_context(written_whole(_note_of(self.path)))  # before anything goes: it needs room
                note.write_text(json.dumps(self.facts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
                self.file.truncate(0)
            for path in self.outdated:
                Path(path).unlink(missing_ok=True)
        self.begun = True

    def write(self, row):
        if not self.begun:
            self.begin()
        with named(self.path):
            self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.file.flush()
        self.count += 1


def rewrite(path, rows):
    """Replace the rows of a file that is whole; one that ends early leaves the old ones."""
    with written_whole(path) as new, new.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@contextmanager
def row_file(path, facts, total, resume, remedy="name another file", outdated=()):
    """A RowFile, opened before anything is computed; with resume it holds the rows of the first texts already.

    facts: of made_with. outdated: files that a first row makes those of other rows. Where it ends early, a line says how to
    go on. UserError where the file was made with other facts.
    """
    with open_output(path, remedy) as file, locked(path):
        rows = RowFile(path, file, facts, _rows_written(Path(path), facts, total) if resume else 0, outdated)
        try:
            yield rows
            if not rows.begun:  # nothing was left to answer
                rows.begin()
            with named(path):
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            if rows.begun:
                end_bars()
                command = [word for word in sys.argv if not word.startswith(("--resume", "--local_rank"))]
                say(f"{path} 里有 {rows.count} 条，接着做: python {shlex.join([*command, '--resume'])}")
            raise
        finally:
            with named(path):
                file.close()  # which writes again what could not be written


def _note_of(path):
    return path.with_name(path.name + ".run.json")


def _rows_written(path, facts, total):
    """How many rows the file holds; half a row at its end is cut off."""
    count = end = 0
    with path.open("r+b") as file:
        for line in file:
            if line.endswith(b"\n"):
                count, end = count + 1, end + len(line)
        if count:
            _check_facts(path, facts)
        if count > total:
            raise UserError(f"{path}: holds {count} rows, the input {total}; name another file, or no --resume")
        file.truncate(end)
    return count


def _check_facts(path, facts):
    note = _note_of(path)
    try:
        written = dict(json.loads(note.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"{path}: {note.name} beside it, which says what its rows were made with, is missing or not whole; name "
            "another file, or no --resume"
        ) from None
    for key, value in facts.items():
        if key not in KNOWN_BY_CONTENT and written.get(key) != value:
            was, now = ({**known, key: known.get(key)} for known in (written, facts))
            raise UserError(
                f"{path}: its rows were made with {_shown(key, was)}, this run has {_shown(key, now)}; make them equal, "
                "name another file, or no --resume"
            )


def _shown(key, facts):
    """A value; of a hash the beginning, with the path of what it is of."""
    name = key.removesuffix("_sha256")
    return f"{name} {facts.get(name)} ({str(facts[key])[:12]}…)" if name != key else f"{key} {str(facts[key])[:60]}"

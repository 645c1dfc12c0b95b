"""Which format a corpus has, and who reads it."""

import re
from collections import Counter
from pathlib import Path

from alpaca.common.errors import UserError
from alpaca.common.text_files import SURROGATE, read_lines
from alpaca.corpora.brat import is_brat, read_brat
from alpaca.corpora.characters import is_characters, read_characters
from alpaca.corpora.cmeee import is_cmeee, read_cmeee
from alpaca.corpora.conll import is_conll, read_conll
from alpaca.corpora.doccano import is_doccano, read_doccano
from alpaca.corpora.json_lines import read_json_sentences
from alpaca.corpora.label_studio import (
    is_label_studio,
    is_label_studio_min,
    read_label_studio,
    read_label_studio_min,
)
from alpaca.corpora.problems import LOSSES, REMARKS
from alpaca.corpora.records import Head, first_records
from alpaca.corpora.spans import is_spans, read_spans
from alpaca.corpora.tagged_columns import is_heading, read_tagged_sentences, split_columns

JSON = re.compile(r"\s*(\{|\[\s*([\[{\]]|$))")  # how an object begins, or an array of them


def is_tagged_columns(head):
    return split_columns(head.line) is not None


def is_json(head):
    return bool(JSON.match(head.line))


# name: (whether a Head is of this format, the generator of a path's Sentences), in the order of asking: jsonl takes
# any JSON that no other wants, and its reader says what is wrong with it
FORMATS = {
    "brat": (is_brat, read_brat),
    "conll": (is_conll, read_conll),
    "bio": (is_tagged_columns, read_tagged_sentences),
    "labelstudio": (is_label_studio, read_label_studio),
    "labelstudio_min": (is_label_studio_min, read_label_studio_min),
    "characters": (is_characters, read_characters),
    "doccano": (is_doccano, read_doccano),
    "cmeee": (is_cmeee, read_cmeee),
    "spans": (is_spans, read_spans),
    "jsonl": (is_json, lambda path, problems: read_json_sentences(path)),
}
PLAIN = ("bio", "jsonl")  # corpora without any entity are read too; a tool's export without one is an error


def detect_format(path):
    """The name of a file's or folder's format, by its name, its first line and its first records."""
    path = Path(path)
    head = Head(path, "", [])
    if not path.is_dir() and path.suffix != ".ann":
        line = next((line for _, line in read_lines(path) if line.strip() and not is_heading(line)), None)
        if line is None:
            raise UserError(f"{path}: the file holds only blank lines and comments")
        head = Head(path, line, first_records(path) if line.lstrip()[:1] in ("{", "[") else [])
    for name, (recognises, _) in FORMATS.items():
        if recognises(head):
            return name
    raise UserError(
        f"{path}: neither JSON lines nor 字<tab>标签, the first line is {head.line[:40]!r}; {remedy_of(path, head.line)}"
    )


def remedy_of(path, line):
    """What to do about a file whose first line is of no format."""
    if "\r" in line:
        return f"its lines end with a carriage return alone: tr '\\r' '\\n' < {path} > new.txt"
    if re.match(r"\d+-\d+\t\d+-\d+\t", line):
        return "it is WebAnno's TSV, as INCEpTION exports it; export CoNLL 2002 instead"
    if path.suffix.lower() in (".csv", ".tsv"):
        return "a table is not read; let the tool export JSON, or make it lines of 字<tab>标签"
    if "\u3000" in line and split_columns(line.replace("\u3000", "\t")):
        return f"part the columns with tabs, not with full-width blanks: sed 's/　/\\t/' {path} > new.txt"
    if re.fullmatch(r"\S[ \t]+\S+|\S+\t\S+", line.strip()):
        return f"a tag is O, or B-, I-, M-, E-, S-, L- or U- and a type, not {line.split()[1]!r}"
    return "see process.py --help"


def read_corpus(path, form, problems, ends="exclusive"):
    """Yield each Sentence of a corpus of the named format. UserError where there is none, or nothing was marked.

    ends: as read_json_sentences takes it; inclusive for no other format.
    """
    if ends == "inclusive" and form != "jsonl":
        raise UserError(f"--ends=inclusive: only JSON lines with an entity_list can be read so, and {path} is {form}")
    found = read_json_sentences(path, ends) if form == "jsonl" else FORMATS[form][1](path, problems)
    sentences = entities = 0
    before = Counter(problems)
    for sentence in found:
        if SURROGATE.search(sentence.text):
            raise UserError(f"{path}:{sentence.line}: half a character in {sentence.text[:40]!r}; correct the text")
        sentences += 1
        entities += len(sentence.marks)
        yield sentence
    if not sentences or not entities and form not in PLAIN:
        left_out = "，".join(
            f"{(LOSSES | REMARKS)[kind]} {count}" for kind, count in (Counter(problems) - before).items()
        )
        raise UserError(
            f"{path}: read as {form}, but no {'entity' if sentences else 'sentence'} is in it"
            f"{f' ({left_out})' if left_out else ''}; export what was annotated, or name another --format"
        )

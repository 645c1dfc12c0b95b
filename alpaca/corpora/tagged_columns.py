"""Two-column corpora: one token and its tag a line, an empty line after each sentence."""

import re
from itertools import accumulate
from typing import NamedTuple

from alpaca.common.errors import UserError
from alpaca.common.text_files import read_lines
from alpaca.corpora.sentences import Mark, Sentence

TAG = re.compile(r"O|([BIMES])[-_](.+)")


class TagSpan(NamedTuple):
    """An entity as its tags state it."""

    first: int  # tokens of the sentence, from 0
    end: int  # exclusive
    kind: str  # the type as the corpus writes it
    guessed: bool  # whether the tag that opens it was missing


def split_columns(line):
    """`字<tab or space>标签` -> (token, tag), None for any other line; a token that is lost was a blank."""
    token, _, tag = line.rstrip().rpartition("\t" if "\t" in line else " ")
    if len(token.split()) > 1 or not TAG.fullmatch(tag):
        return None
    return token or " ", tag


def read_tagged_sentences(path, problems):
    """Yield each Sentence of a two-column corpus."""
    rows = []
    for number, line in read_lines(path):
        columns = split_columns(line)
        if columns:
            rows.append((number, *columns))
        elif line.strip():
            raise UserError(
                f"{path}:{number}: expected 字<tab>标签, the tag O or B-, I-, M-, E- or S- and a type, got {line!r}"
            )
        elif rows:
            yield join_tokens(rows, path, problems)
            rows = []
    if rows:
        yield join_tokens(rows, path, problems)


def join_tokens(rows, path, problems):
    """[(line number, token, tag)] of one sentence -> Sentence."""
    numbers, tokens, tags = zip(*rows, strict=True)
    text, ends = "".join(tokens), [0, *accumulate(map(len, tokens))]
    marks = []
    for span in decode_tags(tags):
        begin, end, number = ends[span.first], ends[span.end], numbers[span.first]
        marks.append(Mark(begin, end, span.kind, text[begin:end], number))
        if span.guessed:
            problems.add("repaired", path, number, f"{tokens[span.first]} {tags[span.first]}")
    return Sentence(numbers[0], text, marks)


def decode_tags(tags):
    """BIO, BMES(O) or BIOES tags of a sentence -> list of TagSpan, in order."""
    spans, current = [], None
    for i, tag in enumerate(tags):
        prefix, kind = TAG.fullmatch(tag).groups()
        if prefix is None:
            current = None
            continue
        continues = prefix in "IME" and current == kind
        if continues:
            spans[-1] = spans[-1]._replace(end=i + 1)
        else:
            spans.append(TagSpan(i, i + 1, kind, prefix in "IME"))
        current = None if prefix in "ES" else kind
    return spans

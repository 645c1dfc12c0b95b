"""Corpora in columns: one token and its tag a line, an empty line after each sentence.

The token is the first column and the tag the last; CoNLL files have others between (part of speech, chunk). Blanks and
tabs part the columns, as many as there are. CoNLL-2003: https://www.clips.uantwerpen.be/conll2003/ner/

The Weibo corpus numbers the characters of each word (科0 技1 全0): the numbers are no text, and are taken off.
"""

import re
from itertools import accumulate, islice
from typing import NamedTuple

from alpaca.common.errors import UserError
from alpaca.common.text_files import read_lines
from alpaca.corpora.sentences import Mark, Sentence

TAG = re.compile(r"O|([BIMESLU])[-_](.+)")  # BIO, BMES(O), BIOES, BILOU
LATIN = re.compile("[A-Za-z0-9]")
DOCUMENT = "-DOCSTART-"  # CoNLL's token where a document begins
FEWEST, MOST, SHARE = 5, 100, 0.8  # so many first tokens, and such a part of them, say whether characters are numbered


class Columns(NamedTuple):
    """One line of a corpus in columns."""

    token: str
    tag: str
    count: int  # of the columns


class TagSpan(NamedTuple):
    """An entity as its tags state it."""

    first: int  # tokens of the sentence, from 0
    end: int  # exclusive
    kind: str  # the type as the corpus writes it
    guessed: bool  # whether the tag that opens it was missing


def split_columns(line):
    """A line -> Columns; None where its last column is no tag, or a token holds a blank and more.

    Only blanks and tabs part columns: a full-width blank or a no-break space may be a token. Where nothing but blanks
    stands before the tag, the first of them is the token; one that is lost was a blank. A type may hold blanks where
    nothing but tabs parts the columns: 梁<tab>B-Person Name.
    """
    line = line.rstrip()
    *before, tag = line.split("\t")
    if before and " " in tag and TAG.fullmatch(tag):
        token, *between = before
        if re.fullmatch(r"\S+|\s?", token) and not re.search(r"\s", "".join(between)):
            return Columns(token or " ", tag, 2 + sum(map(bool, between)))
    fields = re.findall(r"[^ \t]+", line)
    if not fields or not TAG.fullmatch(fields[-1]):
        return None
    if len(fields) == 1:
        before = line[: -len(fields[0])]
        return Columns(before[0] if len(before) > 1 else " ", fields[0], 2)
    token = fields[0]
    if any(field.strip() and field.split() != [field] for field in fields):  # another blank in or beside a column
        return None
    if "\t" in line and any(" " in column.strip(" ") for column in line.strip(" \t").split("\t")):
        return None  # New York<tab>B-LOC: two words, or three columns?
    return Columns(token, fields[-1], len(fields))


def is_heading(line):
    """Whether a line is CoNLL's mark of a new document or a comment rather than a token."""
    return line.startswith(DOCUMENT) or (line.startswith("#") and not split_columns(line))


def without_number(token, before):
    """A token of a file that numbers the characters of words -> (character, its number in its word); None without one.

    before: the number of the token before, -1 at the start of a sentence. A digit may be numbered too: 20 is 2 and 0. A number
    alone is that of a blank, which parts columns.
    """
    for number in (before + 1, 0):
        if token.endswith(str(number)) and token != str(number):
            return token.removesuffix(str(number)), number
    digits = re.fullmatch(r"(\D+)([0-9]+)", token)  # a character of the word before it is missing
    if digits:
        return digits[1], int(digits[2])
    return (" ", int(token)) if token in (str(before + 1), "0") else None


def first_tokens(path):
    """The first MOST tokens of a corpus in columns."""
    columns = (split_columns(line) for _, line in read_lines(path) if line.strip() and not is_heading(line))
    return [found.token for found in islice(columns, MOST) if found]


def are_counted(tokens):
    """Whether the tokens are their own numbers in their sentences, as in CoNLL-U: the characters are in the next column."""
    numbers = [int(token) if token.isdecimal() else -2 for token in tokens]
    return len(tokens) > 1 and all(n in (0, 1, before + 1) for before, n in zip([0, *numbers], numbers, strict=False))


def numbers_characters(tokens):
    """Whether the first tokens of a corpus end in their number in a word, and are Chinese; a few may be spoilt."""
    before, fitting = -1, 0
    for token in tokens:
        found = without_number(token, before) or ("", -1)
        fitting += found[1] in (0, before + 1) and found[0].strip() != ""
        before = found[1]
    return len(tokens) >= FEWEST and fitting >= SHARE * len(tokens) and not "".join(tokens).isascii()


def read_tagged_sentences(path, problems):
    """Yield each Sentence of a corpus in columns; UserError for a line with a tag missing or with more or fewer columns."""
    rows, count, before = [], None, -1
    tokens = first_tokens(path)
    if are_counted(tokens):
        raise UserError(
            f"{path}: the first column numbers the tokens, it must hold them; leave it out: "
            f"sed -E 's/^[0-9]+[ \\t]+//' {path} > new.txt"
        )
    numbered = numbers_characters(tokens)
    for number, line in read_lines(path):
        columns = split_columns(line)
        if is_heading(line) or (line.startswith("#") and count and columns.count != count):
            problems.add("heading", path, number, repr(line))
            if not line.startswith(DOCUMENT):
                continue
        if line.startswith(DOCUMENT) or not line.strip():
            if rows:
                yield join_tokens(rows, path, problems)
            rows, before = [], -1
            continue
        if not columns:
            raise UserError(
                f"{path}:{number}: expected 字<tab>标签, the tag O or B-, I-, M-, E- or S- and a type, got {line!r}"
            )
        if count is None and columns.count > 2:
            problems.add("columns", path, number, f"{columns.count} 列，{columns.token!r} 和 {columns.tag!r}")
        count = count or columns.count
        if columns.count != count:
            raise UserError(
                f"{path}:{number}: {columns.count} columns, but the lines before have {count}: {line!r}; correct the line"
            )
        token = columns.token
        if token == " " and len(line.rstrip()) < len(columns.tag) + 2:
            problems.add("lost_token", path, number, repr(line))
        if numbered:
            found = without_number(token, before)
            if not found:
                raise UserError(
                    f"{path}:{number}: the tokens before end in their number in a word, {token!r} does not; correct the line"
                )
            problems["numbered"] += 1
            token, before = found
        rows.append((number, token, columns.tag))
    if rows:
        yield join_tokens(rows, path, problems)


def needs_blank(before, token):
    """Whether two tokens are Latin words, which a blank has parted; two single letters are characters of one word."""
    return bool(LATIN.match(before[-1:]) and LATIN.match(token)) and len(before + token) > 2


def join_tokens(rows, path, problems):
    """[(line number, token, tag)] of one sentence -> Sentence. Blanks between Latin words are put back, and counted."""
    spaced = []
    for number, token, tag in rows:
        before = spaced[-1][1] if spaced else ""
        if needs_blank(before, token):
            spaced.append((number, " ", f"I-{tag[2:]}" if tag[0] in "IMEL" else "O"))
            problems["blank"] += 1
        spaced.append((number, token, tag))
    numbers, tokens, tags = zip(*spaced, strict=True)
    text, ends = "".join(tokens), [0, *accumulate(map(len, tokens))]
    marks = []
    for span in decode_tags(tags):
        begin, end, number = ends[span.first], ends[span.end], numbers[span.first]
        marks.append(Mark(begin, end, span.kind, text[begin:end], number))
        if span.guessed:
            problems.add("repaired", path, number, f"{tokens[span.first]} {tags[span.first]}")
    return Sentence(numbers[0], text, marks)


def decode_tags(tags):
    """BIO, BMES(O), BIOES or BILOU tags of a sentence -> list of TagSpan, in order."""
    spans, current = [], None
    for i, tag in enumerate(tags):
        prefix, kind = TAG.fullmatch(tag).groups()
        if prefix is None:
            current = None
            continue
        continues = prefix in "IMEL" and current == kind
        if continues:
            spans[-1] = spans[-1]._replace(end=i + 1)
        else:
            spans.append(TagSpan(i, i + 1, kind, prefix in "IMEL"))
        current = None if prefix in "ESLU" else kind
    return spans

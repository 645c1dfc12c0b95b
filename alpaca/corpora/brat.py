"""brat's standoff: the text in one file (.txt), what is marked in it in another (.ann).

    T1<tab>PER 4 7<tab>梁小雨              an entity, the end exclusive
    T2<tab>PER 0 2;5 7<tab>梁小 三人       one in several pieces
    R… E… *  relations and events;  A… M… N… #…  attributes, normalisations and notes

Offsets count the characters of the whole document. brat shows a line of the text as a sentence, and so it is read.
Source: brat's page on the standoff format and its server/src/annotation.py, read on 2026-11-27.
"""

import re
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

from alpaca.common.errors import UserError
from alpaca.corpora.sentences import Mark, Sentence

ENTITY = re.compile(r"T\S*\t(\S+) (\d+ \d+(?:;\d+ \d+)*)(?:\t(.*))?")
OTHERS = {"R": "relation", "E": "relation", "*": "relation"} | dict.fromkeys("AMN#", "attribute")
BOM = "\ufeff"


def is_brat(head):
    path = Path(head.path)
    return path.is_dir() or path.suffix == ".ann" or path.suffix == ".txt" and path.with_suffix(".ann").is_file()


def read_brat(path, problems):
    """Yield each line of the documents as a Sentence. path: an .ann, a .txt with its .ann, or a folder of them."""
    for ann in _annotation_files(Path(path), problems):
        yield from _read_document(ann, ann.with_suffix(".txt"), problems)


def _annotation_files(path, problems):
    files = sorted(path.rglob("*.ann")) if path.is_dir() else [path.with_suffix(".ann")]
    if not files:
        raise UserError(f"{path}: no .ann file in this folder; name a file, or a folder of brat's .txt and .ann files")
    for ann in files:
        if not ann.is_file():
            raise UserError(f"{ann}: no such file; brat writes what is marked there, beside the .txt")
        if not ann.with_suffix(".txt").is_file():
            raise UserError(f"{ann}: {ann.stem}.txt is missing; the text is there, put both into one folder")
    for text in sorted(path.rglob("*.txt")) if path.is_dir() else ():
        if text.with_suffix(".ann") not in files:
            problems.add("unannotated", text, 1, f"没有 {text.stem}.ann")
    return files


def _read_document(ann, txt, problems):
    marks = list(_read_marks(ann, problems))
    text = _text_that_fits(txt, marks, problems)
    lines = text.split("\n")
    starts = [0, *accumulate(len(line) + 1 for line in lines)][:-1]
    of_line = [[] for _ in lines]
    for begin, end, tag, entity, number in marks:
        place = bisect_right(starts, begin) - 1
        first, content = _content(starts[place], lines[place])
        entity = text[begin:end] if entity is None else entity
        crosses = first + len(content) < end <= len(text)
        if crosses and entity.split() == text[begin:end].split():  # brat writes a blank for a line end
            problems.add("newline", ann, number, repr(entity))
        elif crosses or not content.strip():
            problems.add("mismatch", ann, number, f"{entity!r}，文本 [{begin}, {end}) 处是 {text[begin:end]!r}")
        else:
            of_line[place].append(Mark(begin - first, end - first, tag, entity, number))
    for number, (start, line) in enumerate(zip(starts, lines, strict=True), 1):
        content = _content(start, line)[1]
        if content.strip():
            yield Sentence(number, content, of_line[number - 1], ann)


def _content(start, line):
    """(where a line's text begins, the text without byte order mark and carriage return)"""
    mark = line.startswith(BOM) and start == 0
    return start + mark, line[mark:].rstrip("\r")


def _read_marks(ann, problems):
    """Yield the (begin, end, type, entity or None, line number) of an .ann; what else it holds is counted."""
    for number, line in enumerate(_decode(ann).removeprefix(BOM).split("\n"), 1):
        line = line.rstrip("\r")
        if not line.strip():
            continue
        if line[0] in OTHERS:
            problems[OTHERS[line[0]]] += 1
            continue
        entity = ENTITY.fullmatch(line)
        if not entity:
            raise UserError(
                f"{ann}:{number}: expected T1<tab>TYPE begin end<tab>text (or R, E, *, A, M, N, #), got {line[:60]!r}"
            )
        tag, places, stated = entity.groups()
        if ";" in places:
            problems.add("discontinuous", ann, number, f"{stated} {places}")
            continue
        yield *map(int, places.split()), tag, stated or None, number


def _text_that_fits(txt, marks, problems):
    """The text as the offsets count it: with a Windows line end as two characters or one, with the BOM or without."""
    raw = _decode(txt)
    texts = [raw, raw.replace("\r\n", "\n")] if "\r\n" in raw else [raw]
    texts += [text.removeprefix(BOM) for text in texts if text.startswith(BOM)]
    text = max(texts, key=lambda text: sum(text[begin:end] == entity for begin, end, _, entity, _ in marks))
    if "\r\n" in raw and marks:
        problems.add("crlf", txt, 1, f"下标把一个换行算作 {2 if chr(13) in text else 1} 个字符")
    return text


def _decode(path):
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start}); re-encode it") from None

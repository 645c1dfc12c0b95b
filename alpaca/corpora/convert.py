"""A corpus file -> examples of instruction data."""

import re
from typing import NamedTuple

from tqdm import tqdm

from alpaca.common.errors import UserError
from alpaca.corpora.formats import read_corpus
from alpaca.corpora.offsets import in_characters, other_counts, refuse_misfits, stands_at
from dataset import format_answer

INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u00ad\u200b-\u200f\u2060\ufeff]"
)  # controls, zero-width marks, soft hyphens


class Task(NamedTuple):
    """What sentences are turned into."""

    labels: dict  # the corpus's tag -> the name of the type in answers, None: left out
    instruct: str
    query_prefix: str


def example_of_sentence(sentence, path, task, problems):
    """A Sentence -> an example of instruction data; entities that cannot be answered with are left out and reported."""
    text, entities = sentence.text, []
    if found := INVISIBLE.search(text):
        problems.add("invisible", path, sentence.line, f"{found.group()!r}，第 {found.start()} 个字符")
    for begin, end, tag, entity, line in sentence.marks:
        if tag not in task.labels:
            problems.unknown_types.setdefault(tag, f"{path}:{line}")
            continue
        problems.used_types.add(tag)
        if task.labels[tag] is None:
            problems.add("left_out", path, line, f"{entity!r}，{tag}")
        elif not stands_at(text, begin, end, entity):
            place = f"{entity!r}，文本 [{begin}, {end}) 处是 {text[max(begin, 0) : end]!r}"
            others = other_counts(text, begin, end, entity)
            problems.add("mismatch", path, line, place + (f"；{others[0]} 就相符" if others else ""))
        elif "\n" in entity or "\r" in entity:
            problems.add("newline", path, line, repr(entity))
        elif not entity.strip():
            problems.add("blank_entity", path, line, repr(entity))
        else:
            entities.append({"entity": entity, "type": task.labels[tag], "begin": begin, "end": end})
    entities.sort(key=lambda e: (e["begin"], -e["end"]))
    return {
        "instruct": task.instruct,
        "query": task.query_prefix + text,
        "answer": format_answer(entities),
        "text": text,
        "entities": [e for i, e in enumerate(entities) if e not in entities[:i]],
    }


def with_characters(sentence, path, problems):
    """The Sentence with those of its offsets that count UTF-16 units converted, and counted."""
    marks = []
    for mark in sentence.marks:
        fits = stands_at(sentence.text, mark.begin, mark.end, mark.entity)
        converted = None if fits else in_characters(sentence.text, mark)
        if converted:
            problems.add("utf16", path, mark.line, f"{mark.entity!r} [{mark.begin}, {mark.end})")
        marks.append(converted or mark)
    return sentence._replace(marks=marks)


def convert(path, form, task, problems, ends="exclusive"):
    """A corpus -> list of examples, in the order of the file.

    form: a name of FORMATS; ends: whether the end of an entity in JSON lines is the character behind it (exclusive) or
    its last one (inclusive).
    """
    sentences = read_corpus(path, form, problems, ends)
    examples, marks, misfits = [], 0, []
    for sentence in tqdm(sentences, desc=str(path), unit=" 句", delay=1, disable=None):
        if sentence.text.strip():
            sentence = with_characters(sentence, sentence.path or path, problems)
            marks += len(sentence.marks)
            misfits += [
                (sentence.text, m) for m in sentence.marks if not stands_at(sentence.text, m.begin, m.end, m.entity)
            ]
            examples.append(example_of_sentence(sentence, sentence.path or path, task, problems))
        else:
            problems.add("empty", path, sentence.line, repr(sentence.text))
    refuse_misfits(path, marks, misfits)
    if not examples:
        raise UserError(f"{path}: no sentence in it")
    return examples

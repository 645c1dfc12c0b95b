"""Documents that are too long to train on, cut at sentence ends as predict.py cuts what it answers."""

from functools import partial
from typing import NamedTuple

from alpaca.models.cut_text import cut_text, room_for_text, token_ends
from alpaca.models.templates import encode_examples
from dataset import format_answer


class CutDocuments(NamedTuple):
    """Examples of which none is too long, as far as that can be had."""

    examples: list
    documents: int  # how many were cut
    parts: int  # into how many
    inside: int  # how many of the cuts are inside a sentence
    lost: int  # entities that are longer than a window


def cut_long(examples, task, tokenizer, max_seq_length):
    """Cut the examples of a corpus (convert.Task's) that have more than max_seq_length tokens -> CutDocuments."""
    room = room_for_text(tokenizer, task.instruct, task.query_prefix, max_seq_length)
    lengths = count_tokens(tokenizer, examples)
    kept, documents, parts, inside, lost = [], 0, 0, 0, 0
    for example, length in zip(examples, lengths, strict=True):
        if length <= max_seq_length or room < 1:
            kept.append(example)
            continue
        cut, windows = cut_document(example, task, tokenizer, room, max_seq_length)
        kept += windows
        documents, parts, inside = documents + 1, parts + len(windows), inside + len(cut.inside)
        lost += len(example["entities"]) - sum(len(window["entities"]) for window in windows)
    return CutDocuments(kept, documents, parts, inside, lost)


def count_tokens(tokenizer, examples):
    """The tokens of each example, prompt and answer."""
    return [len(e.prompt_ids) + len(e.answer_ids) for e in encode_examples(tokenizer, examples)]


def cut_document(example, task, tokenizer, room, max_seq_length):
    """One example -> (the Cut of its text, the examples of the windows).

    Many entities make an answer of more than half the text's tokens: the windows are then made smaller.
    """
    text, keep = example["text"], [(e["begin"], e["end"]) for e in example["entities"]]
    while True:
        cut = cut_text(text, partial(token_ends, tokenizer), room, keep=keep)
        windows = [part_of(example, w, task) for w in cut.windows if text[w.begin : w.end].strip()]
        if room < 2 or max(count_tokens(tokenizer, windows)) <= max_seq_length:
            return cut, windows
        room = room * 3 // 4


def part_of(example, window, task):
    """The example of a window: its text and the entities that are whole in it."""
    begin, end = window
    inside = [e for e in example["entities"] if begin <= e["begin"] and e["end"] <= end]
    entities = [e | {"begin": e["begin"] - begin, "end": e["end"] - begin} for e in inside]
    text = example["text"][begin:end]
    return {
        "instruct": task.instruct,
        "query": task.query_prefix + text,
        "answer": format_answer(entities),
        "text": text,
        "entities": entities,
    }

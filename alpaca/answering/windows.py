"""Texts longer than the model is to read: an example a window, and the windows' rows joined again."""

from functools import lru_cache, partial
from typing import NamedTuple

from alpaca.answering.predictions import quoted_text
from alpaca.common.console import say
from alpaca.models.cut_text import Window, cut_text, room_for_text, token_ends
from alpaca.models.layers import positions_of
from alpaca.scoring.calibration import with_confidence
from dataset import NO_ENTITY, gold_entities, task_of


class CutExample(NamedTuple):
    """An example as it is answered."""

    parts: list  # an example for each window; the example itself where its text is one window; none where it is blank
    windows: list  # of Window, in its text
    inside: list  # those of the windows' ends that are inside a sentence, in characters


def join_rows(text, windows, rows):
    """The rows of predictions.jsonl of a text's windows -> that of the text, with the offsets in it.

    An entity that several windows name has the spans of all and the probability of the surest. A window that was too long
    to be answered counts as an answer that was cut; where no window was answered, the text was not. What the answer is
    compared with (`answer`, `gold`) is not the windows' and left to the caller.
    """
    entities, problems = {}, {}
    answered = [row for row in rows if row["prediction"] is not None]
    if len(answered) < len(rows):
        problems["cut"] = len(rows) - len(answered)
    for (begin, _), row in zip(windows, rows, strict=True):
        for entity in row["entities"]:
            spans = [[begin + first, begin + last] for first, last in entity["spans"]]
            known = entities.setdefault((entity["entity"], entity["type"]), {**entity, "spans": []})
            known["spans"] += spans
            known["log_probability"] = max(known["log_probability"], entity["log_probability"])
        for name, count in row.get("problems", {}).items():
            problems[name] = problems.get(name, 0) + count
    lines = dict.fromkeys(line for row in answered for line in row["prediction"].split("\n") if line)
    lines.pop(NO_ENTITY, None)
    joined = {"text": text, "answer": None, "prediction": None, "entities": list(entities.values())}
    if answered:
        joined["prediction"] = "\n".join(lines) or NO_ENTITY
        joined["log_probability"] = round(sum(row["log_probability"] for row in answered), 4)
    return {**joined, "problems": problems} if problems and answered else joined


def cutter(model, tokenizer, train_args, facts):
    """A function from a list of examples (dataset.example_of_input) to their CutExamples, in order.

    train_args, facts: the adapter's (None, {}: the base alone). Its max_seq_length limits the tokens of a prompt with its
    answer, its text_tokens is how long texts usually were: on longer ones a model misses most entities, so windows are
    not made longer. Of another task than NER nothing is cut: the answers to the halves of a question are no answer to it.
    """
    labels, _, _ = task_of(facts)
    positions = positions_of(model.config)
    room = min(train_args.max_seq_length, positions) if train_args else positions
    limit_of = lru_cache(64)(lambda instruct, prefix: room_for_text(tokenizer, instruct, prefix, room))
    ends_of = partial(token_ends, tokenizer)

    def cut(example, tokens):
        text, query = example["text"], example["query"]
        if not example.get("asks", True):
            return CutExample([], [], [])
        if labels is None or not query.endswith(text):  # another task; a query of the user's own
            return whole(example)
        prefix = query[: len(query) - len(text)]
        limit = limit_of(example["instruct"], prefix)
        usual = min(facts.get("text_tokens") or limit, limit)
        if limit < 1 or tokens <= usual:
            return whole(example)
        windows, inside = cut_text(text, ends_of, limit, usual)
        if len(windows) == 1:
            return whole(example)
        texts = [text[begin:end] for begin, end in windows]
        return CutExample([{**example, "text": t, "query": prefix + t, "answer": None} for t in texts], windows, inside)

    def cut_all(examples):
        if labels is None:
            return [cut(example, 0) for example in examples]
        counts = map(len, tokenizer.encode_texts([example["text"] for example in examples]))
        return [cut(example, tokens) for example, tokens in zip(examples, counts, strict=True)]

    return cut_all


def say_cuts(cuts):
    """Say how many texts are answered in windows, where some are."""
    if long := [cut for cut in cuts if len(cut.parts) > 1]:
        inside = sum(len(cut.inside) for cut in long)
        say(f"{len(long)} 条比训练的文本长，像 predict.py 那样在句末切开回答（{inside} 处没有句末，切在句子里面）")


def whole(example):
    """An example that is not cut."""
    return CutExample([example], [Window(0, len(example["text"]))], [])


def row_of_text(example, cut, rows, calibration=None, nested=False, instructs=None):
    """An example's row of predictions.jsonl, from those of its parts: behind its own keys, with what is right for it, where
    known, and with confidences. calibration: of scoring/calibration.py, or None; it is for answers that a grammar holds, see
    predictions.held_instructs. nested: as in dataset.nests."""
    if not rows:
        row = {"text": example["text"], "answer": example["answer"], "prediction": "", "entities": []}
    elif len(rows) == 1:
        (row,) = rows
    else:
        row = join_rows(example["text"], cut.windows, rows)
        if example["answer"] is not None:
            row |= {"answer": example["answer"], "gold": gold_entities(example, nested)}
    calibration = calibration if quoted_text(example, instructs) is not None else None
    return {**example.get("own", {}), **with_confidence(row, calibration)}

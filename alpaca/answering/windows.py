"""Texts longer than the model is to read: cut at sentence ends into windows, and the windows' rows joined again."""

import re
from bisect import bisect_left

from dataset import NO_ENTITY, build_prompt, encode_prompts, gold_entities, task_of

# After what a text may be cut, best first: an entity goes across none of the first, and seldom across the second.
CLOSING = "[”’』」）)\\]】》\"']*"
SENTENCE_END = re.compile(rf"[。！？!?…；;]+{CLOSING}|\.{CLOSING}(?=\s)|\n")
CLAUSE_END = re.compile(rf"[，、：:,]+{CLOSING}|\s+|(?<=[）》」』”])")


def cut(text, fits, usual=None):
    """Windows of a text: [(begin, end)], in order and without gaps, and of those ends the ones inside a sentence.

    fits, usual: whether the model can read a part of the text, and whether the part is no longer than texts usually are
    (None: the same); true of a part, they are true of its beginnings. A window is as many whole sentences as are usual,
    or else one that fits; where not even one does, it ends after a clause; where there is no such place, anywhere.
    """
    usual = usual or fits
    if usual(text):
        return [(0, len(text))], []
    windows, inside, begin = [], [], 0
    while begin < len(text):
        end = begin + _longest(text[begin:], fits)
        ends = _ends(SENTENCE_END, text, begin, end) + [end] * (end == len(text))
        if ends:
            end = max((last for last in ends if usual(text[begin:last])), default=ends[0])
        else:
            end = max(_ends(CLAUSE_END, text, begin, end), default=end)
            inside.append(end)
        windows.append((begin, end))
        begin = end
    return windows, inside


def _longest(text, fits):
    """How many characters of the text fit; at least one, so that there is an end to it."""
    reach = 64
    while reach < len(text) and fits(text[:reach]):
        reach *= 2
    reach = min(reach, len(text))
    return max(bisect_left(range(1, reach + 1), True, key=lambda n: not fits(text[:n])), 1)


def _ends(pattern, text, begin, end):
    """Where the matches end that end in (begin, end], in order."""
    return [match.end() for match in pattern.finditer(text, begin, end) if match.end() > begin]


def join_rows(text, windows, rows):
    """The rows of predictions.jsonl of a text's windows -> that of the text, with the offsets in it.

    An entity that several windows name has the spans of all and the confidence of the surest. What the answer is
    compared with (`answer`, `gold`) is not the windows' and left to the caller.
    """
    entities, problems = {}, {}
    for (begin, _), row in zip(windows, rows, strict=True):
        for entity in row["entities"]:
            spans = [[begin + first, begin + last] for first, last in entity["spans"]]
            known = entities.setdefault((entity["entity"], entity["type"]), {**entity, "spans": []})
            known["spans"] += spans
            known["confidence"] = max(known["confidence"], entity["confidence"])
        for name, count in row.get("problems", {}).items():
            problems[name] = problems.get(name, 0) + count
    lines = dict.fromkeys(line for row in rows for line in (row["prediction"] or "").split("\n") if line)
    lines.pop(NO_ENTITY, None)
    joined = {
        "text": text,
        "answer": None,
        "prediction": None if any(row["prediction"] is None for row in rows) else "\n".join(lines) or NO_ENTITY,
        "entities": list(entities.values()),
    }
    if joined["prediction"] is not None:
        joined["log_probability"] = round(sum(row["log_probability"] for row in rows), 4)
    return {**joined, "problems": problems} if problems else joined


def cut_examples(examples, model, tokenizer, train_args, facts):
    """Each example (dataset.to_example) -> (the examples of its windows, their offsets, what was cut inside a sentence).

    train_args, facts: the adapter's (None, {}: the base alone), whose training says how long a prompt with its answer
    may be and how long texts usually are: on longer ones a model misses most, so sentences are not joined to more. Of
    another task than NER nothing is cut: the answers to the halves of a question are no answer to it.
    """
    labels, _, _ = task_of(facts)
    if labels is None:
        return [_whole(example) for example in examples]
    positions = model.config.max_position_embeddings
    room = min(train_args.max_seq_length, positions) if train_args else positions
    return [_cut_example(example, tokenizer, room, facts.get("text_tokens")) for example in examples]


def _cut_example(example, tokenizer, room, usual):
    """A window leaves the answer half as many tokens as its text has. room, usual: tokens of a prompt with its answer,
    and of a text."""
    text, query = example["text"], example["query"]
    if not query.endswith(text):  # a query of the user's own
        return _whole(example)
    prefix = query[: len(query) - len(text)]
    (empty,) = encode_prompts(tokenizer, [build_prompt(example["instruct"], prefix)])
    limit = 2 * (room - len(empty)) // 3
    if limit < 1:  # the instruction alone is too long
        return _whole(example)
    usual = min(usual or limit, limit)

    def within(limit):
        return lambda part: len(tokenizer.encode_texts([part])[0]) <= limit

    windows, inside = cut(text, within(limit), within(usual))
    if len(windows) == 1:
        return _whole(example)
    parts = [text[begin:end] for begin, end in windows]
    return [{**example, "text": part, "query": prefix + part, "answer": None} for part in parts], windows, inside


def _whole(example):
    return [example], [(0, len(example["text"]))], []


def rows_of_texts(examples, cuts, rows):
    """Yield each example's row, from the rows of its windows (an iterator over those of all, in order) and cut_examples'
    cuts; with what is right for it, where known."""
    for example, (_, windows, _) in zip(examples, cuts, strict=True):
        if len(windows) == 1:
            yield next(rows)
            continue
        row = join_rows(example["text"], windows, [next(rows) for _ in windows])
        if example["answer"] is not None:
            row |= {"answer": example["answer"], "gold": gold_entities(example)}
        yield row

"""Texts longer than the model is to read: cut at sentence ends into windows, and the windows' rows joined again."""

import re
from bisect import bisect_left

from dataset import NO_ENTITY

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

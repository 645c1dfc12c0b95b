"""A text that is longer than a model is to read, cut at sentence ends."""

import re
from bisect import bisect_left
from typing import NamedTuple

from dataset import build_prompt, encode_prompts

# After what a text may be cut, best first: an entity goes across none of the first, and seldom across the second.
CLOSING = "[”’』」）)\\]】》\"']*"
SENTENCE_END = re.compile(rf"[。！？!?…；;]+{CLOSING}|\.{CLOSING}(?=\s)|\n")
CLAUSE_END = re.compile(rf"[，、：:,]+{CLOSING}|\s+|(?<=[）》」』”])")


class Window(NamedTuple):
    """A part of a text."""

    begin: int  # characters of the text, from 0
    end: int  # exclusive


class Cut(NamedTuple):
    """A text in windows."""

    windows: list  # of Window, in order and without gaps
    inside: list  # those of the windows' ends that are inside a sentence


def cut_text(text, count_tokens, room, usual=None, keep=()):
    """Cut a text into windows of at most `room` tokens -> Cut.

    count_tokens: str -> int, which must not fall as the text grows (the longest part that fits is found by bisection). usual: how many
    tokens texts usually have (None: `room`). A window is as many whole sentences as have at most `usual` tokens
    together, but at least one sentence. A sentence of more than `room` tokens is cut after a clause or, where there is
    no clause, anywhere. keep: [(begin, end)] of the text, which no window's end goes across if each fits into one.
    """
    usual = room if usual is None else usual
    if count_tokens(text) <= usual:
        return Cut([Window(0, len(text))], [])
    windows, inside, begin = [], [], 0
    while begin < len(text):
        end = begin + _longest(text[begin:], count_tokens, room)
        ends = _ends(SENTENCE_END, text, begin, end, keep) + [end] * (end == len(text))
        if ends:
            end = max((last for last in ends if count_tokens(text[begin:last]) <= usual), default=ends[0])
        else:
            end = max(_ends(CLAUSE_END, text, begin, end, keep), default=_before(keep, begin, end))
            inside.append(end)
        windows.append(Window(begin, end))
        begin = end
    return Cut(windows, inside)


def _longest(text, count_tokens, room):
    """How many characters of the text have at most `room` tokens; at least one, so that every window ends."""
    reach = 64
    while reach < len(text) and count_tokens(text[:reach]) <= room:
        reach *= 2
    reach = min(reach, len(text))
    return max(bisect_left(range(1, reach + 1), True, key=lambda n: count_tokens(text[:n]) > room), 1)


def _ends(pattern, text, begin, end, keep):
    """Where the matches end that end in (begin, end] and across nothing of `keep`, in order."""
    ends = [match.end() for match in pattern.finditer(text, begin, end) if match.end() > begin]
    return [last for last in ends if not any(b < last < e for b, e in keep)]


def _before(keep, begin, end):
    """The last place up to `end` that is across nothing of `keep`; `end` where there is none behind `begin`."""
    place = end
    while across := [b for b, e in keep if b < place < e]:
        place = min(across)
    return place if place > begin else end


def room_for_text(tokenizer, instruct, query_prefix, length):
    """How many tokens a text may have for its example to have `length`: the answer gets half as many as the text.

    Less than 1 where the instruction alone is too long.
    """
    (empty,) = encode_prompts(tokenizer, [build_prompt(instruct, query_prefix)])
    return 2 * (length - len(empty)) // 3

"""A text that is longer than a model is to read, cut at sentence ends."""

import re
from bisect import bisect_left, bisect_right
from itertools import accumulate
from typing import NamedTuple

from alpaca.models.templates import encode_prompts, message_of

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


def token_ends(tokenizer, text):
    """Where each of a text's tokens ends, in characters; 0 for a space that the tokenizer puts before the text."""
    (ids,) = tokenizer.encode_texts([text])
    ends = list(accumulate(len(tokenizer.token_bytes[token]) for token in ids))
    before = (ends[-1] if ends else 0) - len(text.encode())
    starts = list(accumulate((len(character.encode()) for character in text), initial=0))
    return [min(bisect_left(starts, max(end - before, 0)), len(text)) for end in ends]


def cut_text(text, ends_of, room, usual=None, keep=()):
    """Cut a text into windows of at most `room` tokens -> Cut.

    ends_of: from a text to the ends of its tokens (token_ends); it is asked once for the whole text, and for each window
    once, since a part may have a token more than it has within the text. usual: how many tokens texts usually have
    (None: `room`). A window is as many whole sentences as have at most `usual` tokens together, but at least one
    sentence. A sentence of more than `room` tokens is cut after a clause or, where there is no clause, anywhere. keep:
    [(begin, end)] of the text, which no window's end goes across if each fits into one.
    """
    usual, ends = room if usual is None else usual, ends_of(text)
    if len(ends) <= usual:
        return Cut([Window(0, len(text))], [])
    before = bisect_right(ends, 0)  # tokens of no character, which every window has
    windows, inside, begin = [], [], 0
    while begin < len(text):
        most = room
        while True:
            end, is_inside = _window_end(text, begin, ends, most - before, usual - before, keep)
            excess = len(ends_of(text[begin:end])) - room
            if excess <= 0 or most <= before + 1:
                break
            most = min(most, bisect_right(ends, end) - bisect_right(ends, begin) + before) - excess
        windows.append(Window(begin, end))
        inside += [end] * is_inside
        begin = end
    return Cut(windows, inside)


def _window_end(text, begin, ends, room, usual, keep):
    """(where the window ends that begins there, whether that is inside a sentence). ends: of the text's tokens."""
    first = bisect_right(ends, begin)

    def reach(tokens):
        """How far so many tokens go; at least a character, so that every window ends."""
        last = first + max(tokens, 1)
        if last >= len(ends):
            return len(text)
        return max(ends[last - 1] if ends[last] > ends[last - 1] else ends[last] - 1, begin + 1)

    end = reach(room)
    sentences = _ends(SENTENCE_END, text, begin, end, keep) + [end] * (end == len(text))
    if sentences:
        whole = bisect_right(sentences, reach(usual))
        return sentences[max(whole - 1, 0)], False
    return max(_ends(CLAUSE_END, text, begin, end, keep), default=_before(keep, begin, end)), True


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
    (empty,) = encode_prompts(tokenizer, [message_of(instruct, query_prefix)])
    return 2 * (length - len(empty)) // 3

"""What prompts begin with together: it is read once, kept once, and attended to once for all rows that begin with it.

Prompts of one instruction share all up to their text. Where there are several instructions, each group of prompts has
what it shares, not only what all of them do.
"""

from collections import namedtuple
from os.path import commonprefix

# Of the prefixes of some prompts, which one; its tokens; where they begin in Slots.shared.
Prefix = namedtuple("Prefix", "number tokens begin")
NO_PREFIX = Prefix(0, (), 0)
LEAST_TOKENS, LEAST_ROWS = 16, 4  # so many more tokens, of so many rows, are worth a prefix of their own
MOST_PREFIXES = 16  # each is a sequence of its own to flash attention, in every step


def find_prefixes(prompts):
    """(the Prefix list of these prompts, that of each prompt). Never with the last token of any, which is to be read."""
    if len(prompts) < 2:
        return [NO_PREFIX], [NO_PREFIX] * len(prompts)
    candidates = [(0, [])]  # tokens saved, prefix; the first is for prompts that nothing else fits
    _collect(sorted(prompts), 0, candidates)
    chosen = [tokens for _, tokens in sorted(candidates[1:], reverse=True)[:MOST_PREFIXES]]
    longest_first = sorted([[], *chosen], key=len, reverse=True)
    starts = [next(i for i, start in enumerate(longest_first) if begins(prompt, start)) for prompt in prompts]
    prefixes, begin = {}, 0
    for i in sorted(set(starts)):
        prefixes[i] = Prefix(len(prefixes), longest_first[i], begin)
        begin += len(longest_first[i])
    return list(prefixes.values()), [prefixes[i] for i in starts]


def begins(prompt, start):
    """Whether a prompt begins with these tokens, and goes on."""
    return len(start) < len(prompt) and prompt[: len(start)] == list(start)


def _collect(prompts, kept, candidates):
    """Note what sorted prompts share beyond the first `kept` tokens, and then what groups of them do."""
    shared = commonprefix([prompts[0], prompts[-1]])[: min(map(len, prompts)) - 1]
    if not kept or len(shared) - kept >= LEAST_TOKENS:
        candidates.append((len(prompts) * (len(shared) - kept), shared))
        kept = len(shared)
    begin = 0
    for end in range(1, len(prompts) + 1):
        if end == len(prompts) or prompts[end][len(shared)] != prompts[begin][len(shared)]:
            if LEAST_ROWS <= end - begin < len(prompts):
                _collect(prompts[begin:end], kept, candidates)
            begin = end

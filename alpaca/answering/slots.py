"""The memory for the keys and values of the rows being answered: slots of one size, of which a row takes what it needs.

What all prompts begin with is kept once, beside the slots. A row's own tokens stand in neighbouring slots, so that they
are one piece of memory; a row that outgrows its slots takes the next one, or moves to where there are enough.
Each layer's memory is on the layer's device.
"""

import math
from itertools import groupby

import numpy
import torch

from alpaca.answering.memory import free_memory
from alpaca.answering.prefixes import NO_PREFIX

MEMORY_SHARE = 0.4  # of the free memory, for the slots
PLACES = 16  # a slot holds a multiple of so many tokens
SHARED_PLACES = 256  # the prefixes get a multiple of so many, so that what was compiled for one work fits another
USUAL = 0.9  # so many of the prompts fit into one slot, with a short answer
ANSWER_PLACES = 32  # what a short answer takes
SLOTS_PER_ROW = 4  # at most, on average; rows for which there are none wait


def slot_places(rows):
    """How many tokens a slot holds, that most of the rows need no second one."""
    lengths = sorted(row.own(len(row.prompt)) for row in rows)
    usual = lengths[int(USUAL * (len(lengths) - 1))] + ANSWER_PLACES
    longest = longest_row(rows)
    return -(-max(min(usual, longest), 1) // PLACES) * PLACES


def longest_row(rows):
    """The most tokens of its own that a row may come to."""
    return max(row.own(row.limit) for row in rows)


def device_runs(layers):
    """[(device, how many of a model's layers in a row are on it)]."""
    devices = (next(layer.parameters()).device for layer in layers)
    return [(device, len(list(run))) for device, run in groupby(devices)]


def zeros(shape, dtype, device):
    """As torch.zeros; on a CPU in memory that takes neither time nor room before it is written to."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(numpy.zeros(math.prod(shape) * dtype.itemsize, numpy.uint8)).view(dtype).view(shape)


class Slots:
    """`count` slots of `places` tokens each. runs: see device_runs.

    kept: keys and values, for each run [layers, 2, slots, places, heads, size]; by_heads: [layers, 2, slots, heads, places,
    size]. shared: those of `prefixes`, one behind the other, for each run [layers, 2, tokens, heads, size], or by heads.
    spare: how many slots there are beyond `count`, which no row takes: what padding leaves behind goes there. longest:
    tokens that a row may come to, where there will be others than `rows`.
    """

    def __init__(self, config, runs, dtype, rows, at_once, by_heads, spare=0, longest=None):
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads, self.heads, self.dtype, self.spare = config.num_key_value_heads, config.num_key_value_heads, dtype, spare
        self.places, self.by_heads = slot_places(rows), by_heads
        own = -(-(longest or longest_row(rows)) // self.places)  # slots of the longest row there may be
        prefix = max(len(row.prefix.tokens) for row in rows)
        of_layer = 2 * heads * size * dtype.itemsize * self.places
        in_memory = min(int(MEMORY_SHARE * free_memory(device)) // (of_layer * layers) for device, layers in runs)
        least = max(own, -(-prefix // self.places))  # one row can always end, and a prefix be read
        wanted = min(own, SLOTS_PER_ROW) * at_once
        if in_memory < wanted:  # a multiple, so that what was compiled for it fits a later one too
            wanted = in_memory // at_once * at_once or in_memory
        self.count = max(least, wanted)
        shape = (heads, self.places) if by_heads else (self.places, heads)
        # Zeros: what a row has not written yet is multiplied by 0, and 0 times not-a-number would not be 0.
        shape = [2, self.count + spare, *shape, size]
        self.kept = [zeros([layers, *shape], dtype, device) for device, layers in runs]
        none = (heads, 0) if by_heads else (0, heads)
        self.shared = [kept.new_zeros(len(kept), 2, *none, size) for kept in self.kept]
        self.prefixes = [NO_PREFIX]
        self.taken = [False] * self.count

    def of_layers(self):
        """Yield (kept, shared) of each layer."""
        for kept, shared in zip(self.kept, self.shared, strict=True):
            yield from zip(kept, shared, strict=True)

    def take_out(self, row):
        """A copy of what a row holds, shaped as `shared`; its slots are free again."""
        kept = [kept[:, :, row.first : row.first + row.width] for kept in self.kept]
        if self.by_heads:
            held = [part.transpose(2, 3).flatten(3, 4)[:, :, :, : row.read].clone() for part in kept]
        else:
            held = [part.flatten(2, 3)[:, :, : row.read].clone() for part in kept]
        self.release(row)
        return held

    @property
    def shared_places(self):
        return self.shared[0].shape[3 if self.by_heads else 2]

    def share(self, prefixes, held):
        """Keep these prefixes from now on. held: what take_out gave of a row of each. In the memory that there is, if it
        is enough: captured steps read it."""
        places, dim = sum(len(prefix.tokens) for prefix in prefixes), 3 if self.by_heads else 2
        if places > self.shared_places:
            room = places if self.by_heads else -(-places // SHARED_PLACES) * SHARED_PLACES
            self.shared = [
                shared.new_zeros([*shared.shape[:dim], room, *shared.shape[dim + 1 :]]) for shared in self.shared
            ]
        for shared, parts in zip(self.shared, zip(*held, strict=True), strict=True):
            shared.narrow(dim, 0, places).copy_(torch.cat(parts, dim=dim))
        self.prefixes = prefixes

    def release_all(self):
        self.taken, self.prefixes = [False] * self.count, [NO_PREFIX]

    def give(self, row, tokens):
        """Let a row have slots for so many tokens of its own, those that it holds included; False if there are none."""
        width = max(-(-tokens // self.places), 1)
        if width <= row.width:
            return True
        old, self.taken[slice(*_ends(row))] = _ends(row), [False] * row.width
        first = self._run(width, row.first)
        if first is None:
            self.taken[slice(*old)] = [True] * row.width
            return False
        if row.width and first != row.first:
            for kept in self.kept:
                kept[:, :, first : first + row.width] = kept[:, :, slice(*old)].clone()  # the two may overlap
        row.first, row.width = first, width
        self.taken[slice(*_ends(row))] = [True] * width
        return True

    def _run(self, width, here=None):
        """The first of `width` free slots in a row: those from `here` on, if they are, else the first ones."""
        for first in [*([] if here is None else [here]), *range(self.count - width + 1)]:
            if first + width <= self.count and not any(self.taken[first : first + width]):
                return first
        return None

    def release(self, row):
        """Take a row's slots back, and what they hold."""
        self.taken[slice(*_ends(row))] = [False] * row.width
        row.first, row.width, row.read = None, 0, 0

    def close_up(self, rows):
        """Move rows of one slot from the end into the gaps before them, so that the rows stand together."""
        sources, targets = [], []
        for row in sorted(rows, key=lambda row: -row.first):
            gap = self._run(1)
            if gap is None or gap > row.first:
                break
            if row.width == 1:
                sources.append(row.first)
                targets.append(gap)
                self.taken[gap], self.taken[row.first] = True, False
                row.first = gap
        for kept in self.kept if sources else ():
            kept[:, :, targets] = kept[:, :, sources]


def _ends(row):
    """Where a row's slots begin and end."""
    return row.first or 0, (row.first or 0) + row.width

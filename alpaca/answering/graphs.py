"""Steps of a few sizes as CUDA graphs: a step that is launched operation by operation waits for the host most of its time."""

import functools
from bisect import bisect_left, bisect_right
from collections import namedtuple
from itertools import accumulate

import torch

from alpaca.answering.attention import Flash
from alpaca.answering.step import Stepper, lay_out, shared_keys

SIZE_MULTIPLE = 128  # tokens of a step: a multiple of the tiles of matrix products
TOKENS_PER_ROW = 8  # of a full step; while rows come and go, one that answers in few tokens needs about 6 a step
STEP_TOKENS = 1024  # of a full step; larger ones gain nothing on an H100, and waste more at the end

# indices, ints: the inputs on the device; sent_indices, sent_ints: on the host, to be filled once `arrived` says that the
# last ones have been read; step: what else the graph reads, which must go on to exist.
Captured = namedtuple("Captured", "graph logits indices ints sent_indices sent_ints arrived step")


def step_sizes(at_once):
    """The numbers of tokens that a step may have, for so many rows at a time."""
    most = max(min(TOKENS_PER_ROW * at_once, STEP_TOKENS), at_once)
    return sorted(
        {
            min(at_once, SIZE_MULTIPLE),
            *range(SIZE_MULTIPLE, most, SIZE_MULTIPLE),
            -(-most // SIZE_MULTIPLE) * SIZE_MULTIPLE,
        }
    )


def compile_layers(layers, **options):
    """What to call for each layer of a model: their class's forward, compiled once for all of them and each size. What
    training has put in place of a layer's own forward is left out."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    forward = torch.compile(type(layers[0]).forward, dynamic=False, **options)
    return [functools.partial(forward, layer) for layer in layers]


class CapturedStepper(Stepper):
    """A Stepper whose steps are replayed; all sizes are captured at once, when it is made.

    compiled: the layers are compiled too, once for each size. slots: with one spare slot. prefixes: for how many it is.
    """

    def __init__(self, model, slots, at_once, compiled):
        super().__init__(model, slots)
        self.rows, self.sizes = at_once, step_sizes(at_once)
        self.prefixes = 2 ** (len(slots.prefixes) - 1).bit_length()
        self.layers = compile_layers(self.body.layers) if compiled else self.body.layers
        pool = torch.cuda.graph_pool_handle()  # no two sizes are in use at once
        largest_first = [(size, self._capture(size, pool)) for size in reversed(self.sizes)]
        self.captured = dict(largest_first)

    def _capture(self, size, pool):
        """A step of `size` tokens. Until it has been loaded, all of them are padding, which writes to the spare slot."""
        indices = torch.zeros(3 * size + self.rows, dtype=torch.long)
        ints = torch.zeros(3 * self.rows + 2 + 2 * (self.prefixes + 1), dtype=torch.int32)
        self._fill(size, indices, ints, [])
        sent, indices, ints = (indices.pin_memory(), ints.pin_memory()), indices.to(self.device), ints.to(self.device)
        ids, positions, where, last = indices.split([size, size, size, self.rows])
        step = Flash(where, *self._parted(ints))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles and tunes, which must not happen during a capture
                self.compute(ids, positions, step, last, self.layers)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = self.compute(ids, positions, step, last, self.layers)
        return Captured(graph, logits, indices, ints, *sent, torch.cuda.Event(), step)

    def _fill(self, size, indices, ints, parts):
        """Write the inputs of a step into host tensors. Returns how many logits it has."""
        layout = lay_out(parts, self.slots)
        indices, ints, total, rows = indices.numpy(), ints.numpy(), len(layout.ids), len(parts)
        places = self.slots.places
        indices[:total], indices[size : size + total] = layout.ids, layout.positions
        indices[2 * size : 2 * size + total] = layout.where
        indices[2 * size + total : 3 * size] = self.slots.count * places
        indices[3 * size : 3 * size + len(layout.last)] = layout.last
        begins, keys, used, *prefixes = self._parted(ints)
        begins[: rows + 1], begins[rows + 1 :] = layout.begins, total
        keys[:rows], keys[rows:] = [row.first * places for row, _ in parts], (self.slots.count + 1) * places
        used[:rows], used[rows:] = [row.own(row.read + count) for row, count in parts], 0
        for part, values in zip(prefixes, (layout.prefix_begins, shared_keys(self.slots)), strict=True):
            part[: len(values)], part[len(values) :] = values, values[-1]
        return len(layout.last)

    def _parted(self, ints):
        """The parts of `ints` that are Flash's but the first."""
        ends = list(accumulate([self.rows + 1, self.rows + 1, self.rows, self.prefixes + 1, self.prefixes + 1]))
        return [ints[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]

    def size_around(self, total):
        """The captured sizes next to `total`: (that or the next below, that or the next above); 0 where none is below."""
        i, j = bisect_right(self.sizes, total), bisect_left(self.sizes, total)
        return self.sizes[i - 1] if i else 0, self.sizes[j]

    def __call__(self, parts):
        _, size = self.size_around(sum(count for _, count in parts))
        step = self.captured[size]
        step.arrived.synchronize()
        count = self._fill(size, step.sent_indices, step.sent_ints, parts)
        step.indices.copy_(step.sent_indices, non_blocking=True)
        step.ints.copy_(step.sent_ints, non_blocking=True)
        step.arrived.record()
        step.graph.replay()
        return step.logits[:count]

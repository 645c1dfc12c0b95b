"""Which examples an optimizer step has: the order of an epoch, its shares by rank and micro-batch."""

import math
import random
from concurrent.futures import ThreadPoolExecutor
from heapq import heappop, heappush
from itertools import islice

from alpaca.training.prefix_tree import common_length


def optimizer_steps(sizes, batch_size, accumulation, world_size, seed, epoch):
    """The order of one epoch: for each optimizer step, for each rank, `accumulation` lists of example indices.

    sizes: the tokens that each example adds to a row; the ranks of a step get nearly equal sums of them, since the
    slowest sets the pace. Every index occurs exactly once, and the layout does not change which ones a step has. The
    last step may be smaller; its examples are spread evenly over ranks and micro-batches, some of which may be empty,
    so that every rank takes part in every step.
    """
    order = list(range(len(sizes)))
    random.Random(f"{seed}-{epoch}").shuffle(order)
    cells = accumulation * world_size
    for start in range(0, len(order), batch_size * cells):
        group = order[start : start + batch_size * cells]
        if world_size == 1:  # nobody waits for another
            yield [[group[len(group) * i // cells : len(group) * (i + 1) // cells] for i in range(cells)]]
        else:
            yield [_deal(share, sizes, accumulation) for share in _deal(group, sizes, world_size)]


def _deal(group, sizes, hands):
    """Indices parted into `hands` lists: equally many in each, or one more, and nearly equal sums of their sizes."""
    room = [len(group) * (hand + 1) // hands - len(group) * hand // hands for hand in range(hands)]
    dealt, heap = [[] for _ in room], [(0, hand) for hand in range(hands) if room[hand]]
    for i in sorted(group, key=lambda i: -sizes[i]):  # the largest first, each to the least that has room
        total, hand = heappop(heap)
        dealt[hand].append(i)
        if len(dealt[hand]) < room[hand]:
            heappush(heap, (total + sizes[i], hand))
    return dealt


def added_tokens(examples, together):
    """Estimate how many tokens each example adds to a prefix row of `together` examples that are drawn at random.

    Sorted by prompt, the nearest other example of such a row is about len(examples) / together places away. What an
    example has in common with that one is in the row already; the rest of its prompt, and its answer, it adds.
    """
    order = sorted(range(len(examples)), key=lambda i: examples[i].prompt_ids)
    prompts, apart = [examples[i].prompt_ids for i in order], max(1, len(examples) // together)
    shared = [0] * apart + [common_length(*pair) for pair in zip(prompts, prompts[apart:], strict=False)] + [0] * apart
    sizes = [len(e.prompt_ids) + len(e.answer_ids) for e in examples]
    for i, before, after in zip(order, shared, shared[apart:], strict=False):
        sizes[i] -= max(before, after)
    return sizes


class TrainLoader:
    """One rank's micro-batches, epoch by epoch: the same for both trainers, `accumulation` of them an optimizer step.

    A batch is {"rows": what `collate` makes of its examples, "step_tokens": the answer tokens of the whole optimizer
    step, accumulation and ranks included, by which its summed loss is to be divided}.
    """

    def __init__(self, examples, batch_size, accumulation, collate, seed, rank=0, world_size=1):
        self.examples, self.collate = examples, collate
        self.shape, self.seed, self.rank = (batch_size, accumulation, world_size), seed, rank
        # one rank needs none: nobody waits for it
        self.sizes = added_tokens(examples, batch_size) if world_size > 1 else [0] * len(examples)
        self.epoch = self.skipped = self.longest = 0  # longest: tokens of a row so far
        self.batches, self.ahead, self.thread = None, None, ThreadPoolExecutor(1)
        self.steps_per_epoch = -(-len(examples) // (batch_size * accumulation * world_size))

    def set_epoch(self, epoch):
        if epoch != self.epoch:
            self.epoch, self.skipped = epoch, 0

    def seek(self, step):
        """Go on after `step` optimizer steps: the next iteration ends the epoch in which they ended."""
        self.epoch, self.skipped = divmod(step, self.steps_per_epoch)

    def __len__(self):
        return self.steps_per_epoch * self.shape[1]

    def examples_until(self, step):
        """How many examples all ranks have seen after `step` optimizer steps; the last one of an epoch may have fewer."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * len(self.examples) + steps * math.prod(self.shape)

    def lines(self, step):
        """Where the examples of a 0-based optimizer step, those of all ranks, stand in their file."""
        epoch, index = divmod(step, self.steps_per_epoch)
        parts = next(islice(optimizer_steps(self.sizes, *self.shape, self.seed, epoch), index, None))
        return sorted(self.examples[i].line for rank in parts for part in rank for i in part)

    def __iter__(self):
        """The rest of the epoch. One iteration at a time: another one ends this."""
        self.batches, self.ahead = self._batches(), None
        while step := self.ahead.result() if self.ahead else self._take_step(self.batches):
            self.ahead = None
            yield from step

    def lay_out_next(self):
        """Let a thread lay out the next step's batches. To be called once the device has this one's forward to do:
        Python runs one thread at a time, so any earlier the device would wait for both."""
        self.ahead = self.ahead or self.thread.submit(self._take_step, self.batches)

    def _take_step(self, batches):
        step = list(islice(batches, self.shape[1]))
        lengths = (row["input_ids"].shape[-1] for batch in step for row in batch["rows"] if isinstance(row, dict))
        self.longest = max(self.longest, *lengths, 0)
        return step

    def _batches(self):
        steps = optimizer_steps(self.sizes, *self.shape, self.seed, self.epoch)
        for step in islice(steps, self.skipped, None):
            tokens = sum(len(self.examples[i].answer_ids) for parts in step for part in parts for i in part)
            for part in step[self.rank]:
                yield {"rows": self.collate([self.examples[i] for i in part]), "step_tokens": tokens}


def eval_batches(examples, batch_size, collate, rank=0, world_size=1):
    """Every example once, in file order: this rank's collated rows. All ranks get equally many, perhaps empty, batches."""
    for start in range(0, len(examples), batch_size * world_size):
        begin = start + rank * batch_size
        yield collate(examples[begin : begin + batch_size])

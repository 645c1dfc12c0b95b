"""How a step's examples are laid out for the model: which examples a step has, and in which rows they stand.

Most of an instruction example is the same in every example. With causal attention the hidden states of a prefix do not
depend on what follows, so a row can hold the trie of its prompts, each answer hanging off its prompt's last token: the
shared part is computed once, and the loss and every gradient are exactly those of one example at a time.

In depth-first order each token carries where its node begins (`enter`) and where its subtree ends (`exit`); token q
sees token k iff k <= q and enter[k] <= enter[q] < exit[k]. That is the whole attention mask. A row without sharing
(plain packing), equal prompts and several instructions are the same expression.
"""

import math
import random
from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from heapq import heappop, heappush
from itertools import islice

import torch

from alpaca.common.errors import UserError
from dataset import BOS

IGNORE_INDEX = -100  # torch's cross_entropy skips positions with this label
PACKINGS = ("prefix", "plain", "none")
MIN_SHARED = 4  # a shared node costs bookkeeping and attention blocks; shorter ones are computed again instead


# ---------------------------------------------------------------------------------------------------------------------
# which examples a step has


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
    """How many tokens each example adds to a prefix row in which `together` examples stand, drawn at random.

    Its own are those behind what it shares with one of every `together` examples: that far apart in sorted order.
    """
    order = sorted(range(len(examples)), key=lambda i: examples[i].prompt_ids)
    prompts, apart = [examples[i].prompt_ids for i in order], max(1, len(examples) // together)
    shared = [0] * apart + [_shared(*pair) for pair in zip(prompts, prompts[apart:], strict=False)] + [0] * apart
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
        self.epoch = self.skipped = 0
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
        return list(islice(batches, self.shape[1]))

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
        yield collate(examples[begin : min(begin + batch_size, start + batch_size * world_size)])


# ---------------------------------------------------------------------------------------------------------------------
# in which rows they stand


def make_collate(packing, pad_id, lengths=()):
    """A function from examples (dataset.TokenizedExample) to rows, dicts of tensors for modeling.answer_loss.

    lengths: the ones to which rows are padded, ascending (a longer row is left as it is).
    """
    if packing not in PACKINGS:
        raise UserError(f"--packing={packing}: expected {', '.join(PACKINGS)}")
    if packing == "none":
        return lambda examples: [pad_batch(examples, pad_id)]

    def collate(examples):
        row = tree_row(examples, share=packing == "prefix")
        i = bisect_left(lengths, len(row["input_ids"]))
        return [to_tensors(row, *lengths[i : i + 1])]

    return collate


def pad_batch(examples, pad_id):
    """Examples one below the other, padded on the right to the longest: a dict of [batch, length] tensors.

    An empty micro-batch (a rank that has nothing left in the last step) is one bos without a label: its loss is 0.
    """
    rows = [(e.prompt_ids + e.answer_ids, len(e.prompt_ids)) for e in examples] or [([BOS], 1)]
    length = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad_id] * (length - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor(
            [[IGNORE_INDEX] * start + ids[start:] + [IGNORE_INDEX] * (length - len(ids)) for ids, start in rows]
        ),
    }


def _shared(a, b):
    """Length of the common prefix of two lists."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def tree_row(examples, share=True):
    """The trie of the examples' prompts as one row, a dict of lists.

    input_ids, position_ids, enter, exit: one entry a token. logits_to_keep, shift_labels: for each answer token, the
    position that predicts it and its id; a position may occur twice (one prompt, two answers). An empty micro-batch is
    one bos and an ignored label: its loss is 0.
    """
    row = {key: [] for key in ("input_ids", "position_ids", "enter", "exit", "logits_to_keep", "shift_labels")}

    def add_node(ids, position):
        start = len(row["input_ids"])
        row["input_ids"] += ids
        row["position_ids"] += range(position, position + len(ids))
        row["enter"] += [start] * len(ids)
        row["exit"] += [start + len(ids)] * len(ids)
        return start, start + len(ids)

    def add(group, depth):
        """The subtree of examples (sorted by prompt) whose first `depth` prompt ids are in the row already."""
        first, last = group[0].prompt_ids, group[-1].prompt_ids
        common = _shared(first, last)  # of all: the group is sorted
        inner = [e for e in group if len(e.prompt_ids) > common]
        branches = _branches(inner, common)
        if inner and len(group) > 1 and common - depth < MIN_SHARED:  # not worth a node of its own
            ending = [e for e in group if len(e.prompt_ids) == common]
            for branch in [ending, *branches] if ending else branches:
                add(branch, depth)
            return
        start, end = add_node(first[depth:common], depth)
        for example in group:
            if len(example.prompt_ids) == common:
                answer = example.answer_ids
                begin, stop = add_node(answer[:-1], common)  # nothing is predicted from the last token, eos
                row["logits_to_keep"] += [end - 1, *range(begin, stop)]
                row["shift_labels"] += answer
        for branch in branches:
            add(branch, common)
        row["exit"][start:end] = [len(row["input_ids"])] * (end - start)

    if not examples:
        add_node([BOS], 0)
        row["logits_to_keep"], row["shift_labels"] = [0], [IGNORE_INDEX]
    elif share:
        add(sorted(examples, key=lambda e: e.prompt_ids), 0)
    else:
        for example in examples:
            add([example], 0)
    return row


def _branches(group, depth):
    """Sorted examples, parted by their prompt id at `depth`."""
    parts = []
    for example in group:
        if not parts or parts[-1][0].prompt_ids[depth] != example.prompt_ids[depth]:
            parts.append([])
        parts[-1].append(example)
    return parts


def to_tensors(row, length=None):
    """A tree row as int64 tensors [1, tokens] and [1, answer tokens] (logits_to_keep: [answer tokens]).

    `length`: pad to so many tokens. A padding token sees itself alone, and nothing is predicted from it.
    """
    tokens = len(row["input_ids"])
    padding = range(tokens, length or tokens)
    padded = {
        "input_ids": row["input_ids"] + [0] * len(padding),
        "position_ids": row["position_ids"] + [0] * len(padding),
        "enter": row["enter"] + list(padding),
        "exit": row["exit"] + [i + 1 for i in padding],
        "shift_labels": row["shift_labels"],
    }
    tensors = {key: torch.tensor([values]) for key, values in padded.items()}
    return {**tensors, "logits_to_keep": torch.tensor(row["logits_to_keep"])}


def tree_mask(enter, exit):
    """The attention mask of a tree row: [..., tokens] twice -> bool [..., tokens, tokens], True where q sees k."""
    order = torch.arange(enter.shape[-1], device=enter.device)
    below = (enter[..., None, :] <= enter[..., :, None]) & (enter[..., :, None] < exit[..., None, :])
    return below & (order[:, None] >= order)


def prefix_collator(examples):
    """A data collator for a stock Trainer: examples -> one tree row with its dense mask, as LlamaForCausalLM takes it."""
    row = to_tensors(tree_row(examples))
    enter, exit = row.pop("enter"), row.pop("exit")
    return {**row, "attention_mask": tree_mask(enter, exit).unsqueeze(1), "labels": row["shift_labels"]}

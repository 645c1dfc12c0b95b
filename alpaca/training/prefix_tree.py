"""In which rows a step's examples stand. Imports nothing but torch and alpaca.common: other programs use it too.

Most of an instruction example is the same in every example. With causal attention the hidden states of a prefix do not
depend on what follows, so a row can hold the trie of its prompts, each answer hanging off its prompt's last token: the
shared part is computed once, and the loss and every gradient are exactly those of one example at a time.

In depth-first order each token carries where its node begins (`enter`) and where its subtree ends (`exit`); token q
sees token k iff k <= q and enter[k] <= enter[q] < exit[k]. That is the whole attention mask. A row without sharing
(plain packing), equal prompts and several instructions are the same expression.
"""

from bisect import bisect_left

import torch

from alpaca.common.errors import UserError

IGNORE_INDEX = -100  # torch's cross_entropy skips positions with this label
PACKINGS = ("prefix", "plain", "none")
MIN_SHARED = 4  # a shared node costs bookkeeping and attention blocks; shorter ones are computed again instead


# ---------------------------------------------------------------------------------------------------------------------
# in which rows they stand


def make_collate(packing, pad_id, lengths=(), bos_id=1, longer=None):
    """A function from examples to rows, dicts of tensors as alpaca.training.loss.answer_loss takes them.

    examples: objects with prompt_ids and answer_ids, lists of int. lengths: those to which rows are padded, ascending; a
    longer row is left as it is, or adds the length that longer(its tokens) gives.
    """
    if packing not in PACKINGS:
        raise UserError(f"--packing={packing}: expected {', '.join(PACKINGS)}")
    if packing == "none":
        return lambda examples: [pad_batch(examples, pad_id, bos_id)]

    def collate(examples):
        row = tree_row(examples, packing == "prefix", bos_id)
        tokens = len(row["input_ids"])
        if longer and tokens > lengths[-1]:
            lengths.append(longer(tokens))
        i = bisect_left(lengths, tokens)
        return [to_tensors(row, *lengths[i : i + 1])]

    return collate


def pad_batch(examples, pad_id, bos_id=1):
    """Examples one below the other, padded on the right to the longest: a dict of [batch, length] tensors.

    An empty micro-batch (a rank that has nothing left in the last step) is one bos without a label: its loss is 0.
    """
    rows = [(e.prompt_ids + e.answer_ids, len(e.prompt_ids)) for e in examples] or [([bos_id], 1)]
    length = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad_id] * (length - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor(
            [[IGNORE_INDEX] * start + ids[start:] + [IGNORE_INDEX] * (length - len(ids)) for ids, start in rows]
        ),
    }


def common_length(a, b):
    """Length of the common prefix of two lists."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def tree_row(examples, share=True, bos_id=1):
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
        common = common_length(first, last)  # of all: the group is sorted
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
        add_node([bos_id], 0)
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


def prefix_collator(examples, bos_id=1):
    """A data collator for a stock Trainer: examples -> one tree row with its dense mask, as LlamaForCausalLM takes it.

    examples: objects with prompt_ids and answer_ids, lists of int; an answer ends with eos.
    """
    row = to_tensors(tree_row(examples, bos_id=bos_id))
    enter, exit = row.pop("enter"), row.pop("exit")
    return {**row, "attention_mask": tree_mask(enter, exit).unsqueeze(1), "labels": row["shift_labels"]}

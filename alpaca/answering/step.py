"""One step: the tokens of many rows, end to end, through the model."""

from collections import namedtuple

import torch
from transformers import AttentionInterface

from alpaca.answering.attention import Dense, Flash, Group, step_attention

# count: how many of a row's tokens a step computes, those behind the `row.read` that are kept.
Part = namedtuple("Part", "row count")
# ids, positions, where in the slots: of each token; last: the last token of each row that has nothing more to be read;
# begins: where each part begins, and the end.
Layout = namedtuple("Layout", "ids positions where last begins")
ALIGNED = 8  # places that a dense step looks at: a multiple, which kernels like


class Stepper:
    """A causal LM and the slots that it writes into. Each call computes one step, as it comes."""

    def __init__(self, model, slots, shared_tokens=0):
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's, or the bare one
        self.body, self.head, self.slots = causal.model, causal.lm_head, slots
        self.device, self.shared_tokens = self.head.weight.device, shared_tokens

    def __call__(self, parts):
        """Float32 logits [complete parts, vocabulary] of what follows each row that has nothing more to be read."""
        lists = lay_out(parts, self.slots.places, self.shared_tokens)
        ids, positions, where, last = (
            torch.tensor(values, dtype=torch.long, device=self.device) for values in lists[:4]
        )
        make = self._dense if self.slots.by_heads else self._flash
        step = make(parts, positions, where, lists.begins)
        return self.compute(ids, positions, step, last, self.body.layers)

    def compute(self, ids, positions, step, last, layers):
        """ids, positions: [tokens]; last: which tokens' logits are asked for; layers: what is called for each layer."""
        with attention_by_step(self.body.config):
            hidden = self.body.embed_tokens(ids[None])
            rotary = self.body.rotary_emb(hidden, positions[None])
            for layer, kept, shared in zip(layers, self.slots.kept, self.slots.shared, strict=True):
                memory = {"step": step, "kept": kept, "shared": shared}
                hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, **memory)
            return self.head(self.body.norm(hidden)[0, last]).float()

    def _flash(self, parts, positions, where, begins):
        def ints(values):
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        places = self.slots.places
        return Flash(
            where,
            ints(begins),
            ints([*(row.first * places for row, _ in parts), len(self.slots.kept[0, 0]) * places]),
            ints([row.read + count - self.shared_tokens for row, count in parts]),
            ints([0, len(where)]),
            ints([0, self.slots.shared.shape[2]]),
        )

    def _dense(self, parts, positions, where, begins):
        """Rows with one token together, and those with more; a row in several slots alone."""
        own, one, more, groups = positions - self.shared_tokens, {}, [], []
        for begin, (row, count) in zip(begins, parts, strict=False):
            if row.width > 1:
                groups.append(self._group([(begin, row, count)], own, (row.first, row.width)))
            elif count > 1:
                more.append((begin, row, count))
            else:
                one[row.first] = begin, row, count
        if one:
            # All slots up to the last: that reads them in place. What is computed for slots between is thrown away.
            span = max(one) + 1
            filling = next(iter(one.values()))
            rows = [one.get(slot, filling) for slot in range(span)]
            real = [slot in one for slot in range(span)]
            groups.append(self._group(rows, own, slice(span), None if all(real) else real))
        if more:
            groups.append(self._group(more, own, [row.first for _, row, _ in more]))
        heads = self.slots.kept.shape[3]
        slot, place = where // self.slots.places, where % self.slots.places
        by_heads = slot.unsqueeze(1) * heads + torch.arange(heads, device=self.device)
        return Dense((by_heads * self.slots.places + place.unsqueeze(1)).flatten(), groups)

    def _group(self, rows, own, slots, real=None):
        longest = max(count for _, _, count in rows)
        visible = max(row.read + count for _, row, count in rows) - self.shared_tokens
        tokens = [begin + min(i, count - 1) for begin, _, count in rows for i in range(longest)]
        if real is None and any(count < longest for _, _, count in rows):
            real = [i < count for _, _, count in rows for i in range(longest)]
        tokens = torch.tensor(tokens, device=self.device)
        room = self.slots.places * (slots[1] if isinstance(slots, tuple) else 1)
        visible = min(-(-visible // ALIGNED) * ALIGNED, room)
        seen = torch.arange(visible, device=self.device) <= own[tokens].view(len(rows), 1, 1, longest, 1)
        mask = torch.zeros(seen.shape, dtype=self.slots.kept.dtype, device=self.device)
        mask.masked_fill_(~seen, float("-inf"))
        heads = self.slots.kept.shape[3]
        sharing = self.body.config.num_attention_heads // heads
        mask = mask.expand(-1, heads, sharing, -1, -1).reshape(len(rows) * heads, -1, visible)
        return Group(tokens, slots, mask, None if real is None else torch.tensor(real, device=self.device))


def lay_out(parts, places, shared_tokens):
    """The tokens of the parts, end to end, as lists."""
    ids, positions, where, last, begins = [], [], [], [], [0]
    for row, count in parts:
        end = row.read + count
        ids += row.ids[row.read : end]
        positions += range(row.read, end)
        first = row.first * places - shared_tokens
        where += range(first + row.read, first + end)
        begins.append(len(ids))
        if end == len(row.ids):
            last.append(len(ids) - 1)
    return Layout(ids, positions, where, last, begins)


class attention_by_step:
    """Meanwhile the layers of a model with this config call `step_attention`."""

    def __init__(self, config):
        self.config = config

    def __enter__(self):
        self.before, self.config._attn_implementation = self.config._attn_implementation, "step"

    def __exit__(self, *error):
        self.config._attn_implementation = self.before


AttentionInterface.register("step", step_attention)

"""One step: the tokens of many rows, end to end, through the model."""

from collections import namedtuple
from itertools import accumulate

import torch
from accelerate.utils import send_to_device
from transformers import AttentionInterface

from alpaca.answering.attention import ALIGNED, Dense, Flash, Group, step_attention

# count: how many of a row's tokens a step computes, those behind the `row.read` that are kept.
Part = namedtuple("Part", "row count")
# ids, positions, where in the slots: of each token; last: the last token of each row that has nothing more to be read;
# begins: where each part begins, and the end; prefix_begins: where the tokens of each prefix do, and the end.
Layout = namedtuple("Layout", "ids positions where last begins prefix_begins")
FEWEST = 4  # tokens of a prompt that a dense step computes, see ALIGNED


class Stepper:
    """A causal LM and the slots that it writes into. Each call computes one step, as it comes."""

    def __init__(self, model, slots):
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's, or the bare one
        self.body, self.head, self.slots = causal.model, causal.lm_head, slots
        self.device = self.body.embed_tokens.weight.device  # where a step begins

    def __call__(self, parts):
        """Float32 logits [complete parts, vocabulary] of what follows each row that has nothing more to be read.

        parts: those of rows with the same prefix stand together, in the order of the prefixes.
        """
        lists = lay_out(parts, self.slots)
        ids, positions, where, last = (
            torch.tensor(values, dtype=torch.long, device=self.device) for values in lists[:4]
        )
        if not self.slots.by_heads:
            return self.compute(ids, positions, self._flash(parts, where, lists), last, self.body.layers)
        count, step = len(last), self._dense(parts, where, lists)
        ids, positions, last = (filled_up(values) for values in (ids, positions, last))
        return self.compute(ids, positions, step, last, self.body.layers)[:count]

    def compute(self, ids, positions, step, last, layers):
        """ids, positions: [tokens]; last: which tokens' logits are asked for; layers: what is called for each layer, on its
        device."""
        with attention_by_step(self.body.config):
            hidden = self.body.embed_tokens(ids[None])
            rotary = self.body.rotary_emb(hidden, positions[None])
            for layer, (kept, shared) in zip(layers, self.slots.of_layers(), strict=True):
                if kept.device != hidden.device:
                    hidden, rotary, step, last = send_to_device((hidden, rotary, step, last), kept.device)
                memory = {"step": step, "kept": kept, "shared": shared}
                hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, **memory)
            return self.head(self.body.norm(hidden)[0, last].to(self.head.weight.device)).float()

    def _flash(self, parts, where, lists):
        def ints(values):
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        places = self.slots.places
        return Flash(
            where,
            ints(lists.begins),
            ints([*(row.first * places for row, _ in parts), (self.slots.count + self.slots.spare) * places]),
            ints([row.own(row.read + count) for row, count in parts]),
            ints(lists.prefix_begins),
            ints(shared_keys(self.slots)),
        )

    def _dense(self, parts, where, lists):
        """Rows with one token together, and those with more; a row in several slots alone."""
        own = [row.own(i) for row, count in parts for i in range(row.read, row.read + count)]
        own, one, more, groups = torch.tensor(own, device=self.device), {}, [], []
        for begin, (row, count) in zip(lists.begins, parts, strict=False):
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
        heads = self.slots.heads
        slot, place = where // self.slots.places, where % self.slots.places
        by_heads = slot.unsqueeze(1) * heads + torch.arange(heads, device=self.device)
        keys = shared_keys(self.slots)
        spans = zip(lists.prefix_begins, lists.prefix_begins[1:], keys, keys[1:], strict=False)
        spans = [span for span in spans if span[0] < span[1] and span[2] < span[3]]
        return Dense((by_heads * self.slots.places + place.unsqueeze(1)).flatten(), groups, spans)

    def _group(self, rows, own, slots, real=None):
        longest = max(count for _, _, count in rows)
        longest = longest if longest == 1 else max(longest, FEWEST)
        visible = max(row.own(row.read + count) for _, row, count in rows)
        tokens = [begin + min(i, count - 1) for begin, _, count in rows for i in range(longest)]
        if real is None and any(count < longest for _, _, count in rows):
            real = [i < count for _, _, count in rows for i in range(longest)]
        tokens = torch.tensor(tokens, device=self.device)
        room = self.slots.places * (slots[1] if isinstance(slots, tuple) else 1)
        visible = min(-(-visible // ALIGNED) * ALIGNED, room)
        seen = torch.arange(visible, device=self.device) <= own[tokens].view(len(rows), 1, 1, longest, 1)
        mask = torch.zeros(seen.shape, dtype=self.slots.dtype, device=self.device)
        mask.masked_fill_(~seen, float("-inf"))
        heads = self.slots.heads
        sharing = self.body.config.num_attention_heads // heads
        mask = mask.expand(-1, heads, sharing, -1, -1).reshape(len(rows) * heads, -1, visible)
        return Group(tokens, slots, mask, None if real is None else torch.tensor(real, device=self.device))


def filled_up(values):
    """A multiple of ALIGNED of them, the last one repeated."""
    return torch.cat([values, values[-1:].expand(-len(values) % ALIGNED)])


def lay_out(parts, slots):
    """The tokens of the parts, end to end, as lists."""
    ids, positions, where, last, begins = [], [], [], [], [0]
    counts = [0] * len(slots.prefixes)
    for row, count in parts:
        end = row.read + count
        ids += row.ids[row.read : end]
        positions += range(row.read, end)
        first = row.first * slots.places + row.own(0)
        where += range(first + row.read, first + end)
        begins.append(len(ids))
        counts[row.prefix.number] += count
        if end == len(row.ids):
            last.append(len(ids) - 1)
    return Layout(ids, positions, where, last, begins, [0, *accumulate(counts)])


def shared_keys(slots):
    """Where each prefix begins in `shared`, and the end of the last."""
    return [0, *accumulate(len(prefix.tokens) for prefix in slots.prefixes)]


class attention_by_step:
    """Meanwhile the layers of a model with this config call `step_attention`."""

    def __init__(self, config):
        self.config = config

    def __enter__(self):
        self.before, self.config._attn_implementation = self.config._attn_implementation, "step"

    def __exit__(self, *error):
        self.config._attn_implementation = self.before


AttentionInterface.register("step", step_attention)

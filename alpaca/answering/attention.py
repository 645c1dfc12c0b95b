"""Attention of a step: every token sees the prefix of its row, and what of the row is in the slots up to it.

All tokens of a step stand end to end, as one row to transformers' layers, those of rows with the same prefix together.
A prefix is attended to once for all of them, their own tokens row by row; the two are one attention by the logarithms
of what they sum up to.
Two ways to the same: `dense`, with products and masks, for any device and type; `flash`, torch's attention for rows of
many lengths, which reads the slots in place, on CUDA in half precision.
"""

from collections import namedtuple

import torch

# What the layers are told, beside their own arguments. where: for each token, its place in the slots; spans: of each
# prefix (its first token in the step, the end, its first place in `shared`, the end).
Dense = namedtuple("Dense", "where groups spans")
# tokens: of each row its tokens in the step, long [rows * longest]; slots: a slice of those of the rows, or their
# numbers, or (first, width) of one row's; mask: 0 or -inf, [rows * heads, 1 or groups * longest, places]; real: which of
# `tokens` are, the others fill up; None: all.
Group = namedtuple("Group", "tokens slots mask real")
# begins: where each row's tokens begin in the step, and the end; keys: where its slots begin; used: how many of its
# places count; spans: where each prefix's tokens begin in the step, and the end; shared_keys: the same in `shared`.
Flash = namedtuple("Flash", "where begins keys used spans shared_keys")
# A dense step computes a multiple of so many tokens and looks at a multiple of so many places. Kernels like that, and most
# of a CPU's then give a row the same numbers in float32 whatever is computed beside it, by one thread or by two: they
# compute what is left of a vector, and matrices of few rows, in another way.
ALIGNED = 16
LONGEST_PART = 128  # tokens of one row in a step that flash attention computes: one block of its kernel


def step_attention(
    module, query, key, value, attention_mask, scaling=None, step=None, kept=None, shared=None, **kwargs
):
    """transformers' attention interface, [1, heads, tokens, size] -> [1, tokens, heads, size], without gradients.

    kept, shared: the slots of the layer, and what it keeps of the prefixes (Slots).
    """
    attend = _flash if isinstance(step, Flash) else _dense
    return attend(step, kept, shared, query[0], key[0], value[0], scaling).unsqueeze(0), None


def merged(own, own_sums, shared, shared_sums):
    """Two attentions as one: outputs [..., size], the logarithms of the sums of their weights [...]."""
    share = torch.sigmoid(shared_sums - own_sums).unsqueeze(-1)
    return torch.lerp(own.float(), shared.float(), share.float()).to(own.dtype)


def _dense(step, kept, shared, query, key, value, scaling):
    heads, tokens, size = query.shape
    written = len(step.where) // len(key)  # tokens; the others fill the step up
    for memory, new in zip(kept, (key, value), strict=True):
        memory.flatten(0, 2).index_copy_(0, step.where, new[:, :written].transpose(0, 1).flatten(0, 1))
    together = query.new_zeros(tokens, heads, size)
    sums = query.new_zeros(tokens, heads, dtype=torch.float64) if step.spans else None
    for group in step.groups:
        out, logarithms = _attend_group(kept, group, query, scaling)
        where, real = group.tokens, group.real
        if real is not None:
            where, out, logarithms = where[real], out[real], logarithms[real]
        together[where] = out
        if sums is not None:
            sums[where] = logarithms
    for begin, end, first, last in step.spans:
        asking = query[:, begin:end]
        asking = torch.cat([asking, asking[:, -1:].expand(-1, (begin - end) % ALIGNED, -1)], dim=1)
        # the heads that share a key, one behind the other
        grouped = asking.reshape(len(shared[0]), -1, size)
        out, logarithms = _weighted(torch.bmm(grouped, shared[0][:, first:last].mT) * scaling, shared[1][:, first:last])
        out, logarithms = out.view(heads, -1, size).transpose(0, 1), logarithms.view(heads, -1).T
        own = together[begin:end], sums[begin:end]
        together[begin:end] = merged(*own, out[: end - begin], logarithms[: end - begin])
    return together


def _attend_group(kept, group, query, scaling):
    """(outputs [rows * longest, heads, size], logarithms [rows * longest, heads]) of a group's tokens."""
    heads, _, size = query.shape
    visible, key_heads = group.mask.shape[-1], kept.shape[2]
    if isinstance(group.slots, tuple):  # one row in neighbouring slots
        first, width = group.slots
        keys, values = kept[:, first : first + width].transpose(1, 2).flatten(2, 3)[:, :, :visible]
    else:
        keys, values = kept[:, group.slots, :, :visible].flatten(1, 2)
    rows = len(keys) // key_heads
    chosen = query[:, group.tokens].view(heads, rows, -1, size).transpose(0, 1)
    chosen = chosen.reshape(rows * key_heads, -1, size)
    scores = torch.baddbmm(group.mask, chosen, keys.mT, alpha=scaling)
    out, logarithms = _weighted(scores, values)
    longest = len(group.tokens) // rows
    out = out.view(rows, heads, longest, size).transpose(1, 2).reshape(-1, heads, size)
    return out, logarithms.view(rows, heads, longest).transpose(1, 2).reshape(-1, heads)


def _weighted(scores, values):
    """softmax(scores) @ values, and the logarithms of the softmax's sums: [batch, tokens, keys] -> [batch, tokens, size]
    and float64 [batch, tokens]. In float64 the order in which weights are added is not seen."""
    scores = scores.float()
    largest = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(largest).exp_()
    sums = weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    out = torch.bmm(weights.to(values.dtype), values) / sums.to(values.dtype)
    return out, (largest + sums.log()).squeeze(-1)


def flash_works(device, dtype, size):
    """Whether torch's flash attention computes with heads of this size there."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or size % 8 or size > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


# One operation that torch.compile does not look into: were the writing left to it, it would copy all slots of a layer.
@torch.library.custom_op("alpaca::write_and_attend", mutates_args={"kept"})
def write_and_attend(
    kept: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    where: torch.Tensor,
    begins: torch.Tensor,
    keys: torch.Tensor,
    used: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put new keys and values into one layer's slots, and attend to those of each row, causally.

    kept: [2, slots, places, heads, size]; query, key, value: [heads, tokens, size]; the rest: see Flash.
    Returns [tokens, heads, size] and float32 [heads, tokens].
    """
    flat = kept.flatten(1, 2)
    flat[0].index_copy_(0, where, key.transpose(0, 1))
    flat[1].index_copy_(0, where, value.transpose(0, 1))
    return _varlen(query.transpose(0, 1), flat, begins, keys, used, flat.shape[1], True, scaling)


@torch.library.custom_op("alpaca::attend_shared", mutates_args=())
def attend_shared(
    shared: torch.Tensor, query: torch.Tensor, spans: torch.Tensor, shared_keys: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the prefixes, [2, tokens, heads, size], from the tokens of each. Returned as above."""
    query = query.transpose(0, 1)
    return _varlen(query, shared, spans, shared_keys, None, shared.shape[1], False, scaling)


def _varlen(query, flat, begins, keys, used, longest, causal, scaling):
    more = {"num_splits": 1} if "num_splits" in str(torch.ops.aten._flash_attention_forward.default._schema) else {}
    # never 1: with it the op would fold the heads that share a key into tokens, and not return them so
    most = LONGEST_PART if causal else max(len(query), 2)
    out, sums, *_ = torch.ops.aten._flash_attention_forward(
        query, *flat, begins, keys, most, longest, 0.0, causal, False, scale=scaling, seqused_k=used, **more
    )
    return out, sums


@write_and_attend.register_fake
def _(kept, query, key, value, where, begins, keys, used, scaling):
    return _like_varlen(query)


@attend_shared.register_fake
def _(shared, query, spans, shared_keys, scaling):
    return _like_varlen(query)


def _like_varlen(query):
    heads, tokens, size = query.shape
    return query.new_empty(tokens, heads, size), query.new_empty(heads, tokens, dtype=torch.float32)


def _flash(step, kept, shared, query, key, value, scaling):
    out, sums = write_and_attend(kept, query, key, value, step.where, step.begins, step.keys, step.used, float(scaling))
    if not shared.shape[1]:
        return out
    other, other_sums = attend_shared(shared, query, step.spans, step.shared_keys, float(scaling))
    # of a prefix without tokens, flash attention says +inf
    other_sums = torch.where(other_sums == float("inf"), float("-inf"), other_sums)
    return merged(out, sums.T, other, other_sums.T)

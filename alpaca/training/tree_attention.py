"""How the decoder layers compute a tree row (prefix_tree.py): its attention. cuda_graphs.py captures the layers.

Nothing of transformers or PEFT is patched: "tree" is an attention implementation of transformers' own interface, and a
row's plan travels as a keyword argument through model(**inputs).
"""

from collections import namedtuple

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alpaca.training.prefix_tree import tree_mask

Tree = namedtuple("Tree", "root branches slots mask")  # what tree_attention needs of a row, see plan_attention


def plan_attention(enter, exit, dtype):
    """How the attention of a tree row is computed without the blocks that see nothing of each other.

    Tokens are those of the root node, then the subtrees under it, one after another. Each subtree sees the root and
    itself, so all of them are one batch of padded rows whose keys are the root's and their own.
    enter, exit: int tensors [1, tokens] on any device. Returns root: its number of tokens; branches: [subtrees,
    longest], the token in each slot; slots: [tokens - root], the slot of each token; mask: [subtrees, 1, longest,
    root + longest], 0 or -inf, in `dtype`.
    """
    device, enters, exits = enter.device, enter[0].tolist(), exit[0].tolist()
    tokens = len(enters)
    root = next((i for i, e in enumerate(enters) if e), tokens) if exits[0] == tokens else 0
    starts = [root] if root < tokens else []
    while starts and exits[starts[-1]] < tokens:
        starts.append(exits[starts[-1]])
    sizes = torch.tensor([exits[s] - s for s in starts], dtype=torch.long)
    longest = int(sizes.max()) if starts else 0
    offsets = torch.arange(longest)
    inside = offsets < sizes[:, None]
    branches = torch.where(inside, torch.tensor(starts, dtype=torch.long)[:, None] + offsets, root)
    # A slot without a token sees itself alone: seeing nothing would be not-a-number.
    own_enter = torch.where(inside, enter[0].cpu()[branches], tokens + offsets)
    own_exit = torch.where(inside, exit[0].cpu()[branches], tokens + offsets + 1)
    own = tree_mask(own_enter, own_exit)
    seen = torch.cat([inside[:, :, None].expand(-1, -1, root), own], dim=-1).unsqueeze(1)
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, float("-inf"))
    slots = inside.flatten().nonzero()[:, 0]
    return Tree(root, branches.to(device), slots.to(device), mask.to(device))


def tree_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, tree=None, **kwargs):
    """transformers' attention interface, [batch, heads, tokens, size] -> [batch, tokens, heads, size].

    FlexAttention for a BlockMask, one batch of subtrees for a Tree, plain SDPA for everything else.
    """
    grouped = {"enable_gqa": key.shape[1] != query.shape[1]}
    if isinstance(attention_mask, BlockMask):
        output = flex_attention(query, key, value, block_mask=attention_mask, scale=scaling, **grouped)
        return output.transpose(1, 2).contiguous(), None
    if tree is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    parts, count = [], len(tree.branches)
    if tree.root:
        root_query, root_key, root_value = (tensor[:, :, : tree.root] for tensor in (query, key, value))
        parts.append(sdpa(root_query, root_key, root_value, is_causal=True, scale=scaling, **grouped))
    if count:
        own_query, own_key, own_value = (
            tensor[0].index_select(1, tree.branches.flatten()).unflatten(1, tree.branches.shape).transpose(0, 1)
            for tensor in (query, key, value)
        )
        if tree.root:
            own_key = torch.cat([root_key.expand(count, -1, -1, -1), own_key], dim=2)
            own_value = torch.cat([root_value.expand(count, -1, -1, -1), own_value], dim=2)
        output = _masked_attention(own_query, own_key, own_value, tree.mask, scaling)
        parts.append(output.transpose(0, 1).flatten(1, 2).index_select(1, tree.slots).unsqueeze(0))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _masked_attention(query, key, value, mask, scaling):
    """softmax(query keyᵀ scaling + mask) value, for short rows."""
    groups = query.shape[1] // key.shape[1]
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return sdpa(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=groups > 1)
    # torch 2.13's kernel takes 2.6 times as long as these products (12 rows of 75, 4 heads, forward and backward)
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return (query @ key.mT * scaling + mask).softmax(dim=-1) @ value


AttentionInterface.register("tree", tree_attention)
AttentionMaskInterface.register("tree", sdpa_mask)  # for whatever is not a tree row: padded batches, generation

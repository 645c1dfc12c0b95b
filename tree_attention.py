"""How the decoder layers compute a tree row (packing.py): its attention, and on CUDA the layers as captured graphs.

Nothing of transformers or PEFT is patched: "tree" is an attention implementation of transformers' own interface, and a
row's plan travels as a keyword argument through model(**inputs).
"""

from bisect import bisect_right
from collections import namedtuple
from functools import partial
from itertools import islice

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from config_utils import UserError
from packing import make_collate, tree_mask

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


# ---------------------------------------------------------------------------------------------------------------------
# the decoder layers on CUDA, for rows of few lengths


ROW_MULTIPLE = 128  # FlexAttention's block size
ROW_LENGTHS = 4  # each costs a compilation and a captured graph
SAMPLED_BATCHES = 512  # enough to know how long rows get


def choose_lengths(lengths, count=ROW_LENGTHS):
    """The `count` row lengths, multiples of ROW_MULTIPLE, to which rows of these lengths are padded with least waste.

    A last one, an eighth longer than the longest seen, takes what later epochs may bring.
    """
    seen = sorted(-(-n // ROW_MULTIPLE) for n in lengths)  # in blocks
    sizes = sorted(set(seen))
    cost = {(0, -1): (0, ())}  # (lengths used, index of the largest) -> (padded blocks in all, lengths)
    for used in range(1, min(count - 1, len(sizes)) + 1):
        for j in range(used - 1, len(sizes)):
            best = min(
                (
                    total + sizes[j] * (bisect_right(seen, sizes[j]) - (bisect_right(seen, sizes[i]) if i >= 0 else 0)),
                    chosen,
                )
                for (u, i), (total, chosen) in cost.items()
                if u == used - 1 and i < j
            )
            cost[used, j] = (best[0], (*best[1], sizes[j]))
    _, chosen = min(value for (_, j), value in cost.items() if j == len(sizes) - 1)
    return [n * ROW_MULTIPLE for n in (*chosen, -(-chosen[-1] * 9 // 8))]


def compile_layers(model, loader, packing, pad_id, graphs):
    """Compile a PEFT model's layers for the rows that `loader` gives; from then on it pads them to few lengths."""
    rows = (row for batch in islice(loader, SAMPLED_BATCHES) for row in batch["rows"])
    lengths = choose_lengths([row["input_ids"].shape[1] for row in rows])
    model.compiled_layers = CompiledLayers(model, lengths, graphs)
    loader.collate = make_collate(packing, pad_id, lengths)
    return lengths


class CompiledLayers:
    """A PEFT model's decoder layers, compiled for tree rows of a few lengths and replayed as CUDA graphs.

    transformers' LlamaModel goes on as it is: only the `forward` of its layers is exchanged, on this instance. Each
    length has a FlexAttention BlockMask in fixed buffers, which the graph reads; a batch's mask is copied into them.
    Parameter gradients go through autograd as ever, so DeepSpeed's hooks on them run.
    """

    def __init__(self, model, lengths, graphs):
        self.body, self.lengths, self.graphs = model.get_base_model().model, lengths, graphs
        self.masks, self.graphed, self.mask = {}, {}, None  # mask: that of the row being computed, else None
        self.proven = False  # whether a compiled row has ever come out
        self.trainable = tuple(p for p in self.body.parameters() if p.requires_grad)
        self.pool = torch.cuda.graph_pool_handle() if graphs else None  # shared: no two lengths are ever in use at once
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(lengths))
        self.originals = [layer.forward for layer in self.body.layers]
        self.compiled = [torch.compile(forward, dynamic=False) for forward in self.originals]
        for i, layer in enumerate(self.body.layers):
            layer.forward = partial(self._layer, i)

    def load_mask(self, enter, exit):
        """Take a row's mask, int tensors [1, length], for the next forward; False if that row is not to be compiled."""
        self.mask, length = None, enter.shape[1]
        if length not in self.lengths or not torch.is_grad_enabled():
            return False
        if length not in self.masks:
            limits = torch.stack([enter[0], exit[0]]).int()

            def sees(batch, head, q, k):
                return (k <= q) & (limits[0, k] <= limits[0, q]) & (limits[0, q] < limits[1, k])

            self.masks[length] = (limits, sees, create_block_mask(sees, None, None, length, length, enter.device))
        limits, sees, self.mask = self.masks[length]
        limits.copy_(torch.stack([enter[0], exit[0]]))
        fresh = create_block_mask(sees, None, None, length, length, enter.device)
        for name in MASK_BUFFERS:
            getattr(self.mask, name).copy_(getattr(fresh, name))
        return True

    def _layer(self, i, hidden_states, *args, **kwargs):
        if self.mask is None or not torch.is_grad_enabled():
            return self.originals[i](hidden_states, *args, **kwargs)
        if not self.graphs:
            hidden_states = self.compiled[i](hidden_states, *args, **{**kwargs, "attention_mask": self.mask})
            self.proven = True
            return hidden_states
        if i:
            return hidden_states  # the first layer's call has gone through all of them
        length, inputs = hidden_states.shape[1], (hidden_states, *kwargs["position_embeddings"])
        if length not in self.graphed:
            self.graphed[length] = self._capture(self.mask, inputs)
            self.proven = True
        return _Replay.apply(self.graphed[length], *inputs, *self.trainable)

    def _capture(self, mask, inputs):
        """Forward and backward through all layers as two CUDA graphs, for rows like `inputs` (hidden states, cos, sin).

        torch.cuda.make_graphed_callables does not fit: DeepSpeed's hooks have tied the parameters' gradient nodes to
        the default stream, which must not take part in a capture. So it goes through stand-ins that share their memory.
        """
        inputs = [tensor.detach().clone() for tensor in inputs]
        standins = {id(p): torch.nn.Parameter(p.detach()) for p in self.trainable}
        holders = [(m, name) for m in self.body.modules() for name, p in m._parameters.items() if id(p) in standins]
        originals = [module._parameters[name] for module, name in holders]
        parameters, forward = list(standins.values()), None

        def run():
            hidden_states, *rotary = inputs
            for forward in self.compiled:
                hidden_states = forward(hidden_states, attention_mask=mask, position_embeddings=tuple(rotary))
            return hidden_states

        for (module, name), parameter in zip(holders, originals, strict=True):
            module._parameters[name] = standins[id(parameter)]
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # compiles, tunes and allocates what must not happen during a capture
                    output = run()
                    torch.autograd.grad(output, parameters, torch.zeros_like(output))
                    del output
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            # "thread_local": what NCCL's threads do meanwhile is none of the capture's business
            with torch.cuda.graph(forward, pool=self.pool, capture_error_mode="thread_local"):
                output = run()
            output_gradient = torch.zeros_like(output)
            with torch.cuda.graph(backward, pool=self.pool, capture_error_mode="thread_local"):
                gradients = torch.autograd.grad(output, parameters, output_gradient)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if forward is None:  # it did not even compile; the caller goes on without
                raise
            # a broken capture leaves torch's allocator unable to reuse memory
            raise UserError(f"CUDA graph capture failed ({str(error).splitlines()[0]}); use --compile=False") from None
        finally:
            for (module, name), parameter in zip(holders, originals, strict=True):
                module._parameters[name] = parameter
        return _Captured(forward, backward, inputs, output.detach(), output_gradient, gradients)


MASK_BUFFERS = (
    *("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"),
    *("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"),
)
_Captured = namedtuple("_Captured", "forward backward inputs output output_gradient gradients")


class _Replay(torch.autograd.Function):
    """The captured layers as one differentiable operation."""

    @staticmethod
    def forward(ctx, captured, *tensors):
        for buffer, tensor in zip(
            captured.inputs, tensors, strict=False
        ):  # the parameters after them are read in place
            buffer.copy_(tensor)
        captured.forward.replay()
        ctx.captured = captured
        return captured.output.detach()

    @staticmethod
    def backward(ctx, gradient):
        captured = ctx.captured
        captured.output_gradient.copy_(gradient)
        captured.backward.replay()
        # The buffers themselves: autograd copies a gradient that somebody else still holds before it keeps it.
        return None, *(None for _ in captured.inputs), *captured.gradients

"""The decoder layers on CUDA, compiled for tree rows of few lengths and replayed as CUDA graphs."""

import time
from bisect import bisect_right
from collections import namedtuple
from functools import partial
from itertools import chain

import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import pad

from alpaca.common.console import say, waiting
from alpaca.common.errors import UserError
from alpaca.training.batches import optimizer_steps
from alpaca.training.checkpoints import from_main
from alpaca.training.prefix_tree import make_collate, tree_mask, tree_row

ROW_MULTIPLE = 128  # FlexAttention's block size
ROW_LENGTHS = 6  # each costs a compilation and a captured graph; with four, 64 MSRA examples are padded 5 %, not 3
COUNTED_SECONDS = 5  # for laying out rows beforehand, to know how long they get


def choose_lengths(lengths, count=ROW_LENGTHS, spare=True):
    """The `count` row lengths, multiples of ROW_MULTIPLE, to which rows of these lengths are padded with least waste.

    spare: the last one is an eighth longer than the longest of these, for rows that are not among them.
    """
    blocks = sorted(-(-n // ROW_MULTIPLE) for n in lengths)
    sizes = sorted(set(blocks))
    rows_up_to = [0, *(bisect_right(blocks, size) for size in sizes)]  # [j]: rows that the first j sizes are enough for
    best, complete = {0: (0, ())}, []  # j -> (blocks after padding, sizes chosen) where the largest chosen is the j-th
    for _ in range(min(count - spare, len(sizes))):  # one more size is chosen each time
        further = {}
        for j, size in enumerate(sizes, 1):
            ways = [
                (padded + size * (rows_up_to[j] - rows_up_to[i]), (*chosen, size))
                for i, (padded, chosen) in best.items()
                if i < j
            ]
            if ways:
                further[j] = min(ways)
        best = further
        complete += [best[len(sizes)]] if len(sizes) in best else []
    _, chosen = min(complete)
    return [n * ROW_MULTIPLE for n in (*chosen, *([-(-chosen[-1] * 9 // 8)] if spare else []))]


def row_lengths(loader, packing, total_steps, seconds=COUNTED_SECONDS):
    """(the lengths of a run's rows, those of all ranks, as far as they can be laid out in that time; whether these are all).

    The examples of a step are drawn at random, so the first steps are a fair sample.
    """
    lengths, end = [], time.monotonic() + seconds
    for step in range(total_steps):
        epoch, index = divmod(step, loader.steps_per_epoch)
        if not index:
            steps = optimizer_steps(loader.sizes, *loader.shape, loader.seed, epoch)
        for part in chain.from_iterable(next(steps)):
            lengths.append(len(tree_row([loader.examples[i] for i in part], packing == "prefix")["input_ids"]))
        if time.monotonic() > end:
            return lengths, step + 1 == total_steps
    return lengths, True


def compile_layers(model, loader, packing, pad_id, graphs, recompute, bind, total_steps):
    """Compile a PEFT model's layers for the rows that `loader` gives; from then on it pads them to few lengths.

    Returns (those lengths, whether they are enough for all rows of the run). A row that is longer gets a length of its
    own when it is met. The lengths are the same on all ranks: one that compiled alone would let the others wait.
    graphs: whether to capture. recompute: gradient checkpointing in what is captured, of layers that draw no dropout.
    model.lora: the one trainable parameter. bind(flat): lets the layers compute with views of another in its place.
    """
    lengths, complete = from_main(lambda: row_lengths(loader, packing, total_steps))
    lengths = choose_lengths(lengths, spare=not complete)
    model.compiled_layers = CompiledLayers(model, lengths, graphs, recompute, bind)
    loader.collate = make_collate(packing, pad_id, lengths, longer=next_length)
    return lengths, complete


def next_length(tokens):
    """The row length for a row of so many tokens, more than were expected; it is said, since it costs a compilation."""
    length = -(-tokens // ROW_MULTIPLE) * ROW_MULTIPLE
    say(f"遇到更长的一行（{tokens} 个 token），为行长 {length} 再编译一次")
    return length


class CompiledLayers:
    """A PEFT model's decoder layers, compiled for tree rows of a few lengths and replayed as CUDA graphs.

    transformers' LlamaModel goes on as it is: only the `forward` of its layers is exchanged, on this instance. Each
    length has a FlexAttention BlockMask in fixed buffers, made anew from the row's enter and exit, by the graph itself
    where there is one. The gradient of model.lora goes through autograd as ever, so DeepSpeed's hook on it runs.
    """

    def __init__(self, model, lengths, graphs, recompute, bind):
        self.model, self.body = model, model.get_base_model().model
        self.lengths, self.graphs, self.bind = lengths, graphs, bind
        self.recompute = recompute and graphs
        self.masks, self.graphed, self.length = {}, {}, None  # length: of the row being computed, None: not compiled
        self.proven = False  # whether a compiled row has ever come out
        self.pool = torch.cuda.graph_pool_handle() if graphs else None  # shared: no two lengths are ever in use at once
        self.originals = [layer.forward for layer in self.body.layers]
        self.compiled = [torch.compile(forward, dynamic=False) for forward in self.originals]
        for i, layer in enumerate(self.body.layers):
            layer.forward = partial(self._layer, i)

    @property
    def replays(self):
        """Whether the row being computed goes through a captured graph."""
        return self.graphs and self.length is not None and torch.is_grad_enabled()

    def load_mask(self, enter, exit):
        """Take a row's mask, int tensors [1, length], for the next forward; False if that row is not to be compiled."""
        length = enter.shape[1]
        self.length = length if length in self.lengths and torch.is_grad_enabled() else None
        if self.recompute:  # transformers would replay the forward graph a second time, in the backward
            for layer in self.body.layers:
                layer.gradient_checkpointing = self.length is None
        if self.length is None:
            return False
        self._make_mask(length, enter.device)
        self.masks[length][0].copy_(torch.cat([enter, exit]))
        if not self.graphs:
            self._renew_mask(length)
        return True

    def _make_mask(self, length, device):
        if length in self.masks:
            return
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(self.lengths))
        limits = torch.zeros(2, length, dtype=torch.int32, device=device)

        def sees(batch, head, q, k):
            return (k <= q) & (limits[0, k] <= limits[0, q]) & (limits[0, q] < limits[1, k])

        self.masks[length] = (limits, create_block_mask(sees, None, None, length, length, device))

    def _renew_mask(self, length):
        limits, mask = self.masks[length]
        for name, fresh in mask_buffers(*limits).items():
            getattr(mask, name).copy_(fresh)
        return mask

    def _layer(self, i, hidden_states, *args, **kwargs):
        if self.length is None or not torch.is_grad_enabled():
            return self.originals[i](hidden_states, *args, **kwargs)
        if not self.graphs:
            mask = self.masks[self.length][1]
            hidden_states = self.compiled[i](hidden_states, *args, **{**kwargs, "attention_mask": mask})
            self.proven = True
            return hidden_states
        if i:
            return hidden_states  # the first layer's call has gone through all of them
        inputs = (hidden_states, *kwargs["position_embeddings"])
        if self.length not in self.graphed:
            # The longest first, whether it is met or not: the others then find room in what it has allocated. In the
            # order of their first use, 192 examples of a 7B ran out of 80 GB; like this they take 61.5 GiB.
            # Without drawing from the step's generator: a resumed run captures in other steps than one uninterrupted.
            with torch.random.fork_rng([hidden_states.device]):
                for length in dict.fromkeys((max(self.lengths), self.length)):
                    if length not in self.graphed:
                        self._make_mask(length, hidden_states.device)
                        longer = (0, 0, 0, length - self.length)
                        self.graphed[length] = self._compiled(length, [pad(tensor, longer) for tensor in inputs])
                # what stands outside the layers, such as the LoRA of lm_head, computes with the model's own parameter
                self.bind(self.model.lora)
            self.proven = True
        return _Replay.apply(self.graphed[self.length], *inputs, self.model.lora)

    def _compiled(self, length, inputs):
        """What _capture returns; lines say that it lives, how long it took, and whether an earlier run had compiled it."""
        start, before = time.time(), _cache_hits()
        with waiting(f"正在编译行长 {length}"):
            captured = self._capture(length, inputs)
        cached = "，取自以前的编译缓存" if _cache_hits() > before else ""
        say(f"行长 {length} 编译好了，用了 {time.time() - start:.0f} 秒{cached}")
        return captured

    def _capture(self, length, inputs):
        """Forward and backward through all layers as two CUDA graphs, for rows like `inputs` (hidden states, cos, sin).

        torch.cuda.make_graphed_callables does not fit: DeepSpeed's hook on the parameter runs on the default stream,
        which may not be used during a capture. So a second Parameter over the same memory is captured with.
        """
        inputs = [tensor.detach().clone() for tensor in inputs]
        lora, forward = torch.nn.Parameter(self.model.lora.detach()), None

        def layers():
            """Each compiled layer as a function of its hidden states, with fresh views of `lora`: made here, since their
            gradients flow on the stream on which they were made."""
            self.bind(lora)
            fixed = {"attention_mask": self.masks[length][1], "position_embeddings": tuple(inputs[1:])}
            return [partial(layer, **fixed) for layer in self.compiled]

        def run():
            """(the last hidden states, those that enter each layer); with self.recompute nothing else is kept."""
            self._renew_mask(length)
            entering, hidden_states = [], inputs[0]
            for layer in layers():
                entering.append(hidden_states)
                hidden_states = layer(hidden_states)
                if self.recompute:
                    hidden_states = hidden_states.detach().requires_grad_()
            return hidden_states, entering

        def gradient_of(output, entering, gradient):
            """That of `lora`, from the gradient of the output."""
            if not self.recompute:
                return torch.autograd.grad(output, lora, gradient)[0]
            again, found = layers(), {}
            weights = [module.weight for module in self.model.lora_modules]
            for layer, hidden_states in zip(reversed(again), reversed(entering), strict=True):
                wanted = [*weights, hidden_states] if hidden_states.requires_grad else weights
                gradients = torch.autograd.grad(layer(hidden_states), wanted, gradient, allow_unused=True)
                found |= {i: part for i, part in enumerate(gradients[: len(weights)]) if part is not None}
                gradient = gradients[-1]
            parts = (found[i] if i in found else torch.zeros_like(weight) for i, weight in enumerate(weights))
            return torch.cat([part.flatten() for part in parts])

        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                # Compiles, tunes and allocates what must not happen during a capture. Layer by layer, since the
                # activations of all of them would need their memory twice: here and in the graphs of other lengths.
                for _ in range(2):
                    self._renew_mask(length)
                    hidden_states = inputs[0]
                    for layer in layers():
                        output = layer(hidden_states)
                        torch.autograd.grad(output, lora, torch.zeros_like(output))
                        hidden_states = output.detach().requires_grad_()
                del output, hidden_states
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            # "thread_local": what NCCL's threads do meanwhile is none of the capture's business
            with torch.cuda.graph(forward, pool=self.pool, capture_error_mode="thread_local"):
                output, entering = run()
            output_gradient = torch.zeros_like(output)
            with torch.cuda.graph(backward, pool=self.pool, capture_error_mode="thread_local"):
                gradient = gradient_of(output, entering, output_gradient)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if forward is None:  # it did not even compile; the caller goes on without
                raise
            # a broken capture leaves torch's allocator unable to reuse memory
            raise UserError(f"CUDA graph capture failed ({str(error).splitlines()[0]}); use --compile=False") from None
        return _Captured(forward, backward, inputs, output.detach(), output_gradient, gradient)


def _cache_hits():
    """How many compiled graphs torch has found on the disk."""
    counters = torch._dynamo.utils.counters
    return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]


def mask_buffers(enter, exit):
    """The tensors of the BlockMask of a tree row, int32 [1, 1, blocks] and [1, 1, blocks, blocks], by their names.

    What create_block_mask computes (blocks are ROW_MULTIPLE wide), with nothing that could not be part of a CUDA graph.
    enter, exit: int [length].
    """
    blocks = len(enter) // ROW_MULTIPLE
    seen = tree_mask(enter, exit).view(blocks, ROW_MULTIPLE, blocks, ROW_MULTIPLE).sum((1, 3))
    full = seen == ROW_MULTIPLE**2
    kinds = {"": (seen > 0) & ~full, "full_": full}
    buffers = {}
    for side in ("kv", "q"):
        for kind, chosen in kinds.items():
            chosen = chosen if side == "kv" else chosen.T
            # the chosen ones first, in their order, then the others
            place = torch.where(chosen, chosen.cumsum(-1), chosen.sum(-1, keepdim=True) + (~chosen).cumsum(-1)) - 1
            columns = torch.arange(blocks, device=enter.device).expand(blocks, blocks)
            buffers[f"{kind}{side}_num_blocks"] = chosen.sum(-1)[None, None].int()
            buffers[f"{kind}{side}_indices"] = torch.empty_like(place).scatter_(-1, place, columns)[None, None].int()
    return buffers


_Captured = namedtuple("_Captured", "forward backward inputs output output_gradient gradient")


class _Replay(torch.autograd.Function):
    """The captured layers as one differentiable operation."""

    @staticmethod
    def forward(ctx, captured, *tensors):
        for buffer, tensor in zip(captured.inputs, tensors[:-1], strict=True):  # the parameter is read in place
            buffer.copy_(tensor)
        captured.forward.replay()
        ctx.captured = captured
        return captured.output.detach()

    @staticmethod
    def backward(ctx, gradient):
        captured = ctx.captured
        captured.output_gradient.copy_(gradient)
        captured.backward.replay()
        # Returning the buffer itself is safe: `captured` still refers to it, so autograd copies it instead of keeping it.
        return None, *(None for _ in captured.inputs), captured.gradient

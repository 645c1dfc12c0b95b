"""What only a CUDA device does: compiled layers replayed as graphs give the gradients of the plain computation."""

import random
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from alpaca.answering.memory import free_memory
from alpaca.models.base_weights import load_base
from alpaca.models.templates import TokenizedExample
from alpaca.models.tokenizer import EOS
from alpaca.training.batches import TrainLoader
from alpaca.training.cuda_graphs import compile_layers
from alpaca.training.lora import add_lora, bind_lora
from alpaca.training.loss import answer_loss
from alpaca.training.prefix_tree import make_collate
from harness import lora_settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Each test compiles the same layers for other models; torch counts that as recompilation, and gives up at its limit."""
    torch._dynamo.reset()


def examples(count, seed):
    """Two instructions, prompts of many lengths, some of them equal."""
    draw = random.Random(seed)
    ids = lambda n: [draw.randrange(3, 60) for _ in range(n)]  # noqa: E731
    instructions = [[1, *ids(90)], [1, *ids(40)]]
    prompts = [draw.choice(instructions) + ids(draw.randint(1, 60)) for _ in range(count)]
    prompts[1] = prompts[0]
    return [TokenizedExample(prompt, [*ids(draw.randint(0, 9)), EOS]) for prompt in prompts]


def gradient(model, batches):
    model.zero_grad()
    for batch in batches:
        answer_loss(model, **batch).backward()
    return model.lora.grad.clone()


@pytest.mark.parametrize("graphs, checkpointing", [(True, False), (True, True), (False, False), (False, True)])
def test_compiled_layers_give_the_same_gradients(lora_model, graphs, checkpointing):
    model = lora_model.cuda()
    torch.backends.cuda.matmul.allow_tf32 = False
    loader = TrainLoader(examples(96, 0), 8, 1, make_collate("prefix", 0), seed=1)
    expected = [gradient(model, [batch]) for batch in loader]
    together = gradient(model, loader)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    bind = partial(bind_lora, model)
    lengths, complete = compile_layers(model, loader, "prefix", 0, graphs, checkpointing, bind, len(loader))
    assert complete
    batches = list(loader)
    assert len({row["input_ids"].shape[1] for batch in batches for row in batch["rows"]} & set(lengths)) > 1
    for batch, reference in zip(batches, expected, strict=True):
        got = gradient(model, [batch])
        assert (got - reference).norm() < 1e-5 * reference.norm()
    assert model.compiled_layers.proven
    assert not graphs or next(iter(model.compiled_layers.graphed)) == max(lengths)  # the others fit into its memory
    accumulated = gradient(model, batches)
    assert (accumulated - together).norm() < 1e-5 * together.norm()
    with torch.no_grad():  # an evaluation between two steps is not compiled, and leaves the graphs as they are
        loss = sum(answer_loss(model, **batch) for batch in batches)
    assert torch.isfinite(loss)
    assert (gradient(model, batches[:1]) - expected[0]).norm() < 1e-5 * expected[0].norm()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_of_the_head_beside_captured_layers_has_its_gradient(base_dir, checkpointing):
    settings = lora_settings(lora_target_modules=["q_proj", "lm_head"])
    model = add_lora(load_base(base_dir, torch.float32, "cuda"), settings)
    torch.nn.init.normal_(model.lora.data, std=0.05)
    loader = TrainLoader(examples(16, 0), 8, 1, make_collate("prefix", 0), seed=1)
    expected = [gradient(model, [batch]) for batch in loader]
    compile_layers(model, loader, "prefix", 0, True, checkpointing, partial(bind_lora, model), len(loader))
    for batch, reference in zip(loader, expected, strict=True):
        assert (gradient(model, [batch]) - reference).norm() < 1e-5 * reference.norm()


def test_captured_checkpointing_keeps_less():
    """Between forward and backward, a captured step holds what enters each layer, not what a layer computes."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}
    loader = TrainLoader(examples(64, 0), 64, 1, make_collate("prefix", 0), seed=1)
    memory = {}
    for checkpointing in (False, True):
        model = add_lora(LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).cuda(), lora_settings())
        compile_layers(model, loader, "prefix", 0, True, checkpointing, partial(bind_lora, model), len(loader))
        gradient(model, list(loader))
        pool = model.compiled_layers.pool
        segments = [part for part in torch.cuda.memory_snapshot() if tuple(part["segment_pool_id"]) == tuple(pool)]
        memory[checkpointing] = sum(part["total_size"] for part in segments)
    assert memory[True] < 0.5 * memory[False]


def test_memory_of_a_captured_graph_is_not_free():
    """A training step's activations stand in it between two steps; an evaluation must not plan with them."""
    device, graph, size = torch.device("cuda"), torch.cuda.CUDAGraph(), 2**28
    torch.cuda.empty_cache()
    before = free_memory(device)
    with torch.cuda.graph(graph):
        kept = torch.zeros(size, dtype=torch.uint8, device=device)
        del kept
    assert before - free_memory(device) >= size


@pytest.mark.parametrize("graphs", [True, False])
def test_a_step_that_captures_has_the_dropout_of_one_that_replays(base_dir, graphs):
    model = add_lora(load_base(base_dir, torch.float32, "cuda"), lora_settings(lora_dropout=0.5))
    loader = TrainLoader(examples(96, 0), 8, 1, make_collate("prefix", 0), seed=1)
    compile_layers(model, loader, "prefix", 0, graphs, False, partial(bind_lora, model), len(loader))

    def step(batch, seed):
        torch.manual_seed(seed)
        return gradient(model, [batch]), torch.rand(1, device="cuda")

    for batch in loader:  # the first of each length compiles and captures
        (first, drawn), (again, drawn_again), (other, _) = step(batch, 7), step(batch, 7), step(batch, 8)
        assert (first - again).norm() < 1e-5 * first.norm() and drawn == drawn_again
        assert (first - other).norm() > 0.1 * first.norm()

"""What is compiled, seen without a GPU: on tensors without content.     python -m pytest tests/answering/test_compiled_layers.py"""

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from alpaca.answering.attention import Flash
from alpaca.answering.graphs import compile_layers
from alpaca.answering.step import attention_by_step

KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"num_key_value_heads": 2, "head_dim": 16}),
}
SHAPE = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
TOKENS, SLOTS, PLACES, SHARED = 128, 5, 16, 256


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_is_compiled_for_all_without_a_graph_break(kind):
    """With a LoRA kept apart, and once more without it; a second step compiles nothing."""
    from torch._dynamo.testing import CompileCounter

    model, config, more = KINDS[kind]
    config = config(**SHAPE, num_hidden_layers=3, **more)
    torch._dynamo.reset()
    counter = CompileCounter()
    with torch.device("meta"), torch.inference_mode():
        options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        causal = model(config).to(torch.bfloat16)
        adapted = PeftModel(causal, LoraConfig(**options), autocast_adapter_dtype=False).eval()
        layers = compile_layers(causal.model.layers, backend=counter, fullgraph=True)
        ints = torch.zeros(9, dtype=torch.int32)
        step = Flash(torch.zeros(TOKENS, dtype=torch.long), ints, ints, ints[1:], ints[:2], ints[:2])
        heads, size = config.num_key_value_heads, 16
        slots = torch.zeros(3, 2, SLOTS, PLACES, heads, size, dtype=torch.bfloat16)
        prefixes = torch.zeros(3, 2, SHARED, heads, size, dtype=torch.bfloat16)
        ids = torch.zeros(1, TOKENS, dtype=torch.long)

        def compute():
            hidden = causal.model.embed_tokens(ids)
            rotary = causal.model.rotary_emb(hidden, ids)
            with attention_by_step(config):
                for layer, kept, shared in zip(layers, slots, prefixes, strict=True):
                    memory = {"step": step, "kept": kept, "shared": shared}
                    hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, **memory)
            return counter.frame_count

        assert [compute(), compute()] == [1, 1]
        with adapted.disable_adapter():
            assert [compute(), compute()] == [2, 2]

"""What the speed benchmarks measure with: a raw corpus as examples, and random models of LLaMA's shapes."""

import torch

from alpaca.common.text_files import read_jsonl
from alpaca.models.base_weights import complete, put_weight
from dataset import INSTRUCT, QUERY_PREFIX, format_answer

LABELS = {"PER": "人名", "LOC": "地名", "ORG": "机构名"}
SHAPES = {
    name: dict(
        zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), sizes, strict=True)
    )
    for name, sizes in {
        "tiny": (256, 688, 8, 4),
        "7b": (4096, 11008, 32, 32),
        "13b": (5120, 13824, 40, 40),
        "33b": (6656, 17920, 60, 52),
        "65b": (8192, 22016, 80, 64),
    }.items()
}


def read_corpus(path):
    """Yield (text, {"instruct", "query", "answer"}) of each sentence of a corpus in process.py's JSON-lines schema."""
    instruct = INSTRUCT.replace("{labels}", "、".join(LABELS.values()))
    for _, record in read_jsonl(path):
        entities = [
            {"entity": e["entity"], "type": LABELS[e["entity_type"]], **e["entity_index"]}
            for e in record["entity_list"]
        ]
        query, answer = QUERY_PREFIX + record["text"], format_answer(entities)
        yield record["text"], {"instruct": instruct, "query": query, "answer": answer}


def random_7b(vocab_size, dtype, device):
    """A LlamaForCausalLM of LLaMA 7B's shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=vocab_size, rms_norm_eps=1e-6, max_position_embeddings=2048, **SHAPES["7b"])
    config.dtype = dtype
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def random_quantized(shape, vocab_size, base_weights, dtype, device):
    """The same of a shape of SHAPES, made and quantized matrix by matrix: a device that could not hold the full model can."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=vocab_size, rms_norm_eps=1e-6, max_position_embeddings=2048, **SHAPES[shape])
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    for name, tensor in model.state_dict().items():
        random = torch.ones if tensor.dim() == 1 else torch.randn  # norms
        weight = random(tensor.shape, dtype=dtype, device=device)
        put_weight(model, name, weight if tensor.dim() == 1 else weight.mul_(0.02), base_weights, dtype, device)
    return complete(model, device)

"""What the speed benchmarks measure with: a raw corpus as examples, and a random model of LLaMA 7B's shape."""

import torch

from alpaca.common.text_files import read_jsonl
from dataset import INSTRUCT, QUERY_PREFIX, format_answer

LABELS = {"PER": "人名", "LOC": "地名", "ORG": "机构名"}
SHAPE_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


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

    config = LlamaConfig(vocab_size=vocab_size, rms_norm_eps=1e-6, max_position_embeddings=2048, **SHAPE_7B)
    config.dtype = dtype
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model

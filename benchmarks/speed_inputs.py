"""What the speed benchmarks measure with: a raw corpus as examples, and random models of the shapes of 7Bs."""

from pathlib import Path

import torch
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoConfig

from alpaca.common.text_files import read_jsonl
from alpaca.models.base_files import EMBEDDING
from alpaca.models.base_weights import complete, put_weight
from alpaca.models.layers import meta_model
from alpaca.models.spread import place_of, spread
from alpaca.models.tokenizer import load_tokenizer, save_tokenizer
from dataset import INSTRUCT, QUERY_PREFIX, format_answer

LABELS = {"PER": "人名", "LOC": "地名", "ORG": "机构名"}


def _llama(hidden, ffn, layers, heads):
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": "llama", **sizes}


SHAPES = {  # --shape -> config.json; where it names no vocabulary, that is the given tokenizer's
    "tiny": _llama(256, 688, 8, 4),
    "7b": _llama(4096, 11008, 32, 32),
    "13b": _llama(5120, 13824, 40, 40),
    "33b": _llama(6656, 17920, 60, 52),
    "65b": _llama(8192, 22016, 80, 64),
    "qwen2.5-7b": {
        **_llama(3584, 18944, 28, 28),
        "model_type": "qwen2",
        "num_key_value_heads": 4,
        "rope_theta": 1000000.0,
        "vocab_size": 152064,
    },
}
BIG = tuple(name for name in SHAPES if name != "tiny")  # where tiny is the embedded model, not random


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


def save_vocabulary(vocab_file, folder, shape):
    """Write a tokenizer.model to a folder, with fillers up to the vocabulary that one of SHAPES names -> the tokenizer."""
    save_tokenizer(vocab_file, folder)
    proto = sentencepiece_model_pb2.ModelProto.FromString(Path(vocab_file).read_bytes())
    for i in range(len(proto.pieces), SHAPES[shape].get("vocab_size", 0)):
        proto.pieces.add(piece=f"<{i}>", score=0.0)
    (Path(folder) / "tokenizer.model").write_bytes(proto.SerializeToString())
    return load_tokenizer(folder)


def _config(shape, vocab_size):
    sizes = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, **SHAPES[shape], "vocab_size": vocab_size}
    return AutoConfig.for_model(**sizes)


def random_model(shape, vocab_size, dtype, device, base_weights="full", memory=None):
    """A causal LM of one of SHAPES with random weights, made, and quantized, matrix by matrix: a device that could not hold
    the full model can. memory: spread over GPUs of which each has so many bytes for weights, see spread.py."""
    config = _config(shape, vocab_size)
    config.dtype = dtype
    model = meta_model(config).to(dtype)
    places = spread(model, base_weights, memory) if memory else {"": device}
    for name, tensor in model.state_dict().items():
        place, matrix = place_of(places, name), tensor.dim() > 1
        make = torch.randn if matrix else torch.zeros if name.endswith(".bias") else torch.ones  # ones: norms
        weight = make(tensor.shape, dtype=dtype, device=place)
        put_weight(model, name, weight.mul_(0.02) if matrix else weight, base_weights, dtype, place)
    return complete(model, place_of(places, EMBEDDING))

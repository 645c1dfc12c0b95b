"""Meta's LLaMA written down from its published formulas, with nothing from transformers or model_hub.

Weights are a dict of tensors by Meta's names; `params` is the content of a params.json.
"""

import json
import shutil

import torch

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 8, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": -1}
# Which dimension Meta's model parallelism cuts: columns (1) of what sums over the cut, rows (0) of all other matrices.
CUT = {"wo": 1, "w2": 1, "tok_embeddings": 1, "wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0}


def feed_forward_width(params):
    width = int(2 * 4 * params["dim"] / 3)
    width = int(params.get("ffn_dim_multiplier", 1) * width)
    return params["multiple_of"] * ((width + params["multiple_of"] - 1) // params["multiple_of"])


def random_weights(params, vocab_size, seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)

    def matrix(rows, columns):
        return (torch.randn(rows, columns, generator=random) * columns**-0.5).to(dtype)

    def norm():
        return (1 + 0.1 * torch.randn(params["dim"], generator=random)).to(dtype)

    dim, width = params["dim"], feed_forward_width(params)
    keys = dim // params["n_heads"] * params.get("n_kv_heads", params["n_heads"])
    weights = {"tok_embeddings.weight": matrix(vocab_size, dim), "norm.weight": norm()}
    weights["output.weight"] = matrix(vocab_size, dim)
    for i in range(params["n_layers"]):
        shapes = {"wq": (dim, dim), "wk": (keys, dim), "wv": (keys, dim), "wo": (dim, dim)}
        weights |= {f"layers.{i}.attention.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        shapes = {"w1": (width, dim), "w2": (dim, width), "w3": (width, dim)}
        weights |= {f"layers.{i}.feed_forward.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        weights |= {f"layers.{i}.attention_norm.weight": norm(), f"layers.{i}.ffn_norm.weight": norm()}
    return weights


def logits(weights, params, ids):
    """ids of one text -> (length, vocabulary) logits."""
    heads, length = params["n_heads"], len(ids)
    head_dim = params["dim"] // heads

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * weight

    def rotate(x):  # neighbouring numbers of a head are one complex number, turned by position * theta^(-2i/d)
        speeds = params.get("rope_theta", 10000.0) ** (-torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.outer(torch.arange(length).float(), speeds)[:, None]
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned).flatten(-2)

    x = weights["tok_embeddings.weight"][ids]
    mask = torch.full((length, length), float("-inf")).triu(1)
    for i in range(params["n_layers"]):
        layer = {
            k.split(".", 2)[2].removesuffix(".weight"): w for k, w in weights.items() if k.startswith(f"layers.{i}.")
        }
        y = norm(x, layer["attention_norm"])
        q, k, v = ((y @ layer[f"attention.w{name}"].T).unflatten(-1, (-1, head_dim)) for name in "qkv")
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))  # grouped queries share a key
        scores = torch.einsum("qhd,khd->hqk", q, k) * head_dim**-0.5 + mask
        y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + y @ layer["attention.wo"].T
        y = norm(x, layer["ffn_norm"])
        gate = torch.nn.functional.silu(y @ layer["feed_forward.w1"].T)
        x = x + (gate * (y @ layer["feed_forward.w3"].T)) @ layer["feed_forward.w2"].T
    return norm(x, weights["norm.weight"]) @ weights["output.weight"].T


def write_meta_folder(folder, params, weights, n_shards=1, tokenizer_file=None, rope_freqs=True):
    folder.mkdir(parents=True)
    for i in range(n_shards):
        shard = {}
        for name, weight in weights.items():
            cut = CUT.get(name.split(".")[-2])
            shard[name] = weight if cut is None else weight.chunk(n_shards, dim=cut)[i].clone()
        if rope_freqs:
            shard["rope.freqs"] = torch.ones(4)
        torch.save(shard, folder / f"consolidated.{i:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    if tokenizer_file:
        shutil.copyfile(tokenizer_file, folder / "tokenizer.model")

"""LLaMA's weights in two layouts: names, shapes, the order of rows, and who cuts what. Reads and writes no file.

Meta's (llama/model.py of github.com/meta-llama/llama) is consolidated.*.pth + params.json, Hugging Face's
model*.safetensors + config.json. They differ in names and in the order of the rows of wq and wk: Meta rotates the
neighbouring rows 2i and 2i + 1 of a head together, Hugging Face the rows i and i + half. With several files, each of
Meta's holds some rows or some columns of a matrix, and all of a norm.
"""

import torch

from alpaca.common.errors import UserError
from alpaca.models.base_files import EMBEDDING, HEAD
from alpaca.models.tokenizer import BOS, EOS

OUTSIDE_LAYERS = {EMBEDDING: "tok_embeddings.weight", "model.norm.weight": "norm.weight", HEAD: "output.weight"}
IN_LAYER = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
CUT_BY_COLUMNS = ("self_attn.o_proj.weight", "mlp.down_proj.weight", "embed_tokens.weight")
FILES_OF_META = {5120: 2, 6656: 4, 8192: 8}  # hidden size -> consolidated files of 13B, 33B, 65B and 70B; else 1


def meta_names(n_layers):
    """Hugging Face's name of every tensor -> Meta's."""
    names = dict(OUTSIDE_LAYERS)
    for i in range(n_layers):
        for ours, metas in IN_LAYER.items():
            names[f"model.layers.{i}.{ours}.weight"] = f"layers.{i}.{metas}.weight"
    return names


def check_places(names, config):
    """UserError where Meta's layout has no place for one of these tensors, or for how the layers use them."""
    others = set(names) - meta_names(config["num_hidden_layers"]).keys()
    if others or config.get("sliding_window"):
        what = f"the tensor {min(others)}" if others else "a sliding window"
        raise UserError(f"--output_type=pth: no place there for {what}; use --output_type=huggingface")


# ---------------------------------------------------------------------------------------------------------------------
# tensors


def rotary_heads(name, config):
    """The number of heads in which the rows of this tensor are rotated: 0 for all but wq and wk."""
    if name.endswith("self_attn.q_proj.weight"):
        return config["num_attention_heads"]
    if name.endswith("self_attn.k_proj.weight"):
        return config.get("num_key_value_heads") or config["num_attention_heads"]
    return 0


def from_meta(name, parts, config):
    """The parts of one of Meta's tensors, in the order of its files -> Hugging Face's tensor."""
    if len(parts) == 1 or parts[0].dim() == 1:
        tensor = parts[0]
    else:
        tensor = torch.cat(parts, dim=1 if name.endswith(CUT_BY_COLUMNS) else 0)
    heads = rotary_heads(name, config)
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2) if heads else tensor


def to_meta(name, tensor, config, n_files):
    """Hugging Face's tensor -> its part in each of Meta's files.

    Where rows cannot be shared out equally (pieces of a vocabulary), the last part has the rest of them, as in
    merge_llama_with_chinese_lora_low_mem.py of github.com/ymcui/Chinese-LLaMA-Alpaca.
    """
    heads = rotary_heads(name, config)
    if heads:
        tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    if tensor.dim() == 1:
        return [tensor] * n_files
    cut = 1 if name.endswith(CUT_BY_COLUMNS) else 0
    size = tensor.shape[cut] // n_files
    return tensor.split([size] * (n_files - 1) + [tensor.shape[cut] - size * (n_files - 1)], dim=cut)


# ---------------------------------------------------------------------------------------------------------------------
# params.json <-> config.json


def config_of(params, vocab_size, intermediate_size, dtype, max_position_embeddings):
    """config.json from params.json and what only the tensors tell (params.json's vocab_size is -1, or outdated)."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": params["dim"],
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_position_embeddings,
        "num_attention_heads": params["n_heads"],
        "num_hidden_layers": params["n_layers"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta") or 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocab_size,
    }


def params_of(config):
    """params.json from config.json; Meta's code computes the feed-forward width, so find numbers that give ours."""
    dim, ffn = config["hidden_size"], config["intermediate_size"]
    heads, keys = config["num_attention_heads"], config.get("num_key_value_heads")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    if kind != "default" or (config.get("head_dim") or dim // heads) * heads != dim:
        raise UserError(
            f"--output_type=pth: no place there for rope type {kind!r} or head_dim {config.get('head_dim')} "
            f"with {heads} heads of {dim}; use --output_type=huggingface"
        )
    plain = int(2 * 4 * dim / 3)
    for multiple_of in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        if -(-plain // multiple_of) * multiple_of == ffn:
            width = {"multiple_of": multiple_of}
            break
    else:
        width = {"multiple_of": 1, "ffn_dim_multiplier": (ffn + 0.5) / plain}  # Meta's int() drops the half
    return {
        "dim": dim,
        **width,
        "n_heads": heads,
        **({"n_kv_heads": keys} if keys and keys != heads else {}),
        "n_layers": config["num_hidden_layers"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        **({"rope_theta": theta} if theta != 10000.0 else {}),
        "vocab_size": config["vocab_size"],
    }


def count_files(config, wanted):
    """How many consolidated files to write: `wanted`, or for -1 as many as Meta's model of that hidden size has.

    Heads, feed-forward units and dimensions are shared out equally, pieces of the vocabulary as to_meta does.
    """
    n_files = FILES_OF_META.get(config["hidden_size"], 1) if wanted == -1 else wanted
    heads = config["num_attention_heads"]
    sizes = {"heads": heads, "key and value heads": config.get("num_key_value_heads") or heads}
    sizes |= {"feed-forward units": config["intermediate_size"], "dimensions": config["hidden_size"]}
    uneven = [f"{size} {what}" for what, size in sizes.items() if n_files < 1 or size % n_files]
    if uneven and wanted != -1:
        raise UserError(f"--pth_files={wanted}: {uneven[0]} cannot be shared out equally; use --pth_files=1")
    return 1 if uneven else n_files

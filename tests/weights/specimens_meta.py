"""Miniatures of the folders that Meta ships: consolidated.NN.pth, params.json, checklist.chk, a tokenizer beside them."""

import base64
import hashlib
from pathlib import Path

import torch

from specimens import (
    ALPACA,
    BASE,
    EMBEDDING,
    HEAD,
    LLAMA,
    Model,
    Shape,
    random_tensor,
    rotary_table,
    vocabularies,
    write_as_transformers,
    write_json,
)
from specimens_hf import SPECIALS, long_tokenizer

# Meta's name -> Hugging Face's, and along which dimension the files part the tensor (0: rows, 1: columns, None: whole in
# each). wq, wk, wv, w1, w3 and output are column-parallel layers, which part the rows of their matrix; wo and w2 are
# row-parallel, tok_embeddings a parallel embedding; both part the columns (llama/model.py of meta-llama/llama).
OUTSIDE = {
    "tok_embeddings.weight": (EMBEDDING, 1),
    "norm.weight": ("model.norm.weight", None),
    "output.weight": (HEAD, 0),
}
INSIDE = {
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "attention_norm.weight": ("input_layernorm.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
}
# 1/64 of the dimensions and feed-forward units; heads are what the files can share out evenly and leave 16 numbers a
# head. 70B is 1/32, else 8 files could not share 8 key heads that each serve more than one query head; and one layer.
SHAPES = {
    "7B": Shape(64, 172, 4, 4, 2),
    "13B": Shape(80, 216, 4, 4, 2),
    "30B": Shape(104, 280, 4, 4, 2),
    "65B": Shape(128, 344, 8, 8, 2),
    "70B": Shape(256, 896, 16, 8, 1),
}
FILES = {"7B": 1, "13B": 2, "30B": 4, "65B": 8, "70B": 8}


def names(layers):
    """Meta's name -> (Hugging Face's, dimension of the parts), in the order of Meta's files."""
    found = dict(OUTSIDE)
    for i in range(layers):
        found |= {f"layers.{i}.{meta}": (f"model.layers.{i}.{name}", cut) for meta, (name, cut) in INSIDE.items()}
    return found


def llama1(folder, size):
    """<folder>/<size>/ of LLaMA-1 7B, 13B, 30B or 65B, with tokenizer.model and tokenizer_checklist.chk in <folder>.

    Names of files, params.json (on one line: 101 bytes for 7B) and the number of files: ymcui/Chinese-LLaMA-Alpaca's
    wiki (Manual-Conversion) and merge_llama_with_chinese_lora_low_mem.py, huggingface.co/cnbeining/Chinese-Alpaca-7B-
    Merged. fp16. The rotary table stands as layers.N.attention.inner_attention.rope.freqs in each layer of 7B and once
    as rope.freqs in each file of the others: llama.cpp's tensor_mapping.py and flash-attention's remapping of names,
    which leave out both; public converters branch on 7B. Its number format and the checklist's form (md5sum's, as
    Meta's download.sh reads it) are of memory.
    """
    eps = 1e-5 if size == "65B" else 1e-6
    params = {"multiple_of": 4, "norm_eps": eps, "vocab_size": -1}
    return _write(folder, size, size, params, torch.float16, table_in_layers=size == "7B")


def llama2(folder, size):
    """<folder>/llama-2-<size>/ of LLaMA-2 7B, 13B or 70B, with the tokenizer in <folder>.

    70B: datascience.stackexchange.com/questions/126942 lists params.json and a file's tensors: one rope.freqs, n_kv_heads
    8, multiple_of 4096 (here 128), ffn_dim_multiplier 1.3. Folders' names and files: Meta's download.sh, as deepwiki.com/
    meta-llama/llama tells it. bf16 is of memory.
    """
    params = {"multiple_of": 4, "norm_eps": 1e-5, "vocab_size": -1}
    if size == "70B":
        params |= {"multiple_of": 128, "ffn_dim_multiplier": 1.3, "n_kv_heads": SHAPES[size].key_heads}
    return _write(folder, f"llama-2-{size.lower()}", size, params, torch.bfloat16)


def llama3(folder):
    """<folder>/Meta-Llama-3-8B/, which must be refused: its tokenizer.model is a list of base64 words, not SentencePiece.

    params.json: rope_theta 500000.0, vocab_size 128256 (here 512), as read by transformers' convert_llama_weights_to_hf;
    the list of files is of memory.
    """
    params = {"multiple_of": 4, "norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": BASE}
    model = _write(folder, "Meta-Llama-3-8B", "7B", params, torch.bfloat16)
    words = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))
    (Path(folder) / "tokenizer.model").unlink()
    (model.folder / "tokenizer.model").write_text(words)
    return model


def published_pth(folder, vocabulary):
    """shibing624/chinese-alpaca-plus-13b-pth, or the same of Chinese-LLaMA: merged by the publishers' script into 2 files.

    Files: that repository's tree (commit a49577c): params.json of 101 bytes with vocab_size -1, tokenizer files beside it.
    ymcui/Chinese-LLaMA-Alpaca's merge_llama_with_chinese_lora_low_mem.py writes no rotary table, and where the pieces
    do not divide by the files, the last output.weight has the rest: 24,976 and 24,977 of 49,953 (here 398 and 399).
    """
    rows, place = {"llama": LLAMA, "alpaca": ALPACA}[vocabulary], Path(folder)
    place.mkdir(parents=True)
    shape, n_files = SHAPES["13B"], FILES["13B"]
    _weights(place, shape, n_files, rows, torch.float16, "nowhere")
    params = {"dim": shape.dim, "multiple_of": 4, "n_heads": shape.heads, "n_layers": shape.layers, "norm_eps": 1e-06}
    write_json(place / "params.json", params | {"vocab_size": -1})
    long_tokenizer(place, vocabulary)
    (place / "tokenizer.json").unlink()
    write_as_transformers(place / "special_tokens_map.json", SPECIALS | {"pad_token": "[PAD]"})
    return Model(place, expected(place, shape, n_files))


def _write(folder, name, size, params, dtype, table_in_layers=False):
    shape, n_files = SHAPES[size], FILES[size]
    place = Path(folder) / name
    place.mkdir(parents=True)
    _weights(place, shape, n_files, BASE, dtype, "in layers" if table_in_layers else "in files")
    sizes = {"dim": shape.dim, "n_heads": shape.heads, "n_layers": shape.layers}
    write_json(place / "params.json", dict(sorted((sizes | params).items())))
    (Path(folder) / "tokenizer.model").write_bytes(vocabularies()["base"])
    _checklist(place / "checklist.chk", sorted(place.iterdir()))
    _checklist(Path(folder) / "tokenizer_checklist.chk", [Path(folder) / "tokenizer.model"])
    return Model(place, expected(place, shape, n_files))


def _weights(place, shape, n_files, rows, dtype, where):
    """consolidated.NN.pth with random numbers; where: the rotary table stands "in layers", "in files" or "nowhere"."""
    full, table = _random(shape, rows, dtype), rotary_table(shape, dtype)
    for i in range(n_files):
        part = {}
        for meta, (_, cut) in names(shape.layers).items():
            if meta == "layers.0.attention.wq.weight" and where == "in files":
                part["rope.freqs"] = table.clone()
            part[meta] = full[meta].clone()
            if cut is not None:
                step, rest = divmod(full[meta].shape[cut], n_files)
                part[meta] = full[meta].narrow(cut, i * step, step + rest * (i == n_files - 1)).clone()
            if meta.endswith("ffn_norm.weight") and where == "in layers":
                part[meta.replace("ffn_norm.weight", "attention.inner_attention.rope.freqs")] = table.clone()
        torch.save(part, place / f"consolidated.{i:02d}.pth")


def _random(shape, rows, dtype):
    """Full tensors by Meta's names, wq and wk with their rows in Meta's order."""
    random, dim, keys = torch.Generator().manual_seed(1), shape.dim, shape.dim // shape.heads * shape.key_heads
    sizes = {"wq": (dim, dim), "wk": (keys, dim), "wv": (keys, dim), "wo": (dim, dim)}
    sizes |= {"w1": (shape.ffn, dim), "w2": (dim, shape.ffn), "w3": (shape.ffn, dim)}
    sizes |= {"tok_embeddings": (rows, dim), "output": (rows, dim)}
    return {meta: random_tensor(sizes.get(meta.split(".")[-2], (dim,)), random, dtype) for meta in names(shape.layers)}


def _checklist(path, files):
    """As md5sum writes it: sum, two blanks, name."""
    sums = (f"{hashlib.md5(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    path.write_text("".join(sums))


def expected(folder, shape, n_files):
    """The full weights by Hugging Face's names, put together from the files of one of Meta's folders.

    Meta turns the numbers 2i and 2i + 1 of a head as a pair, Hugging Face i and i + half (huggingface/transformers,
    apply_rotary_pos_emb): so the rows of wq and wk go, head by head, even ones first.
    """
    parts = [torch.load(folder / f"consolidated.{i:02d}.pth") for i in range(n_files)]
    weights = {}
    for meta, (name, cut) in names(shape.layers).items():
        tensor = parts[0][meta] if cut is None else torch.cat([part[meta] for part in parts], cut)
        if meta.endswith(("wq.weight", "wk.weight")):
            size = shape.dim // shape.heads
            heads = range(len(tensor) // size)
            rows = [head * size + i + odd for head in heads for odd in (0, 1) for i in range(0, size, 2)]
            tensor = tensor[rows]
        weights[name] = tensor
    return weights

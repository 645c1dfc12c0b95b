"""What convert and merge must agree on: the two layouts of LLaMA's weights, and how folders are read and written.

Meta's layout is consolidated.*.pth + params.json, Hugging Face's is model*.safetensors + config.json. They differ in
names and in the order of the rows of wq and wk: Meta rotates the neighbouring rows 2i and 2i + 1 of a head together,
Hugging Face the rows i and i + half. Weights are memory-mapped where they are read.
"""

import json
import math
import os
import pickle
import shutil
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from config_utils import UserError
from dataset import BOS, EOS, how_to_get, load_tokenizer, save_tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
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
SHARD_BYTES = 10**9  # also what writing holds in memory


def meta_names(n_layers):
    """Hugging Face's name of every tensor -> Meta's."""
    names = dict(OUTSIDE_LAYERS)
    for i in range(n_layers):
        for ours, metas in IN_LAYER.items():
            names[f"model.layers.{i}.{ours}.weight"] = f"layers.{i}.{metas}.weight"
    return names


def expected_shapes(config):
    """Hugging Face's name of every tensor -> its shape, from a config.json."""
    hidden, ffn, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    in_layer = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
        "mlp.up_proj": (ffn, hidden),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    rows = (config["vocab_size"], hidden)
    shapes = {EMBEDDING: rows, "model.norm.weight": (hidden,), HEAD: rows}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in in_layer.items()}
    return shapes


def rotary_heads(name, config):
    """The number of heads in which the rows of this tensor are rotated: 0 for all but wq and wk."""
    if name.endswith("self_attn.q_proj.weight"):
        return config["num_attention_heads"]
    if name.endswith("self_attn.k_proj.weight"):
        return config.get("num_key_value_heads") or config["num_attention_heads"]
    return 0


def rows_from_meta(weight, heads):
    """Meta's order of wq's and wk's rows -> Hugging Face's."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def rows_to_meta(weight, heads):
    """Hugging Face's order of wq's and wk's rows -> Meta's."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def dims(shape):
    """A shape as error messages show it."""
    return " x ".join(map(str, shape))


def read_json(path, remedy):
    """The object in a JSON file; `remedy` says how to get the file if it is missing."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; {remedy}")
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); get the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}; get the file again")
    return value


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_tensors(path):
    """Name -> memory-mapped tensor of a .safetensors file or a PyTorch file; nothing pickled is ever run."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; download it, every part of the model is needed")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # files that PyTorch wrote before version 1.6 are no zip archives, and only archives can be mapped
        tensors = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: damaged, or no file of weights ({reason}); download it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"{path}: holds something else than named tensors; download it again")
    return tensors


def progress(tensors, shapes, dtype, what):
    """The (name, tensor) pairs as they come, with a bar that counts bytes."""
    total = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
    with tqdm(total=total, unit="B", unit_scale=True, desc=what) as bar:
        for name, tensor in tensors:
            yield name, tensor
            bar.update(tensor.nbytes)


def save_model(folder, config, tensors, tokenizer_file):
    """Write a folder for LlamaForCausalLM.from_pretrained and AutoTokenizer; `tensors` are (name, tensor) pairs."""
    folder = Path(folder)
    shards, size, shard = [], 0, {}

    def flush():
        # the final names tell how many shards there are, which is known only at the end
        save_file(shard, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    flush()

    total = len(shards)
    files = [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    files = files if total > 1 else ["model.safetensors"]
    for i, file in enumerate(files):
        (folder / f"{i}.safetensors").rename(folder / file)
    if total > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})

    save_tokenizer(tokenizer_file, folder)
    pad = load_tokenizer(folder).pad_token_id
    write_json(folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": pad})
    for file in files:  # safetensors lets only the owner read what it writes
        shutil.copymode(folder / "generation_config.json", folder / file)
    write_json(folder / "config.json", config)


def read_base(folder):
    """(config, {name: memory-mapped tensor}) of a Hugging Face LLaMA."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {how_to_get(folder)}")
    config = read_json(folder / "config.json", "convert_llama_weights_to_hf.py makes such folders")
    if config.get("model_type") != "llama":
        raise UserError(f'{folder}/config.json: "model_type" is {config.get("model_type")!r}; only LLaMA can be merged')
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"):
        if not isinstance(config.get(key), int):
            raise UserError(f'{folder}/config.json: "{key}" must be a number, got {config.get(key)!r}; get it again')
    for kind in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{kind}.index.json"
        if index.is_file():
            files = sorted(set(read_json(index, "download it again").get("weight_map", {}).values()))
            break
        if (folder / kind).is_file():
            files = [kind]
            break
    else:
        raise UserError(f"{folder}: no model.safetensors and no pytorch_model.bin in it; convert or download it again")
    tensors = {}
    for file in files:
        tensors |= read_tensors(folder / file)
    # tables that old versions of transformers saved along with the weights
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}

    expected = expected_shapes(config)
    for name in [*expected, *tensors]:
        if name not in tensors or name not in expected:
            problem = "is missing" if name in expected else "is none of a LLaMA's"
            raise UserError(f"{folder}: the tensor {name} {problem}; convert or download it again")
        if tuple(tensors[name].shape) != expected[name]:
            raise UserError(
                f"{folder}: {name} is {dims(tensors[name].shape)}, by config.json {dims(expected[name])}; convert again"
            )
    return config, {name: tensors[name] for name in expected}


def save_pth(folder, config, tensors, tokenizer_file):
    """Meta's layout in one file. torch.save wants all tensors at once: this takes the memory of the changed ones."""
    params, names, weights = meta_params(config), meta_names(config["num_hidden_layers"]), {}
    for name, tensor in tensors:
        heads = rotary_heads(name, config)
        weights[names[name]] = (rows_to_meta(tensor, heads) if heads else tensor).contiguous()
    torch.save(weights, folder / "consolidated.00.pth")
    shutil.copyfile(tokenizer_file, folder / "tokenizer.model")
    write_json(folder / "params.json", params)


def meta_params(config):
    """params.json; Meta's code computes the width of the feed-forward layer, so find numbers that give ours."""
    dim, ffn = config["hidden_size"], config["intermediate_size"]
    heads, keys = config["num_attention_heads"], config.get("num_key_value_heads")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind, theta = rope.get("rope_type", "default"), rope.get("rope_theta") or config.get("rope_theta", 10000.0)
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
        "norm_eps": config["rms_norm_eps"],
        **({"rope_theta": theta} if theta != 10000.0 else {}),
        "vocab_size": config["vocab_size"],
    }


@contextmanager
def new_folder(path, inputs):
    """Yield `<path>.tmp`, which becomes `path` when the block ends: an interrupted run never looks finished.

    Where `path` exists, only the model files of its kind are replaced; other files stay. It must be none of `inputs`.
    """
    path = Path(path).resolve()
    work = path.with_name(path.name + ".tmp")
    for source in inputs:
        if Path(source).resolve() in (path, work):
            raise UserError(f"--output_dir={path} would overwrite {source}, which is read; name another folder")
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir={path} is a file; name a folder")
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output_dir={path}: cannot be made ({error.strerror}); name another folder") from None
    try:
        yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    if not path.exists():
        work.rename(path)
        return
    # The file without which nothing loads the folder goes first and comes back last.
    last = "config.json" if (work / "config.json").exists() else "params.json"
    weights = ["model.safetensors*", "model-*-of-*.safetensors"] if last == "config.json" else ["consolidated.*.pth"]
    for pattern in [last, *weights]:
        for old in path.glob(pattern):
            old.unlink()
    for file in sorted(work.iterdir(), key=lambda file: file.name == last):
        os.replace(file, path / file.name)
    work.rmdir()


def folder_bytes(folder):
    return sum(file.stat().st_size for file in Path(folder).iterdir())

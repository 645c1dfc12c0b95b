"""Reading a base from disk, memory-mapped and checked: a Hugging Face folder, and any file of weights or settings."""

import json
import math
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from alpaca.common.errors import UserError
from alpaca.models.tokenizer import how_to_get

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# Rows of embeddings without a piece: a vocabulary is padded to a multiple of 64 or 128, or has a few added tokens.
UNUSED_ROWS = 128


def read_json(path, remedy):
    """The object in a JSON file; `remedy` says how to get the file if it is missing."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; {remedy}")
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))  # editors of Windows write a byte order mark
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct its permissions or its disk") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); get the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}; get the file again")
    return value


def check_counts(values, keys, path):
    """UserError unless each of these keys is a whole number above 0."""
    for key in keys:
        if type(values.get(key)) is not int or values[key] < 1:
            raise UserError(f'{path}: "{key}" must be a whole number above 0, got {values.get(key)!r}; get it again')


def check_types(values, kinds, path):
    """UserError unless what stands under each key of `kinds` is of that type, or is missing or null."""
    for key, kind in kinds.items():
        value = values.get(key)
        wrong = not isinstance(value, kind) or kind is not bool and isinstance(value, bool)
        if value is not None and (wrong or isinstance(value, float) and not math.isfinite(value)):
            name = {dict: "an object", list: "a list", bool: "true or false"}.get(kind, "a number")
            raise UserError(f'{path}: "{key}" must be {name}, got {value!r}; get the file again')


def is_table(name):
    """Whether this tensor is a table of rotary angles, which config.json determines. Some files hold it, some do not.

    Meta's is called rope.freqs, in a 7B layers.N.attention.inner_attention.rope.freqs; transformers' rotary_emb.inv_freq.
    """
    return name.endswith(("rope.freqs", "inv_freq"))


def is_finite(tensor):
    """Whether no number is NaN or infinite. torch.aminmax keeps NaN and takes a 20th of the time of isfinite."""
    return not tensor.numel() or all(math.isfinite(number) for number in torch.aminmax(tensor))


def read_tensors(path):
    """Name -> memory-mapped tensor of a .safetensors file or a PyTorch file; nothing pickled is ever run.

    Tables of rotary angles are left out.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; download it, every part of the model is needed")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct its permissions or its disk") from None
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            _check_pickle(path)
            # files that PyTorch wrote before version 1.6 are no zip archives, and only archives can be mapped
            tensors = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception as error:  # damaged bytes make an unpickler fail in any way there is
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: damaged, or no file of weights ({reason}); download it again") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise UserError(f"{path}: holds something else than named tensors; download it again")
    tensors = {name: tensor for name, tensor in tensors.items() if not is_table(name)}
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS or tensor.layout != torch.strided or tensor.is_meta:
            raise UserError(
                f"{path}: {name} is of type {tensor.dtype}; only float16, bfloat16 and float32 can be read, so take "
                "the model that is not quantized"
            )
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _check_pickle(path):
    """Raise BadZipFile where the pickle of a .pth is damaged. torch.load does not look at its checksum.

    One changed byte of it may name the numbers of another tensor of the same shape.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if "/data/" not in name:  # those are the numbers
                    archive.read(name)


def dims(shape):
    """A shape as error messages show it."""
    return " x ".join(map(str, shape))


# ---------------------------------------------------------------------------------------------------------------------
# a Hugging Face folder


def read_base(folder):
    """(config, {name: tensor}, files of weights) of a Hugging Face LLaMA, every tensor checked."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {how_to_get(folder)}")
    config = read_json(folder / "config.json", "convert_llama_weights_to_hf.py makes such folders")
    if config.get("model_type") != "llama":
        raise UserError(f'{folder}/config.json: "model_type" is {config.get("model_type")!r}; only LLaMA can be merged')
    counts = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    check_counts(config, counts, folder / "config.json")
    _check_config(config, folder / "config.json")
    files = _weight_files(folder)
    tensors = {}
    for file in files:
        tensors |= read_tensors(file)
    if config.get("tie_word_embeddings") and EMBEDDING in tensors:  # one matrix for both, which a merge may part
        tensors[HEAD] = tensors[EMBEDDING]
        config["tie_word_embeddings"] = False

    expected = expected_shapes(config)
    for name in [*expected, *tensors]:
        if name not in tensors or name not in expected:
            problem = "is missing" if name in expected else "is none of a LLaMA's"
            raise UserError(f"{folder}: the tensor {name} {problem}; convert or download it again")
        if tuple(tensors[name].shape) != expected[name]:
            raise UserError(
                f"{folder}: {name} is {dims(tensors[name].shape)}, by config.json {dims(expected[name])}; convert again"
            )
    return config, {name: tensors[name] for name in expected}, files


def _check_config(config, path):
    """UserError where what a conversion or a merge reads of config.json is of another type, or does not fit."""
    numbers = dict.fromkeys(("rms_norm_eps", "rope_theta", "max_position_embeddings"), int | float)
    objects = {"rope_parameters": dict, "rope_scaling": dict, "tie_word_embeddings": bool}
    check_types(config, {**numbers, **objects}, path)
    optional = [key for key in ("num_key_value_heads", "head_dim") if config.get(key) is not None]
    check_counts(config, optional, path)
    heads, keys = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    if heads % keys or not config.get("head_dim") and config["hidden_size"] % heads:
        raise UserError(f"{path}: {heads} heads and {keys} key heads do not fit {config['hidden_size']} dimensions")


def _weight_files(folder):
    for kind in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{kind}.index.json"
        if index.is_file():
            names = read_json(index, "download it again").get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise UserError(f'{index}: "weight_map" must give the file of each tensor; download it again')
            return [folder / name for name in sorted(set(names.values()))]
        if (folder / kind).is_file():
            return [folder / kind]
    raise UserError(f"{folder}: no model.safetensors and no pytorch_model.bin in it; convert or download it again")


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

"""Reading models from disk, memory-mapped and checked: Meta's folders, Hugging Face's, and single files of weights."""

import json
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from alpaca.common.errors import UserError
from alpaca.models.tokenizer import how_to_get
from alpaca.weights.llama_layout import CUT_BY_COLUMNS, EMBEDDING, HEAD, config_of, dims, expected_shapes, meta_names

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def read_json(path, remedy):
    """The object in a JSON file; `remedy` says how to get the file if it is missing."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; {remedy}")
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
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


def check_heads(hidden, heads, key_heads, path):
    if hidden % (2 * heads) or heads % key_heads:
        raise UserError(f"{path}: {heads} heads and {key_heads} key heads do not fit {hidden} dimensions; get it again")


def read_tensors(path):
    """Name -> memory-mapped tensor of a .safetensors file or a PyTorch file; nothing pickled is ever run."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; download it, every part of the model is needed")
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            # files that PyTorch wrote before version 1.6 are no zip archives, and only archives can be mapped
            tensors = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception as error:  # damaged bytes make an unpickler fail in any way there is
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: damaged, or no file of weights ({reason}); download it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"{path}: holds something else than named tensors; download it again")
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS or tensor.layout != torch.strided or tensor.is_meta:
            raise UserError(
                f"{path}: {name} is of type {tensor.dtype}; only float16, bfloat16 and float32 can be read, so take "
                "the model that is not quantized"
            )
    return {name: tensor.detach() for name, tensor in tensors.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Meta's layout


def read_meta(folder, max_position_embeddings=2048):
    """(config, {Hugging Face's name: its part in each file}, files) of Meta's layout, every tensor checked."""
    folder = Path(folder)
    params = _read_params(folder / "params.json")
    found = len(list(folder.glob("consolidated.*.pth")))
    files = [folder / f"consolidated.{i:02d}.pth" for i in range(max(found, 1))]
    shards = [read_tensors(file) for file in files]

    names, shapes = meta_names(params["n_layers"]), {}
    for name, meta in names.items():
        for file, shard in zip(files, shards, strict=True):
            if meta not in shard:
                raise UserError(f"{file}: holds no tensor {meta}; is it a LLaMA's?")
            if shard[meta].shape != shards[0][meta].shape or shard[meta].dtype != shards[0][meta].dtype:
                raise UserError(f"{file}: its part of {meta} is not like that of {files[0]}; are they of one model?")
        shape = list(shards[0][meta].shape)
        if len(shape) == 2:
            shape[1 if name.endswith(CUT_BY_COLUMNS) else 0] *= len(shards)
        shapes[name] = tuple(shape)
    for file, shard in zip(files, shards, strict=True):
        # rope.freqs, where it is there, is a table of the rotary angles, which config.json determines
        unknown = sorted(shard.keys() - set(names.values()) - {"rope.freqs"}, key=str)
        if unknown:
            raise UserError(f"{file}: unknown tensor {unknown[0]}; is it a LLaMA's?")

    ffn, dtype = shapes["model.layers.0.mlp.gate_proj.weight"][0], shards[0][names[EMBEDDING]].dtype
    config = config_of(params, shapes[EMBEDDING][0], ffn, dtype, max_position_embeddings)
    for name, shape in expected_shapes(config).items():
        if shapes[name] != shape:
            raise UserError(
                f"{folder}: {names[name]} is {dims(shapes[name])} in {len(shards)} file(s), but params.json and the "
                f"other tensors make it {dims(shape)}; is a consolidated file missing, or params.json of another model?"
            )
    return config, {name: [shard[meta] for shard in shards] for name, meta in names.items()}, files


def _read_params(path):
    params = read_json(path, "it comes with Meta's weights")
    check_counts(params, ("dim", "n_layers", "n_heads"), path)
    if params.get("n_kv_heads") is not None:
        check_counts(params, ("n_kv_heads",), path)
    check_heads(params["dim"], params["n_heads"], params.get("n_kv_heads") or params["n_heads"], path)
    for key, value in {"norm_eps": params.get("norm_eps"), "rope_theta": params.get("rope_theta", 10000.0)}.items():
        if type(value) not in (int, float):
            raise UserError(f'{path}: "{key}" must be a number, got {value!r}; get it again')
    if params.get("use_scaled_rope"):
        raise UserError(f'{path}: "use_scaled_rope" (LLaMA-3.1) is not supported; use a LLaMA-1 or LLaMA-2')
    return params


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's layout


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
    files = _weight_files(folder)
    tensors = {}
    for file in files:
        tensors |= read_tensors(file)
    # tables that old versions of transformers saved along with the weights
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
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

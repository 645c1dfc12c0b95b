"""Reading Meta's folders, memory-mapped and checked: consolidated.*.pth and params.json."""

import re
from pathlib import Path

from alpaca.common.errors import UserError
from alpaca.common.folders import folders_with
from alpaca.models.base_files import (
    EMBEDDING,
    HEAD,
    check_counts,
    check_types,
    dims,
    read_json,
    read_tensors,
)
from alpaca.models.layers import tensor_shapes
from alpaca.weights.llama_layout import CUT_BY_COLUMNS, config_of, meta_names

FIRST_MATRIX = "model.layers.0.self_attn.q_proj.weight"


def read_meta(folder, max_position_embeddings=2048):
    """(config, {Hugging Face's name: its part in each file}, files) of Meta's layout, every tensor checked."""
    folder = Path(folder)
    files = _consolidated(folder)
    params = _read_params(folder / "params.json")
    shards = [read_tensors(file) for file in files]

    names, shapes = meta_names(params["n_layers"]), {}
    for name, meta in names.items():
        for file, shard in zip(files, shards, strict=True):
            if meta not in shard:
                raise UserError(f"{file}: holds no tensor {meta}; is it a LLaMA's?")
            like_first = shard[meta].shape == shards[0][meta].shape
            # where the pieces of a vocabulary cannot be shared out equally, the last file has the rest of them
            if name == HEAD and shard is shards[-1]:
                like_first = shard[meta].shape[1:] == shards[0][meta].shape[1:]
            if not like_first or shard[meta].dtype != shards[0][meta].dtype:
                raise UserError(f"{file}: its part of {meta} is not like that of {files[0]}; are they of one model?")
        shape = list(shards[0][meta].shape)
        if len(shape) == 2:
            cut = 1 if name.endswith(CUT_BY_COLUMNS) else 0
            shape[cut] = sum(shard[meta].shape[cut] for shard in shards)
        shapes[name] = tuple(shape)
    for file, shard in zip(files, shards, strict=True):
        unknown = sorted(shard.keys() - set(names.values()))
        if unknown:
            raise UserError(f"{file}: unknown tensor {unknown[0]}; is it a LLaMA's?")

    ffn, dtype = shapes["model.layers.0.mlp.gate_proj.weight"][0], shards[0][names[EMBEDDING]].dtype
    config = config_of(params, shapes[EMBEDDING][0], ffn, dtype, max_position_embeddings)
    for name, shape in tensor_shapes(config).items():
        if shapes[name] != shape:
            raise UserError(
                f"{folder}: {names[name]} is {dims(shapes[name])} in {len(shards)} file(s), but params.json and the "
                f"other tensors make it {dims(shape)}; is a consolidated file missing, or params.json of another model?"
            )
    _check_different(files, [shard[names[FIRST_MATRIX]] for shard in shards])
    return config, {name: [shard[meta] for shard in shards] for name, meta in names.items()}, files


def _consolidated(folder):
    """consolidated.00.pth, .01, …; UserError for one of another name, as browsers give to a second download."""
    names = sorted(file.name for file in folder.glob("consolidated*.pth"))
    if not names and (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: is in Hugging Face's format already; name it as it is, with --base_model or --model_dir"
        )
    for file in () if names else folder.glob("consolidated*.safetensors"):
        raise UserError(f"{file}: is Mistral's; take config.json and model*.safetensors, which need no converting")
    for name in names:
        if not re.fullmatch(r"consolidated\.\d\d\.pth", name):
            raise UserError(
                f"{folder / name}: no name of Meta's; call it consolidated.00.pth, .01, … if it is one of the model's "
                "files, else move it away"
            )
    return [folder / f"consolidated.{i:02d}.pth" for i in range(max(len(names), 1))]


def _check_different(files, parts):
    """UserError where two files are one, downloaded twice: their parts of a matrix begin with the same row."""
    first = {}
    for file, part in zip(files, parts, strict=True):
        row = part[0].float().numpy().tobytes()
        if row in first:
            raise UserError(f"{file}: holds the same numbers as {first[row]}; download it again")
        first[row] = file


def meta_folder(input_dir, model_size):
    """The folder of Meta's weights; UserError, which says where they seem to be, where it is none or has no params.json."""
    folder = input_dir / model_size
    if (folder / "params.json").exists() or (folder / "config.json").is_file():
        return folder
    found = folders_with("params.json", folder if folder.is_dir() else input_dir)
    if found:
        there = found[0].resolve()
        remedy = f"params.json is in {there}: give --input_dir={there.parent} --model_size={there.name}"
    elif folder.is_dir():
        return folder
    else:
        remedy = "put Meta's consolidated.*.pth and params.json there"
    raise UserError(f"{folder}: no {'params.json here' if folder.is_dir() else 'such folder'}; {remedy}")


def _read_params(path):
    params = read_json(path, "it comes with Meta's weights")
    check_counts(params, ("dim", "n_layers", "n_heads"), path)
    if params.get("n_kv_heads") is not None:
        check_counts(params, ("n_kv_heads",), path)
    check_heads(params["dim"], params["n_heads"], params.get("n_kv_heads") or params["n_heads"], path)
    check_types({"norm_eps": "missing", **params}, {"norm_eps": int | float, "rope_theta": int | float}, path)
    if params.get("use_scaled_rope"):
        raise UserError(f'{path}: "use_scaled_rope" (LLaMA-3.1) is not supported; use a LLaMA-1 or LLaMA-2')
    return params


def check_heads(hidden, heads, key_heads, path):
    if hidden % (2 * heads) or heads % key_heads:
        raise UserError(f"{path}: {heads} heads and {key_heads} key heads do not fit {hidden} dimensions; get it again")

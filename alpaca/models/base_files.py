"""Reading a base from disk, memory-mapped and checked: a Hugging Face folder, and any file of weights or settings."""

import hashlib
import json
import math
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from alpaca.common.errors import UserError
from alpaca.common.file_kinds import refuse_failed_download
from alpaca.common.folders import hint_below, hint_of_folders, no_file, no_folder
from alpaca.models.layers import check_layers, tensor_shapes
from alpaca.models.mapped_memory import FLOATS, map_safetensors, read_only_what_is_used, read_soon
from alpaca.models.tokenizer import how_to_get

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Rows of embeddings without a piece: a vocabulary is padded to a multiple of 64 or 128, or has a few added tokens.
UNUSED_ROWS = 128
READERS = 32  # threads that wait for the disk: what is read lies far apart
TENSOR_BYTES, PARTS = 64 * 1024, 4  # how much of a tensor is read, in how many parts, from its beginning to its end
OTHER_FORMAT = "take the model in Hugging Face's format"
LLAMA_CPP = f"llama.cpp's, which is not supported; {OTHER_FORMAT}"
LLAMA_CPP_MAGIC = (b"GGUF", b"tjgg", b"fmgg", b"lmgg")  # GGUF and the formats before it, in ggml's README
QUANTIZED = "quantized, which is not supported; take the model that is not"
# What a folder may hold in place of a Hugging Face model -> what is said of the first such file.
OTHER_FILES = {
    "consolidated.*.pth": "Meta's; convert them with model_hub/convert_llama_weights_to_hf.py",
    "consolidated*.safetensors": f"Mistral's; {OTHER_FORMAT}",
    "adapter_config.json": "a LoRA's; name its folder with --lora_model, and that of its base here",
    "*.gguf": LLAMA_CPP,
    "ggml-*.bin": LLAMA_CPP,
    "gptq_model-*": QUANTIZED,
    "*-[48]bit*": QUANTIZED,
    "model-*-of-*.safetensors": "a part, and model.safetensors.index.json is missing; download that, too",
    "pytorch_model-*-of-*.bin": "a part, and pytorch_model.bin.index.json is missing; download that, too",
    "zero_to_fp32.py": "of a DeepSpeed checkpoint; run it there, it makes the weights",
}
# What it may hold in place of the weights alone.
OTHER_WEIGHTS = OTHER_FILES | {
    "*.safetensors": "no name that transformers loads; call it model.safetensors if it is the whole model",
    "pytorch_model*.bin": "no name that transformers loads; call it pytorch_model.bin if it is the whole model",
    "*.pt": f"of another tool; {OTHER_FORMAT}",
    "*.pth": f"of another tool; {OTHER_FORMAT}",
}
# What tools that wrap a model put into its tensors' names (torch.compile, FSDP, DeepSpeed), and in front of them (DDP).
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
FRONT = "module"
# Zero in a sound model: biases, and in layers that were added to one (LLaMA-Pro) what these end with.
MAY_BE_ZERO = ("bias", "o_proj.weight", "down_proj.weight")
LAST_NORM = "model.norm.weight"
OF_A_DELTA = 0.05  # its mean: that of a model is about 1 or more, and what training added to it is about 0


def read_json(path, remedy):
    """The object in a JSON file; `remedy` says how to get the file if it is missing."""
    if not Path(path).is_file():
        raise UserError(f"{path}: {no_file(path)}; {remedy}")
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


def check_whole(name, tensor, source):
    """UserError where a base's tensor is all zeros, as a hole that an interrupted download has left (torrents, too), or
    where the last norm is that of a delta: what is to be added to another model, such as Vicuna's and Ziya's first ones.

    Looks at 16 rows, and at all of a tensor only if these are zero. name: Hugging Face's; source: file or folder.
    """
    if not name.endswith(MAY_BE_ZERO) and not tensor[:: max(1, len(tensor) // 16)].any() and not tensor.any():
        raise UserError(f"{source}: {name} is all zeros: it was not downloaded whole; download it again")
    if name == LAST_NORM and tensor.float().mean().abs() < OF_A_DELTA:
        raise UserError(
            f"{source}: {name} is about 0, so these weights are a delta, to be added to another model; apply them to it "
            "first, as their authors say"
        )


def check_weights_file(path):
    """UserError for a file that is missing or cannot be read, or whose first bytes are those of something else."""
    if not path.is_file():
        raise UserError(f"{path}: {no_file(path)}; download it, every part of the model is needed")
    try:
        with path.open("rb") as file:
            head = file.read(4)
        refuse_failed_download(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct its permissions or its disk") from None
    if head in LLAMA_CPP_MAGIC:
        raise UserError(f"{path}: is {LLAMA_CPP}")


def read_tensors(path):
    """Name -> memory-mapped tensor of a .safetensors file or a PyTorch file; nothing pickled is ever run.

    Tables of rotary angles are left out, and of the names what tools that wrap a model have put into them.
    """
    path = Path(path)
    check_weights_file(path)
    try:
        if path.suffix == ".safetensors":
            tensors = map_safetensors(path)
        else:
            _check_pickle(path)
            # files that PyTorch wrote before version 1.6 are no zip archives, and only archives can be mapped
            tensors = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception as error:  # damaged bytes make an unpickler fail in any way there is
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        # torch says how to have the file run its code, which nobody must do
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in reason:
            reason = "it holds other things than tensors"
        raise UserError(f"{path}: damaged, or no file of weights ({reason}); download it again") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise UserError(f"{path}: holds something else than named tensors; download it again")
    read, tensors = tensors, {}
    for original, tensor in read.items():
        if is_table(original):
            continue
        name = _unwrapped(original)
        if name in tensors:
            raise UserError(f"{path}: holds {name} twice, the second time as {original}; which one counts is not known")
        tensors[name] = tensor
        if tensor.dtype not in FLOATS.values() or tensor.layout != torch.strided or tensor.is_meta:
            raise UserError(
                f"{path}: {name} is of type {tensor.dtype}; only float16, bfloat16 and float32 can be read, so take "
                "the model that is not quantized"
            )
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _unwrapped(name):
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while parts[1:] and parts[0] == FRONT:
        parts = parts[1:]
    return ".".join(parts)


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


def fits_vocabulary(pieces, rows):
    """Whether a tokenizer's pieces and so many rows of embeddings can be of one vocabulary."""
    return pieces <= rows < pieces + max(UNUSED_ROWS, pieces // 256)  # a Qwen2.5-7B has 399 of 152,064


# ---------------------------------------------------------------------------------------------------------------------
# a Hugging Face folder


def read_config(folder):
    """config.json of a Hugging Face folder, checked; UserError for a folder that is none, or that cannot be used."""
    folder = Path(folder)
    path = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: {no_folder(folder)}")
    if not path.is_file() and not path.is_symlink():
        remedy = (
            _other_files(folder) or hint_below(path.name, folder) or f"{hint_of_folders(folder)}; {how_to_get(folder)}"
        )
        raise UserError(f"{folder}: no model here (config.json is missing){remedy}")
    config = read_json(path, how_to_get(folder))
    if "hidden_size" not in config and (
        others := _other_files(folder)
    ):  # beside GGUF files there are ones that say nothing
        raise UserError(f"{folder}: no model here (config.json does not describe one){others}")
    check_layers(config, folder)
    if config.get("quantization_config") or (folder / "quantize_config.json").is_file():
        raise UserError(f"{folder}: its weights are {QUANTIZED}")
    counts = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    check_counts(config, counts, path)
    _check_config(config, path)
    return config


def weight_files(folder):
    """The files that transformers loads from a folder, each looked at; UserError where there are none."""
    folder = Path(folder)
    for kind in ("model.safetensors", "pytorch_model.bin"):
        files, index = [folder / kind], folder / f"{kind}.index.json"
        if not files[0].is_file() and not files[0].is_symlink():
            if not index.is_file():
                continue
            names = read_json(index, "download it again").get("weight_map")
            if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
                raise UserError(f'{index}: "weight_map" must give the file of each tensor; download it again')
            files = [folder / name for name in sorted(set(names.values()))]
        for file in files:
            check_weights_file(file)
        return files
    remedy = _other_files(folder, OTHER_WEIGHTS) or f"; {how_to_get(folder)}"
    raise UserError(f"{folder}: no weights here (model.safetensors is missing){remedy}")


def _other_files(folder, known=OTHER_FILES):
    """What a folder holds instead, for an error message; "" where it is nothing known."""
    for pattern, text in known.items():
        for file in sorted(folder.glob(pattern)):
            return f"; {file.name} is {text}"
    return ""


def mapped_tensors(folder):
    """Yield (name, tensor) of each tensor of a folder, file by file; only those bytes are read that are looked at."""
    for file in weight_files(folder):
        tensors = read_tensors(file)
        if factor := next((name for name in tensors if ".lora_" in name), None):
            raise UserError(
                f"{file}: holds a LoRA beside the model ({factor}), not merged into it; save what PEFT's merge_and_unload() "
                "returns, or name base and LoRA apart"
            )
        yield from sorted(tensors.items())


def tensors_sha256(model_dir):
    """Of each tensor's name, shape, type, and 64 KiB spread over its bytes: enough to tell two models apart."""
    with ThreadPoolExecutor(READERS) as pool:
        digests = list(pool.map(_tensor_sha256, mapped_tensors(model_dir)))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _tensor_sha256(named):
    name, tensor = named
    digest = hashlib.sha256(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    data = tensor.contiguous().flatten().view(torch.uint8)
    size = min(TENSOR_BYTES // PARTS, len(data))
    starts = [(len(data) - size) * part // (PARTS - 1) for part in range(PARTS)]
    parts = [data[start : start + size] for start in starts]
    read_only_what_is_used(data)
    for part in parts:
        read_soon(part)
    for part in parts:
        digest.update(part.numpy())  # lets other threads run while it waits for the disk
    return digest.digest()


def read_base(folder):
    """(config, {name: tensor}, files of weights) of a Hugging Face folder, every tensor checked."""
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"{folder}: {no_folder(folder)}; {how_to_get(folder)}")
    config, files = read_config(folder), weight_files(folder)
    kind, tensors = config["model_type"], dict(mapped_tensors(folder))
    if config.get("tie_word_embeddings") and EMBEDDING in tensors:  # one matrix for both, which a merge may part
        check_tied(tensors.setdefault(HEAD, tensors[EMBEDDING]), tensors[EMBEDDING], folder)
        config["tie_word_embeddings"] = False

    expected = tensor_shapes(config)
    for name in [*expected, *tensors]:
        if name not in tensors or name not in expected:
            problem = "is missing" if name in expected else f"is none of a {kind}'s"
            raise UserError(f"{folder}: the tensor {name} {problem}; convert or download it again")
        if tuple(tensors[name].shape) != expected[name]:
            raise UserError(
                f"{folder}: {name} is {dims(tensors[name].shape)}, by config.json {dims(expected[name])}; convert again"
            )
    return config, {name: tensors[name] for name in expected}, files


def check_tied(head, embeddings, folder):
    """UserError where the files hold another head than the embeddings, which config.json says it is."""
    if head is not embeddings and not torch.equal(head, embeddings):
        raise UserError(
            f'{folder}: {HEAD} is not the embeddings, though config.json says "tie_word_embeddings": true; set it to false, '
            "or download the model again"
        )


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

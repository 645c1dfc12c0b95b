"""Reading PEFT's LoRA adapters, and refusing what is not understood.

The format is PEFT's (github.com/huggingface/peft, docs/source/developer_guides/checkpoint.md): adapter_config.json, and
adapter_model.safetensors or .bin with lora_A (rank x in) and lora_B (out x rank) of every changed matrix and whole
tensors for modules_to_save.
"""

import hashlib
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch

from alpaca.common.errors import UserError
from alpaca.common.folders import hint_below, no_folder
from alpaca.models.base_files import check_types, check_whole, dims, is_finite, read_json, read_tensors

# Settings of adapter_config.json that are honoured here, or that say nothing about the trained weights. Any other one
# must be off: a kind of LoRA that is not known here must not be merged as if it were the plain kind. fan_in_fan_out is
# about GPT-2's Conv1D; PEFT switches it off for LLaMA's nn.Linear whatever the file says, so the factors are the same.
KNOWN_SETTINGS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("fan_in_fan_out", "bias", "init_lora_weights", "eva_config", "megatron_core", "qalora_group_size"),
}
# Ways to start LoRA which leave the base as it was; the others (pissa, olora, …) subtract their start from the base.
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


NOT_TRAINED = ("original_module", "base_layer")  # the base's own tensors, as they were before training


class Adapter(NamedTuple):
    folder: Path
    lora: dict  # name of the base's tensor -> (lora_A, lora_B, scaling)
    saved: dict  # name of the base's tensor -> the tensor that takes its place (modules_to_save)
    config: dict  # adapter_config.json
    tokenizer: Path | None  # the folder of its tokenizer.model


def weights_file(folder):
    """The file of an adapter's weights; UserError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        remedy = "" if folder.exists() else "; download that LoRA there, or train one (README.md)"
        joined = "; several folders are joined by commas" if " " in str(folder) else ""
        raise UserError(f"{folder}: {no_folder(folder)}{remedy}{joined}")
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    file = next((file for file in files if file.is_file() or file.is_symlink()), None)
    if file is None and not (folder / "adapter_config.json").is_file():
        remedy = hint_below("adapter_config.json", folder) or "; --lora_model must name folders of PEFT adapters"
        raise UserError(f"{folder}/adapter_config.json: no such file{remedy}")
    if file is None and (folder / "adapters.safetensors").is_file():
        raise UserError(
            f"{folder}/adapters.safetensors: is MLX's; convert it to PEFT's format, or fuse it with mlx_lm.fuse"
        )
    if file is None:
        raise UserError(f"{folder}: neither {files[0].name} nor {files[1].name} in it; download the adapter's weights")
    return file


def adapter_sha256(folder):
    """Hex digest of the file of an adapter's weights."""
    with weights_file(folder).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_adapter(folder):
    """The Adapter of a folder; UserError if it is damaged, empty, untrained, or of a kind unknown here."""
    file = weights_file(folder)
    settings = file.parent / "adapter_config.json"
    config = read_json(settings, "it comes with the adapter's weights")
    _check_settings(config, settings)

    factors, saved = {}, {}
    tensors = read_tensors(file)
    empty = [name for name, tensor in tensors.items() if not tensor.numel()]
    if empty:
        raise UserError(
            f"{file}: {empty[0]} is empty: it was saved under ZeRO-3 without its weights; gather them when saving "
            "(stage3_gather_16bit_weights_on_model_save), or make them with zero_to_fp32.py of the checkpoint"
        )
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise UserError(f"{file}: {name} holds numbers that are not finite; download it again or train it again")
        if "lora_embedding_" in name:
            module = _base_name(name.partition(".lora_embedding_")[0] + ".weight")[0].removesuffix(".weight")
            raise UserError(f"{file}: a LoRA on embeddings ({module}) is unknown here; merge this adapter with PEFT")
        target, kind = _base_name(name)
        if kind in NOT_TRAINED:
            continue
        place, key = (saved, target) if kind == "saved" else (factors.setdefault(target, {}), kind)
        # with a resized vocabulary PEFT writes embeddings under two of their names
        if key in place and not torch.equal(place[key], tensor):
            raise UserError(f"{file}: holds {target} twice, the second time as {name}; which one counts is not known")
        place[key] = tensor
    if not factors and not saved:
        raise UserError(
            f"{file}: an empty adapter ({file.stat().st_size} bytes), nothing to merge; download it again or train it "
            "again"
        )
    for name, tensor in saved.items():
        check_whole(name, tensor, file)
    for module in config.get("modules_to_save") or []:
        if not any(f".{module}." in f".{name}" for name in saved):
            raise UserError(f"{file}: adapter_config.json lists {module} in modules_to_save, but it is not in the file")

    lora = {name: _factors(name, parts, config, file) for name, parts in factors.items()}
    if not saved and not any(b.any() for _, b, _ in lora.values()):
        raise UserError(f"{file}: every lora_B is zero, so it changes nothing: it was saved untrained; train it again")
    tokenizer = file.parent if (file.parent / "tokenizer.model").is_file() else None
    return Adapter(file.parent, lora, saved, config, tokenizer)


def _check_settings(config, path):
    if config.get("peft_type") != "LORA":
        raise UserError(f'{path}: "peft_type" is {config.get("peft_type")!r}; only LORA can be merged')
    refused = [key for key, value in config.items() if value and key not in KNOWN_SETTINGS]
    if (config.get("bias") or "none") != "none":
        refused.append("bias")
    if config.get("init_lora_weights", True) not in HARMLESS_STARTS:
        refused.append("init_lora_weights")
    if refused:
        raise UserError(f'{path}: "{refused[0]}": {config[refused[0]]!r} is unknown here; merge this adapter with PEFT')
    check_types(config, {"rank_pattern": dict, "alpha_pattern": dict, "modules_to_save": list}, path)


def _base_name(name):
    """A tensor's name in an adapter -> (name of the base's tensor, lora_A | lora_B | saved | one of NOT_TRAINED).

    PEFT has written base_model.model.X.lora_A.weight and X.lora_A.default.weight, where default is the adapter's name,
    and for modules_to_save both X.modules_to_save.default.weight and plain X.weight.
    """
    name = name.removeprefix("base_model.model.")
    for kind in ("lora_A", "lora_B", "modules_to_save", *NOT_TRAINED):
        module, found, rest = name.partition(f".{kind}.")
        if found:  # rest: weight, behind the adapter's name where that was saved
            return f"{module}.{rest.rpartition('.')[2]}", kind.replace("modules_to_save", "saved")
    return name, "saved"


def _factors(name, parts, config, file):
    """(lora_A, lora_B, scaling) of one matrix."""
    module, settings = name.removesuffix(".weight"), file.parent / "adapter_config.json"
    missing = {"lora_A", "lora_B"} - parts.keys()
    if missing:
        raise UserError(f"{file}: {module} has no {missing.pop()}; download the adapter again or train it again")

    def setting(key, patterns):
        for pattern, value in (config.get(patterns) or {}).items():
            try:
                if re.fullmatch(rf"(.*\.)?({pattern})", module):
                    return value
            except re.error as error:
                raise UserError(f'{settings}: "{patterns}": {pattern!r} is no pattern ({error})') from None
        return config.get(key)

    a, b = parts["lora_A"], parts["lora_B"]
    rank, alpha = setting("r", "rank_pattern"), setting("lora_alpha", "alpha_pattern")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise UserError(f'{settings}: "r" and "lora_alpha" must be numbers, got {rank!r}, {alpha!r}; get it again')
    if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == rank:
        raise UserError(
            f"{file}: {module}: lora_A is {dims(a.shape)} and lora_B {dims(b.shape)}, but adapter_config.json says "
            f"r={rank}; the two files are not of one adapter"
        )
    return a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

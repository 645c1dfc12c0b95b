"""Reading PEFT's LoRA adapters, and refusing what is not understood.

The format is PEFT's (github.com/huggingface/peft, docs/source/developer_guides/checkpoint.md): adapter_config.json, and
adapter_model.safetensors or .bin with lora_A (rank x in) and lora_B (out x rank) of every changed matrix and whole
tensors for modules_to_save.
"""

import math
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from alpaca.common.errors import UserError
from alpaca.models.base_files import dims, read_json, read_tensors

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


class Adapter(NamedTuple):
    folder: Path
    lora: dict  # name of the base's tensor -> (lora_A, lora_B, scaling)
    saved: dict  # name of the base's tensor -> the tensor that takes its place (modules_to_save)
    tokenizer: Path | None  # the folder of its tokenizer.model


def weights_file(folder):
    """The file of an adapter's weights; UserError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        joined = "; several folders are joined by commas" if " " in str(folder) else ""
        raise UserError(f"{folder}: no such folder; download that LoRA there, or train one (README.md){joined}")
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    file = next((file for file in files if file.is_file()), None)
    if file is None and not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}/adapter_config.json: no such file; --lora_model must name folders of PEFT adapters")
    if file is None:
        raise UserError(f"{folder}: neither {files[0].name} nor {files[1].name} in it; download the adapter's weights")
    return file


def read_adapter(file):
    """The Adapter with this file of weights; UserError if it is damaged, empty, untrained, or of a kind unknown here."""
    folder = file.parent
    config = read_json(folder / "adapter_config.json", "it comes with the adapter's weights")
    _check_settings(config, folder / "adapter_config.json")

    factors, saved = {}, {}
    for name, tensor in read_tensors(file).items():
        if tensor.numel() and not all(map(math.isfinite, map(float, torch.aminmax(tensor)))):
            raise UserError(f"{file}: {name} holds numbers that are not finite; download it again or train it again")
        target, kind = _base_name(str(name))
        if kind == "original_module":  # the base's own tensor, as it was before training
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
    for module in config.get("modules_to_save") or []:
        if not any(f".{module}." in f".{name}" for name in saved):
            raise UserError(f"{file}: adapter_config.json lists {module} in modules_to_save, but it is not in the file")

    lora = {name: _factors(name, parts, config, file) for name, parts in factors.items()}
    if not saved and not any(b.any() for _, b, _ in lora.values()):
        raise UserError(f"{file}: every lora_B is zero, so it changes nothing: it was saved untrained; train it again")
    return Adapter(folder, lora, saved, folder if (folder / "tokenizer.model").is_file() else None)


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
    for key, kind in {"rank_pattern": dict, "alpha_pattern": dict, "modules_to_save": list}.items():
        if not isinstance(config.get(key) or kind(), kind):
            raise UserError(f'{path}: "{key}" must be a {kind.__name__}, got {config[key]!r}; get the file again')


def _base_name(name):
    """A tensor's name in an adapter -> (name of the base's tensor, lora_A | lora_B | saved | original_module).

    PEFT has written base_model.model.X.lora_A.weight and X.lora_A.default.weight, and for modules_to_save both
    X.modules_to_save.default.weight and plain X.weight.
    """
    *module, leaf = (part for part in name.removeprefix("base_model.model.").split(".") if part != "default")
    kind = "saved"
    if module and module[-1] in ("lora_A", "lora_B", "modules_to_save", "original_module"):
        kind = module.pop().replace("modules_to_save", "saved")
    return ".".join([*module, leaf]), kind


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
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise UserError(f'{settings}: "r" and "lora_alpha" must be numbers, got {rank!r}, {alpha!r}; get it again')
    if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == rank:
        raise UserError(
            f"{file}: {module}: lora_A is {dims(a.shape)} and lora_B {dims(b.shape)}, but adapter_config.json says "
            f"r={rank}; the two files are not of one adapter"
        )
    return a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def adapter_shapes(adapter):
    """{name: shape} of an adapter's file. A pickle is only read as tensors: it runs nothing."""
    path = adapter / "adapter_model.safetensors"
    try:
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                return {name: file.get_slice(name).get_shape() for name in file.keys()}
        path = adapter / "adapter_model.bin"
        if path.is_file():
            return {name: tuple(t.shape) for name, t in torch.load(path, weights_only=True, mmap=True).items()}
    except (OSError, ValueError, RuntimeError, AttributeError, SafetensorError, pickle.UnpicklingError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: not the tensors of an adapter ({first}); train or download it again") from None
    raise UserError(f"{adapter}: holds neither adapter_model.safetensors nor adapter_model.bin; train it again")

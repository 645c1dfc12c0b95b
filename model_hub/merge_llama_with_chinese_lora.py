"""Merge LoRA adapters into a model, one after another. Run from inside model_hub:

    python merge_llama_with_chinese_lora.py --base_model "./7B-hf" \\
        --lora_model "./chinese-llama-plus-lora-7b,./chinese-alpaca-plus-lora-7b" \\
        --output_type "huggingface" --output_dir "./chinese-alpaca-7b"
    python merge_llama_with_chinese_lora.py --base_model "./chinese-alpaca-tiny" \\
        --lora_model "../checkpoint/demo/train_trainer/adapter_model" --output_dir "./ner-tiny"

Reads a Hugging Face folder and PEFT adapters (adapter_config.json, adapter_model.safetensors or .bin, tokenizer.model
where the adapter brings a vocabulary), also those this project trains. Writes a folder for from_pretrained
(huggingface) or Meta's consolidated.00.pth, params.json and tokenizer.model (pth). Each adapter is added in float32 and
the sum rounded to the base's number format before the next one, as the published weights were made.
"""

import math
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config_utils import UserError, load_config, run_script
from dataset import BOS, EOS, load_tokenizer, tokenizer_sha256
from llama_files import (
    EMBEDDING,
    HEAD,
    dims,
    folder_bytes,
    new_folder,
    progress,
    read_base,
    read_json,
    read_tensors,
    save_model,
    save_pth,
)

CONFIG = {
    "base_model": None,  # the Hugging Face folder of the base, e.g. ./7B-hf
    "lora_model": None,  # the adapters' folders, joined by commas, in the order of their training: LLaMA's, Alpaca's
    "output_type": "huggingface",  # huggingface, or pth (Meta's layout)
    "output_dir": None,  # the folder to write
    "offload_dir": None,  # accepted and unused: weights are read from their files as they are needed
}

# Settings of adapter_config.json that are honoured below, or that say nothing about the trained weights. Any other one
# must be off: a kind of LoRA that is not known here must not be merged as if it were the plain kind.
KNOWN_SETTINGS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("fan_in_fan_out", "bias", "init_lora_weights", "megatron_core", "qalora_group_size"),
}
# Ways to start LoRA which leave the base as it was; the others (pissa, olora, …) subtract their start from the base.
HARMLESS_STARTS = (True, False, None, "gaussian", "eva")


class Adapter(NamedTuple):
    folder: Path
    lora: dict  # name of the base's tensor -> (lora_A, lora_B, scaling)
    saved: dict  # name of the base's tensor -> the tensor that takes its place (modules_to_save)
    tokenizer: Path | None  # the folder of its tokenizer.model


# ---------------------------------------------------------------------------------------------------------------------
# adapters


def read_adapter(folder):
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; download that LoRA there, or train one (README.md)")
    config = read_json(folder / "adapter_config.json", "--lora_model must name folders of PEFT adapters")
    check_settings(config, folder / "adapter_config.json")
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(f"{folder}: neither {files[0].name} nor {files[1].name} in it; download the adapter's weights")

    factors, saved = {}, {}
    for name, tensor in read_tensors(file).items():
        target, kind = base_name(name)
        if kind == "original_module":  # the base's own tensor, as it was before training
            continue
        place, key = (saved, target) if kind == "saved" else (factors.setdefault(target, {}), kind)
        # with a resized vocabulary PEFT writes embeddings under two of their names
        if key in place and not torch.equal(place[key], tensor):
            raise UserError(f"{file}: holds {target} twice, the second time as {name}; which one counts is not known")
        place[key] = tensor
    if not factors and not saved:
        raise UserError(f"{file}: an empty adapter, nothing to merge; download it again or train it again")
    for module in config.get("modules_to_save") or []:
        if not any(f".{module}." in f".{name}" for name in saved):
            raise UserError(f"{file}: adapter_config.json lists {module} in modules_to_save, but it is not in the file")

    lora = {name: lora_factors(name, parts, config, file) for name, parts in factors.items()}
    if not saved and not any(b.any() for _, b, _ in lora.values()):
        raise UserError(f"{file}: every lora_B is zero, so it changes nothing: it was saved untrained; train it again")
    return Adapter(folder, lora, saved, folder if (folder / "tokenizer.model").is_file() else None)


def check_settings(config, path):
    if config.get("peft_type") != "LORA":
        raise UserError(f'{path}: "peft_type" is {config.get("peft_type")!r}; only LORA can be merged')
    refused = [key for key, value in config.items() if value and key not in KNOWN_SETTINGS]
    if (config.get("bias") or "none") != "none":
        refused.append("bias")
    if config.get("init_lora_weights", True) not in HARMLESS_STARTS:
        refused.append("init_lora_weights")
    if refused:
        raise UserError(f'{path}: "{refused[0]}": {config[refused[0]]!r} is unknown here; merge this adapter with PEFT')


def base_name(name):
    """A tensor's name in an adapter -> (name of the base's tensor, lora_A | lora_B | saved | original_module).

    PEFT has written base_model.model.X.lora_A.weight and X.lora_A.default.weight, and for modules_to_save both
    X.modules_to_save.default.weight and plain X.weight.
    """
    *module, leaf = (part for part in name.removeprefix("base_model.model.").split(".") if part != "default")
    kind = "saved"
    if module and module[-1] in ("lora_A", "lora_B", "modules_to_save", "original_module"):
        kind = module.pop().replace("modules_to_save", "saved")
    return ".".join([*module, leaf]), kind


def lora_factors(name, parts, config, file):
    """(lora_A, lora_B, scaling) of one matrix; fan_in_fan_out needs no care, LLaMA has nothing but nn.Linear."""
    module = name.removesuffix(".weight")
    missing = {"lora_A", "lora_B"} - parts.keys()
    if missing:
        raise UserError(f"{file}: {module} has no {missing.pop()}; download the adapter again or train it again")

    def setting(key, patterns):
        for pattern, value in (config.get(patterns) or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        return config.get(key)

    a, b = parts["lora_A"], parts["lora_B"]
    rank, alpha = setting("r", "rank_pattern"), setting("lora_alpha", "alpha_pattern")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise UserError(
            f'{file.parent}/adapter_config.json: "r" and "lora_alpha" must be numbers, got {rank!r}, {alpha!r}'
        )
    if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == rank:
        raise UserError(
            f"{file}: {module}: lora_A is {dims(a.shape)} and lora_B {dims(b.shape)}, but adapter_config.json says "
            f"r={rank}; the two files are not of one adapter"
        )
    return a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


# ---------------------------------------------------------------------------------------------------------------------
# checks


def check_fit(base_folder, base, adapters):
    """Refuse adapters that belong to another base or another order. Returns (shapes afterwards, tokenizer's folder)."""
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    tokenizer = base_folder if (base_folder / "tokenizer.model").is_file() else None
    below = base_folder  # what the adapter at hand is laid on
    for adapter in adapters:
        check_shapes(adapter, shapes, below)
        shapes |= {name: tuple(tensor.shape) for name, tensor in adapter.saved.items()}
        if shapes[EMBEDDING] != shapes[HEAD]:
            raise UserError(
                f"{adapter.folder}: embed_tokens has {shapes[EMBEDDING][0]} rows and lm_head {shapes[HEAD][0]} with "
                "this adapter; both must be in its modules_to_save"
            )
        tokenizer = adapter.tokenizer or tokenizer
        check_vocabulary(adapter, shapes[EMBEDDING][0], tokenizer)
        below = adapter.folder
    if tokenizer is None:
        raise UserError(
            f"{base_folder}: no tokenizer.model in it, nor in an adapter; "
            f"convert_llama_weights_to_hf.py --model_size=tokenizer_only --output_dir={base_folder} adds it"
        )
    pieces = load_tokenizer(tokenizer).sp_model.get_piece_size()
    if pieces > shapes[EMBEDDING][0]:
        raise UserError(
            f"{tokenizer}/tokenizer.model has {pieces} pieces, but {base_folder} has embeddings for "
            f"{shapes[EMBEDDING][0]}; put the tokenizer.model of {base_folder} there"
        )
    return shapes, tokenizer


def check_shapes(adapter, shapes, below):
    for name in [*adapter.lora, *adapter.saved]:
        if name not in shapes:
            raise UserError(f"{adapter.folder}: its tensor {name} has no counterpart in {below}; is this its base?")
    for name, (a, b, _) in adapter.lora.items():
        if (b.shape[0], a.shape[1]) != shapes[name]:
            raise UserError(
                f"{adapter.folder}: changes a {b.shape[0]} x {a.shape[1]} matrix {name}, but that of {below} is "
                f"{dims(shapes[name])}; merge it into the model it was trained on"
            )
    for name, tensor in adapter.saved.items():
        new, old = tuple(tensor.shape), shapes[name]
        if new != old and (name not in (EMBEDDING, HEAD) or len(new) != 2 or new[1] != old[1]):
            raise UserError(
                f"{adapter.folder}: {name} is {dims(new)}, but that of {below} is {dims(old)}; merge it into "
                "the model it was trained on"
            )
        if new[0] < old[0]:
            raise UserError(
                f"{adapter.folder}: has embeddings for {new[0]} pieces, but {below} before it has {old[0]}, and a "
                "vocabulary never shrinks; give the adapters in the order of their training, LLaMA's before Alpaca's"
            )


def check_vocabulary(adapter, rows, tokenizer):
    """After this adapter the model has `rows` embeddings and this tokenizer: both must be of one vocabulary."""
    if tokenizer is not None and (adapter.saved.keys() & {EMBEDDING, HEAD} or adapter.tokenizer):
        pieces = load_tokenizer(tokenizer).sp_model.get_piece_size()
        if pieces != rows:
            source = "" if adapter.tokenizer else f" (the adapter has none, so that of {tokenizer} was taken)"
            raise UserError(
                f"{adapter.folder}: with this adapter the model has embeddings for {rows} pieces, but its "
                f"tokenizer.model has {pieces}{source}; put the tokenizer.model that came with this adapter there"
            )
    train_args = adapter.folder / "train_args.json"
    if train_args.is_file():
        trained = load_config(train_args)[1].get("tokenizer_sha256")
        if trained and (tokenizer is None or trained != tokenizer_sha256(tokenizer)):
            raise UserError(
                f"{adapter.folder}: trained with another tokenizer.model than that of {tokenizer}; merge it into the "
                "base that its train_args.json names as model_dir"
            )


# ---------------------------------------------------------------------------------------------------------------------
# merge


def merged(base, adapters):
    """(name, tensor) of the merged model, one at a time."""
    for name, weight in base.items():
        dtype = weight.dtype
        for adapter in adapters:
            if name in adapter.saved:
                weight = adapter.saved[name].to(dtype)
            if name in adapter.lora:
                a, b, scaling = adapter.lora[name]
                # beta * weight + alpha * B A in one pass; a copy, since weights are mapped from their files
                weight = torch.addmm(weight.float(), b.float(), a.float(), alpha=scaling).to(dtype)
        yield name, weight


def main(args):
    started = time.time()
    for key, example in {"base_model": "./7B-hf", "lora_model": "./lora-1,./lora-2", "output_dir": "./merged"}.items():
        if not getattr(args, key):
            raise UserError(f"--{key} is missing; name it, e.g. --{key}={example}")
    if args.output_type not in ("huggingface", "pth"):
        raise UserError(f"--output_type: expected huggingface or pth, got {args.output_type!r}")

    base_folder = Path(args.base_model)
    config, base = read_base(base_folder)
    adapters = [read_adapter(folder.strip()) for folder in args.lora_model.split(",") if folder.strip()]
    if not adapters:
        raise UserError(f"--lora_model={args.lora_model}: names no folder; e.g. --lora_model=./lora-1,./lora-2")
    shapes, tokenizer = check_fit(base_folder, base, adapters)
    dtype = base[EMBEDDING].dtype
    config.pop("dtype", None)  # newer name of torch_dtype
    config |= {"vocab_size": shapes[EMBEDDING][0], "torch_dtype": str(dtype).removeprefix("torch.")}
    # Some converted LLaMAs have wrong special ids in config.json; those of the vocabulary are always these.
    config |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": None}

    inputs = [base_folder, *(adapter.folder for adapter in adapters)]
    save = save_model if args.output_type == "huggingface" else save_pth
    with new_folder(args.output_dir, inputs) as work:
        tensors = progress(merged(base, adapters), shapes.values(), dtype, "merge")
        save(work, config, tensors, tokenizer / "tokenizer.model")
        size = folder_bytes(work)
    print(
        f"wrote {args.output_dir}: {args.output_type}, {size:,} bytes, vocabulary {config['vocab_size']}, "
        f"{len(adapters)} adapter(s) merged in {time.time() - started:.1f} s"
    )


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)

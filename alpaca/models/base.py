"""The base model of a folder, loaded for training or, with an adapter, for answering."""

import json
import pickle
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from alpaca.common.console import progress, say
from alpaca.common.devices import DTYPES, describe_device, pick_precision
from alpaca.common.errors import UserError
from alpaca.common.folders import hint_of_folders
from alpaca.models.adapter_files import adapter_shapes
from alpaca.models.tokenizer import how_to_get, load_tokenizer, tokenizer_sha256
from dataset import PROMPT_SHA256

DEFAULT_BASE = "./model_hub/chinese-alpaca-tiny"  # the trainers' default model_dir


def check_model_dir(model_dir):
    """The config.json of a Hugging Face model's folder; UserError if there is none. Asked before anything slow begins."""
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        missing = f"no model here (config.json is missing){hint_of_folders(model_dir)}"
        raise UserError(f"{model_dir}: {missing}; {how_to_get(model_dir)}")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); {how_to_get(model_dir)}") from None


def load_base(model_dir, dtype, device):
    """The causal LM of a local folder in `dtype` on `device`, frozen."""
    check_model_dir(model_dir)
    transformers_logging.set_tqdm_hook(lambda _, args, options: progress(*args, **{**options, "desc": "加载模型"}))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{model_dir}: the model cannot be read ({first}); {how_to_get(model_dir)}") from None
    finally:
        transformers_logging.set_tqdm_hook(None)
    return model.to(device).requires_grad_(False)


def check_generation(args):
    """UserError for values of test's, predict's and chat's options that cannot be."""
    for name in {"batch_size", "max_new_tokens"} & args.nested.keys():
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)}: expected 1 or more")
    if args.constrained not in ("auto", "True", "False"):
        raise UserError(f"--constrained={args.constrained}: expected auto, True, False")
    pick_precision(args.nested.get("precision", "auto"), "cuda" if torch.cuda.is_available() else "cpu")


def load_for_inference(
    adapter, train_args, facts, base_model, tokenizer_path, precision="auto", device=None, merge=False
):
    """(model, tokenizer) as the command line and what find_adapter returned say; the command line wins.

    Refuses, before the weights load, a base or a tokenizer that is not the adapter's. `merge`: add the LoRA to the
    weights, which then cost nothing more; the base alone is gone.
    """
    base = base_model or (train_args.model_dir if adapter else DEFAULT_BASE)
    config = check_model_dir(base)
    tokenizer_dir = tokenizer_path or base
    tokenizer = load_tokenizer(tokenizer_dir)
    if tokenizer.vocab_size > config["vocab_size"]:
        raise UserError(
            f"{tokenizer_dir}/tokenizer.model has {tokenizer.vocab_size} pieces, {base} only {config['vocab_size']} "
            "embeddings; use the tokenizer.model that belongs to it"
        )
    if adapter:
        check_fit(adapter, train_args, facts, base, tokenizer_dir)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = pick_precision(precision, device)
    say(f"模型: {base}, LoRA: {adapter or '无'}, {describe_device(device, precision)}")
    model = load_base(base, DTYPES[precision], device)
    if adapter:
        model = attach_adapter(model, adapter)
        if merge:
            layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
            for layer in progress(layers, desc="合并 LoRA", unit="层"):
                layer.merge()
            model = model.unload()
    return model.eval(), tokenizer


def attach_adapter(model, adapter, name="default"):
    """The model, bare or with other adapters, with that of a folder, in the weights' type and in use from now on."""
    dtype, device = model.dtype, str(model.device)
    options = {"autocast_adapter_dtype": False, "torch_device": device}
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(adapter, name, **options)
        else:
            model = PeftModel.from_pretrained(model, adapter, name, **options)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{adapter}/adapter_config.json: cannot be used ({error}); train it again") from None
    model.set_adapter(name)
    return model.to(dtype).eval()


def check_fit(adapter, train_args, facts, base, tokenizer_dir):
    """UserError where an adapter was trained with another prompt, tokenizer or base than these."""
    if facts.get("prompt_sha256") != PROMPT_SHA256:
        raise UserError(f"{adapter}: was trained with another prompt template; retrain it with this version")
    if facts.get("tokenizer_sha256") != tokenizer_sha256(tokenizer_dir):
        raise UserError(
            f"{tokenizer_dir}/tokenizer.model is not the one that {adapter} was trained with "
            f"(that of {train_args.model_dir}); name that base with --base_model"
        )
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        ).state_dict()
    for name, shape in adapter_shapes(adapter).items():
        module, _, factor = name.removeprefix("base_model.model.").partition(".lora_")
        side = {"A": 1, "B": 0}.get(factor[:1])
        weight = expected.get(f"{module}.weight")
        if side is not None and (weight is None or weight.shape[side] != shape[side]):
            has = "no such layer" if weight is None else f"one of {weight.shape[side]}"
            raise UserError(
                f"{adapter} does not fit {base}: it changes {module}, of size {shape[side]}, and the model has {has}; "
                "name its base with --base_model"
            )

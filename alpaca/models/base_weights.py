"""How the weights of a frozen base are held: as they are, or quantized while they are read."""

from importlib.util import find_spec

import torch
from torch import nn
from transformers import AutoConfig

from alpaca.common.console import progress, say
from alpaca.common.errors import UserError
from alpaca.models.base_files import EMBEDDING, HEAD, check_tied, check_whole, dims, mapped_tensors, read_config
from alpaca.models.layers import meta_model
from alpaca.models.mapped_memory import forget
from alpaca.models.quantized import FP8_MULTIPLE, Fp8Linear, Nf4Linear
from alpaca.models.spread import place_of, places_on
from alpaca.models.tokenizer import how_to_get

BASE_WEIGHTS = ("full", "nf4", "fp8")
LAYERS = {"nf4": Nf4Linear, "fp8": Fp8Linear}


def check_base_weights(base_weights, device, precision):
    """UserError where this device, in this precision, cannot hold a base like that."""
    if problem := _problem(base_weights, torch.device(device), precision):
        raise UserError(f"--base_weights={base_weights}: {problem}, or use --base_weights=full")


def pick_base_weights(asked, train_args, device, precision):
    """--base_weights of what answers -> full, nf4 or fp8. auto: as the adapter was trained, full where that cannot be.

    train_args: the adapter's, or None where there is none.
    """
    if asked not in ("auto", *BASE_WEIGHTS):
        raise UserError(f"--base_weights={asked}: expected auto, {', '.join(BASE_WEIGHTS)}")
    if asked != "auto":
        check_base_weights(asked, device, precision)
        return asked
    trained = getattr(train_args, "base_weights", "full")
    if problem := _problem(trained, torch.device(device), precision):
        say(f"LoRA 是在 {trained} 基座上训练的，这里改用 full: {problem}")
        return "full"
    return trained


def _problem(base_weights, device, precision):
    if base_weights == "nf4" and device.type == "cuda" and find_spec("bitsandbytes") is None:
        return "needs bitsandbytes; pip install -r requirements-nf4.txt"
    if base_weights == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        return "needs a GPU that multiplies in fp8 (compute capability 8.9 or more); take nf4"
    if base_weights == "fp8" and precision != "bf16":
        return f"computes in bf16, not {precision}; give --precision=bf16"
    return None


def empty_model(model_dir, dtype=torch.float32):
    """The model of a folder without its weights."""
    return meta_model(AutoConfig.for_model(**{**read_config(model_dir), "name_or_path": str(model_dir)})).to(dtype)


def load_base(model_dir, dtype, device, base_weights="full"):
    """The causal LM of a local folder, frozen, on `device` (auto: several, see spread.py): its layers' matrices quantized as
    base_weights says, the rest, or with `full` all, in `dtype`. UserError for other tensors than config.json says.

    Read tensor by tensor, so that the host never holds more than the model and one tensor, of a model on a GPU one tensor.
    What is quantized is so from the file's own numbers, the same in every precision; nothing ever holds the full model.
    """
    model, tensors = empty_model(model_dir, dtype), dict(mapped_tensors(model_dir))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise UserError(
            f"{model_dir}: {len(missing)} tensors are missing, {missing[0]} among them; {how_to_get(model_dir)}"
        )
    for name, shape in shapes.items():
        if shape != (found := tuple(tensors[name].shape)):
            raise UserError(
                f"{model_dir}: {name} is {dims(found)}, by config.json {dims(shape)}; {how_to_get(model_dir)}"
            )
    if model.config.tie_word_embeddings and HEAD in tensors:
        check_tied(tensors.pop(HEAD), tensors[EMBEDDING], model_dir)
    _check_others(sorted(tensors.keys() - shapes.keys()), model_dir)
    places = places_on(device, model, base_weights)
    for name in progress(shapes, desc="加载模型", unit="个"):
        check_whole(name, tensor := tensors.pop(name), model_dir)
        put_weight(model, name, tensor, base_weights, dtype, place_of(places, name))
        forget(tensor)
    return complete(model, place_of(places, EMBEDDING))


def _check_others(names, model_dir):
    """UserError for tensors that layers would have to compute with, and these do not; a line for any others."""
    if inside := [name for name in names if name.startswith(("model.", "lm_head."))]:
        raise UserError(
            f"{model_dir}: {len(inside)} tensors are not of the model in config.json, {inside[0]} among them; "
            f"{how_to_get(model_dir)}"
        )
    if names:  # such as the value head of a training with rewards
        say(f"{model_dir}: 不用 {len(names)} 个张量，如 {names[0]}")


def put_weight(model, name, tensor, base_weights, dtype, device):
    """Give an empty model one of its tensors, quantized where it is the matrix of a layer and base_weights is not full."""
    path, _, kind = name.rpartition(".")
    parent, _, child = path.rpartition(".")
    module = model.get_submodule(path)
    if base_weights == "full" or name == HEAD or kind == "bias" or not isinstance(module, nn.Linear):
        copied = tensor.to(device).to(dtype, copy=True)  # on a GPU the GPU converts it
        setattr(module, kind, nn.Parameter(copied, requires_grad=False))
        return
    if base_weights == "fp8" and any(size % FP8_MULTIPLE for size in tensor.shape):
        raise UserError(
            f"--base_weights=fp8: {name} is {dims(tensor.shape)}, and fp8 products want multiples of {FP8_MULTIPLE}; "
            "use nf4 or full"
        )
    setattr(model.get_submodule(parent), child, LAYERS[base_weights](tensor.to(device), dtype))


def complete(model, device):
    """An empty model that has got all its tensors, with what config.json determines."""
    rotary = model.model.rotary_emb
    with torch.device(device):
        model.model.rotary_emb = type(rotary)(model.config)
    model.tie_weights()
    return model.requires_grad_(False).eval()

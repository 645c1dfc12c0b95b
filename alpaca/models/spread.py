"""Where the parts of a base stand that is spread over the GPUs of one process."""

from itertools import groupby

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import CustomDtype, compute_module_sizes, get_balanced_memory
from torch import nn

from alpaca.common.console import say
from alpaca.common.errors import UserError

HELD = {"nf4": CustomDtype.INT4, "fp8": CustomDtype.FP8}  # how accelerate calls it; the scales are left out
FOR_WEIGHTS = 0.9  # of a GPU's free memory: answers need some, too


def spread(model, base_weights, memory=None):
    """{name of a module: device} of an empty LLaMA, by accelerate: on as few GPUs as hold it, each layer as a whole.

    memory: {number of a GPU: bytes for weights}; None: what is free. UserError where the base does not fit.
    """
    memory = memory or memory_for_weights()
    layers = model.model.layers
    matrices = [name for name, part in layers.named_modules(prefix="model.layers") if isinstance(part, nn.Linear)]
    held = {f"{name}.weight": HELD[base_weights] for name in matrices if base_weights in HELD}
    options = {"no_split_module_classes": [type(layers[0]).__name__], "special_dtypes": held}
    for count in range(1, len(memory) + 1):
        few = dict(list(memory.items())[:count])
        for most in (get_balanced_memory(model, {**few}, **options), few):  # like shares, else what each can hold
            places = infer_auto_device_map(model, {**most}, clean_result=False, **options)
            if "disk" not in places.values():
                return _devices(places, len(layers))
    needed, room = (
        size / 2**30 for size in (compute_module_sizes(model, special_dtypes=held)[""], sum(memory.values()))
    )
    raise UserError(
        f"--devices=auto: the base takes {needed:.1f} GiB as {base_weights}, and of {len(memory)} GPUs {room:.1f} GiB may "
        f"hold weights; give {'' if base_weights == 'nf4' else '--base_weights=nf4, or '}more GPUs"
    )


def memory_for_weights():
    """{number of a GPU: bytes}."""
    free = {number: torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())}
    return {number: int(FOR_WEIGHTS * amount) for number, amount in free.items()}


def _devices(places, layers):
    """accelerate's map as devices; said in a line."""
    of_layers = [place_of(places, f"model.layers.{number}.") for number in range(layers)]
    places["model.norm"] = of_layers[-1]
    shares = [f"{len(list(run))} 层在 GPU {number}" for number, run in groupby(of_layers)]
    say(f"基座: {'，'.join(shares)}" + ("，逐层计算，不用 CUDA graph" if len(shares) > 1 else ""))
    return {name: torch.device("cuda", number) for name, number in places.items()}


def places_on(device, model, base_weights):
    """The map of an empty LLaMA on one device, or as `spread` says for auto."""
    return spread(model, base_weights) if device == "auto" else {"": device}


def place_of(places, name):
    """The device of a tensor, by `places`, in which "" stands for the whole model."""
    return next(device for module, device in places.items() if not module or name.startswith(f"{module}."))

"""The DeepSpeed file of a run: where it is, its leaves as options, and what it may not contradict."""

import os

from alpaca.common.errors import ConfigError, UserError
from alpaca.common.options import PRECISIONS, Option, dotted, flatten, kind_of, value_at

# What the DeepSpeed file calls it -> what CONFIG calls it.
BATCH_KEYS = {
    "train_micro_batch_size_per_gpu": "train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}

AUTO = (("bf16", "enabled"), ("fp16", "enabled"), ("optimizer", "params", "lr"))  # by the device, and by the base


def deepspeed_path(values, file):
    """The file asked for, else data/<data_name>/deepspeed.json beside the script, else deepspeed.json there."""
    if values["deepspeed_json_path"]:
        return values["deepspeed_json_path"]
    folder = os.path.dirname(os.path.abspath(file))
    own = os.path.join(folder, "data", str(values.get("data_name")), "deepspeed.json")
    return os.path.relpath(own if os.path.exists(own) else os.path.join(folder, "deepspeed.json"))


def deepspeed_options(settings, path, taken):
    """Leaves of the DeepSpeed file -> options, typed by their values in the file."""
    options = {}
    try:
        leaves = flatten(settings, ("deepspeed",))
    except ConfigError as error:
        raise UserError(f"{path}: {error}") from None
    for name, (_, *keys) in leaves.items():
        default = value_at(settings, keys)
        if name in taken:
            raise UserError(f"{path}: {dotted(keys)} and CONFIG key {dotted(taken[name].path)} are both --{name}")
        if isinstance(default, list) and any(isinstance(item, dict | list | None) for item in default):
            continue  # nothing that fits on a command line
        options[name] = Option(tuple(keys), default, _deepspeed_kind(keys, default), in_deepspeed=True)
    return options


def _deepspeed_kind(keys, default):
    if default == "auto":
        return "auto or " + {"enabled": "bool", "lr": "float", **dict.fromkeys(BATCH_KEYS, "int")}.get(
            keys[-1], "number"
        )
    kind = kind_of(default)
    # JSON has one kind of number: a file that says "weight_decay": 0 must not refuse 0.01
    real = keys[:2] == ["optimizer", "params"] or keys == ["gradient_clipping"]
    return kind.replace("int", "float") if real else kind


def checked_settings(settings, args, path):
    """DeepSpeed settings with the batch numbers of CONFIG filled in; UserError where the two contradict each other.

    bf16 and fp16 are only compared with `precision`; what "auto" means there depends on the device.
    """
    if "scheduler" in settings:
        raise UserError(f'{path}: remove "scheduler"; warm-up and decay are set by --warmup_ratio')
    values = args._values
    for key, name in BATCH_KEYS.items():
        found, asked = settings.get(key, "auto"), values.get(name, 1)
        if found == "auto":
            settings[key] = asked
        elif name in values and found != asked:
            raise UserError(f'{path}: "{key}" is {found}, but --{name} is {asked}; make them equal or write "auto"')
    _check_total(settings, path)
    _check_precision(settings, values.get("precision", "auto"), path)
    _check_numbers(settings, path)
    return settings


def _check_total(settings, path):
    found = settings.get("train_batch_size", "auto")
    if found == "auto":
        settings.pop("train_batch_size", None)  # DeepSpeed multiplies the three numbers itself
        return
    micro, steps = (settings[key] for key in BATCH_KEYS)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if found != micro * steps * world:
        raise UserError(
            f'{path}: "train_batch_size" is {found}, but --train_batch_size {micro} x --gradient_accumulation_steps '
            f"{steps} x {world} ranks is {micro * steps * world}; remove it or make them equal"
        )


def _check_precision(settings, precision, path):
    if precision not in PRECISIONS:
        raise UserError(f"--precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    enabled = {}
    for name in ("bf16", "fp16"):
        section = settings.get(name, {})
        enabled[name] = section.get("enabled", "auto") if isinstance(section, dict) else None
        if enabled[name] not in (True, False, "auto"):
            raise UserError(f'{path}: "{name}" must be {{"enabled": true, false or "auto"}}, got {section!r}')
    if enabled["bf16"] is True and enabled["fp16"] is True:
        raise UserError(f'{path}: "bf16.enabled" and "fp16.enabled" are both true; leave one or write "auto"')
    for name, value in enabled.items():
        contradicts = value is True if name != precision else value is False
        if precision != "auto" and contradicts:
            raise UserError(
                f'{path}: "{name}.enabled" is {str(value).lower()}, but --precision is {precision}; make them agree or '
                'write "auto"'
            )


def _check_numbers(settings, path):
    """The learning rate has its home in the file, and raw DeepSpeed does not know "auto"; the trainers fill in AUTO."""
    for name, keys in flatten(settings).items():
        if value_at(settings, keys) == "auto" and keys not in AUTO:
            raise UserError(
                f"{path}: {dotted(keys)} must be a number, not auto; write one or pass --deepspeed_{name}=…"
            )
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(
            f'{path}: "zero_optimization.stage" must be 0, 1, 2 or 3, got {zero if stage is None else stage!r}'
        )
    try:
        lr = settings["optimizer"]["params"]["lr"]
    except (KeyError, TypeError):
        lr = None
    if lr != "auto" and (isinstance(lr, bool) or not isinstance(lr, int | float)):
        raise UserError(
            f'{path}: "optimizer.params.lr" must hold the learning rate, auto or a number such as 1e-4; got {lr!r}'
        )

"""Which values a trainer's options can have. A run asks before it reads or moves anything."""

import difflib

from alpaca.common.errors import UserError
from alpaca.models.base_files import mapped_tensors

COUNT = "1 or more", lambda value: value >= 1
NOT_NEGATIVE = "0 or more", lambda value: value >= 0
POSITIVE = "more than 0", lambda value: value > 0
EVERY = "1 or more, or -1", lambda value: value >= -1  # 0 has always meant -1

RANGES = {
    **dict.fromkeys(("train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "log_steps"), COUNT),
    **dict.fromkeys(("lora_r", "max_seq_length"), COUNT),
    **dict.fromkeys(("max_steps", "eval_steps", "save_steps"), EVERY),
    **dict.fromkeys(("save_total_limit", "eval_examples", "deepspeed_gradient_clipping"), NOT_NEGATIVE),
    "deepspeed_optimizer_params_weight_decay": NOT_NEGATIVE,
    **dict.fromkeys(("lora_alpha", "deepspeed_optimizer_params_lr", "deepspeed_optimizer_params_eps"), POSITIVE),
    # LoRA's weights are one long parameter here (lora.py): Muon, which asks for matrices, would be Adam without a word
    "deepspeed_optimizer_type": ("Adam or AdamW", lambda value: str(value).lower() in ("adam", "adamw")),
    "seed": ("0 to 4294967295", lambda value: 0 <= value < 2**32),  # what numpy takes, which Trainer seeds as well
    "lora_dropout": ("0 or more and less than 1", lambda value: 0 <= value < 1),
    "warmup_ratio": ("0 to 1, a share of the steps and not their number", lambda value: 0 <= value <= 1),
    "deepspeed_optimizer_params_betas": (
        "two numbers of 0 or more and less than 1, e.g. 0.9,0.95",
        lambda value: isinstance(value, list) and len(value) == 2 and all(0 <= beta < 1 for beta in value),
    ),
}


def check_ranges(args):
    """UserError for the first option whose value is out of its range. Those that the DeepSpeed file leaves out have none."""
    for name, (expected, fits) in RANGES.items():
        try:
            value = getattr(args, name)
        except AttributeError:
            continue
        if value != "auto" and not fits(value):
            text = ",".join(map(str, value)) if isinstance(value, list) else value
            raise UserError(f"--{name}={text}: expected {expected}")


def check_targets(targets, model_dir):
    """UserError where the base has no layer of a name in --lora_target_modules; PEFT takes one it finds, and forgets the rest."""
    tensors = {name.removesuffix(".weight"): tensor.dim() for name, tensor in mapped_tensors(model_dir)}
    modules = {name for name, dimensions in tensors.items() if dimensions == 2 and "embed" not in name}
    modules |= {"lm_head"}  # which may be tied
    names = {module.rpartition(".")[2] for module in modules}
    if not targets:
        raise UserError(
            f"--lora_target_modules=: expected names of linear layers; there are {', '.join(sorted(names))}"
        )
    for target in targets:
        if not any(module == target or module.endswith(f".{target}") for module in modules):
            close = difflib.get_close_matches(target, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(names))}"
            raise UserError(
                f"--lora_target_modules={','.join(targets)}: {model_dir} has no linear layer {target!r}; {hint}"
            )

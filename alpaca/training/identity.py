"""What a run is: the facts that a resumed run must share with the one that it goes on with."""

import hashlib
import json

from alpaca.common.errors import UserError
from alpaca.common.options import flatten
from alpaca.models.base import check_model_dir
from alpaca.models.base_files import tensors_sha256
from alpaca.training.lora import zero_stage

# What a run may change when it is resumed. Every other option must be the run's own, and so must what identity_of adds.
MAY_CHANGE = {
    # where things are; data and base are compared by what they hold
    *("data_name", "train_path", "dev_path", "model_dir", "save_dir", "deepspeed_json_path", "local_rank", "resume"),
    # the optimizer's numbers
    *("deepspeed_optimizer_params_lr", "deepspeed_optimizer_params_betas", "deepspeed_optimizer_params_weight_decay"),
    "warmup_ratio",  # only before the end of both warm-ups, which check_resumed looks at
    # how a step's examples are split; the examples of a step are compared
    *("train_batch_size", "gradient_accumulation_steps"),
    # compared as what they come to: the steps of the schedule, the precision that the device has, the prompt
    *("num_train_epochs", "max_steps", "precision", "template"),
    # how it is computed, logged, saved and evaluated
    *("compile", "gradient_checkpointing", "log_steps", "tensorboard", "too_long"),
    *("save_steps", "save_total_limit", "safe_serialization", "eval_steps", "eval_examples", "best"),
}
# Of the DeepSpeed file, the optimizer and the stage decide the weights; the rest says how memory and messages are managed.
DEEPSPEED_DECIDES = ("deepspeed_optimizer_", "deepspeed_zero_optimization_stage")


def identity_of(args, tokenizer, precision, train_path, loader, total_steps):
    """{fact: value} as JSON holds it, of the options outside MAY_CHANGE and of what the run reads."""
    names = [*flatten(args.nested)]
    names += [name for name in flatten(args.deepspeed, ("deepspeed",)) if name.startswith(DEEPSPEED_DECIDES)]
    batch_size, accumulation, ranks = loader.shape
    return {
        **{name: getattr(args, name) for name in names if name not in MAY_CHANGE},
        "deepspeed_zero_optimization_stage": zero_stage(args),
        "lora_target_modules": sorted(args.lora_target_modules),
        "ranks": ranks,
        "examples_per_step": batch_size * accumulation * ranks,
        "examples": len(loader.examples),
        "total_steps": total_steps,
        "warmup_ratio": args.warmup_ratio,
        "precision": precision,
        "prompt_sha256": tokenizer.template.sha256,
        "train_data_sha256": _file_sha256(train_path),
        "base_config_sha256": _config_sha256(args.model_dir),
        "base_tokenizer_sha256": tokenizer.sha256,
        "base_tensors_sha256": tensors_sha256(args.model_dir),
    }


def read_identity(checkpoint):
    """The identity_of the run that wrote a checkpoint; earlier versions wrote fewer facts, or none."""
    text = (checkpoint / "complete").read_text(encoding="utf-8")
    try:
        written = dict(json.loads(text)) if text.strip() else {}
    except ValueError:
        raise UserError(f"{checkpoint}/complete: not what a training run wrote; train without --resume") from None
    split = [written.get(key) for key in ("train_batch_size", "gradient_accumulation_steps", "ranks")]
    if "examples_per_step" not in written and all(split):
        written["examples_per_step"] = split[0] * split[1] * split[2]
    return written


def own_precision(args, written):
    """--precision; where neither it nor the DeepSpeed file asks for one, that of the run that is resumed."""
    asked = {args.precision, *(args.deepspeed.get(key, {}).get("enabled", "auto") for key in ("bf16", "fp16"))}
    return written.get("precision", "auto") if asked == {"auto"} else args.precision


def check_resumed(checkpoint, step, written, identity):
    """UserError, naming both values, where `identity` is not that of the run that wrote the checkpoint after `step` steps."""
    warming = step < min(facts.get("warmup_ratio", 0) * identity.get("total_steps", 0) for facts in (written, identity))
    for key, value in identity.items():
        was = written.get(key, value)
        if was == value or key == "warmup_ratio" and warming:
            continue
        remedy = "make them equal, or train without --resume"
        if key == "total_steps":
            remedy = (
                "the schedule of a run is as long as it began: give the same --max_steps or --num_train_epochs. The LoRA of "
                f"this checkpoint is --lora_model={checkpoint}/adapter_model; for more steps train without --resume"
            )
        elif key == "warmup_ratio":
            remedy = "it can only be changed while the warm-up lasts; make them equal"
        elif key == "examples_per_step":
            remedy = (
                "--train_batch_size x --gradient_accumulation_steps x ranks must stay the same, in any split; make them "
                "equal, or train without --resume"
            )
        raise UserError(
            f"--resume: {checkpoint} was written with {key} {_shown(was)}, this run has {_shown(value)}; {remedy}"
        )


def _shown(value):
    """A hash by its beginning, as git shows one."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text[:12] + "…" if len(text) == 64 else text


def _file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _config_sha256(model_dir):
    """Of config.json, without what says only who wrote it."""
    config = check_model_dir(model_dir)
    facts = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

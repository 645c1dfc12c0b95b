"""The base model, its LoRA, the loss, and what ends a step.

Both trainers and the inference scripts share these, because what one trains the other must compute. Reads no corpus.
"""

import os
import random
import signal
import warnings
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers.utils import logging as transformers_logging

from alpaca.common.console import end_bars, progress, say
from alpaca.common.errors import UserError
from alpaca.models.base import check_model_dir
from alpaca.training.prefix_tree import PACKINGS
from alpaca.training.tree_attention import compile_layers, plan_attention

# One line a user can act on is worth more than a page of library notices.
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning, message=".*gradient_checkpointing")
warnings.filterwarnings("ignore", message="OMP_NUM_THREADS", module="accelerate")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed would choose too, after a warning


# ---------------------------------------------------------------------------------------------------------------------
# devices and processes


# ---------------------------------------------------------------------------------------------------------------------
# model, LoRA, loss


def check_options(args):
    """UserError for values of a trainer's options that no run can have; asked before anything is read or moved."""
    for name in ("train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "log_steps", "lora_r"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)}: expected 1 or more")
    choices = {"packing": PACKINGS, "compile": ("auto", "True", "False"), "best": ("last", "f1", "loss")}
    for name, values in choices.items():
        if getattr(args, name) not in values:
            raise UserError(f"--{name}={getattr(args, name)}: expected {', '.join(values)}")
    if args.best != "last" and args.eval_steps < 1:
        raise UserError(f"--best={args.best} needs evaluations; give --eval_steps=500")
    if args.tensorboard and find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs the package of that name; pip install tensorboard")
    if args.best == "f1" and args.eval_examples < 1:
        raise UserError("--best=f1 needs answers to score; give --eval_examples=200")
    if args.eval_examples > 0 and zero_stage(args) == 3:
        raise UserError(
            "--eval_examples: with ZeRO-3 no process has the whole model to answer with; use stage 1 or 2, or "
            "--eval_examples=0 and test.py"
        )
    betas = args.deepspeed["optimizer"]["params"].get("betas", [0.9, 0.999])
    if not isinstance(betas, list) or len(betas) != 2:
        raise UserError(f"--deepspeed_optimizer_params_betas={betas}: expected two numbers, e.g. 0.9,0.95")
    check_model_dir(args.model_dir)


def add_lora(model, args):
    """The model with fresh LoRA adapters, drawn under args.seed."""
    model.set_attn_implementation("tree")  # tree_attention.py
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(args.seed)
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=list(args.lora_target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(model, config)
    except ValueError as error:  # no such module
        raise UserError(f"--lora_target_modules={','.join(args.lora_target_modules)}: {error}") from None
    if zero_stage(args) != 3:  # which moves each module's own weights about
        flatten_lora(model)
    return model.train()  # all of it: from_pretrained leaves the layers where gradient checkpointing does nothing


def zero_stage(args):
    return args.deepspeed.get("zero_optimization", {}).get("stage", 0)


def flatten_lora(model):
    """Make the LoRA weights of a PEFT model views of one parameter, `model.lora`.

    A 7B has 448 of them, and DeepSpeed's work at a step is per parameter (a hook, copies, a norm, a look for overflow).
    """
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    model.lora_shapes = {name: tensor.shape for name, tensor in weights.items()}
    model.lora_modules = [model.get_submodule(name.removesuffix(".weight")) for name in weights]
    model.register_parameter("lora", torch.nn.Parameter(torch.cat([tensor.flatten() for tensor in weights.values()])))
    for module in model.lora_modules:
        del module.weight
    model.compiled_layers = None  # compile_for_training may set it
    model.register_forward_pre_hook(_bind_before_forward)


def _bind_before_forward(model, inputs):
    """Anew each time, since DeepSpeed moves the parameter's memory; a captured graph has views of its own."""
    if not (model.compiled_layers and model.compiled_layers.replays):
        bind_lora(model, model.lora)


def lora_weights(model, flat):
    """The LoRA weights as views of a flat tensor: {parameter name: tensor}."""
    parts = flat.split([shape.numel() for shape in model.lora_shapes.values()])
    return {name: part.view(shape) for part, (name, shape) in zip(parts, model.lora_shapes.items(), strict=True)}


def bind_lora(model, flat):
    """Let the LoRA modules compute with views of `flat`."""
    for module, weight in zip(model.lora_modules, lora_weights(model, flat).values(), strict=True):
        module.weight = weight


def compile_for_training(model, loader, args, pad_id, device):
    """Compile the decoder layers for the loader's rows, as --compile says; one line says so, or why not."""
    if args.compile == "False":
        return
    stage = zero_stage(args)
    if device.type != "cuda" or args.packing == "none" or stage == 3:  # ZeRO-3 moves weights about at every step
        if args.compile == "True":
            say(
                f"不编译: 需要 CUDA、ZeRO 0–2 和 --packing=prefix 或 plain（现在是 {device.type}, {stage}, {args.packing}）"
            )
        return
    # recomputing a layer for its gradient cannot be part of a captured graph
    graphs = not args.gradient_checkpointing
    lengths = compile_layers(model, loader, args.packing, pad_id, graphs, bind=partial(bind_lora, model))
    say(f"编译各层，行长 {', '.join(map(str, lengths))}；每种行长第一次出现时要等编译")


def answer_loss(model, rows, step_tokens):
    """Summed cross-entropy of a micro-batch over the answer tokens of its whole optimizer step (a float32 scalar).

    rows: what packing's collate made of the examples. Micro-batches and ranks add up to the step's mean.
    """
    parameter, compiled = next(model.parameters()), getattr(model, "compiled_layers", None)

    def row_loss(row):
        inputs = model_inputs(row, parameter.device, compiled, parameter.dtype)
        return model(**inputs, num_items_in_batch=step_tokens).loss.float()

    try:
        return torch.stack([row_loss(row) for row in rows]).sum()
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if compiled is None or compiled.proven:
            raise
        say(f"编译失败，改为不编译: {type(error).__name__}: {str(error).splitlines()[0]}")
        compiled.lengths = []
        return torch.stack([row_loss(row) for row in rows]).sum()


def model_inputs(row, device, compiled=None, dtype=torch.float32):
    """A row on the device, as LlamaForCausalLM takes it. It must not keep a cache: with one, transformers ignores that
    the examples of a row are apart."""
    row = {key: value.to(device, non_blocking=True) for key, value in row.items()}
    if "enter" in row:
        enter, exit = row.pop("enter"), row.pop("exit")
        if not (compiled and compiled.load_mask(enter, exit)):
            row["tree"] = plan_attention(enter, exit, dtype)  # goes through the model to tree_attention.py
        row["attention_mask"] = torch.ones(1, 1, 1, 1, device=device)  # so that transformers makes none of its own
        row["labels"] = row["shift_labels"]  # without labels there is no loss
    return {**row, "use_cache": False}


@torch.no_grad()
def evaluate_loss(model, batches, device, count=None):
    """Mean cross-entropy per answer token over all batches (lists of rows) of all ranks; `count`: of batches, for a bar."""
    training, total = model.training, torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    for rows in progress(batches, total=count, desc="验证", unit="批"):
        total[0] += answer_loss(model, rows, 1).double()
        total[1] += sum((row.get("shift_labels", row.get("labels")) >= 0).sum().item() for row in rows)
    model.train(training)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


def warmup_linear(step, warmup_steps, total_steps):
    """The factor on the learning rate at a 0-based step: (step+1)/warmup, then linearly towards 0; never 0 itself."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(total_steps - step, 0) / max(total_steps - warmup_steps, 1)


def make_scheduler(optimizer, args, total_steps):
    warmup_steps = int(args.warmup_ratio * total_steps + 0.5)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: warmup_linear(k, warmup_steps, total_steps))


# ---------------------------------------------------------------------------------------------------------------------
# the end of a step


def seed_step(seed, step, rank):
    """Draw dropout from (seed, step, rank) alone, so that a resumed run needs no generator's state."""
    torch.manual_seed(random.Random(f"{seed}-{step}-{rank}").getrandbits(63))


def catch_sigterm():
    """From now on SIGTERM only fills the list that is returned; end_of_step makes all ranks see it."""
    received = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    return received


def end_of_step(loss, sigterm, loader, step, lr, train_path):
    """True if any rank got SIGTERM. UserError, on all ranks, if the loss of any is NaN or infinite.

    loss: this rank's, a scalar tensor. step: 1-based, the one that has ended.
    """
    state = torch.stack([~torch.isfinite(loss), torch.tensor(bool(sigterm), device=loss.device)]).int()
    if dist.get_world_size() > 1:
        dist.all_reduce(state, op=dist.ReduceOp.MAX)
    diverged, stop = state.tolist()
    if diverged:
        end_bars()
        lines = ", ".join(map(str, loader.lines(step - 1)))
        raise UserError(
            f"step {step}: the loss is NaN or infinite (learning rate {lr:.3g}; {train_path}, lines {lines}); what was "
            "saved before is intact. Lower --deepspeed_optimizer_params_lr, use --precision=bf16 or fp32, look at those "
            "lines; --resume goes on from the last checkpoint"
        )
    return bool(stop)


def end_by_sigterm(step):
    """Leave with the exit code of a process that SIGTERM ended, after everything is saved."""
    say(f"收到 SIGTERM，已在第 {step} 步保存；加 --resume 继续")
    dist.destroy_process_group()
    raise SystemExit(128 + signal.SIGTERM)


# ---------------------------------------------------------------------------------------------------------------------
# inference


@contextmanager
def merged_lora(model):
    """A PEFT model whose LoRA is part of its weights meanwhile, as in test.py. Afterwards they are what they were, bit
    for bit: taking the LoRA out again would leave rounding errors, so the weights are kept on the CPU."""
    layers = [module.get_base_layer() for module in model.modules() if isinstance(module, LoraLayer)]
    originals = [layer.weight.detach().to("cpu", copy=True) for layer in layers]
    training = model.training
    model.eval()
    if getattr(model, "lora_shapes", None):  # DeepSpeed may have moved what they are views of
        bind_lora(model, model.lora.detach())
    model.merge_adapter()
    try:
        yield model
    finally:
        model.unmerge_adapter()
        for layer, original in zip(layers, originals, strict=True):
            layer.weight.data.copy_(original)
        model.train(training)

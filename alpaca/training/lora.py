"""The LoRA of a model in training: added to its base, held as one parameter, compiled, made ready for an evaluation."""

from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

import torch
from peft import LoraConfig, get_peft_model

from alpaca.common.console import say
from alpaca.common.errors import UserError
from alpaca.models.base import check_model_dir
from alpaca.models.base_files import read_config
from alpaca.models.base_weights import BASE_WEIGHTS
from alpaca.models.layers import check_window
from alpaca.training.cuda_graphs import compile_layers
from alpaca.training.prefix_tree import PACKINGS
from alpaca.training.ranges import check_ranges, check_targets


def check_options(args):
    """UserError for values of a trainer's options that no run can have; asked before anything is read or moved."""
    check_ranges(args)
    choices = {"packing": PACKINGS, "compile": ("auto", "True", "False"), "best": ("last", "f1", "loss")}
    choices["base_weights"] = BASE_WEIGHTS
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
    if args.base_weights != "full" and zero_stage(args) == 3:
        raise UserError(
            f"--base_weights={args.base_weights}: ZeRO-3 cannot split a quantized base; use stage 0, 1 or 2, or "
            "--base_weights=full"
        )
    check_window(read_config(args.model_dir), args.model_dir, args.max_seq_length, args.packing)
    check_model_dir(args.model_dir)
    check_targets(args.lora_target_modules, args.model_dir)


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
    except ValueError as error:  # not a layer that PEFT knows
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
    """Anew each time, since DeepSpeed moves the parameter's memory; captured layers have views of their own."""
    captured = model.compiled_layers and model.compiled_layers.replays
    if not captured or any(".layers." not in name for name in model.lora_shapes):  # such as lm_head's
        bind_lora(model, model.lora)


def lora_weights(model, flat):
    """The LoRA weights as views of a flat tensor: {parameter name: tensor}."""
    parts = flat.split([shape.numel() for shape in model.lora_shapes.values()])
    return {name: part.view(shape) for part, (name, shape) in zip(parts, model.lora_shapes.items(), strict=True)}


def bind_lora(model, flat):
    """Let the LoRA modules compute with views of `flat`."""
    for module, weight in zip(model.lora_modules, lora_weights(model, flat).values(), strict=True):
        module.weight = weight


def compile_for_training(model, loader, args, pad_id, device, total_steps):
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
    recompute, bind = args.gradient_checkpointing, partial(bind_lora, model)
    graphs = not (recompute and args.lora_dropout)  # a graph that computes a layer again would draw another dropout
    reached = {name.partition(".layers.")[2].partition(".")[0] for name in model.lora_shapes if ".layers." in name}
    if graphs and len(reached) < model.config.num_hidden_layers:  # a graph's backward wants a gradient from each layer
        say(f"不编译: {model.config.num_hidden_layers} 层里只有 {len(reached)} 层有 LoRA，每层都有时才能编译")
        return
    lengths, complete = compile_layers(model, loader, args.packing, pad_id, graphs, recompute, bind, total_steps)
    counted = "数过全部的行" if complete else "数过一部分的行，遇到更长的会再编译"
    say(f"编译各层，行长 {', '.join(map(str, lengths))}（{counted}）；每种行长第一次出现时要等编译")


@contextmanager
def for_answers(model):
    """A PEFT model that answers meanwhile, its LoRA beside its weights: what a step captures of it is gone afterwards."""
    training = model.training
    model.eval()
    if getattr(model, "lora_shapes", None):  # DeepSpeed may have moved what they are views of
        bind_lora(model, model.lora.detach())
    try:
        yield model
    finally:
        model.train(training)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()  # training's graphs and the answers' slots are not of one pool

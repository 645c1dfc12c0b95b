"""The base model, its LoRA, the loss, and what a training run leaves on disk.

Both trainers and the inference scripts share these, because what one writes the other must read. Reads no corpus.
"""

import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import sys
import time
import warnings
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from config_utils import UserError, load_config, save_config
from dataset import PROMPT_SHA256, how_to_get, labels_of, load_tokenizer, query_prefix_of, tokenizer_sha256
from packing import PACKINGS
from tree_attention import compile_layers, plan_attention

DEFAULT_BASE = "./model_hub/chinese-alpaca-tiny"  # the trainers' default model_dir
TRAINERS = ("train_trainer", "train_deepspeed")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# One line a user can act on is worth more than a page of library notices.
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing")
warnings.filterwarnings("ignore", message="OMP_NUM_THREADS", module="accelerate")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed would choose too, after a warning


# ---------------------------------------------------------------------------------------------------------------------
# devices and processes


def is_main():
    """True on the one process that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def say(message):
    """A status line on stderr, from rank 0 alone, that does not break a progress bar."""
    if is_main():
        tqdm.write(message, file=sys.stderr)


def end_bars():
    """Leave the progress bar's line, so that an error stands on its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def init_distributed():
    """Join the process group that the deepspeed launcher started, or make one of this process alone.

    Returns (device, rank, world_size).
    """
    import deepspeed  # here, not above: inference does without it, and it takes seconds to import

    if "RANK" not in os.environ:  # without the launcher; deepspeed would ask MPI for these
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in alone.items()})
    # DeepSpeed would compile its shared-memory collectives with c++ (36 s, or death where there is none); gloo does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        device = torch.device("cpu")
    return device, dist.get_rank(), dist.get_world_size()


def _cpu_has_bf16():
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def pick_precision(precision, device):
    """auto -> bf16, fp16 or fp32, by what the device computes natively; anything else is checked and returned."""
    if precision not in ("auto", *DTYPES):
        raise UserError(f"--precision={precision}: expected auto, {', '.join(DTYPES)}")
    on_cuda = torch.device(device).type == "cuda"
    if precision == "fp16" and not on_cuda:
        raise UserError("fp16 needs a CUDA GPU; on a CPU use --precision=fp32, bf16 or auto")
    if precision != "auto":
        return precision
    if on_cuda:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if _cpu_has_bf16() else "fp32"


def resolve_precision(precision, deepspeed_config, device):
    """Fill in bf16 and fp16 of the DeepSpeed settings by --precision, the file and the device.

    Returns (precision, settings). config_utils has refused contradictions between the two already.
    """
    said = {key: deepspeed_config.get(key, {}).get("enabled", "auto") for key in ("bf16", "fp16")}
    if precision == "auto" and True in said.values():
        precision = "bf16" if said["bf16"] is True else "fp16"
    elif precision == "auto" and set(said.values()) == {False}:
        precision = "fp32"
    precision = pick_precision(precision, device)
    filled = {key: {**deepspeed_config.get(key, {}), "enabled": key == precision} for key in said}
    return precision, {**deepspeed_config, **filled}


def describe_device(device, precision, world_size=1):
    """Where this runs and in which precision, for the status line."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "CPU"
    return f"设备: {name}{f' × {world_size}' if world_size > 1 else ''}, 精度: {precision}"


# ---------------------------------------------------------------------------------------------------------------------
# model, LoRA, loss


def check_model_dir(model_dir):
    """The config.json of a Hugging Face model's folder; UserError if there is none. Asked before anything slow begins."""
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise UserError(f"{model_dir}: no model here (config.json is missing); {how_to_get(model_dir)}")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); {how_to_get(model_dir)}") from None


def load_base(model_dir, dtype, device):
    """The causal LM of a local folder in `dtype` on `device`, frozen."""
    check_model_dir(model_dir)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{model_dir}: the model cannot be read ({first}); {how_to_get(model_dir)}") from None
    return model.to(device).requires_grad_(False)


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
    return model


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
def evaluate_loss(model, batches, device):
    """Mean cross-entropy per answer token over all batches (lists of rows) of all ranks."""
    training, total = model.training, torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    for rows in batches:
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
# what a run leaves on disk


class TrainLog:
    """Progress of a run: one aligned line on the terminal and one JSON object in train_log.jsonl a log, from rank 0."""

    def __init__(self, save_dir, total_steps, first_step=0):
        self.path, self.total = Path(save_dir) / "train_log.jsonl", total_steps
        self.bar = tqdm(
            total=total_steps, initial=first_step, desc="训练", unit="步", disable=not is_main(), dynamic_ncols=True
        )
        self.examples, self.since = 0, time.time()

    def step(self, examples):
        """One optimizer step over `examples` examples (all ranks) has ended."""
        self.examples += examples
        self.bar.update()

    def write(self, record):
        """Append a record; a training record gets its speed since the last one."""
        if "loss" in record:
            record = {**record, "examples_per_second": round(self.examples / (time.time() - self.since), 2)}
            self.examples, self.since = 0, time.time()
            if torch.cuda.is_available():
                record["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        if not is_main():
            return
        with saving(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        line = f"step {record['step']:>{len(str(self.total))}}/{self.total} | epoch {record['epoch']:.2f}"
        if "loss" in record:
            speed = record["examples_per_second"]
            line += f" | loss {record['loss']:.4f} | lr {record['lr']:.2e} | {speed:.1f} 条/秒"
        else:
            line += f" | eval_loss {record['eval_loss']:.4f}"
            line += f" | F1 {record['eval_f1']:.2%}" if "eval_f1" in record else ""
            self.since = time.time()  # the evaluation is no part of the training speed
            self.examples = 0
        say(line)

    def close(self):
        self.bar.close()


@contextmanager
def saving(path):
    """Turn a write that fails, mostly of a full disk, into one line: what was saved before is never touched by it."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(
            "inline_container|PytorchStreamWriter|iostream", str(error)
        ):
            raise  # not torch.save's way of saying it
        end_bars()
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        first = str(cause).strip().splitlines()[0]
        raise UserError(
            f"{path}: cannot be written ({first}); free some space there, then go on with --resume. The adapter and the "
            "checkpoints that were saved before are intact"
        ) from None


def start_run(save_dir, resume_from):
    """Make save_dir ready: an earlier run in it is moved to `<save_dir>.old`, unless it is to be resumed.

    Only what a run wrote is ever moved; a folder that holds anything else is refused. Of a run that is resumed,
    checkpoints later than `resume_from` are moved to `checkpoint-<step>.old`: they are no part of what follows.
    """
    save_dir = Path(save_dir).resolve()
    if is_main():
        for folder in complete_checkpoints(save_dir) if resume_from else []:
            if step_of(folder) > step_of(resume_from):
                old = folder.with_name(folder.name + ".old")
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
                say(f"{folder.name} 在 {resume_from.name} 之后，已移到 {old}")
        if not resume_from and save_dir.is_dir() and any(save_dir.iterdir()):
            if not any(
                (save_dir / name).exists() for name in ("train_log.jsonl", "adapter_model", "adapter_model.old")
            ):
                raise UserError(f"--save_dir={save_dir}: holds other files than a training run's; name a new folder")
            old = save_dir.with_name(save_dir.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            save_dir.rename(old)
            say(f"之前的训练结果已移到 {old}")
        save_dir.mkdir(parents=True, exist_ok=True)
    if dist.is_initialized():
        dist.barrier()


def checkpoint_to_resume(save_dir, resume):
    """`--resume` -> the folder of a complete checkpoint, or None for False.

    True: the newest complete one in save_dir. A number: that step. Anything else: a path.
    """
    if resume == "False":
        return None
    complete = complete_checkpoints(save_dir)
    if resume == "True":
        for folder in sorted(_checkpoints(save_dir), key=step_of):
            if folder not in complete:
                say(f"跳过不完整的 {folder}")
        if not complete:
            raise UserError(f"--resume: no complete checkpoint in {save_dir}; train without --resume")
        return complete[-1]
    folder = Path(save_dir) / f"checkpoint-{resume}" if resume.isdigit() else Path(resume)
    if not (folder / "complete").is_file() or not folder.name.removeprefix("checkpoint-").isdigit():
        have = ", ".join(p.name for p in complete) or "none"
        raise UserError(
            f"--resume={resume}: {folder} is not a complete checkpoint; complete ones in {save_dir}: {have}"
        )
    return folder


def _checkpoints(save_dir):
    return [p for p in Path(save_dir).glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", p.name)]


def step_of(checkpoint):
    return int(checkpoint.name.rpartition("-")[2])


def complete_checkpoints(save_dir):
    """The folders of the checkpoints in save_dir that were written to their end, by step."""
    return sorted((p for p in _checkpoints(save_dir) if (p / "complete").is_file()), key=step_of)


@contextmanager
def checkpoint(folder, save_total_limit, run):
    """Around what writes a resumable checkpoint, on all ranks: only then it is marked as complete, with the facts `run`.

    Then the oldest beyond the limit are deleted (0: keep all). What a save cut short has left in the folder is deleted
    first, and what this one leaves if it fails.
    """
    folder = Path(folder)
    if is_main():
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    try:
        with saving(folder):
            yield
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    dist.barrier()  # until all ranks have written their part
    if is_main():
        with saving(folder):
            (folder / "complete.new").write_text(json.dumps(run) + "\n", encoding="utf-8")
            (folder / "complete.new").rename(folder / "complete")
        for old in complete_checkpoints(folder.parent)[:-save_total_limit] if save_total_limit > 0 else []:
            (old / "complete").unlink()
            shutil.rmtree(old)


def run_facts(args, loader):
    """What a resumed run must share with the one that it goes on with, or its data order would be another."""
    batch_size, accumulation, world_size = loader.shape
    return {
        "train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "ranks": world_size,
        "seed": args.seed,
        "examples": len(loader.examples),
        "lora_r": args.lora_r,
        "deepspeed_zero_optimization_stage": zero_stage(args),
    }


def check_resumed(checkpoint, run):
    """UserError where the facts `run` are not those of the run that wrote the checkpoint."""
    text = (checkpoint / "complete").read_text(encoding="utf-8")
    try:
        written = dict(json.loads(text)) if text.strip() else {}
    except ValueError:
        raise UserError(f"{checkpoint}/complete: not what a training run wrote; train without --resume") from None
    for key, value in run.items():
        if written.get(key, value) != value:
            raise UserError(
                f"--resume: {checkpoint} was written with {key} {written[key]}, this run has {value}; make them equal, or "
                "train without --resume"
            )


def training_facts(args, records):
    """What inference must know about a run besides its CONFIG; stands in train_args.json beside the adapter."""
    packages = ("torch", "transformers", "peft", "deepspeed", "sentencepiece")
    labels = labels_of(records)
    if args.eval_examples > 0 and not labels:
        raise UserError(
            "--eval_examples: the training answers are no 实体_类型 lines, so there is no F1; give 0, choose the adapter "
            "with --best=loss and measure it with test.py --metric=exact"
        )
    return {
        "prompt_sha256": PROMPT_SHA256,
        "tokenizer_sha256": tokenizer_sha256(args.model_dir),
        "instructs": list(dict.fromkeys(record["instruct"] for record in records)),
        "labels": labels,
        "query_prefix": query_prefix_of(records),
        "text_tokens": usual_length(args.model_dir, records),
        "versions": {name: version(name) for name in packages},
    }


def usual_length(model_dir, records):
    """The tokens of the training texts at their 80th percentile; predict.py joins no sentences to longer windows."""
    lengths = sorted(map(len, load_tokenizer(model_dir).encode_texts([record["text"] for record in records])))
    return lengths[(len(lengths) - 1) * 4 // 5]


def save_adapter(model, save_dir, args, deepspeed_config, facts, step):
    """Write <save_dir>/adapter_model/ whole or not at all: LoRA weights, adapter_config.json, train_args.json.

    All ranks call it (under ZeRO-3 they hold the weights together); rank 0 writes.
    """
    import deepspeed

    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with deepspeed.zero.GatheredParameters(list(trainable.values())):
        if not is_main():
            return
        weights = lora_weights(model, model.lora.detach()) if "lora" in trainable else trainable
        weights = {name: weight.detach().clone() for name, weight in weights.items()}  # not views of one storage
        lora_b = [weight for name, weight in weights.items() if "lora_B" in name]
        assert lora_b and any(weight.abs().max() > 0 for weight in lora_b), "the adapter is empty: nothing was trained"
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise UserError(f"step {step}: the LoRA holds NaN or infinite weights; the adapter saved before is kept")
        target = Path(save_dir) / "adapter_model"
        new, old = target.with_name("adapter_model.new"), target.with_name("adapter_model.old")
        try:
            with saving(target):
                shutil.rmtree(new, ignore_errors=True)
                model.save_pretrained(
                    new, safe_serialization=args.safe_serialization, save_embedding_layers=False, state_dict=weights
                )
                (new / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
                save_config(args, new / "train_args.json", deepspeed=deepspeed_config, **facts, step=step)
        except UserError:
            shutil.rmtree(new, ignore_errors=True)
            raise
        written = list(_adapter_shapes(new).values())
        expected = [tuple(weight.shape) for weight in weights.values()]
        assert sorted(map(tuple, written)) == sorted(expected), "the adapter on disk is not the one in memory"
        if target.exists():  # a folder cannot be renamed over a full one
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)


class BestScore:
    """Which evaluated states are to become adapter_model/: those that score better than the one that is there."""

    def __init__(self, save_dir, metric):
        self.key, self.sign = f"eval_{metric}", -1 if metric == "loss" else 1
        path = Path(save_dir) / "adapter_model" / "train_args.json"  # of a run that is resumed
        self.score = load_config(path)[1].get(self.key) if path.is_file() else None

    def improves(self, scores):
        """Whether {"eval_loss", …} of a state beats the best so far; never with --best=last."""
        score = scores.get(self.key)
        if score is None or self.score is not None and self.sign * score <= self.sign * self.score:
            return False
        self.score = score
        return True


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


def find_adapter(data_name, lora_model):
    """`--lora_model` -> (the adapter's folder, the training's Config, the facts beside it); the base alone: None, None, {}.

    `auto`: the adapter of data_name that was written last, else the shipped one.
    """
    if lora_model in (None, "none", "None"):
        return None, None, {}
    folder = _adapter_folder(data_name, lora_model)
    return folder, *load_config(folder / "train_args.json")


def _adapter_folder(data_name, lora_model):
    if lora_model != "auto":
        folder = _adapter_or_old(Path(lora_model).resolve())
        if folder is None:
            raise UserError(
                f"{lora_model}: no adapter here (adapter_config.json is missing); train one or name another"
            )
        return folder
    root = Path("checkpoint") / data_name
    trained = [folder for name in TRAINERS if (folder := _adapter_or_old(root / name / "adapter_model"))]
    shipped = _adapter_or_old(root / "shipped" / "adapter_model")
    if not trained and not shipped:
        raise UserError(f"{root}: no adapter here; train one with `deepspeed train_trainer.py --data_name={data_name}`")
    return max(trained, key=lambda p: (p / "adapter_config.json").stat().st_mtime) if trained else shipped


def _adapter_or_old(folder):
    """The folder, or what a save that was cut short between its two renames left of it, or None."""
    old = folder.with_name(folder.name + ".old")
    if (folder / "adapter_config.json").is_file():
        return folder
    if (old / "adapter_config.json").is_file():
        say(f"{folder} 不存在，使用上一次保存的 {old}")
        return old
    return None


def check_generation(args):
    """UserError for values of test's, predict's and chat's options that cannot be."""
    for name in {"batch_size", "max_new_tokens"} & args.nested.keys():
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)}: expected 1 or more")
    if args.constrained not in ("auto", "True", "False"):
        raise UserError(f"--constrained={args.constrained}: expected auto, True, False")
    pick_precision(args.nested.get("precision", "auto"), "cuda" if torch.cuda.is_available() else "cpu")


def open_output(path):
    """A file to write answers to, opened before they are computed: a path that cannot be written costs nothing then.

    What it holds stays until the caller truncates it, for what else can go wrong before there is an answer.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another file") from None


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
        _check_fit(adapter, train_args, facts, base, tokenizer_dir)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = pick_precision(precision, device)
    say(f"模型: {base}, LoRA: {adapter or '无'}, {describe_device(device, precision)}")
    model = load_base(base, DTYPES[precision], device)
    if adapter:
        try:
            model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False, torch_device=str(device))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{adapter}/adapter_config.json: cannot be used ({error}); train it again") from None
        model = model.to(DTYPES[precision])
        model = model.merge_and_unload() if merge else model
    return model.eval(), tokenizer


def _check_fit(adapter, train_args, facts, base, tokenizer_dir):
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
    for name, shape in _adapter_shapes(adapter).items():
        module, _, factor = name.removeprefix("base_model.model.").partition(".lora_")
        side = {"A": 1, "B": 0}.get(factor[:1])
        weight = expected.get(f"{module}.weight")
        if side is not None and (weight is None or weight.shape[side] != shape[side]):
            has = "no such layer" if weight is None else f"one of {weight.shape[side]}"
            raise UserError(
                f"{adapter} does not fit {base}: it changes {module}, of size {shape[side]}, and the model has {has}; "
                "name its base with --base_model"
            )


def _adapter_shapes(adapter):
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

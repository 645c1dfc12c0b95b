"""What a training run leaves on disk and finds there again: its log, its checkpoints, its adapter.

Each is written whole or not at all, so that a run that is killed or meets a full disk loses nothing of what was there.
"""

import json
import logging
import re
import shutil
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from alpaca.common.console import end_bars, is_main, progress, say
from alpaca.common.errors import UserError
from alpaca.models.adapters import adapter_shapes
from alpaca.models.tokenizer import load_tokenizer, tokenizer_sha256
from alpaca.training.lora import lora_weights, zero_stage
from config_utils import load_config, save_config
from dataset import PROMPT_SHA256, labels_of, query_prefix_of, without_rehearsal


class TrainLog:
    """Progress of a run, from rank 0: a bar, one aligned line a log, train_log.jsonl, training.png, TensorBoard's file."""

    def __init__(self, save_dir, loader, total_steps, first_step=0, tensorboard=False):
        self.path, self.loader, self.total = Path(save_dir) / "train_log.jsonl", loader, total_steps
        self.bar = progress(total=total_steps, initial=first_step, desc="训练", unit="步")
        self.since_step, self.since = first_step, time.time()
        self.draws, self.board = is_main(), None
        if tensorboard and is_main():
            from torch.utils.tensorboard import SummaryWriter  # check_options has looked for it

            # Of a run that is resumed, what was logged after its checkpoint is no part of what follows.
            self.board = SummaryWriter(self.path.with_name("tensorboard"), purge_step=first_step + 1)

    def step(self):
        """One optimizer step has ended."""
        self.bar.update()

    def write(self, step, **figures):
        """Log the figures after `step` steps: loss and lr, which get the speed since the last log, or eval_loss, …."""
        examples = self.loader.examples_until(step)
        if "loss" in figures:
            seen = examples - self.loader.examples_until(self.since_step)
            figures["examples_per_second"] = round(seen / (time.time() - self.since), 2)
            if torch.cuda.is_available():
                figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.since_step, self.since = step, time.time()  # an evaluation is no part of the training speed
        if not is_main():
            return
        record = {"step": step, "epoch": step / self.loader.steps_per_epoch, "examples": examples, **figures}
        with saving(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        with saving(self.path.with_name("tensorboard")):
            for name, value in figures.items() if self.board else ():
                self.board.add_scalar(name, value, step)
        line = f"step {step:>{len(str(self.total))}}/{self.total} | epoch {record['epoch']:.2f}"
        if "loss" in figures:
            speed = figures["examples_per_second"]
            line += f" | loss {figures['loss']:.4f} | lr {figures['lr']:.2e} | {speed:.1f} 条/秒"
        else:
            line += f" | eval_loss {figures['eval_loss']:.4f}"
            line += f" | F1 {figures['eval_f1']:.2%}" if "eval_f1" in figures else ""
        say(line)

    def draw(self):
        """Draw what was logged so far as training.png. A picture is worth no run: what goes wrong is said, once."""
        if not self.draws:
            return
        path, new = self.path.with_name("training.png"), self.path.with_name("training.png.new")
        try:
            draw_log(self.path, new)
            new.replace(path)
        except Exception as error:
            self.draws = False
            new.unlink(missing_ok=True)
            say(f"画不了 {path}，训练照常进行: {error}")

    def close(self):
        self.bar.close()
        if self.board:
            self.board.close()


def series_of(log):
    """train_log.jsonl as {name: [(examples seen, value), …]}. What a resumed run has done again counts once."""
    series = {name: [] for name in ("loss", "eval_loss", "eval_f1", "lr")}
    for line in log.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        examples = record.get("examples", 0)  # logs of earlier versions have none
        for name, points in series.items():
            while points and (points[-1][0] > examples or name in record and points[-1][0] == examples):
                points.pop()
            if examples and name in record:
                points.append((examples, record[name]))
    return series


def draw_log(log, path):
    """Draw train_log.jsonl as a PNG: losses, F1 where there is any, and learning rate, over the examples seen."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it speaks of its font cache
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    series, titles = series_of(log), ("training loss", "dev loss", "dev F1", "learning rate")
    looks = {
        name: {"label": title, "color": f"C{i}"} for i, (name, title) in enumerate(zip(series, titles, strict=True))
    }
    groups = [group for group in (("loss", "eval_loss"), ("eval_f1",), ("lr",)) if any(series[name] for name in group)]
    figure = Figure(figsize=(8, 2 + 1.5 * len(groups)))
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=[2] + [1] * (len(groups) - 1))
    figure.subplots_adjust(left=0.1, right=0.97, top=0.97, bottom=0.55 / figure.get_figheight(), hspace=0.12)
    for panel, group in zip(panels.flat, groups, strict=True):
        for name in filter(series.get, group):
            dots = {"marker": "o", "markersize": 4} if len(series[name]) < 50 else {}
            panel.plot(*zip(*series[name], strict=True), linewidth=1.2, **looks[name], **dots)
        if "loss" in group:
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
        panel.legend()
    panels[-1, 0].set_xlabel("examples seen")
    figure.savefig(path, format="png", dpi=100)


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
    records = without_rehearsal(records)
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
        written = list(adapter_shapes(new).values())
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

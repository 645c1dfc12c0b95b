"""What a run logs: progress bar, lines, train_log.jsonl, training.png and TensorBoard's file."""

import json
import logging
import statistics
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch

from alpaca.common.console import is_main, progress, quiet_if_gone, say
from alpaca.training.checkpoints import saving

TIMED_STEPS = 10  # after as many the time of the rest is said


class TrainLog:
    """Progress of a run, from rank 0: a bar, one aligned line a log, train_log.jsonl, training.png, TensorBoard's file."""

    def __init__(self, save_dir, loader, total_steps, first_step=0, tensorboard=False):
        self.path, self.loader, self.total = Path(save_dir) / "train_log.jsonl", loader, total_steps
        self.bar = progress(total=total_steps, initial=first_step, desc="训练", unit="步")
        if is_main():
            repair_log(self.path)
        self.since_step, self.since = first_step, time.time()
        self.first_step, self.steps = first_step, 0  # steps: of this process
        self.ends = []  # when the first TIMED_STEPS of them ended
        self.draws, self.board = is_main(), None
        if tensorboard and is_main():
            from torch.utils.tensorboard import SummaryWriter  # check_options has looked for it

            # Of a run that is resumed, what was logged after its checkpoint is no part of what follows.
            with saving(folder := self.path.with_name("tensorboard")):
                self.board = SummaryWriter(folder, purge_step=first_step + 1)

    def step(self):
        """One optimizer step has ended."""
        with quiet_if_gone():
            self.bar.update()
        self.steps += 1
        if self.steps <= TIMED_STEPS:
            self.ends.append(time.time())
        if self.steps == 1:
            say_peak("第 1 步后")
        left = self.total - self.first_step - self.steps
        if self.steps == TIMED_STEPS and left:
            # the median: between two there may be a save, an evaluation or a compilation
            seconds = statistics.median(end - before for before, end in pairwise(self.ends))
            say(
                f"每步 {seconds:.2f} 秒，余下 {left} 步约需 {timedelta(seconds=round(seconds * left))}（不算保存和评估）"
            )

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
        say_peak("训练结束，")
        self.bar.close()
        if self.board:
            with saving(self.path.with_name("tensorboard")):
                self.board.close()


def say_peak(when):
    """Say the most GPU memory so far that this process has kept from others: what a card must have."""
    if torch.cuda.is_available():
        say(f"{when}显存峰值 {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB")


def evaluated_steps(log):
    """The steps whose evaluation is in train_log.jsonl."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return [record["step"] for record in map(json.loads, lines) if "eval_loss" in record]


def repair_log(log):
    """Cut off the half record that a full disk or a killed process has left at the end of train_log.jsonl."""
    if log.is_file() and not (text := log.read_bytes()).endswith(b"\n"):
        with saving(log), log.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)


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

"""What surrounds an optimizer step: the learning rate, the seed, and the signals that end a run."""

import random
import signal

import torch
import torch.distributed as dist

from alpaca.common.console import say

# What "auto" is for a base whose hidden_size is below the first number: tried for the tiny model, usual for a 7B.
LEARNING_RATES = ((1024, 1.5e-3), (float("inf"), 1e-4))


def with_learning_rate(settings, hidden_size):
    """(DeepSpeed's settings with a number for the learning rate, where that comes from)."""
    optimizer, asked = settings["optimizer"], settings["optimizer"]["params"]["lr"]
    if asked != "auto":
        return settings, "DeepSpeed 配置或命令行"
    lr = next(lr for below, lr in LEARNING_RATES if hidden_size < below)
    return {
        **settings,
        "optimizer": {**optimizer, "params": {**optimizer["params"], "lr": lr}},
    }, f"auto，hidden_size {hidden_size}"


def warmup_linear(step, warmup_steps, total_steps):
    """The factor on the learning rate at a 0-based step: (step+1)/warmup, then linearly down to 0, which it reaches only behind the last step."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(total_steps - step, 0) / max(total_steps - warmup_steps, 1)


def make_scheduler(optimizer, args, total_steps):
    warmup_steps = int(args.warmup_ratio * total_steps + 0.5)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: warmup_linear(k, warmup_steps, total_steps))


def use_settings(optimizer, scheduler, settings):
    """Give a resumed run its own learning rate, betas, weight decay and clipping: a load has set the checkpoint's.

    optimizer: DeepSpeed's or torch's. scheduler: make_scheduler's, after its load. settings: DeepSpeed's.
    """
    params = settings["optimizer"]["params"]
    numbers = {key: params[key] for key in ("betas", "weight_decay") if key in params}
    scheduler.base_lrs = [params["lr"]] * len(scheduler.base_lrs)
    scheduler._last_lr = [params["lr"] * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    for group, lr in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group.update(numbers, lr=lr, initial_lr=params["lr"])
    if hasattr(optimizer, "clip_grad"):  # at stage 0 in fp32 the engine clips, by its own settings
        optimizer.clip_grad = settings.get("gradient_clipping", 0.0)


def begin_at_step_0(optimizer):
    """Let the Adam of a fresh run begin with nothing. optimizer: DeepSpeed's or torch's.

    For ZeRO 0 in half precision DeepSpeed makes Adam's state by a step with gradients of 0. The bias correction counts it,
    so that the first real step would go 0.74 of the learning rate, and later ones too little as well.
    """
    getattr(optimizer, "optimizer", optimizer).state.clear()


def seed_step(seed, step, rank):
    """Draw dropout from (seed, step, rank) alone, so that a resumed run needs no generator's state."""
    torch.manual_seed(random.Random(f"{seed}-{step}-{rank}").getrandbits(63))


def catch_signals():
    """From now on SIGINT, SIGTERM and SIGHUP only fill the list that is returned, for shared_state; a second SIGINT ends at
    once. A SIGHUP that is ignored, as under nohup, stays so."""
    received = []

    def remember(number, frame):
        if number == signal.SIGINT and number in received:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, remember)
    return received


def shared_state(loss, skipped, signals):
    """After a step, what any rank has met: (loss not finite, update skipped, number of a signal or 0).

    loss: this rank's, a scalar tensor. skipped: whether DeepSpeed has left the step out for its gradient.
    """
    here = torch.tensor([bool(skipped), signals[0] if signals else 0], device=loss.device)
    state = torch.cat([~torch.isfinite(loss).reshape(1), here]).int()
    if dist.get_world_size() > 1:
        dist.all_reduce(state, op=dist.ReduceOp.MAX)
    return state.tolist()


def signalled(signals, device):
    """The number of a signal that any rank has got, or 0. All ranks ask at once."""
    number = torch.tensor([signals[0] if signals else 0], dtype=torch.int32, device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return number.item()


def end_by_signal(number, step):
    """Leave with the exit code of a process that the signal ended, after everything is saved."""
    say(f"收到 {signal.Signals(number).name}，已在第 {step} 步保存；加 --resume 继续")
    dist.destroy_process_group()
    raise SystemExit(128 + number)

"""What surrounds an optimizer step: the learning rate, the seed, and the signals that end a run."""

import random
import signal

import torch
import torch.distributed as dist

from alpaca.common.console import end_bars, say
from alpaca.common.errors import UserError


def warmup_linear(step, warmup_steps, total_steps):
    """The factor on the learning rate at a 0-based step: (step+1)/warmup, then linearly towards 0; never 0 itself."""
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

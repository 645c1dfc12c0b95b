"""Devices, the processes of a run, and the precision that a device computes in."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from alpaca.common.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def cores():
    """How many cores this process may use; a container or taskset leaves fewer of them than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_launcher():
    """UserError where mpirun or srun has started several processes that do not know of each other."""
    for name in () if "RANK" in os.environ else ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        count = os.environ.get(name, "1")
        if count.isdigit() and int(count) > 1:
            raise UserError(
                f"{name} is {count}, but RANK is not set: each of these processes would be a run of its own. Start one process "
                f"a machine with the launcher, as `deepspeed --num_gpus={count} train_trainer.py`, or `torchrun "
                f"--nproc_per_node={count} train_trainer.py`"
            )


def init_distributed():
    """Join the process group that the deepspeed launcher started, or make one of this process alone.

    Returns (device, rank, world_size).
    """
    import deepspeed  # here, not above: inference does without it, and it takes seconds to import

    if "RANK" not in os.environ:  # without the launcher; deepspeed would ask MPI for these
        # Port 0 is whichever is free when torch binds it. One looked for here could be another run's by then.
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update(alone)
    # DeepSpeed would compile its shared-memory collectives with c++ (36 s, or death where there is none); gloo does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # first: NCCL takes the current GPU
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        device = torch.device("cpu")
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return device, dist.get_rank(), dist.get_world_size()


def check_devices(asked):
    """UserError for a --devices that is no number of a GPU here, nor auto, or that a launcher's processes cannot have."""
    if asked != "0" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"--devices={asked}: each process of a launcher takes a GPU of its own; start one with python")
    count = torch.cuda.device_count()
    if asked != "auto" and not (asked.isdecimal() and int(asked) < max(count, 1)):
        raise UserError(f"--devices={asked}: expected auto, or the number of one of the {count} GPUs here, from 0 on")


def pick_device(asked):
    """--devices -> cpu, cuda:<number>, which is the current device from now on, or auto where there are several GPUs.
    "0" is the first, or the one that a launcher's process has taken."""
    count = torch.cuda.device_count()
    if not count:
        return "cpu"
    if asked == "auto" and count > 1:
        return "auto"
    if asked != "0" and asked != "auto":
        torch.cuda.set_device(int(asked))
    return f"cuda:{torch.cuda.current_device()}"


def _cpu_has_bf16():
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
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

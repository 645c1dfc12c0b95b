"""How much memory is free for answering: of a GPU, or of this machine or container."""

from contextlib import suppress
from pathlib import Path

import torch

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
LIMITS = {  # controllers of a line of /proc/self/cgroup, v2 and v1 -> limit, usage, what of it caches files
    "": ("memory.max", "memory.current", "active_file", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_active_file", "total_inactive_file"),
}


def free_memory(device):
    """Bytes that can still be allocated on the device, here within what a container or a batch job may use."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        free, total = torch.cuda.mem_get_info(index)
        allowed = torch.cuda.get_per_process_memory_fraction(index) * total - torch.cuda.memory_reserved(index)
        return max(0, int(min(free, allowed))) + _kept_unused(index)
    lines = (PROC / "meminfo").read_text(encoding="utf-8").splitlines()
    machine = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return max(0, min([machine, *left_by_cgroups()]))


def _kept_unused(index):
    """Bytes that torch has of the device and does not use, without those of a CUDA graph, which only its replay uses."""
    segments = [segment for segment in torch.cuda.memory_snapshot() if segment["device"] == index]
    segments = [segment for segment in segments if tuple(segment["segment_pool_id"]) == (0, 0)]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in segments)


def left_by_cgroups():
    """Yield the bytes that the limit of each control group, v1 or v2, of this process still allows: a container's, a
    batch job's. What caches files is free, as it is in MemAvailable. A container may not see the path, but its own root."""
    file = PROC / "self/cgroup"
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        _, controllers, path = line.split(":", 2)
        group = CGROUPS / controllers / path[1:]
        for folder in (group, *group.parents) if controllers in LIMITS else ():
            with suppress(OSError, ValueError):  # no such group here; no limit, which v2 calls max
                limit, used = (int((folder / name).read_text(encoding="utf-8")) for name in LIMITS[controllers][:2])
                stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
                yield limit - used + sum(int(stat[name]) for name in LIMITS[controllers][2:])

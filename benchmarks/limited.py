"""Run a trainer as on a smaller card, or with another number of compiled row lengths; for train_speed.py.

python benchmarks/limited.py '{"memory_gb": 12}' train_deepspeed.py --base_weights=nf4
"""

import json
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from alpaca.common.start import start

start()

import torch

from alpaca.training import cuda_graphs

DRIVER_GB = 0.8  # what a CUDA context, and a desktop, take of a card


def limit(settings):
    """settings: {"memory_gb", "row_lengths"}, each optional."""
    if "memory_gb" in settings and torch.cuda.is_available():
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, (settings["memory_gb"] - DRIVER_GB) * 1e9 / total))
    if "row_lengths" in settings:
        _, spare = cuda_graphs.choose_lengths.__defaults__
        cuda_graphs.choose_lengths.__defaults__ = (settings["row_lengths"], spare)


if __name__ == "__main__":
    limit(json.loads(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")

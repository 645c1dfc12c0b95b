"""What loading a base of LLaMA 7B's widths takes: host memory of each process, and the time of the hash that tells bases apart.

    python benchmarks/base_loading.py --layers=32                          # a whole 7B, 13 GB in float16
    python benchmarks/base_loading.py --layers=16 --processes=1,2          # half of it, for a host of 24 GB

Writes float16 files below --work_dir, deletes them at the end, and prints one line a measurement. The hash is that of
alpaca/models/base_files.py, first with nothing of the files in memory, then again. Then each number of processes loads the
model at the same time; memory is PSS of /proc/self/smaps_rollup, where a page that several processes share counts in parts,
at its peak, as a multiple of the weights.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from alpaca.common.start import start

start()

import torch
from safetensors.torch import save_file

from alpaca.common.devices import DTYPES
from alpaca.models.base_files import tensors_sha256, weight_files
from alpaca.models.base_weights import load_base
from alpaca.models.layers import tensor_shapes
from benchmarks.speed_inputs import SHAPES
from config_utils import run_script

CONFIG = {
    "layers": 32,  # of them; a 7B has 32
    "processes": [1, 2],  # so many load at the same time
    "precision": "bf16",  # to load it in; the files are float16
    "work_dir": None,  # folder to write below; None: the system's for temporary files
    "loading": None,  # internal: load this folder in this process
}
SHARDS = 2  # files of weights, as a 7B has them


def write_model(folder, layers):
    """A Hugging Face folder of random float16 weights; its size in bytes."""
    config = {"vocab_size": 49954, **SHAPES["7b"], "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes, numbers, index = tensor_shapes(config), torch.randn(2**20, dtype=torch.float16), {}
    for shard in range(SHARDS):
        file, tensors = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors", {}
        for name, shape in [*shapes.items()][shard::SHARDS]:
            count = torch.Size(shape).numel()
            tensors[name] = numbers.repeat(-(-count // len(numbers)))[:count].view(shape)
            index[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return sum(file.stat().st_size for file in weight_files(folder))


def drop_from_memory(folder):
    """Let the kernel forget the files of a model."""
    for path in weight_files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory():
    """{"Pss", "Pss_Anon", …} of this process in bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
    return {name: int(value.split()[0]) * 1024 for name, value in (line.split(":") for line in lines)}


def load(folder, dtype):
    """Load the model in this process, on the GPU if there is one; prints its peak memory, and how long it took, as JSON."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peak, ended = {"Pss": 0, "Pss_Anon": 0}, threading.Event()

    def watch():
        while not ended.wait(0.1):
            now = memory()
            peak.update({name: max(most, now[name]) for name, most in peak.items()})

    watching, began = threading.Thread(target=watch), time.perf_counter()
    watching.start()
    model = load_base(folder, dtype, device)
    seconds = time.perf_counter() - began
    time.sleep(1)  # the last peak is seen too
    ended.set()
    watching.join()
    print(json.dumps({**peak, "seconds": seconds, "size": model.num_parameters() * dtype.itemsize, "device": device}))


def main(args):
    if args.loading:
        load(args.loading, DTYPES[args.precision])
        return
    folder = Path(tempfile.mkdtemp(dir=args.work_dir))
    try:
        size = write_model(folder, args.layers)
        print(f"{args.layers} layers, float16, {size / 1e9:.1f} GB in {SHARDS} files")
        drop_from_memory(folder)
        for what in ("cold", "again"):
            began = time.perf_counter()
            tensors_sha256(folder)
            print(f"hash, {what}: {time.perf_counter() - began:.2f} s", flush=True)
        for count in args.processes:
            drop_from_memory(folder)
            command = [sys.executable, __file__, f"--loading={folder}", f"--precision={args.precision}"]
            running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
            for result in [json.loads(process.communicate()[0]) for process in running]:
                whole, own = (result[name] / result["size"] for name in ("Pss", "Pss_Anon"))
                print(
                    f"loading, {count} at once, {args.precision} on {result['device']}: peak {whole:.2f} x the weights, "
                    f"{own:.2f} x without files' pages; {result['seconds']:.1f} s",
                    flush=True,
                )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)

"""How fast convert and merge are and how much memory they take, beside `cp` and the straightforward way.

    python benchmarks/hub_speed.py                                      # an eighth of the layers: about 7 GB of disk
    python benchmarks/hub_speed.py --scale=1 --work_dir=/disk/hub       # the whole 7B: 45 GB of disk, 16 GB of memory

Makes random weights of LLaMA-1 7B in Meta's layout (a table of rotary angles in each layer) and two LoRAs of Chinese-LLaMA-Plus's and
Chinese-Alpaca-Plus's shapes, then runs the two scripts as subprocesses, several times, from a cold and a warm page
cache, each beside `cp` of the folder that it reads. straightforward is what most scripts do: load the whole model,
merge with PEFT, save; it runs once, where memory suffices. Each output is deleted before the next way runs.

Prints a table and writes benchmarks/results/hub_speed-CPU.json: {"scale", "bytes" (of the base), "memory_gib", "cores",
"runs": a list of {"way", "cache", "seconds" (until the command returned), "synced" (until all of it was on the disk),
"anon_gib" (the highest RssAnon of the process, sampled every 20 ms; mapped files do not count)}, "medians"}.
"""

import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from sentencepiece import sentencepiece_model_pb2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from alpaca.common.start import start

start()

from alpaca.common.errors import UserError
from alpaca.models.layers import tensor_shapes
from alpaca.weights.llama_layout import config_of, meta_names
from alpaca.weights.output_folder import write_json
from config_utils import run_script

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "scale": 8,  # a divisor of the 32 layers: 1 is the 7B
    "repeats": 2,  # runs of each way from each cache
    "work_dir": "benchmarks/work/hub",  # made, and deleted at the end
    "straightforward": False,  # internal: merge the straightforward way in this process
}
PARAMS = {"dim": 4096, "n_heads": 32, "norm_eps": 1e-6}
FFN = 11008
LORAS = {"llama": (49953, 8, 32), "alpaca": (49954, 64, 128)}  # rows, rank, alpha of the published Plus adapters
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---------------------------------------------------------------------------------------------------------------------
# inputs


def make_tokenizer(path, pieces):
    """A tokenizer.model of so many pieces: the embedded one and fillers."""
    proto = sentencepiece_model_pb2.ModelProto.FromString((ROOT / "model_hub/tiny/tokenizer.model").read_bytes())
    for i in range(len(proto.pieces), pieces):
        proto.pieces.add(piece=f"<{i}>", score=0.0)
    path.write_bytes(proto.SerializeToString())


def random(shape):
    return torch.empty(shape, dtype=torch.float16).uniform_(-0.03, 0.03)


def make_7b(folder, shapes, layers):
    """consolidated.00.pth as PyTorch writes it, with the names of LLaMA-1 7B, and params.json.

    The file is made without its numbers, which are then drawn into it: they do not fit into memory.
    """
    tensors = {meta: torch.empty(shapes[name], dtype=torch.float16) for name, meta in meta_names(layers).items()}
    for i in range(layers):
        tensors[f"layers.{i}.attention.inner_attention.rope.freqs"] = torch.empty(64, dtype=torch.float16)
    with torch.serialization.skip_data():
        torch.save(tensors, folder / "consolidated.00.pth")
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        tensors = torch.load(folder / "consolidated.00.pth", mmap=True, weights_only=True)
    for tensor in tensors.values():
        tensor.uniform_(-0.03, 0.03)
    write_json(folder / "params.json", {**PARAMS, "multiple_of": 256, "n_layers": layers, "vocab_size": -1})


def make_inputs(work, layers):
    """work/7B in Meta's layout, work/llama and work/alpaca."""
    config = config_of({**PARAMS, "n_layers": layers}, 32000, FFN, torch.float16, 2048)
    shapes = tensor_shapes(config)
    for name in ("7B", *LORAS):
        (work / name).mkdir(parents=True)
    make_7b(work / "7B", shapes, layers)
    make_tokenizer(work / "7B" / "tokenizer.model", 32000)
    for name, (rows, rank, alpha) in LORAS.items():
        prefix = "base_model.model."
        tensors = {f"{prefix}{module}.weight": random((rows, 4096)) for module in ("model.embed_tokens", "lm_head")}
        for weight, shape in shapes.items():
            if weight.endswith(tuple(f"{module}.weight" for module in LINEAR)):
                module = prefix + weight.removesuffix(".weight")
                tensors[f"{module}.lora_A.weight"] = random((rank, shape[1]))
                tensors[f"{module}.lora_B.weight"] = random((shape[0], rank))
        torch.save(tensors, work / name / "adapter_model.bin")
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha}
        settings |= {"target_modules": list(LINEAR), "modules_to_save": ["embed_tokens", "lm_head"]}
        write_json(work / name / "adapter_config.json", settings)
        make_tokenizer(work / name / "tokenizer.model", rows)


# ---------------------------------------------------------------------------------------------------------------------
# runs


def prepare_cache(folders, cache):
    """Put the files of these folders out of the page cache, or into it."""
    os.sync()
    for file in (file for folder in folders for file in folder.iterdir()):
        fd = os.open(file, os.O_RDONLY)
        if cache == "cold":
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while os.read(fd, 1 << 24):
                pass
        os.close(fd)


def run(way, command, reads, cache, output):
    """One row of the results; the output is deleted before."""
    shutil.rmtree(output, ignore_errors=True)
    prepare_cache(reads, cache)
    begin, peak = time.perf_counter(), 0
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        # whatever it is that takes too much memory, it is this that the system should end
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000", encoding="utf-8")
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            anon = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
            peak = max([peak, *map(int, anon)])
            time.sleep(0.02)
        seconds = time.perf_counter() - begin
        if process.returncode:
            raise UserError(f"{way}: exit code {process.returncode}: {process.stdout.read()[-1500:].decode()}")
    os.sync()
    row = {"way": way, "cache": cache, "seconds": round(seconds, 2), "synced": round(time.perf_counter() - begin, 2)}
    row["anon_gib"] = round(peak / 2**20, 2)
    print(" | ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def memory_gib(key):
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    return int(lines[key].split()[0]) / 2**20


def merge_straightforward(work):
    """Load the whole model, merge with PEFT, save."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(work / "7B-hf", dtype=torch.float16)
    for name, (rows, _, _) in LORAS.items():
        model.resize_token_embeddings(rows, mean_resizing=False)
        model = PeftModel.from_pretrained(model, work / name, autocast_adapter_dtype=False).merge_and_unload()
    model.save_pretrained(work / "merged")


def main(args):
    work = Path(args.work_dir).resolve()
    if args.straightforward:
        return merge_straightforward(work)
    if args.scale < 1 or 32 % args.scale:
        raise UserError(f"--scale={args.scale}: expected a divisor of 32")
    if work.exists():
        raise UserError(f"--work_dir={work}: is there already, and would be deleted; name a new folder")
    try:
        report(args, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def report(args, work):
    make_inputs(work, 32 // args.scale)
    size = (work / "7B" / "consolidated.00.pth").stat().st_size
    hub, copy = ROOT / "model_hub", work / "copy"
    convert = [sys.executable, hub / "convert_llama_weights_to_hf.py", f"--input_dir={work}", "--model_size=7B"]
    convert.append(f"--output_dir={work / '7B-hf'}")
    merge = [sys.executable, hub / "merge_llama_with_chinese_lora.py", f"--base_model={work / '7B-hf'}"]
    merge += [f"--lora_model={work / 'llama'},{work / 'alpaca'}", f"--output_dir={work / 'merged'}"]
    straight = [sys.executable, __file__, f"--work_dir={work}", "--straightforward"]
    adapters = [work / name for name in LORAS]

    rows = []
    for way, command, source, others in (("convert", convert, "7B", []), ("merge", merge, "7B-hf", adapters)):
        output = work / ("7B-hf" if way == "convert" else "merged")
        for i in range(args.repeats):
            for cache in ("cold", "warm"):
                reads = [work / source]
                shutil.rmtree(output, ignore_errors=True)  # else its cached pages would be room for cp, not for ours
                rows.append(run(f"cp {source}", ["cp", "-r", work / source, copy], reads, cache, copy))
                shutil.rmtree(copy)
                rows.append(run(way, command, [*reads, *others], cache, output))
                if way == "merge" and i == 0 and cache == "cold":
                    shutil.rmtree(output)
                    if memory_gib("MemAvailable") < 1.25 * size / 2**30 + 2:
                        print(
                            f"straightforward: not run, {memory_gib('MemAvailable'):.1f} GiB of memory do not suffice"
                        )
                        continue
                    rows.append(run("straightforward", straight, [*reads, *others], cache, output))

    medians = []
    for way, cache in dict.fromkeys((row["way"], row["cache"]) for row in rows):
        ours = [row for row in rows if (row["way"], row["cache"]) == (way, cache)]
        median = {"way": way, "cache": cache, "runs": len(ours)}
        median |= {key: round(statistics.median(row[key] for row in ours), 2) for key in ("seconds", "synced")}
        median["anon_gib"] = max(row["anon_gib"] for row in ours)
        copies = [m for m in medians if m["cache"] == cache and m["way"].startswith("cp")]
        if not way.startswith("cp"):  # beside the cp that was measured between its runs
            median |= {f"{key}_of_cp": round(median[key] / copies[-1][key], 2) for key in ("seconds", "synced")}
        medians.append(median)
    result = {"scale": args.scale, "bytes": size, "memory_gib": round(memory_gib("MemTotal"), 1)}
    result |= {"cores": len(os.sched_getaffinity(0)), "runs": rows, "medians": medians}
    out = ROOT / "benchmarks" / "results" / "hub_speed-CPU.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("\n| way | page cache | seconds (× cp) | until on disk (× cp) | RssAnon, GiB |\n|---|---|---|---|---|")
    for m in medians:
        times = [
            f"{m[key]:.1f}" + (f" ({m[f'{key}_of_cp']})" if f"{key}_of_cp" in m else "")
            for key in ("seconds", "synced")
        ]
        print(f"| {m['way']} | {m['cache']} | {times[0]} | {times[1]} | {m['anon_gib']} |")


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)

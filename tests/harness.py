"""What the tests call: a script of the project run as a user would, instruct data, what two runs must share."""

import functools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

# As text, since xdist's first process, which runs no test, need not wait for torch.
needs_two_gpus = pytest.mark.skipif("torch.cuda.device_count() == 1", reason="two ranks need two GPUs or none")

INSTRUCTION = (
    "你现在是一个实体识别模型，你需要提取文本里面的人名、地名、机构名，如果存在结果，返回'实体_实体类型'，"
    "不同实体间用\n分隔。如果没有结果，回答'没有'。"
)


def lora_settings(
    gradient_checkpointing=False, lora_dropout=0.0, lora_target_modules=("q_proj", "o_proj", "down_proj")
):
    """What add_lora reads of a trainer's args."""
    return SimpleNamespace(
        gradient_checkpointing=gradient_checkpointing,
        deepspeed={},
        seed=42,
        lora_r=4,
        lora_alpha=8,
        lora_dropout=lora_dropout,
        lora_target_modules=list(lora_target_modules),
    )


def make_records(count, seed):
    """Instruct data of our own: one sentence each with a person and a place, or with neither."""
    draw = random.Random(seed)
    records = []
    for _ in range(count):
        person, place = draw.choice(["王明", "李华", "张伟"]), draw.choice(["北京", "上海", "长沙"])
        if draw.random() < 0.25:
            text, entities = "我们去年说" + "新闻" * draw.randint(1, 8) + "。", []
        else:
            text = f"{person}去年在{place}说" + "新闻" * draw.randint(0, 8) + "。"
            entities = [
                {"entity": entity, "type": kind, "begin": text.index(entity), "end": text.index(entity) + len(entity)}
                for entity, kind in ((person, "人名"), (place, "地名"))
            ]
        answer = "\n".join(f"{e['entity']}_{e['type']}" for e in entities) or "没有"
        records.append(
            {"instruct": INSTRUCTION, "query": f"文本：{text}", "answer": answer, "text": text, "entities": entities}
        )
    return records


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


ROOT = Path(__file__).resolve().parent.parent


# What a fork runs: a script, and what Python does at the end of one. What it leaves out is to free each object of the
# libraries, which takes 0.5 s, longer than most scripts' own work.
RUN = """
import atexit, os, runpy, signal, sys, threading
def run_main():
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = None
    except SystemExit as end:
        code = end.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code or 0)
"""
# Importing the libraries takes longer than most scripts' own work: a process does it once, and forks for each script. What
# is ours is imported by the fork. DeepSpeed imports torch's compiler for an optimizer that is not used, and more when an
# engine is made; matplotlib looks for fonts when it draws. Where torch registers an operator, inspect asks every module
# for its file, and keeps the answers.
FORKING = """
import gc, inspect, io, json
import deepspeed, llguidance, matplotlib.figure, peft, torch, transformers
import deepspeed.module_inject.auto_ep_layer, deepspeed.ops.op_builder.all_ops, peft.utils.transformers_weight_conversion
from deepspeed.runtime.zero.muon import muon_optimizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM, SentencePieceBackend, Trainer
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
matplotlib.figure.Figure().savefig(io.BytesIO())
get_checkpoint_conversion_mapping("llama")
inspect.getmodule(sys._getframe())
gc.freeze()  # else a fork looks at all of it once more
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if not pid:
        break
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()
signal.alarm(600)
for number, name in enumerate(("stdin", "stdout", "stderr")):
    os.dup2(os.open(order[name], os.O_RDWR), number)
sys.stdin = open(0, encoding="utf-8", errors="surrogateescape")
os.chdir(order["cwd"])
os.environ.clear()
os.environ.update(order["env"])
sys.argv = order["argv"]
sys.path[0] = os.path.dirname(sys.argv[0])
exec(order["before"], {})
run_main()
"""
# The same without a fork: what is done before stands in its middle.
NOT_FORKING = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
{}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@functools.cache
def forking():
    command = [sys.executable, "-c", RUN + FORKING]
    env = {**os.environ, "PYTHONUTF8": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)


def run_forked(argv, cwd, env, stdin, before, meanwhile):
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in ("stdin", "stdout", "stderr")}
        for name, path in files.items():
            path.write_text(stdin if name == "stdin" else "", encoding="utf-8", errors="surrogateescape")
        order = {"argv": argv, "cwd": str(cwd), "env": env, "before": before}
        order |= {name: str(path) for name, path in files.items()}
        print(json.dumps(order), file=forking().stdin, flush=True)
        meanwhile(int(forking().stdout.readline()))
        code = int(forking().stdout.readline())
        out, err = (files[name].read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(argv, code, out, err)


def run_new(command, cwd, env, stdin, meanwhile):
    text = {"text": True, "encoding": "utf-8", "errors": "surrogateescape"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=cwd, env=env, **pipes, **text) as process:
        try:
            meanwhile(process.pid)
            out, err = process.communicate(stdin, timeout=300)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


# Runs of a script as several ranks, one run after another, of which one rank may be killed once the output holds so many rows.
# The launcher's part: where a rank has died, the others are ended.
RANKS = f"""{RUN}
import faulthandler, json, time
runs, log = json.loads(sys.stdin.read()), sys.argv[1]
def child(run, rank):
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    faulthandler.dump_traceback_later(120, exit=True)  # a rank that hangs says where
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(run["count"]), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(run["port"]), OMP_NUM_THREADS="1")
    sys.argv, sys.path[0] = run["argv"], os.path.dirname(run["argv"][0])
    run_main()
def rows(run):
    try:
        with open(run["output"], "rb") as file:
            return file.read().count(b"\\n")
    except OSError:
        return 0
for run in runs:
    ranks, kill, codes = {{}}, run["kill"], {{}}
    for rank in range(run["count"]):
        pid = os.fork()
        if not pid:
            break
        ranks[pid] = rank
    else:
        while ranks:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                codes[ranks.pop(pid)] = code = os.waitstatus_to_exitcode(status)
                for other in ranks if code else ():
                    os.kill(other, signal.SIGTERM)
            elif kill and rows(run) >= kill["rows"]:
                os.kill(next(pid for pid, rank in ranks.items() if rank == kill["rank"]), signal.SIGKILL)
                kill = None
            time.sleep(0.001)
        print(json.dumps({{"codes": [codes[rank] for rank in range(run["count"])], "rows": rows(run)}}), flush=True)
        continue
    child(run, rank)
    break
"""


def run_ranks(script, options, output, runs, cwd):
    """Run a script as {"count", "kill": {"rank", "rows"} or None, "more": options} say, run after run -> [{"codes", "rows"}].

    output: the file that they write and whose rows are counted, where a run names no other "output"; what the ranks print
    goes to <output>.log.
    """
    orders = [{"output": str(output), "port": free_port(), **run} for run in runs]
    for order in orders:
        more = [*options, f"--output_path={order['output']}", *order["more"]]
        order["argv"] = [str(ROOT / script), *map(str, more)]
    ranks, log = Path(f"{output}.ranks.py"), Path(f"{output}.log")
    ranks.write_text(RANKS, encoding="utf-8")
    env = {"CUDA_VISIBLE_DEVICES": ""}
    result = run_script(ranks, log, cwd=cwd, stdin=json.dumps(orders), env=env, check=False)
    log = log.read_text(encoding="utf-8", errors="replace")
    assert result.returncode == 0, result.stderr[-2000:] + log[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()], log


def free_port():
    """A port for a process that must be told one. Another may take it before it is bound; nothing else is to be had."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_script(
    script, *options, cwd, launcher=None, check=True, env=None, stdin="", before="", meanwhile=lambda pid: None
):
    """Run a script of the project as a user would; with check, a failure shows what it printed.

    launcher: another command than python to run it with. before: Python code that its process runs first. meanwhile: is
    called with the process's id while it runs. A process that is to use CUDA cannot be a fork.
    """
    argv = [str(ROOT / script), *map(str, options)]
    env = {**os.environ, "PYTHONUTF8": "1", **(env or {})}
    if launcher or os.path.exists("/dev/nvidiactl"):
        plain = [sys.executable, "-c", NOT_FORKING.format(before)] if before else [sys.executable]
        result = run_new([*map(str, launcher or plain), *argv], cwd, env, stdin, meanwhile)
    else:
        result = run_forked(argv, cwd, env, stdin, before, meanwhile)
    assert not check or result.returncode == 0, f"{script} {options}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result


def training_options(base_dir):
    """50 steps with warm-up over an epoch boundary: 205 examples are 35 steps of 6."""
    return [
        "--data_name=mine",
        f"--model_dir={base_dir}",
        "--precision=fp32",
        "--lora_dropout=0.1",
        "--deepspeed_optimizer_params_lr=1e-3",
        "--max_steps=50",
        "--warmup_ratio=0.1",
        "--train_batch_size=6",
        "--log_steps=1",
        "--eval_steps=25",
        "--save_steps=20",
    ]


def assert_same_rows(rows, expected):
    """Rows of train_log.jsonl: bit for bit on a CPU. A GPU's kernels are tuned in each process, and round differently."""
    import torch

    if not torch.cuda.is_available():
        assert rows == expected
        return
    for row, other in zip(rows, expected, strict=True):
        memory = {key: value for key, value in row.items() if key == "peak_gib"}  # also of what was captured before
        assert row == pytest.approx({**other, **memory}, rel=2e-5)


def assert_same_adapter(run, expected):
    """The adapters of two runs, in the same way."""
    import torch
    from safetensors.torch import load_file

    ours, theirs = (load_file(path / "adapter_model" / "adapter_model.safetensors") for path in (run, expected))
    assert ours.keys() == theirs.keys()
    share = 1e-3 if torch.cuda.is_available() else 0
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= share * tensor.norm(), name


def read_log(run_dir):
    """train_log.jsonl without the speed, which no two runs share."""
    lines = (Path(run_dir) / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "examples_per_second"} for line in lines]

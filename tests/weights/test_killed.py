"""A merge killed at any moment leaves nothing that loads and is wrong, and the next run starts clean.

A process that has imported the script forks a merge for each line it is given, and kills it with SIGKILL: after some
time, or at the n-th file that the merge creates, renames or deletes.
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.slow

HUB = Path(__file__).resolve().parent.parent.parent / "model_hub"
sys.path.insert(0, str(HUB))
from alpaca.common.errors import UserError
from alpaca.models.base_files import read_base
from alpaca.weights.llama_files import read_meta
from alpaca.weights.llama_layout import from_meta
from alpaca.weights.output_folder import clear

FORKING = f"""
import json, os, signal, sys, time
sys.path.insert(0, {str(HUB)!r})
import merge_llama_with_chinese_lora as merge
from alpaca.weights import safetensors_writer
from config_utils import run_script
from transformers import LlamaForCausalLM  # else each merge imports it, which takes ten times as long as the rest of it
safetensors_writer.FILE_BYTES = 400_000

def die_at(count, folder):
    def hook(event, arguments):
        nonlocal count
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open") and str(arguments[0]).startswith(folder):
            count -= 1
            if count < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

for line in sys.stdin:
    order = json.loads(line)
    started = time.monotonic()
    pid = os.fork()
    if not pid:
        if order["event"] is not None:
            die_at(order["event"], order["output"])
        with open(os.devnull, "w") as sink:
            os.dup2(sink.fileno(), 2)
            os.dup2(sink.fileno(), 1)
        try:
            run_script(merge.main, merge.CONFIG, merge.__file__, order["argv"])
        finally:
            os._exit(0)
    if order["seconds"] is not None:
        time.sleep(order["seconds"])
        os.kill(pid, signal.SIGKILL)
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    print(json.dumps([killed, time.monotonic() - started]), flush=True)
"""


@pytest.fixture(scope="module")
def forking():
    command = [sys.executable, "-c", FORKING]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def merge(folder, kind, adapter="ner", seconds=None, event=None):
            """Merge into folder/out; (whether it was killed, seconds it took)."""
            argv = [f"--base_model={folder.parent / 'base'}", f"--lora_model={folder.parent / adapter}"]
            argv += [f"--output_dir={folder / 'out'}", f"--output_type={kind}", "--pth_files=-1"]
            order = {"argv": argv, "output": str(folder / "out"), "seconds": seconds, "event": event}
            print(json.dumps(order), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield merge
        process.stdin.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer_models):
    """base/ of 2 MB, and two adapters for it, ner/ and older/."""
    folder = tmp_path_factory.mktemp("killed")
    shape = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=420, **shape)).half().save_pretrained(folder / "base")
    shutil.copyfile(tokenizer_models / "base.model", folder / "base" / "tokenizer.model")
    for adapter in ("ner", "older"):
        tensors = {}
        for name, tensor in read_base(folder / "base")[1].items():
            if "_proj" in name:
                module = f"base_model.model.{name.removesuffix('.weight')}"
                tensors[f"{module}.lora_A.weight"] = torch.randn(4, tensor.shape[1])
                tensors[f"{module}.lora_B.weight"] = torch.randn(tensor.shape[0], 4)
        (folder / adapter).mkdir()
        torch.save(tensors, folder / adapter / "adapter_model.bin")
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
        (folder / adapter / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def weights_of(folder, kind):
    """Its weights, or None for what does not load; plain transformers must be of the same opinion."""
    try:
        if kind == "pth":
            config, parts, _ = read_meta(folder)
            return {name: from_meta(name, part, config) for name, part in parts.items()}
        weights = read_base(folder)[1]
    except UserError:
        weights = None
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError):
        assert weights is None
        return None
    assert weights is not None and not any(info.values())
    assert same(model.state_dict(), weights)
    return weights


def same(one, other):
    return one is not None and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(inputs, forking):
    """What whole merges write, by (kind, adapter), and the seconds that one takes."""
    weights, seconds = {}, []
    for kind in ("huggingface", "pth"):
        for adapter in ("ner", "older"):
            folder = inputs / f"{kind}-{adapter}"
            folder.mkdir()
            killed, taken = forking(folder, kind, adapter)
            assert not killed
            seconds.append(taken)
            weights[kind, adapter] = weights_of(folder / "out", kind)
    return weights, sorted(seconds)[2]


def check(folder, kind, replaced, finished):
    """Nothing in `folder` loads but whole models; out/ is the new one, the older one where there was one, or neither."""
    ner, older = finished[kind, "ner"], finished[kind, "older"]
    for path in folder.iterdir():
        weights = weights_of(path, kind)
        assert weights is None or same(weights, ner) or (replaced and path.name == "out" and same(weights, older))


def start(inputs, name, kind, replaced):
    """A folder for one run, in which out/ is that of an earlier merge or does not exist."""
    folder = inputs / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if replaced:
        shutil.copytree(inputs / f"{kind}-older" / "out", folder / "out")
    return folder


CASES = [(kind, replaced) for kind in ("huggingface", "pth") for replaced in (False, True)]


@pytest.mark.parametrize("moment", range(10))
def test_at_random_moments(inputs, forking, finished, moment):
    weights, seconds = finished
    kind, replaced = CASES[moment % 4]
    folder = start(inputs, "random", kind, replaced)
    forking(folder, kind, seconds=random.uniform(0, 1.1 * seconds))
    check(folder, kind, replaced, weights)
    assert not forking(folder, kind)[0]
    assert [path.name for path in folder.iterdir()] == ["out"]
    assert same(weights_of(folder / "out", kind), weights[kind, "ner"])


@pytest.mark.parametrize(("kind", "replaced"), CASES)
def test_at_every_file(inputs, forking, finished, kind, replaced):
    weights, _ = finished
    for event in range(100):
        folder = start(inputs, "event", kind, replaced)
        killed, _ = forking(folder, kind, event=event)
        check(folder, kind, replaced, weights)
        clear(folder / "out.tmp")  # with which the next run begins: it takes nothing there for somebody's own
        if not killed:
            break
    assert 5 < event < 99
    assert same(weights_of(folder / "out", kind), weights[kind, "ner"])
    forking(start(inputs, "event", kind, replaced), kind, event=event - 2)  # and after a kill near the end
    assert not forking(folder, kind)[0]
    assert [path.name for path in folder.iterdir()] == ["out"]

"""Answers on CUDA: the captured steps, the plain one, and transformers' own.     python -m pytest tests/answering/test_cuda_answers.py"""

import json
import random
import shutil
import weakref
from collections import deque
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from alpaca.answering import engine
from alpaca.answering.engine import Engine
from alpaca.answering.graphs import CapturedStepper
from alpaca.answering.row import Row
from alpaca.answering.standby import Standby
from alpaca.answering.step import Part, Stepper
from alpaca.training.lora import flatten_lora, for_answers
from harness import make_records, run_script, write_jsonl

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SHAPE = {
    "vocab_size": 500,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "grouped": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"num_key_value_heads": 2, "head_dim": 64}),
}


class Tokenizer:
    token_bytes, ends, controls = [b"x"] * 500, {2}, {"<s>": 1, "</s>": 2}


def model_of(kind, dtype):
    torch.manual_seed(0)
    model, config, more = KINDS[kind]
    return model(config(**SHAPE, **more)).to("cuda", dtype).eval()


def make_prompts(count=40):
    draw = random.Random(0)
    shared = [1, *(draw.randrange(3, 500) for _ in range(50))]
    # the borders of what is read at a time, and of what one slot holds
    lengths = [1, 2, 127, 128, 129, 255, 256, 257, 300, *(draw.randrange(1, 60) for _ in range(count - 9))]
    return [shared + [draw.randrange(3, 500) for _ in range(length)] for length in lengths]


def engine_of(model, prompts, monkeypatch, capture, at_once=32):
    monkeypatch.setattr(engine, "CAPTURE_STEPS", 0 if capture else 10**9)
    monkeypatch.setattr(engine, "COMPILE_ROWS", 1)
    rows = [Row(i, prompt, len(prompt) + 40, Tokenizer) for i, prompt in enumerate(prompts)]
    made = Engine(model, Tokenizer, rows, at_once)
    assert isinstance(made.step, CapturedStepper) == capture
    return made, rows


@torch.inference_mode()
def logits_of(made, rows, order, most=128, beside=2):
    """The logits behind each prompt, read `most` tokens at a time, `beside` rows in a step."""
    found, todo = {}, [rows[i] for i in order]
    for row in todo:
        assert made.slots.give(row, row.own(len(row.ids)))
        row.read = len(row.prefix.tokens)
    while todo:
        parts = [Part(row, min(most, len(row.ids) - row.read)) for row in todo[:beside]]
        parts.sort(key=lambda part: (part.row.prefix.number, part.row.first))
        logits, complete = made.step(parts).clone(), 0
        for row, count in parts:
            row.read += count
            if row.read == len(row.ids):
                found[row.number] = logits[complete]
                complete += 1
                todo.remove(row)
    for i in order:
        made.slots.release(rows[i])
    return torch.stack([found[i] for i in sorted(order)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capture", [False, True])
def test_a_step_is_the_models_forward(monkeypatch, kind, capture):
    model, prompts = model_of(kind, torch.bfloat16), make_prompts()
    made, rows = engine_of(model, prompts, monkeypatch, capture)
    some = range(20)
    exact = model_of(kind, torch.float32)
    with torch.inference_mode():
        right = torch.stack([exact(torch.tensor([prompts[i]], device="cuda")).logits[0, -1] for i in some])
        theirs = torch.stack([model(torch.tensor([prompts[i]], device="cuda")).logits[0, -1].float() for i in some])
    error = lambda logits: (logits - right).norm() / right.norm()  # noqa: E731
    assert error(logits_of(made, rows, some)) < 1.5 * error(theirs) < 0.1
    assert error(logits_of(made, rows, some, most=23, beside=5)) < 1.5 * error(theirs)


def test_borders_of_captured_sizes(monkeypatch):
    """Steps with one token less than a captured size, as many, and one more."""
    prompts = make_prompts()
    made, rows = engine_of(model_of("grouped", torch.bfloat16), prompts, monkeypatch, capture=True)
    sizes, used = made.step.sizes, []
    plain, around = Stepper(made.model, made.slots), CapturedStepper.size_around
    monkeypatch.setattr(CapturedStepper, "size_around", lambda *args: used.append(around(*args)) or used[-1])
    long = [row for row in rows if row.own(len(row.ids)) >= 126]
    totals = (size + more for size in sizes for more in (-1, 0, 1))
    for total in (1, *(total for total in totals if total <= sizes[-1])):
        parts = []
        for row in long:
            count = min(total - sum(part.count for part in parts), 126)
            if count:
                assert made.slots.give(row, row.own(len(row.ids)))
                row.read = len(row.ids) - count  # what stands before it is what an earlier turn left there
                parts.append(Part(row, count))
        with torch.inference_mode():
            ours, theirs = made.step(parts).clone(), plain(parts)
        assert used[-1][1] == next(size for size in sizes if size >= total)
        assert (ours - theirs).norm() < 0.05 * theirs.norm()
        for row in long:
            made.slots.release(row)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_size_compiles_one_layer_once_for_each_adapter(monkeypatch, kind):
    """No graph break; nothing is compiled or captured after that, in other calls neither. What is captured for an adapter
    is of that adapter."""
    monkeypatch.setattr(engine, "CAPTURE_STEPS", 0)
    monkeypatch.setattr(engine, "COMPILE_ROWS", 1)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
    model = PeftModel(model_of(kind, torch.bfloat16), LoraConfig(**options), "one", autocast_adapter_dtype=False)
    model.add_adapter("two", LoraConfig(**options), autocast_adapter_dtype=False)
    model, standby, prompts, firsts = model.to("cuda", torch.bfloat16).eval(), Standby(32), make_prompts(), {}
    for count, name in enumerate(("one", "two", "none", "two", "none", "one")):
        if name != "none":
            model.set_adapter(name)
        with model.disable_adapter() if name == "none" else nullcontext():
            rows = [Row(i, prompt, len(prompt) + 9, Tokenizer) for i, prompt in enumerate(prompts)]
            made = Engine(model, Tokenizer, rows, 32, standby=standby)
            waiting, ended = deque(rows), []
            while len(ended) < len(rows):
                ended += made.advance(waiting)
            ids = torch.tensor([prompts[0]], device="cuda")
            with torch.inference_mode():
                right = model(ids).logits[0, -1]
        assert isinstance(made.step, CapturedStepper)
        made.close()
        firsts.setdefault(name, []).append([[*row.ids[len(row.prompt) :], 2][0] for row in rows])
        assert right[firsts[name][0][0]] > right.max() - 0.1 * right.std()
        assert counters["stats"]["unique_graphs"] == min(count + 1, 3) * len(made.step.sizes)
    assert not counters["graph_break"]
    assert all(first == again for first, again in firsts.values()) and len({str(f) for f in firsts.values()}) == 3


def test_a_model_in_training_answers_in_captured_steps(monkeypatch):
    """Its LoRA is one parameter, which DeepSpeed has moved; afterwards its memory is free and it trains on."""
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
    model = PeftModel(model_of("llama", torch.bfloat16), LoraConfig(**options), autocast_adapter_dtype=False)
    flatten_lora(model.to("cuda").train())
    model.lora.data = model.lora.data.clone()
    prompts = make_prompts()
    with for_answers(model):
        made, rows = engine_of(model, prompts, monkeypatch, capture=True)
        ours = logits_of(made, rows, range(9, 20))
        with torch.inference_mode():
            theirs = [model(torch.tensor([prompts[i]], device="cuda")).logits[0, -1].float() for i in range(9, 20)]
        left = [weakref.ref(made.step), weakref.ref(made.slots)]
        del made
    theirs = torch.stack(theirs)
    assert (ours - theirs).norm() < 0.05 * theirs.norm()
    assert model.training and [thing() for thing in left] == [None, None]


def test_neighbours_slots_and_order_change_no_bit(monkeypatch):
    made, rows = engine_of(model_of("llama", torch.bfloat16), make_prompts(), monkeypatch, capture=True)
    monkeypatch.setattr(CapturedStepper, "size_around", lambda self, total: (0, self.sizes[-1]))  # one captured size
    first = logits_of(made, rows, range(9, 24), beside=2)
    assert torch.equal(logits_of(made, rows, range(23, 8, -1), beside=2), first)
    assert torch.equal(logits_of(made, rows, range(9, 24), beside=5), first)


@pytest.mark.parametrize("capture", [False, True])
def test_float32_and_a_failing_capture_use_the_plain_step(monkeypatch, capsys, capture):
    def fails(*args):
        raise RuntimeError("no graphs here")

    prompts = make_prompts(12)
    monkeypatch.setattr(engine, "CAPTURE_STEPS", 0)
    monkeypatch.setattr(engine, "CapturedStepper", fails)
    model = model_of("grouped", torch.bfloat16 if capture else torch.float32)
    rows = [Row(i, prompt, len(prompt) + 20, Tokenizer) for i, prompt in enumerate(prompts)]
    made = Engine(model, Tokenizer, rows, 5)
    assert type(made.step) is Stepper and made.slots.by_heads != capture
    assert ("no graphs here" in capsys.readouterr().err) == capture
    waiting, ended = deque(rows), []
    while len(ended) < len(rows):
        ended += made.advance(waiting)
    if not capture:
        for row in rows:
            ids = torch.tensor([row.prompt], device="cuda")
            theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
            assert [token for token in theirs[0].tolist() if token != 2] == row.ids


def test_answers_hardly_depend_on_the_captured_size(monkeypatch):
    """In float32 alone they would not; here the products of another size round differently."""
    prompts, answers = make_prompts(), []
    model = model_of("llama", torch.bfloat16)
    for at_once, capture in ((32, True), (5, True), (32, False)):
        made, rows = engine_of(model, prompts, monkeypatch, capture, at_once)
        waiting, ended = deque(rows), []
        while len(ended) < len(rows):
            ended += made.advance(waiting)
        answers.append([row.ids[len(row.prompt)] for row in rows])
    for other in answers[1:]:
        same = sum(a == b for a, b in zip(answers[0], other, strict=True))
        assert same >= 0.9 * len(prompts)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "base_weights, precision", [("full", "fp32"), ("full", "bf16"), ("nf4", "bf16"), ("fp8", "bf16")]
)
def test_a_base_on_two_gpus_answers_as_on_one(base_dir, tmp_path, base_weights, precision):
    """predict.py --devices=auto, told that no GPU may hold the whole base."""
    if base_weights == "nf4":
        pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig.from_pretrained(base_dir, **sizes, head_dim=32))
    base.save_pretrained(tmp_path / "base")
    shutil.copy(base_dir / "tokenizer.model", tmp_path / "base")
    layers, others = sum(w.numel() for w in base.model.layers.parameters()), 2 * base.lm_head.weight.numel()
    held = {"full": 4 if precision == "fp32" else 2, "fp8": 1, "nf4": 0.5}[base_weights]
    most = int(0.7 * (layers * held + others * (4 if precision == "fp32" else 2)))
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": record["text"]} for record in make_records(30, 3)])
    options = ["--lora_model=none", f"--base_model={tmp_path}/base", f"--input_path={texts}", "--constrained=True"]
    options += [f"--precision={precision}", f"--base_weights={base_weights}", "--max_new_tokens=12", "--batch_size=8"]
    before, rows = f"from alpaca.models import spread; spread.memory_for_weights = lambda: {{0: {most}, 1: {most}}}", {}
    for devices in ("1", "auto"):
        output = tmp_path / f"{devices}.jsonl"
        more = [f"--devices={devices}", f"--output_path={output}"]
        said = run_script("predict.py", *options, *more, cwd=tmp_path, before=before).stderr
        rows[devices] = [json.loads(line)["prediction"] for line in output.read_text(encoding="utf-8").splitlines()]
        assert ("层在 GPU 1，逐层" in said) == (devices == "auto"), said
    same = [one == two for one, two in zip(rows["1"], rows["auto"], strict=True)]
    assert all(same) if precision == "fp32" else sum(same) >= 0.8 * len(same)

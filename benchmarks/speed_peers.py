"""The other ways to train that train_speed.py compares with, each in a process of its own."""

import json
import random
import time

import torch

from alpaca.common.devices import DTYPES, init_distributed, pick_precision
from alpaca.models.base_weights import load_base
from alpaca.models.templates import encode_examples
from alpaca.models.tokenizer import load_tokenizer
from alpaca.training.prefix_tree import pad_batch
from dataset import read_examples

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run_peer(how, batch, model_dir, work, seconds):
    """Train for some seconds the way `how` says; prints [examples/s, peak GiB or null]."""
    from peft import LoraConfig, get_peft_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = pick_precision("auto", device)
    if how == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    examples = encode_examples(load_tokenizer(model_dir), read_examples(work / "train.txt"))
    random.Random(0).shuffle(examples)
    if how == "sorted":
        examples.sort(key=lambda e: len(e.prompt_ids) + len(e.answer_ids))
    batches = [examples[i : i + batch] for i in range(0, len(examples) - batch + 1, batch)]
    random.Random(1).shuffle(batches)

    original = how == "original"
    half = DTYPES["fp16" if original and device.type == "cuda" else precision]
    model = load_base(model_dir, half, device)
    dropout = 0.0 if how in ("liger", "sorted") else 0.1
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, lora_dropout=dropout, target_modules=TARGETS))
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    if original and device.type == "cuda":
        import deepspeed

        init_distributed()
        offload = {"stage": 1, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
        settings = {"type": "Adam", "params": {"lr": 1e-5, "betas": [0.9, 0.95], "weight_decay": 5e-4}}
        config = {"train_micro_batch_size_per_gpu": batch, "optimizer": settings, "zero_optimization": offload}
        engine, *_ = deepspeed.initialize(
            model=model.half(), model_parameters=trainable, config=config | {"fp16": {"enabled": True}}
        )
    else:
        optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=device.type == "cuda")

    def step(chunk):
        rows = pad_batch(chunk, 0)
        if original:  # every example padded to 192, whatever its length
            pad = max(0, 192 - rows["input_ids"].shape[1])
            fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
            rows = {k: torch.nn.functional.pad(v, (0, pad), value=fill[k])[:, :192] for k, v in rows.items()}
        rows = {key: value.to(device) for key, value in rows.items()}
        if original and device.type == "cuda":
            engine.backward(engine(**rows, use_cache=False).loss)
            engine.step()
            return
        with torch.autocast(device.type, half, enabled=half != torch.float32 and not original):
            loss = model(**rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    for chunk in batches[:4]:
        step(chunk)
    wait()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or count < 6:
        step(batches[(4 + count) % len(batches)])
        count += 1
        wait()
    rate = count * batch / (time.perf_counter() - start)
    print(json.dumps([rate, torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None]))

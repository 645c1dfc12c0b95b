"""Make the embedded model from nothing: vocabularies, a tiny LLaMA and two LoRA adapters on top of it.

    python embedded_model/train_tiny.py                                        # about 13 minutes on one 80 GB GPU
    python embedded_model/train_tiny.py --seconds 60 --rows 4 --workers 1 --output_dir /tmp/tiny  # a rehearsal on a CPU

Writes three folders in the shapes in which the real weights are published:
  tiny/                             consolidated.00.pth, params.json, tokenizer.model, as Meta ships LLaMA
  chinese-llama-plus-lora-tiny/     adapter_model.bin, adapter_config.json, tokenizer.model, as PEFT's adapters
  chinese-alpaca-plus-lora-tiny/    the same

Three stages:
  base    All parameters, on text and on tasks, most of them in a short frame. It has the vocabulary of `llama`, whose
          first ids are those of `base`; `tiny` is this network without the other rows of embedding and head.
  llama   LoRA, embed_tokens and lm_head on top of it: plain text for the most part, cleaner than before.
  alpaca  LoRA, embed_tokens (one row more) and lm_head on top of both: tasks in the project's prompt.
The data of a step depend on the seed alone; how many steps there are depends on the machine.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from alpaca.common.start import start

start()

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from sentencepiece import SentencePieceProcessor
from torch.utils.data import DataLoader, Dataset

from alpaca.common.console import say
from alpaca.common.devices import pick_precision
from alpaca.common.errors import UserError
from config_utils import run_script
from embedded_model import dictionary
from embedded_model.documents import NO_LOSS, make_batch
from embedded_model.figures import IGNORE, report
from embedded_model.optimizers import BaseOptimizer, adapter_optimizer
from embedded_model.published_files import (
    FOLDERS,
    LORA,
    load_adapter,
    load_base,
    new_model,
    with_adapter,
    with_rows,
    write_adapter,
    write_base,
)
from embedded_model.vocabulary import build_vocabularies

CONFIG = {
    "seconds": 600.0,  # training time of all stages together, without compilation
    "first_stage": "base",  # base, or alpaca: train this stage again, on top of the other two in output_dir
    "output_dir": None,  # where the three folders go; None: model_hub
    "seed": 1,  # of the first weights and of all text
    "workers": 14,  # processes that make text while the model trains
    "rows": 256,  # rows of 512 tokens in a batch
    "log_steps": 200,  # steps between two lines of the log
    "report_examples": 100,  # held-out examples of each task in the report at the end
}
SHARE_OF_TIME = {"base": 0.61, "llama": 0.09, "alpaca": 0.30}  # of --seconds, as fractions
HOLD = {
    "base": 0.3,
    "llama": 0.0,
    "alpaca": 0.0,
}  # the fraction of a stage at the full learning rate, which then falls to 0
WARM_UP = 100  # steps
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FIRST_TIMED = 5 if DEVICE == "cuda" else 1  # the step from which the time counts: torch.compile has done its work then


class Batches(Dataset):
    """Batch i of a stage, made from (seed, stage, i) alone: any number of workers gives the same data."""

    def __init__(self, stage, seed, rows, vocabularies):
        self.stage, self.seed, self.rows = stage, seed, rows
        self.base, self.full = (SentencePieceProcessor(model_proto=vocabularies[name]) for name in ("base", "llama"))

    def __getitem__(self, index):
        seed = f"{self.seed}-{self.stage}-{index}"
        return torch.from_numpy(make_batch(self.stage, seed, self.rows, self.base, self.full))


def batches(stage, args, vocabularies):
    """The batches of a stage, without end: int16 [args.rows, documents.ROW_LENGTH]."""
    return DataLoader(
        Batches(stage, args.seed, args.rows, vocabularies),
        batch_size=None,
        sampler=range(10**9),  # more than any run reads
        num_workers=args.workers,
        multiprocessing_context="fork",
        prefetch_factor=8,
        pin_memory=DEVICE == "cuda",
    )


def train(stage, llama, model, optimizer, args, vocabularies):
    """Train one stage for its share of the time. Returns (tokens, seconds).

    llama: the LlamaForCausalLM in `model`, which is that or a PeftModel.
    """

    def loss_of(rows):
        rows = rows.int()
        ids = rows & (NO_LOSS - 1)
        targets = torch.where(rows < NO_LOSS, ids, IGNORE)[:, 1:].long()
        hidden = llama.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        return F.cross_entropy(llama.lm_head(hidden).float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

    compiled_loss = torch.compile(loss_of) if DEVICE == "cuda" else loss_of
    bf16 = pick_precision("auto", DEVICE) != "fp32"  # a CPU without bf16 takes eight times as long with it
    seconds = args.seconds * SHARE_OF_TIME[stage]
    model.train()
    began, tokens = time.time(), 0
    for step, rows in enumerate(batches(stage, args, vocabularies), start=1):
        if step == FIRST_TIMED:
            say(f"{stage}: step {step} begins after {time.time() - began:.0f} s")
            began = time.time()
        done = (time.time() - began) / seconds if step >= FIRST_TIMED else 0.0
        if done >= 1:
            break
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            loss = compiled_loss(rows.to(DEVICE, non_blocking=True))
        loss.backward()
        optimizer.step(min(1.0, step / WARM_UP) * min(1.0, (1 - done) / (1 - HOLD[stage])))
        model.zero_grad(set_to_none=True)
        tokens += rows.numel()
        if step % args.log_steps == 0:
            elapsed = time.time() - began
            say(f"{stage}: step {step} | loss {loss.item():.4f} | {elapsed:.0f} s | {tokens / 1e6:.1f} M tokens")
    seconds = time.time() - began
    say(f"{stage}: end | {step - 1} steps | {tokens / 1e6:.1f} M tokens | {seconds:.0f} s")
    return tokens, seconds


def train_base(args, vocabularies, rows, folder):
    """Train the first stage and write its folder. Returns (the model in the larger vocabulary, (tokens, seconds)).

    rows: {stage: rows of embedding and head}.
    """
    model = new_model(rows["llama"]).to(DEVICE)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters in the merged vocabulary")
    cost = train("base", model, model, BaseOptimizer(model), args, vocabularies)
    write_base(with_rows(model, rows["base"]), folder, vocabularies["base"])
    return model, cost


def train_adapter(stage, model, args, vocabularies, rows, folder):
    """Train LoRA on a copy of `model` and write its folder. Returns (the two merged, (tokens, seconds))."""
    model = with_rows(model, rows[stage])
    torch.manual_seed(args.seed)  # a stage starts alike whether the stages before it ran in this process or not
    peft_model = get_peft_model(with_rows(model, rows[stage]).to(DEVICE), LoraConfig(**LORA))
    llama = peft_model.base_model.model
    cost = train(stage, llama, peft_model, adapter_optimizer(peft_model), args, vocabularies)
    tensors = {name: value.half().cpu().clone() for name, value in get_peft_model_state_dict(peft_model).items()}
    write_adapter(tensors, folder, vocabularies[stage])
    return with_adapter(model, load_adapter(folder)), cost


def main(args):
    if args.first_stage not in ("base", "alpaca"):
        raise UserError(f"--first_stage={args.first_stage}: expected base or alpaca")
    for name in ("seconds", "workers", "rows", "log_steps", "report_examples"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name}={getattr(args, name)}: expected a number above 0")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    output_dir = Path(args.output_dir or ROOT / "model_hub")
    folders = {stage: output_dir / name for stage, name in FOLDERS.items()}
    dictionary.prepare()
    vocabularies = build_vocabularies(args.seed)
    rows = {stage: SentencePieceProcessor(model_proto=v).get_piece_size() for stage, v in vocabularies.items()}
    say(f"pieces of the vocabularies: {rows}")

    costs = []
    if args.first_stage == "base":
        model, cost = train_base(args, vocabularies, rows, folders["base"])
        costs.append(cost)
    else:  # the adapter brings every row of embedding and head, also those that the file of the base lacks
        model = with_adapter(load_base(folders["base"]), load_adapter(folders["llama"]))
    for stage in ("llama", "alpaca") if args.first_stage == "base" else ("alpaca",):
        model, cost = train_adapter(stage, model, args, vocabularies, rows, folders[stage])
        costs.append(cost)

    tokens, seconds = (sum(values) for values in zip(*costs, strict=True))
    files = [path for folder in folders.values() for path in folder.iterdir()]
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"trained {tokens / 1e6:.0f} M tokens in {seconds:.0f} s on {device}, seed {args.seed}")
    print(f"{sum(path.stat().st_size for path in files):,} bytes in {len(files)} files under {output_dir}")
    report(output_dir, DEVICE, args.seed, args.report_examples)


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)

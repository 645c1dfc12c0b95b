"""Three training steps of models too large for a card in 16 bits: what they take on a quantized base.

    python benchmarks/big_shapes.py --shape=13b,33b,65b --corpus=msra_train.txt --tokenizer=tokenizer.model
    python benchmarks/big_shapes.py                                # CPU: the tiny shape

The weights are random, made and quantized on the device one matrix after another, so neither disk nor host needs room for
them. The steps are those of the trainers, with gradient checkpointing, neither compiled nor captured. Prints one line a shape.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from alpaca.common.start import start

start()

import torch

from alpaca.common.devices import DTYPES, pick_precision
from alpaca.common.errors import UserError
from alpaca.models.base_weights import check_base_weights
from alpaca.models.templates import encode_examples
from alpaca.models.tokenizer import load_tokenizer, save_tokenizer
from alpaca.training.batches import TrainLoader
from alpaca.training.lora import add_lora
from alpaca.training.loss import answer_loss
from alpaca.training.prefix_tree import make_collate
from benchmarks.speed_inputs import SHAPES, random_model, read_corpus
from benchmarks.speed_peers import TARGETS
from config_utils import run_script

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "shape": ["tiny"],  # tiny | 7b | 13b | 33b | 65b, joined by commas
    "base_weights": "nf4",  # nf4 | fp8
    "batch": 12,  # examples a step
    "steps": 3,  # how many
    "corpus": None,  # sentences in the JSON-lines schema of process.py; None: the demo's
    "tokenizer": None,  # a tokenizer.model; None: the tiny model's
    "work_dir": "benchmarks/work",  # folder for the tokenizer; git-ignored
}
SETTINGS = SimpleNamespace(  # what add_lora reads of a trainer's args: their defaults
    gradient_checkpointing=True,
    deepspeed={},
    seed=42,
    lora_r=8,
    lora_alpha=32,
    lora_dropout=0.0,
    lora_target_modules=TARGETS,
)


def main(args):
    if unknown := [shape for shape in args.shape if shape not in SHAPES]:
        raise UserError(f"--shape={','.join(unknown)}: expected {', '.join(SHAPES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = pick_precision("auto", device)
    check_base_weights(args.base_weights, device, precision)
    folder = ROOT / "model_hub" / "chinese-alpaca-tiny"
    if args.tokenizer:
        save_tokenizer(args.tokenizer, folder := Path(args.work_dir) / "tokenizer")
    tokenizer = load_tokenizer(folder)
    corpus = args.corpus or ROOT / "data" / "demo" / "ori_data" / "train.txt"
    examples = encode_examples(tokenizer, [example for _, example in read_corpus(corpus)])
    loader = TrainLoader(examples, args.batch, 1, make_collate("prefix", tokenizer.pad_token_id), 42)
    batches = [batch for batch, _ in zip(loader, range(args.steps), strict=False)]
    for shape in args.shape:
        print(measure(shape, tokenizer.vocab_size, batches, args, DTYPES[precision], device), flush=True)


def measure(shape, vocab_size, batches, args, dtype, device):
    """One line of what loading and the steps took."""
    began = time.perf_counter()
    model = add_lora(random_model(shape, vocab_size, dtype, device, args.base_weights), SETTINGS).to(dtype)
    loaded, losses = time.perf_counter() - began, []
    held = torch.cuda.memory_allocated() / 2**30 if device.type == "cuda" else 0
    optimizer = torch.optim.Adam([model.lora], lr=1e-4)
    began = time.perf_counter()
    for batch in batches:
        loss = answer_loss(model, **batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = (time.perf_counter() - began) / len(batches)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0
    if device.type == "cuda":
        del model, optimizer, loss
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    shown = ", ".join(f"{loss:.3f}" for loss in losses)
    return (
        f"{shape}, {args.base_weights}, batch {args.batch}: made in {loaded:.0f} s, {held:.1f} GiB; "
        f"{seconds:.1f} s a step, peak {peak:.1f} GiB; losses {shown}"
    )


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)

"""Do TRL's SFTTrainer and train_deepspeed.py compute the same thing? Their losses step by step, then their speeds.

    pip install trl==1.16.0
    python benchmarks/trl_parity.py                     # CPU, float32, the tiny model and the demo corpus

Both get the same token ids in the same order, the same LoRA under the same seed, the same optimizer and schedule. TRL
pads (completion-only loss); ours shares prefixes. Exit code 1 if a step's losses differ by more than 1e-4 of the loss.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from alpaca.common.start import start

start()

from alpaca.common.errors import UserError
from alpaca.models.base_weights import load_base
from alpaca.models.templates import encode_examples
from alpaca.models.tokenizer import load_tokenizer
from alpaca.training.batches import optimizer_steps
from alpaca.training.steps import make_scheduler
from config_utils import run_script
from dataset import read_examples

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "steps": 50,  # optimizer steps
    "batch": 12,  # examples a step
    "work_dir": "benchmarks/work/trl_parity",  # runs; git-ignored
}
MODEL_DIR = ROOT / "model_hub" / "chinese-alpaca-tiny"
TRAIN_PATH = ROOT / "data" / "demo" / "instruct_data" / "train.txt"


def run_ours(args, work):
    """(losses, examples/s after the first ten steps, the run's Config) of train_deepspeed.py."""
    command = [sys.executable, ROOT / "train_deepspeed.py", f"--model_dir={MODEL_DIR}", f"--save_dir={work / 'ours'}"]
    command += ["--precision=fp32", "--log_steps=1", "--eval_steps=-1", f"--max_steps={args.steps}"]
    # At the tiny model's own learning rate, 3e-3, the rounding of the first steps grows with every step.
    command += [f"--train_batch_size={args.batch}", "--deepspeed_optimizer_params_lr=1e-4"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
    if result.returncode:
        raise UserError(f"train_deepspeed.py failed: {(result.stdout + result.stderr)[-1500:]}")
    log = [json.loads(line) for line in (work / "ours" / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    settings = json.loads((work / "ours" / "adapter_model" / "train_args.json").read_text(encoding="utf-8"))
    speed = statistics.median(row["examples_per_second"] for row in log[10:])
    return [row["loss"] for row in log], speed, settings


def run_trl(args, work, settings):
    """(losses, examples/s after the first ten steps) of SFTTrainer with the settings of our run."""
    try:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise UserError(f"{error}; pip install trl==1.16.0") from None
    from peft import LoraConfig, get_peft_model
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    config, lora, adam = settings["config"], settings["config"]["lora"], settings["deepspeed"]["optimizer"]["params"]
    tokenizer = load_tokenizer(MODEL_DIR)
    examples = encode_examples(tokenizer, read_examples(TRAIN_PATH))
    epochs = -(-args.steps * args.batch // len(examples))
    sizes = [0] * len(examples)  # matter to several ranks alone
    steps = (s for epoch in range(epochs) for s in optimizer_steps(sizes, args.batch, 1, 1, config["seed"], epoch))
    order = [i for ((part,),) in steps for i in part]
    rows = [
        {
            "input_ids": examples[i].prompt_ids + examples[i].answer_ids,
            "completion_mask": [0] * len(examples[i].prompt_ids) + [1] * len(examples[i].answer_ids),
        }
        for i in order[: args.steps * args.batch]
    ]
    model = load_base(MODEL_DIR, torch.float32, "cpu")
    torch.manual_seed(config["seed"])
    targets = list(lora["target_modules"])
    model = get_peft_model(
        model, LoraConfig(r=lora["r"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"], target_modules=targets)
    )
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=adam["lr"],
        betas=adam["betas"],
        eps=adam["eps"],
        weight_decay=adam["weight_decay"],
    )
    scheduler = make_scheduler(optimizer, SimpleNamespace(warmup_ratio=config["warmup_ratio"]), args.steps)
    losses, ends = [], []

    class Record(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

        def on_log(self, trainer_args, state, control, logs=None, **__):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(work / "trl"),
            per_device_train_batch_size=args.batch,
            max_steps=args.steps,
            max_grad_norm=settings["deepspeed"]["gradient_clipping"],
            completion_only_loss=True,
            max_length=None,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            seed=config["seed"],
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        optimizers=(optimizer, scheduler),
        callbacks=[Record()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return losses, args.batch / statistics.median(b - a for a, b in zip(ends[9:], ends[10:], strict=False))


def main(args):
    work = ROOT / args.work_dir
    shutil.rmtree(work, ignore_errors=True)
    if not TRAIN_PATH.exists() or not (MODEL_DIR / "config.json").exists():
        raise UserError(f"{MODEL_DIR} or {TRAIN_PATH} is missing; run `make tiny` first")
    if torch.cuda.is_available():
        raise UserError("this comparison is one of float32 on a CPU; hide the GPU with CUDA_VISIBLE_DEVICES=")
    ours, our_speed, settings = run_ours(args, work)
    theirs, their_speed = run_trl(args, work, settings)
    difference = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    for step in sorted({0, 1, 2, 4, 9, 19, args.steps - 1} & set(range(args.steps))):
        print(f"step {step + 1:>3}: ours {ours[step]:.6f}, TRL {theirs[step]:.6f}")
    print(f"largest relative difference of {args.steps} losses: {difference:.1e}")
    print(f"examples/s: ours {our_speed:.1f}, TRL {their_speed:.1f}, ratio {our_speed / their_speed:.2f}")
    sys.exit(difference > 1e-4)


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)

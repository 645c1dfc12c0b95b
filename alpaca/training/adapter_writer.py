"""What training writes for inference: adapter_model/ with its facts, the newest or the best."""

import math
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file

from alpaca.common.console import say
from alpaca.common.errors import UserError
from alpaca.training.checkpoints import from_main, saving, to_disk
from alpaca.training.lora import lora_weights
from config_utils import load_config, save_config
from dataset import labels_of, nests, query_prefix_of, without_rehearsal


def training_facts(args, records, tokenizer):
    """What inference must know about a run besides its CONFIG; stands in train_args.json beside the adapter."""
    packages = ("torch", "transformers", "peft", "deepspeed", "sentencepiece")
    records = without_rehearsal(records)
    labels = labels_of(records)
    if args.eval_examples > 0 and not labels:
        raise UserError(
            "--eval_examples: the training answers are no 实体_类型 lines, so there is no F1; give 0, choose the adapter "
            "with --best=loss and measure it with test.py --metric=exact"
        )
    return {
        "template": tokenizer.template.name,
        "prompt_sha256": tokenizer.template.sha256,
        "tokenizer_sha256": tokenizer.sha256,
        "instructs": list(dict.fromkeys(record["instruct"] for record in records)),
        "labels": labels,
        "nested": nests(records),
        "query_prefix": query_prefix_of(records),
        "text_tokens": usual_length(tokenizer, records),
        "versions": {name: version(name) for name in packages},
    }


def usual_length(tokenizer, records):
    """The tokens of the training texts at their 80th percentile; predict.py joins no sentences to longer windows."""
    lengths = sorted(map(len, tokenizer.encode_texts([record["text"] for record in records])))
    return lengths[(len(lengths) - 1) * 4 // 5]


def save_adapter(model, save_dir, args, deepspeed_config, facts, step):
    """Write <save_dir>/adapter_model/ whole or not at all: LoRA weights, adapter_config.json, train_args.json.

    All ranks call it (under ZeRO-3 they hold the weights together); rank 0 writes. UserError, on all of them, for weights
    that are no numbers and for what cannot be written.
    """
    import deepspeed

    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with deepspeed.zero.GatheredParameters(list(trainable.values())):
        weights = lora_weights(model, model.lora.detach()) if "lora" in trainable else trainable
        lora_b = [weight for name, weight in weights.items() if "lora_B" in name]
        assert lora_b and all(weight.numel() for weight in weights.values()), "the adapter is empty"
        if not all(weight.isfinite().all() for weight in weights.values()):  # all ranks see it, and all end
            raise UserError(f"step {step}: the LoRA holds NaN or infinite weights; the adapter saved before is kept")
        if not any(weight.any() for weight in lora_b):
            say(f"第 {step} 步: 还没有一步更新过权重，保存的 LoRA 不改变模型")
        facts = {"deepspeed": deepspeed_config, **facts, "step": step}
        from_main(lambda: _write(model, Path(save_dir) / "adapter_model", args, facts, weights))


def _write(model, target, args, facts, weights):
    weights = {name: weight.detach().clone() for name, weight in weights.items()}  # not views of one storage
    new, old = target.with_name("adapter_model.new"), target.with_name("adapter_model.old")
    try:
        with saving(target):
            shutil.rmtree(new, ignore_errors=True)
            model.save_pretrained(
                new, safe_serialization=args.safe_serialization, save_embedding_layers=False, state_dict=weights
            )
            (new / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
            save_config(args, new / "train_args.json", **facts)
    except UserError:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if not _same(_tensors(new), weights):
        raise UserError(f"{new}: what was read back is not what was written; the adapter saved before is kept")
    with saving(target):
        to_disk(new)
        if target.exists():  # a folder cannot be renamed over a full one
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        new.rename(target)
        to_disk(target.parent, contents=False)
    shutil.rmtree(old, ignore_errors=True)


def _tensors(adapter):
    path = adapter / "adapter_model.safetensors"
    return load_file(path) if path.is_file() else torch.load(adapter / "adapter_model.bin", weights_only=True)


def _same(written, weights):
    """Whether the tensors of an adapter's file are the weights in memory, bit for bit; PEFT leaves their "default." out."""
    weights = {name.replace(".default.", "."): weight.cpu() for name, weight in weights.items()}
    return written.keys() == weights.keys() and all(torch.equal(weights[name], written[name]) for name in weights)


def adapter_step(save_dir):
    """The step of the adapter in <save_dir>/adapter_model, or None if there is none."""
    path = Path(save_dir) / "adapter_model" / "train_args.json"
    return load_config(path)[1].get("step") if path.is_file() else None


def is_score(value):
    """Whether a score can be compared; NaN cannot: it is neither better nor worse than any."""
    return value is not None and math.isfinite(value)


class BestScore:
    """Which evaluated states are to become adapter_model/: those that score better than the one that is there.

    Also than one of a later step, of a course that was left to go on from an earlier checkpoint.
    """

    def __init__(self, save_dir, metric):
        self.key, self.sign, self.score = f"eval_{metric}", -1 if metric == "loss" else 1, None
        path = Path(save_dir) / "adapter_model" / "train_args.json"
        facts = load_config(path)[1] if path.is_file() else {}
        if is_score(facts.get(self.key)):
            self.score = facts[self.key]

    def improves(self, scores):
        """Whether {"eval_loss", …} of a state beats the best so far; never with --best=last."""
        score = scores.get(self.key)
        if not is_score(score) or self.score is not None and self.sign * score <= self.sign * self.score:
            return False
        self.score = score
        return True

"""The loss of rows of examples, in training and on the dev set."""

import torch
import torch.distributed as dist

from alpaca.common.console import progress, say
from alpaca.common.errors import UserError
from alpaca.training.tree_attention import plan_attention


def answer_loss(model, rows, step_tokens):
    """Summed cross-entropy of a micro-batch over the answer tokens of its whole optimizer step (a float32 scalar).

    rows: what packing's collate made of the examples. Micro-batches and ranks add up to the step's mean.
    """
    parameter, compiled = next(model.parameters()), getattr(model, "compiled_layers", None)

    def row_loss(row):
        inputs = model_inputs(row, parameter.device, compiled, parameter.dtype)
        return model(**inputs, num_items_in_batch=step_tokens).loss.float()

    try:
        return torch.stack([row_loss(row) for row in rows]).sum()
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if compiled is None or compiled.proven:
            raise
        say(f"编译失败，改为不编译: {type(error).__name__}: {str(error).splitlines()[0]}")
        compiled.lengths = []
        return torch.stack([row_loss(row) for row in rows]).sum()


def model_inputs(row, device, compiled=None, dtype=torch.float32):
    """A row on the device, as LlamaForCausalLM takes it. It must not keep a cache: with one, transformers ignores that
    the examples of a row are apart."""
    row = {key: value.to(device, non_blocking=True) for key, value in row.items()}
    if "enter" in row:
        enter, exit = row.pop("enter"), row.pop("exit")
        if not (compiled and compiled.load_mask(enter, exit)):
            row["tree"] = plan_attention(enter, exit, dtype)  # goes through the model to tree_attention.py
        row["attention_mask"] = torch.ones(1, 1, 1, 1, device=device)  # so that transformers makes none of its own
        row["labels"] = row["shift_labels"]  # without labels there is no loss
    return {**row, "use_cache": False}


@torch.no_grad()
def evaluate_loss(model, batches, device, count=None, stop=lambda: False):
    """Mean cross-entropy per answer token over all batches (lists of rows) of all ranks, or None where `stop` ended it.

    count: of batches, for a bar. stop: asked before each batch; the same on all ranks, which ZeRO-3 lets compute together.
    """
    training, stopped, total = model.training, False, torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    for rows in progress(batches, total=count, desc="验证", unit="批"):
        if stopped := stop():
            break
        total[0] += answer_loss(model, rows, 1).double()
        total[1] += sum((row.get("shift_labels", row.get("labels")) >= 0).sum().item() for row in rows)
    model.train(training)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return None if stopped else (total[0] / total[1]).item()

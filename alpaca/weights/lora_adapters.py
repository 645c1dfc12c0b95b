"""Adding LoRA adapters to a weight."""

import torch

ROWS_AT_ONCE = 128  # of a matrix: the float32 copies of so many rows stay in the processor's cache, 3 times as fast


def add_adapters(name, weight, adapters):
    """The base's tensor `name` with all adapters in it, in its own number format.

    Each product is computed and added in float32 and the sum rounded before the next adapter, as the published models
    were made (scripts/merge_llama_with_chinese_lora_low_mem.py of github.com/ymcui/Chinese-LLaMA-Alpaca).
    """
    loras, dtype = [], weight.dtype
    for adapter in adapters:
        if name in adapter.saved:
            weight, loras = adapter.saved[name].to(dtype), []
        if name in adapter.lora:
            a, b, scaling = adapter.lora[name]
            loras.append((a.float(), b.float(), scaling))
    if not loras:
        return weight
    merged = torch.empty_like(weight, memory_format=torch.contiguous_format)
    rows = torch.empty(min(ROWS_AT_ONCE, len(weight)), weight.shape[1])
    for i in range(0, len(weight), ROWS_AT_ONCE):
        source, target = weight[i : i + ROWS_AT_ONCE], merged[i : i + ROWS_AT_ONCE]
        for a, b, scaling in loras:
            total = rows[: len(target)].copy_(source)
            source = target.copy_(total.addmm_(b[i : i + ROWS_AT_ONCE], a, alpha=scaling))
    return merged

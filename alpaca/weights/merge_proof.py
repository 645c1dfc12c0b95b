"""Whether a merged model is base + adapters: its weights, tensor by tensor, and its answers to a few prompts."""

import gc

import torch
from transformers import AutoConfig

from alpaca.answering.generate import generate
from alpaca.answering.memory import free_memory
from alpaca.common.console import progress
from alpaca.common.errors import UserError
from alpaca.models.base import attach_adapter, merge_adapter
from alpaca.models.base_files import EMBEDDING, read_base
from alpaca.models.base_weights import load_base
from alpaca.models.facts import read_facts, template_of
from alpaca.models.layers import meta_model
from alpaca.models.templates import encode_prompts, message_of
from alpaca.models.tokenizer import load_tokenizer
from alpaca.weights.llama_files import read_meta
from alpaca.weights.llama_layout import from_meta
from dataset import INSTRUCT

QUERIES = ("文本：记者苏晓岚从昆明报道。", "文本：程立群在苏州大学教书。", "文本：天气渐渐凉了。")
NEW_TOKENS = 32
ROWS_AT_ONCE = 1024  # of a matrix, in float32


def prove(base_folder, base, adapters, merged_folder, output_type):
    """Compare what was written with base + adapters in float32, and print the result.

    base: {name: tensor}. UserError where a number is off by more than its rounding can explain. The answers of both are
    printed, in float32 too, where the memory holds the model so; they may differ where two tokens are equally likely.
    """
    config, merged = _read_merged(merged_folder, output_type)
    worst = 0.0
    for name, weight in progress(base.items(), desc="验证", unit="个张量"):
        share = _share_of_rounding(name, merged[name], weight, adapters)
        if not share <= 1:
            raise UserError(
                f"--verify: {name} of the merged model is off by {share:.1f} times what rounding can explain; please "
                "report it"
            )
        worst = max(worst, share)
    print(f"验证：{len(base)} 个张量与 float32 的基座+LoRA 相符，最大误差是舍入误差上限的 {worst:.0%}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, free = 4 * sum(tensor.numel() for tensor in merged.values()), free_memory(device)
    if 1.1 * size > free:
        print(f"验证：float32 的模型要 {size / 1e9:.1f} GB，只剩 {free / 1e9:.1f} GB，不比较答案")
        return
    _compare_answers(base_folder, adapters, merged_folder, config, merged, device)


def _read_merged(folder, output_type):
    """(config, {Hugging Face's name: tensor}) of a merged model."""
    if output_type == "huggingface":
        config, merged, _ = read_base(folder)
        return config, merged
    config, parts, _ = read_meta(folder)
    return config, {name: from_meta(name, part, config) for name, part in parts.items()}


def _share_of_rounding(name, merged, weight, adapters):
    """The largest error of a merged tensor, as a share of what rounding can explain; infinite where the shapes differ.

    Each adapter's sum is rounded to the tensor's number format: off by at most half its eps, relatively. The product of
    rank terms in float32 is off by at most rank times float32's eps of the sizes of its factors (Cauchy and Schwarz).
    """
    whole = [adapter.saved[name] for adapter in adapters if name in adapter.saved]
    if merged.shape != (whole[-1] if whole else weight).shape:
        return float("inf")
    format_ = torch.finfo(merged.dtype)
    worst = 0.0
    for i in range(0, len(merged), ROWS_AT_ONCE):
        rows = slice(i, i + ROWS_AT_ONCE)
        exact = weight[rows].float()
        bound = torch.zeros_like(exact)
        for adapter in adapters:
            if name in adapter.saved:
                exact = adapter.saved[name][rows].float()
                bound = format_.eps / 2 * exact.abs()
            if name in adapter.lora:
                a, b, scaling = adapter.lora[name]
                a, b = a.float(), b[rows].float()
                exact = exact + scaling * (b @ a)
                factors = abs(scaling) * b.norm(dim=1, keepdim=True) * a.norm(dim=0)
                bound = bound + format_.eps / 2 * exact.abs() + len(a) * torch.finfo(torch.float32).eps * factors
        # below the smallest normal number, the steps are of one size; and the rounded sums have errors of their own
        bound = 1.01 * bound + format_.smallest_normal * format_.eps
        worst = max(worst, ((merged[rows].float() - exact).abs() / bound).nan_to_num(float("inf")).max().item())
    return worst


def _compare_answers(base_folder, adapters, merged_folder, config, merged, device):
    tokenizer = load_tokenizer(merged_folder, template_of(read_facts(merged_folder)[1], "auto"))
    instruct = INSTRUCT.replace("{labels}", "人名、地名、机构名")
    prompts = encode_prompts(tokenizer, [message_of(instruct, query) for query in QUERIES])
    expected, expected_answers = _run(_with_adapters(base_folder, adapters, device), tokenizer, prompts)
    logits, answers = _run(_model(config, merged, device), tokenizer, prompts)
    for query, one, other in zip(QUERIES, expected_answers, answers, strict=True):
        print(f"{query}\n  基座+LoRA：{one!r}\n  合并后：  {other!r}")
    same = sum(one == other for one, other in zip(expected_answers, answers, strict=True))
    deviation = torch.cat(expected).std().item()
    largest = max((one - other).abs().max().item() for one, other in zip(expected, logits, strict=True))
    print(
        f"验证：{same}/{len(QUERIES)} 个贪心答案相同，logits 最大相差 {largest:.4f}（logits 的标准差 {deviation:.4f}）"
    )


def _with_adapters(folder, adapters, device):
    """The base with all adapters but the last one merged by PEFT, and the last one beside it."""
    model = load_base(folder, torch.float32, device)
    for i, adapter in enumerate(adapters):
        if i:
            model = merge_adapter(model)
        if EMBEDDING in adapter.saved:
            model.resize_token_embeddings(len(adapter.saved[EMBEDDING]), mean_resizing=False)
        model = attach_adapter(model, adapter.folder)
    return model


def _model(config, weights, device):
    model = meta_model(AutoConfig.for_model(**config))
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)  # its table is in no state dict
    return model.to(device)


@torch.inference_mode()
def _run(model, tokenizer, prompts):
    model.eval()
    logits = [model(torch.tensor([ids], device=model.device)).logits[0].float().cpu() for ids in prompts]
    answers = [answer.text for answer in generate(model, tokenizer, prompts, NEW_TOKENS, len(prompts))]
    del model
    gc.collect()
    return logits, answers

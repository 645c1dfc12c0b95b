"""Whether a merged model is base + adapters: both answer a few prompts, the base with the adapters through PEFT."""

import gc
import warnings

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from alpaca.answering.generate import generate
from alpaca.common.errors import UserError
from alpaca.models.base import load_base
from alpaca.models.base_files import EMBEDDING
from alpaca.models.tokenizer import load_tokenizer
from alpaca.weights.llama_files import read_meta
from alpaca.weights.llama_layout import from_meta
from dataset import INSTRUCT, build_prompt, encode_prompts

QUERIES = ("文本：记者苏晓岚从昆明报道。", "文本：程立群在苏州大学教书。", "文本：天气渐渐凉了。")
NEW_TOKENS = 32
# Rounding the sums to 8 (bfloat16) or 11 bits moves logits by some hundredths of their standard deviation.
TOLERANCE = 0.5


def prove(base_folder, adapters, merged_folder, output_type):
    """Print the greedy answers and the largest difference of the logits; UserError where that is no rounding.

    In the base's number format, on the GPU if there is one; one of the two models in memory at a time.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(merged_folder)
    instruct = INSTRUCT.replace("{labels}", "人名、地名、机构名")
    prompts = encode_prompts(tokenizer, [build_prompt(instruct, query) for query in QUERIES])
    expected, expected_answers = _run(_with_adapters(base_folder, adapters, device), tokenizer, prompts)
    logits, answers = _run(_merged(merged_folder, output_type).to(device), tokenizer, prompts)

    for query, one, other in zip(QUERIES, expected_answers, answers, strict=True):
        print(f"{query}\n  基座+LoRA：{one!r}\n  合并后：  {other!r}")
    same = sum(one == other for one, other in zip(expected_answers, answers, strict=True))
    deviation = torch.cat(expected).std().item()
    largest = max((one - other).abs().max().item() for one, other in zip(expected, logits, strict=True))
    print(
        f"验证：{same}/{len(QUERIES)} 个贪心答案相同，logits 最大相差 {largest:.4f}（logits 的标准差 {deviation:.4f}）"
    )
    if not largest <= TOLERANCE * deviation:
        raise UserError(
            f"--verify: the logits of the merged model are off by up to {largest:.4f}, with a standard deviation of "
            f"{deviation:.4f}: this is more than rounding; nothing was written, please report it"
        )


def _with_adapters(folder, adapters, device):
    """The base with all adapters but the last one merged by PEFT, and the last one beside it."""
    warnings.filterwarnings("ignore", "Unexpected keyword arguments", module="peft")  # read_adapter has judged them
    model = load_base(folder, "auto", device)
    for adapter in adapters:
        if isinstance(model, PeftModel):
            model = model.merge_and_unload()
        if EMBEDDING in adapter.saved:
            model.resize_token_embeddings(len(adapter.saved[EMBEDDING]), mean_resizing=False)
        model = PeftModel.from_pretrained(model, adapter.folder, autocast_adapter_dtype=False, torch_device=device)
    return model.to(next(model.parameters()).dtype)


def _merged(folder, output_type):
    if output_type == "huggingface":
        return load_base(folder, "auto", "cpu")
    config, parts, _ = read_meta(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict({name: from_meta(name, part, config) for name, part in parts.items()}, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)  # its table is in no state dict
    return model


@torch.inference_mode()
def _run(model, tokenizer, prompts):
    model.eval()
    logits = [model(torch.tensor([ids], device=model.device)).logits[0].float().cpu() for ids in prompts]
    answers = [answer.text for answer in generate(model, tokenizer, prompts, NEW_TOKENS, len(prompts))]
    del model
    gc.collect()
    return logits, answers

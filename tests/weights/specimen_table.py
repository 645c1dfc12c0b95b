"""The table of docs/{zh,en}/seven_b.md: which folders of weights go through, and with which line others are refused.

    python tests/weights/specimen_table.py     # print both

The tests go through its rows: a specimen without a row fails, as does a row without a specimen, or another line.
"""

HEADS = {"zh": ("权重文件夹", "结果"), "en": ("folder of weights", "result")}
THROUGH = {"zh": "全程走通", "en": "the whole way"}
# names of specimens -> (in Chinese, in English)
GOES_THROUGH = {
    ("llama1 7B", "llama1 13B", "llama1 30B", "llama1 65B"): (
        "Meta 的 LLaMA-1 7B、13B、30B、65B",
        "Meta's LLaMA-1 7B, 13B, 30B, 65B",
    ),
    ("llama2 7B", "llama2 13B", "llama2 70B"): ("Meta 的 LLaMA-2 7B、13B、70B", "Meta's LLaMA-2 7B, 13B, 70B"),
    ("published_pth llama", "published_pth alpaca"): (
        "官方脚本合并出的 pth（两个文件，`output.weight` 分得不均）",
        "pth merged by the publishers' script (two files, `output.weight` parted unevenly)",
    ),
    ("decapoda",): (
        "`decapoda-research/llama-7b-hf` 一类，33 个 `.bin`",
        "`decapoda-research/llama-7b-hf`, 33 `.bin` files",
    ),
    ("converted", "converted_safetensors", "llama2"): (
        "transformers 转换的 LLaMA-1 和 `meta-llama/Llama-2-7b-hf`，`.bin` 或 safetensors",
        "LLaMA-1 as transformers converts it and `meta-llama/Llama-2-7b-hf`, `.bin` or safetensors",
    ),
    ("grown",): (
        "多出一个词的基座（`added_tokens.json`，32,001 行）",
        "a base with one token more (`added_tokens.json`, 32,001 rows)",
    ),
    ("merged_llama", "merged_alpaca", "merged_and_grown", "merged_alpaca_grown"): (
        "别人合并好的 Chinese-LLaMA、Chinese-Alpaca（49,953 到 49,955 行）",
        "Chinese-LLaMA and Chinese-Alpaca that somebody has merged (49,953 to 49,955 rows)",
    ),
    ("chinese_llama", "chinese_llama + chinese_alpaca", "chinese_alpaca_2"): (
        "官方公布的 LoRA，第二代也行",
        "the published LoRAs, those of generation 2 too",
    ),
    ("alpaca_lora_16", "chinese_vicuna", "llama_factory", "current_peft", "current_peft saving embeddings"): (
        "alpaca-lora、Chinese-Vicuna、LLaMA-Factory、PEFT 训练的 LoRA",
        "LoRAs trained with alpaca-lora, Chinese-Vicuna, LLaMA-Factory, PEFT",
    ),
    ("names with default", "names with module", "bare names", "names with base_layer"): (
        "张量名带 `.default`、`module.`、`base_layer`，或不带前缀的 LoRA",
        "LoRAs whose tensors' names have `.default`, `module.` or `base_layer`, or no prefix",
    ),
    ("trainer_checkpoint", "trainer_checkpoint of the whole model"): (
        "Trainer 的 `pytorch_model.bin` 改名为 `adapter_model.bin`，整个模型的也行",
        "a Trainer's `pytorch_model.bin` renamed to `adapter_model.bin`, that of a whole model too",
    ),
    ("byte_order_mark",): (
        "`adapter_config.json` 开头有 BOM 的 LoRA",
        "a LoRA whose `adapter_config.json` begins with a byte order mark",
    ),
}
# name of a specimen -> (in Chinese, in English, what the error line says)
REFUSED = {
    "zero3": (
        "ZeRO-3 下没有收集权重就保存的 LoRA",
        "a LoRA saved under ZeRO-3 without its weights",
        "is empty: it was saved under ZeRO-3 without its weights; gather them when saving",
    ),
    "empty_443": (
        "443 字节的 `adapter_model.bin`",
        "an `adapter_model.bin` of 443 bytes",
        "an empty adapter (443 bytes), nothing to merge; download it again or train it again",
    ),
    "on_embeddings": (
        "嵌入层上的 LoRA",
        "a LoRA on embeddings",
        "a LoRA on embeddings (model.embed_tokens) is unknown here; merge this adapter with PEFT",
    ),
    "llama3": (
        "LLaMA-3",
        "LLaMA-3",
        "tokenizer.model: LLaMA-3's; put the tokenizer.json of its Hugging Face folder there",
    ),
}


def table(language):
    number = 0 if language == "zh" else 1
    rows = [HEADS[language], ("---", "---")]
    rows += [(row[number], THROUGH[language]) for row in GOES_THROUGH.values()]
    rows += [(row[number], f"`error: … {row[2]}`") for row in REFUSED.values()]
    return "".join(f"| {folder} | {result} |\n" for folder, result in rows)


if __name__ == "__main__":
    print(table("zh"), table("en"), sep="\n")

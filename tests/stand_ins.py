"""Tiny random bases in the shapes of those that people have, with tokenizers made on the fly.

qwen2 (biases, tied embeddings), qwen3 (norms of queries and keys, heads of their own size, a thinking template) and mistral
(a sliding window) have a byte-level BPE with Qwen2's pre-tokenizer expression; alpaca2 is a LLaMA-2 shape with
SentencePiece. None is of the others' tokens: the ids of controls come last, and the embeddings have rows to spare.
"""

import json

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from alpaca.models.tokenizer import load_sentencepiece, save_tokenizer
from harness import make_records

SPARE_ROWS = 40
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # with the usual 0.02, no hidden state of this size makes any token likely
}
KINDS = {  # -> what config.json has beside SHAPE
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "mistral": {"model_type": "mistral", "sliding_window": 300, "head_dim": 16},
    # as the 16K ones of Chinese-Alpaca-2 say it
    "alpaca2": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
}
TEMPLATE = {"alpaca2": "alpaca2", "mistral": "alpaca"}  # what --template must say
# The system's turn, and the empty block where thinking is off, as Qwen's; today's date, as LLaMA-3.1's and others'.
CHAT = """\
<|im_start|>system
You are a helpful assistant. Today is {{ strftime_now('%d %b %Y') }}<|im_end|>
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""
SPECIAL, MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), ("<tool_call>", "<think>", "</think>")


def byte_level_bpe(texts, size=480):
    """A tokenizers.Tokenizer as Qwen's: no bos, special tokens and marks that are not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=alphabet)
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKS])
    return tokenizer


def save_fast_tokenizer(folder, texts, chat=CHAT):
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja as transformers does; returns transformers' own."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(texts), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = chat
    fast.save_pretrained(folder)
    return fast


def make_stand_in(folder, kind, tokenizer_models):
    """Write a base of one of KINDS. tokenizer_models: the fixture's folder."""
    settings = {**SHAPE, **KINDS[kind]}
    torch.manual_seed(0)
    if kind == "alpaca2":
        save_tokenizer(tokenizer_models / "alpaca.model", folder)
        pieces, ends = len(load_sentencepiece(folder)), 2
    else:
        texts = [record["instruct"] + record["query"] + record["answer"] for record in make_records(60, 3)]
        fast = save_fast_tokenizer(folder, texts, None if kind == "mistral" else CHAT)
        pieces, ends = len(fast), [fast.eos_token_id, fast.pad_token_id]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings, vocab_size=pieces + SPARE_ROWS))
    with torch.no_grad():
        for parameter in model.parameters():  # biases begin with 0 and norms with 1
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)
    if "rope_scaling" in settings:  # as the published files have it, and not as this version of transformers writes it
        path = folder / "config.json"
        written = json.loads(path.read_text(encoding="utf-8"))
        del written["rope_parameters"]
        path.write_text(json.dumps({**written, "rope_scaling": settings["rope_scaling"]}), encoding="utf-8")
    return folder

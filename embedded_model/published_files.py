"""The embedded model in the shapes in which the real weights are published, and the arithmetic between its stages.

`tiny` is Meta's layout (consolidated.00.pth, params.json, tokenizer.model), the two others are PEFT's folders with a
tokenizer.model of their own. All numbers in the files are float16.
"""

import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from alpaca.models.adapter_files import read_adapter
from alpaca.weights.llama_files import read_meta
from alpaca.weights.llama_layout import EMBEDDING, HEAD, config_of, from_meta, meta_names, params_of, to_meta
from alpaca.weights.lora_adapters import add_adapters

FOLDERS = {
    "base": "tiny",
    "llama": "chinese-llama-plus-lora-tiny",
    "alpaca": "chinese-alpaca-plus-lora-tiny",
}  # by stage
SHAPE = {"dim": 256, "n_heads": 4, "n_layers": 8, "norm_eps": 1e-06}  # as in Meta's params.json
FEED_FORWARD = 688  # units
POSITIONS = 2048  # tokens
LORA = {  # as in PEFT's adapter_config.json
    "r": 8,
    "lora_alpha": 32.0,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "down_proj", "up_proj"],
    "modules_to_save": ["embed_tokens", "lm_head"],
    "task_type": "CAUSAL_LM",
}


def config_with(rows):
    """The model's config.json (dict) with `rows` rows of embedding and head."""
    return config_of(SHAPE, rows, FEED_FORWARD, torch.float32, POSITIONS)


def new_model(rows):
    """An untrained float32 LlamaForCausalLM on the CPU, with `rows` rows of embedding and head."""
    return LlamaForCausalLM(LlamaConfig(**config_with(rows), pad_token_id=0))  # <unk>: its embedding is never trained


def with_state(state):
    """The model with these weights: {Hugging Face's name: tensor}."""
    model = new_model(len(state[HEAD]))
    model.load_state_dict(state)
    return model


def rounded(model):
    """The weights of `model` in float32 on the CPU, each number as the float16 of the files can hold it."""
    return {name: value.half().float().cpu() for name, value in model.state_dict().items()}


def with_rows(model, rows):
    """A copy of `model` on the CPU, rounded, with `rows` rows of embedding and head.

    A new row starts as a copy of the row of <unk>, which is never an answer; nor is [PAD].
    """
    state = rounded(model)
    for name in (EMBEDDING, HEAD):
        missing = max(0, rows - len(state[name]))
        state[name] = torch.cat([state[name][:rows], state[name][:1].expand(missing, -1)])
    return with_state(state)


def with_adapter(model, adapter):
    """A copy of `model` on the CPU, rounded, with an Adapter (alpaca.weights.lora_adapters) merged into it."""
    return with_state({name: add_adapters(name, value, [adapter]) for name, value in rounded(model).items()})


def write_base(model, folder, vocabulary):
    """Write `model` as Meta ships LLaMA, in one file. vocabulary: the bytes of tokenizer.model."""
    config = config_with(len(model.lm_head.weight))
    weights, names = model.state_dict(), meta_names(SHAPE["n_layers"])
    tensors = {metas: to_meta(name, weights[name], config, n_files=1)[0] for name, metas in names.items()}
    tensors = {name: tensor.half().cpu().clone() for name, tensor in tensors.items()}
    head_dim = SHAPE["dim"] // SHAPE["n_heads"]
    tensors["rope.freqs"] = (1.0 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)).half()
    folder.mkdir(parents=True, exist_ok=True)
    # Not by save_pth: Meta's own files hold rope.freqs too, and their vocab_size is -1; the converter must bear both.
    torch.save(tensors, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps({**params_of(config), "vocab_size": -1}), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(vocabulary)


def load_base(folder):
    """The float32 model on the CPU that write_base wrote; UserError where its files cannot be read."""
    config, parts, _ = read_meta(folder, POSITIONS)
    return with_state({name: from_meta(name, part, config).float() for name, part in parts.items()})


def write_adapter(tensors, folder, vocabulary):
    """Write an adapter with the configuration keys that PEFT had in spring 2023, when the real ones were published.

    tensors: {PEFT's name: float16 tensor}; vocabulary: the bytes of tokenizer.model.
    """
    config = {
        "base_model_name_or_path": FOLDERS["base"] + "-hf",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "merge_weights": False,
        "peft_type": "LORA",
        **LORA,
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "adapter_model.bin")
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(vocabulary)


def load_adapter(folder):
    """The Adapter that write_adapter wrote; UserError where its files cannot be read."""
    return read_adapter(folder)

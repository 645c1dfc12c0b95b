"""Miniatures of the LoRA folders that people have: published ones, those of other tools, and what went wrong with some."""

import json
import struct
import zlib

import torch
from safetensors.torch import save_file

from specimens import (
    ALPACA,
    BASE,
    EMBEDDING,
    HEAD,
    LINEAR,
    LLAMA,
    SECOND,
    SEVEN_B,
    Lora,
    random_weights,
    rotary_table,
    shapes,
    vocabularies,
    write_as_transformers,
    write_json,
)
from specimens_hf import ADDED, SPECIALS

PREFIX = "base_model.model."
SHORT_TOKENIZER = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "model_max_length": 1000000000000000019884624838656,
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
}


# ---------------------------------------------------------------------------------------------------------------------
# published ones


def chinese_llama(folder):
    """hfl/chinese-llama-plus-lora-7b: LoRA on all seven matrices, and whole embeddings of 49,953 rows (here 797).

    Files: the tree of huggingface.co/hfl/chinese-alpaca-lora-7b (commit e0f50fe) with special_tokens_map.json of 96 bytes
    (72 for LLaMA's: tokenizer-arena, vocab/chinese_llama_lora_7b) and tokenizer_config.json of 166, as many as
    wxjiao/alpaca-7b's. adapter_config.json: hfl/chinese-alpaca-pro-lora-7b (commit b46e061), r 64, alpha 128, an int, and
    the base's name, which the others have. Names of the tensors: ymcui/Chinese-LLaMA-Alpaca's
    merge_llama_with_chinese_lora_low_mem.py. That name and float16 are of memory.
    """
    return _published(folder, "llama", LLAMA, seed=2)


def chinese_alpaca(folder):
    """hfl/chinese-alpaca-plus-lora-7b: goes onto Chinese-LLaMA-Plus, 49,954 rows (here 798), the last one [PAD].

    special_tokens_map.json of 96 bytes: huggingface.co/hfl/chinese-alpaca-lora-7b; the rest as chinese_llama.
    """
    return _published(folder, "alpaca", ALPACA, seed=3)


def chinese_alpaca_2(folder):
    """hfl/chinese-alpaca-2-lora-7b: for LLaMA-2, 55,296 rows (here 888); lora_alpha is 128.0.

    adapter_config.json: huggingface.co/hfl/chinese-alpaca-2-lora-7b (commit 7ffdc36); tokenizer_config.json:
    chinese-alpaca-2-lora-13b; special_tokens_map.json: chinese-alpaca-2-lora-7b-16k.
    """
    lora = _published(folder, "second", SECOND, seed=4)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "/Llama-2-7b-hf", "lora_alpha": 128.0}
    write_json(folder / "adapter_config.json", config, indent=2)
    tokens = {key: {"content": text, **ADDED} for key, text in SPECIALS.items()}
    write_as_transformers(folder / "special_tokens_map.json", tokens | {"pad_token": "<pad>"})
    typed = {key: {"__type": "AddedToken", **token} for key, token in tokens.items()}
    settings = SHORT_TOKENIZER | typed | {"add_bos_token": True, "add_eos_token": False, "legacy": True}
    settings |= {"clean_up_tokenization_spaces": False, "pad_token": None, "sp_model_kwargs": {}, "use_fast": False}
    write_as_transformers(folder / "tokenizer_config.json", dict(sorted(settings.items())))
    return lora


def alpaca_lora(folder, shape=SEVEN_B):
    """tloen/alpaca-lora-7b's kin, r 8 on q_proj and v_proj: two files, adapter_config.json and adapter_model.bin.

    adapter_config.json: huggingface.co/artem9k/alpaca-lora-7b and baruga/alpaca-lora-13b. The weights are of float32:
    bertin-project/bertin-alpaca-lora-7b's file of 16,822,989 bytes is 32 layers of 4 x 8 x 4096 numbers of 4 bytes.
    """
    factors = _factors(("q_proj", "v_proj"), 8, 16, torch.float32, shape, seed=5)
    config = _old_config("decapoda-research/llama-7b-hf", 8, 16, ["q_proj", "v_proj"])
    return _write(folder, config, factors, {})


def alpaca_lora_16(folder):
    """tloen/alpaca-lora-7b itself: r 16 on q, k, v and o. adapter_config.json: its commit 9b26904 and discussion 9."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    factors = _factors(targets, 16, 16, torch.float32, seed=6)
    return _write(folder, _old_config("decapoda-research/llama-7b-hf", 16, 16, targets), factors, {})


def chinese_vicuna(folder):
    """Chinese-Vicuna/Chinese-Vicuna-7b-legal-lora: r 8 on all seven matrices, init_lora_weights true.

    adapter_config.json: that repository (commit 7ae1e99), and a file of 80,114,765 bytes: 19,988,480 numbers of float32.
    """
    targets = ["q_proj", "v_proj", "k_proj", "o_proj", "down_proj", "gate_proj", "up_proj"]
    config = _old_config("/model/yahma_llama_7b", 8, 16, targets) | {"init_lora_weights": True}
    return _write(folder, dict(sorted(config.items())), _factors(targets, 8, 16, torch.float32, seed=7), {})


def byte_order_mark(folder):
    """alpaca_lora whose adapter_config.json was edited in an editor of Windows and begins with a byte order mark.

    Users delete enable_lora and merge_weights by hand, as many an issue tells them (huggingface.co/tloen/alpaca-lora-7b,
    discussion 9).
    """
    lora = alpaca_lora(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("enable_lora", "merge_weights")}
    text = json.dumps(config, indent=2).replace("\n", "\r\n")
    (folder / "adapter_config.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return lora


# ---------------------------------------------------------------------------------------------------------------------
# of later tools


def llama_factory(folder):
    """What LLaMA-Factory leaves with PEFT 0.9: safetensors of float32, tokenizer files and its logs beside them.

    Files and adapter_config.json's keys: huggingface.co/gotzmann/v0.8.13-adapter (commit c4a2fac) and v0.3-adapter.
    Its numbers r 8, alpha 16, dropout 0.0 are LLaMA-Factory's defaults. The contents of the logs are of memory.
    """
    targets = ["k_proj", "gate_proj", "o_proj", "v_proj", "down_proj", "up_proj", "q_proj"]
    config = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": "shibing624/chinese-alpaca-plus-7b-hf",
    }
    config |= {"bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True}
    config |= {"layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 16}
    config |= {"lora_dropout": 0.0, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None}
    config |= {"peft_type": "LORA", "r": 8, "rank_pattern": {}, "revision": None, "target_modules": targets}
    config |= {"task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False}
    factors = _factors(targets, 8, 16, torch.float32, seed=8)
    lora = _write(folder, config, factors, {}, safetensors=True)
    (folder / "README.md").write_text("---\nlicense: other\nlibrary_name: peft\ntags:\n- llama-factory\n- lora\n---\n")
    results = {"epoch": 1.0, "train_loss": 1.0, "train_runtime": 60.0, "train_samples_per_second": 1.0}
    write_json(folder / "all_results.json", results, indent=4)
    write_json(folder / "train_results.json", results, indent=4)
    (folder / "trainer_log.jsonl").write_text('{"current_steps": 10, "total_steps": 10, "loss": 1.0, "epoch": 1.0}\n')
    write_as_transformers(folder / "trainer_state.json", {"epoch": 1.0, "global_step": 10, "log_history": []})
    torch.save({"output_dir": "saves/lora", "learning_rate": 5e-05}, folder / "training_args.bin")
    (folder / "tokenizer.model").write_bytes(vocabularies()["alpaca"])
    write_as_transformers(folder / "tokenizer_config.json", SHORT_TOKENIZER)
    write_as_transformers(folder / "special_tokens_map.json", SPECIALS | {"pad_token": "[PAD]"})
    return lora


def current_peft(folder, base, saved=()):
    """What the installed PEFT writes after training on `base` (a Model), with whole matrices for `saved` modules.

    Made by PEFT itself; the numbers are read from its modules' parameters.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": list(LINEAR), "task_type": "CAUSAL_LM"}
    model = get_peft_model(llama, LoraConfig(modules_to_save=list(saved) or None, **settings))
    random = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=random) * 0.1
    model.save_pretrained(folder)
    factors, whole = {}, {}
    for name, parameter in model.named_parameters():
        target, _, rest = name.removeprefix(PREFIX).partition(".lora_A.")
        if rest:
            b = model.get_parameter(name.replace("lora_A", "lora_B"))
            factors[f"{target}.weight"] = (parameter.detach(), b.detach(), 2.0)
        if ".modules_to_save." in name:
            whole[name.removeprefix(PREFIX).replace(".modules_to_save.default", "")] = parameter.detach()
    return Lora(folder, factors, whole)


# ---------------------------------------------------------------------------------------------------------------------
# the same tensors by other names


def renamed(folder, how, base):
    """A LoRA on q_proj and v_proj with whole embeddings, of which a model's state_dict was saved as adapter_model.bin.

    default: PEFT 0.3 and later, its names kept: lora_A.default.weight, modules_to_save.default.weight beside
        original_module.weight (huggingface/peft, docs/source/developer_guides/checkpoint.md).
    module: the same behind DistributedDataParallel or DeepSpeed, which put module. before each name.
    bare: base_model.model. taken off, as tools do that save the adapter anew.
    base_layer: the whole model of PEFT 0.6 and later, in which a changed matrix is X.base_layer.weight; as DeepSpeed's
        zero_to_fp32.py or FSDP write it. Which tools do so is of memory.
    """
    factors = _factors(("q_proj", "v_proj"), 8, 16, torch.float32, seed=10)
    random = torch.Generator().manual_seed(11)
    rows, dim = base.weights[EMBEDDING].shape
    saved = {name: torch.randn(rows, dim, generator=random) * dim**-0.5 for name in (EMBEDDING, HEAD)}
    config = _old_config("decapoda-research/llama-7b-hf", 8, 16, ["q_proj", "v_proj"])
    lora = _write(folder, config | {"modules_to_save": ["embed_tokens", "lm_head"]}, factors, saved)
    tensors = {}
    for name, weight in base.weights.items():
        module = PREFIX + name.removesuffix(".weight")
        if name in factors:
            a, b, _ = factors[name]
            if how == "base_layer":
                tensors[f"{module}.base_layer.weight"] = weight
            tensors[f"{module}.lora_A.default.weight"], tensors[f"{module}.lora_B.default.weight"] = a, b
        elif name in saved:
            tensors[f"{module}.original_module.weight"] = weight
            tensors[f"{module}.modules_to_save.default.weight"] = saved[name]
        elif how == "base_layer":
            tensors[f"{module}.weight"] = weight
    if how == "module":
        tensors = {f"module.{name}": tensor for name, tensor in tensors.items()}
    if how == "bare":
        tensors = _named(factors, saved, prefix="")
    torch.save(tensors, folder / "adapter_model.bin")
    return lora


def trainer_checkpoint(folder, base, whole):
    """checkpoint-N/pytorch_model.bin renamed to adapter_model.bin, with published config and tokenizer files beside it.

    The maintainers' own advice for what their first training scripts leave: ymcui/Chinese-LLaMA-Alpaca issues 361 and
    378. Then it is the published names in float32; with `whole`, the whole model's state_dict as issue 711 lists it:
    base weights by their plain names, lora_A.default.weight, rotary_emb.inv_freq.
    """
    lora = _published(folder, "alpaca", ALPACA, seed=12, dtype=torch.float32)
    tensors = torch.load(folder / "adapter_model.bin")
    if whole:
        tensors = {
            name.replace("weight", "default.weight") if "lora_" in name else name: t for name, t in tensors.items()
        }
        for name, weight in base.weights.items():
            tensors.setdefault(PREFIX + name, weight)
        for i in range(SEVEN_B.layers):
            tensors[f"{PREFIX}model.layers.{i}.self_attn.rotary_emb.inv_freq"] = rotary_table(SEVEN_B)
        torch.save(tensors, folder / "adapter_model.bin")
    return lora


# ---------------------------------------------------------------------------------------------------------------------
# what must be refused


def zero3(folder):
    """A LoRA saved under ZeRO-3 without gathering: every tensor is of shape [0].

    huggingface/peft issue 1443, ymcui/Chinese-LLaMA-Alpaca-2 issue 392 (embeddings too: "vocab size of the LoRA 0").
    """
    lora = _published(folder, "alpaca", ALPACA, seed=13)
    tensors = torch.load(folder / "adapter_model.bin")
    torch.save({name: torch.empty(0, dtype=t.dtype) for name, t in tensors.items()}, folder / "adapter_model.bin")
    return lora


def empty_443(folder):
    """The 443-byte adapter_model.bin: an empty dict, as PyTorch before 2.1 wrote it, byte for byte.

    tloen/alpaca-lora issues 293, 363, 446: a state_dict patched twice. The archive: a pickle of {} and a version, each
    of which begins at a multiple of 64 (caffe2/serialize/inline_container.cc); the sizes add up to 443.
    """
    lora = alpaca_lora(folder)
    (folder / "adapter_model.bin").write_bytes(_old_archive({"data.pkl": b"\x80\x02}q\x00.", "version": b"3\n"}))
    return Lora(lora.folder, {}, {})


def _old_archive(files):
    """A zip archive as PyTorch 1.6 to 2.0 laid it out, of uncompressed members that begin at multiples of 64."""
    out, directory = b"", b""
    for name, data in files.items():
        name, crc, begin = f"adapter_model/{name}".encode(), zlib.crc32(data), len(out)
        padding = -(begin + 30 + len(name) + 4) % 64
        extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        head = (0, 0x808, 0, 0, 0)  # version, flags (sizes follow, UTF-8), method, time, date
        out += struct.pack("<4s5H3I2H", b"PK\3\4", *head, 0, 0, 0, len(name), len(extra)) + name + extra + data
        out += struct.pack("<4s3I", b"PK\7\x08", crc, len(data), len(data))
        sizes = (crc, len(data), len(data), len(name), 0, 0, 0, 0, 0, begin)
        directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 0, *head, *sizes) + name
    begin, count = len(out), len(files)
    end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0, 45, 0, 0, count, count, len(directory), begin)
    end += struct.pack("<4sIQI", b"PK\6\7", 0, begin + len(directory), 1)
    end += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(directory), begin, 0)
    return out + directory + end


def on_embeddings(folder):
    """A LoRA on embed_tokens: lora_embedding_A and lora_embedding_B, parameters without .weight (huggingface/peft,
    tuners/lora/layer.py); lora_embedding_A is [rank, pieces], lora_embedding_B [dim, rank]."""
    lora = alpaca_lora(folder)
    tensors = torch.load(folder / "adapter_model.bin")
    tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"] = torch.full((8, BASE), 0.1)
    tensors[f"{PREFIX}model.embed_tokens.lora_embedding_B"] = torch.full((SEVEN_B.dim, 8), 0.1)
    torch.save(tensors, folder / "adapter_model.bin")
    config = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", config | {"target_modules": ["q_proj", "v_proj", "embed_tokens"]})
    return lora


# ---------------------------------------------------------------------------------------------------------------------
# parts


def _old_config(base, rank, alpha, targets):
    """adapter_config.json of PEFT 0.2, sorted by key as it writes it."""
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(targets),
        "task_type": "CAUSAL_LM",
    }


def _factors(targets, rank, alpha, dtype, shape=SEVEN_B, seed=0):
    """{name: (A, B, scaling)} of these matrices in every layer."""
    random, factors = torch.Generator().manual_seed(seed), {}
    for name, size in shapes(shape, BASE).items():
        if name.split(".")[-2] in targets:
            a, b = torch.randn(rank, size[1], generator=random), torch.randn(size[0], rank, generator=random)
            factors[name] = ((0.1 * a).to(dtype), (0.1 * b).to(dtype), alpha / rank)
    return factors


def _named(factors, saved, prefix=PREFIX):
    tensors = {prefix + name: tensor for name, tensor in saved.items()}
    for name, (a, b, _) in factors.items():
        module = prefix + name.removesuffix(".weight")
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    return tensors


def _write(folder, config, factors, saved, safetensors=False):
    folder.mkdir(parents=True)
    write_json(folder / "adapter_config.json", config, indent=2)
    if safetensors:
        save_file(_named(factors, saved), folder / "adapter_model.safetensors", {"format": "pt"})
    else:
        torch.save(_named(factors, saved), folder / "adapter_model.bin")
    return Lora(folder, factors, saved)


def _published(folder, vocabulary, rows, seed, dtype=torch.float16):
    targets = ["q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
    config = _old_config("decapoda-research/llama-7b-hf", 64, 128, targets)
    config["modules_to_save"] = ["embed_tokens", "lm_head"]
    whole = random_weights(SEVEN_B, rows, dtype, seed)
    saved = {name: whole[name] for name in (EMBEDDING, HEAD)}
    lora = _write(folder, config, _factors(targets, 64, 128, dtype, seed=seed), saved)
    (folder / "tokenizer.model").write_bytes(vocabularies()[vocabulary])
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    pad = {"pad_token": "[PAD]"} if vocabulary == "alpaca" else {}
    write_as_transformers(folder / "special_tokens_map.json", SPECIALS | pad)
    write_as_transformers(folder / "tokenizer_config.json", SHORT_TOKENIZER)
    return lora

"""Miniatures of the Hugging Face folders of 2023: bases, a base grown by one token, and models merged already."""

import json

import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2

from specimens import (
    ALPACA,
    BASE,
    EMBEDDING,
    HEAD,
    LLAMA,
    SEVEN_B,
    Model,
    Shape,
    random_weights,
    rotary_table,
    vocabularies,
    write_as_transformers,
    write_json,
)

# 32 layers, for as many files; so each is 1/128 of the real one
SHAPE_OF_33 = Shape(32, 86, 2, 2, 32)
MAX_LENGTH = 1000000000000000019884624838656  # int(1e30), as transformers writes "no limit"
ADDED = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def decapoda(folder):
    """decapoda-research/llama-7b-hf: 33 pytorch_model-000NN-of-00033.bin, a layer each and the rest in the last.

    config.json, generation_config.json on one line, specials 0, 1, -1, LLaMAForCausalLM: copies in huggingface.co/
    learnanything/llama-7b-huggingface and chavinlo/alpaca-native (first versions). tokenizer_config.json with
    LLaMATokenizer and empty specials: kdearsty/llama-testing, which names it as its source. inv_freq in each layer:
    ymcui/Chinese-LLaMA-Alpaca issue 711; of float32, as transformers' converter computed it. An empty
    special_tokens_map.json and which layer stands in which file are of memory.
    """
    folder.mkdir(parents=True)
    weights = random_weights(SHAPE_OF_33, BASE, torch.float16)
    config = {"architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu"}
    config |= _sizes(SHAPE_OF_33, "hidden_size", "intermediate_size") | {"initializer_range": 0.02}
    config |= {"max_sequence_length": 2048, "model_type": "llama"}
    config |= _sizes(SHAPE_OF_33, "num_attention_heads", "num_hidden_layers")
    config |= {"pad_token_id": -1, "rms_norm_eps": 1e-06, "torch_dtype": "float16"}
    write_json(
        folder / "config.json", config | {"transformers_version": "4.27.0.dev0", "use_cache": True, "vocab_size": BASE}
    )
    ids = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    write_json(folder / "generation_config.json", ids | {"transformers_version": "4.27.0.dev0"})
    _tokenizer(folder, "base")
    write_json(folder / "tokenizer_config.json", _short_config("", "", "", "LLaMATokenizer"))
    write_json(folder / "special_tokens_map.json", {})
    groups = [
        {name: t for name, t in weights.items() if name.startswith(f"model.layers.{i}.")}
        for i in range(SHAPE_OF_33.layers)
    ]
    groups.append({name: t for name, t in weights.items() if ".layers." not in name})
    _save(folder, groups, SHAPE_OF_33, "pytorch_model", torch.float32)
    return Model(folder, weights)


def converted(folder):
    """LLaMA-7B as transformers 4.28 to 4.30 converted it: two .bin files, tokenizer.json beside tokenizer.model.

    The set of files: ymcui/Chinese-LLaMA-Alpaca's wiki (Manual-Conversion), huggingface.co/Neko-Institute-of-Science/
    LLaMA-7B-HF (commit c466fdd), whose config.json, generation_config.json and special_tokens_map.json these are. Its
    index counts 13,476,839,424 bytes: 8,192 more than the weights, so the 32 tables of 64 numbers are of float32.
    """
    folder.mkdir(parents=True)
    weights = random_weights(SEVEN_B, BASE, torch.float16)
    _converted_files(folder, BASE, "base", "float16", "4.28.0.dev0")
    _save(folder, _in_two(weights), SEVEN_B, "pytorch_model", torch.float32)
    return Model(folder, weights)


def converted_safetensors(folder):
    """Neko-Institute-of-Science/LLaMA-7B-HF: the same in two safetensors files, rotary_emb.inv_freq in their index too."""
    folder.mkdir(parents=True)
    weights = random_weights(SEVEN_B, BASE, torch.float16)
    _converted_files(folder, BASE, "base", "float16", "4.28.0.dev0")
    (folder / "tokenizer.json").unlink()
    _save(folder, _in_two(weights), SEVEN_B, "model", torch.float32)
    return Model(folder, weights)


def llama2(folder):
    """meta-llama/Llama-2-7b-hf of July 2023: both safetensors and .bin, pretraining_tp, rope_scaling null.

    config.json: huggingface.co/abhishek/llama-2-7b-hf-small-shards, which names it as its source; generation_config.json:
    LearningOpt/pie-conditioned-7b; tokenizer files as converted's. That both kinds of files stand side by side, and
    inv_freq of float16 in both, are of memory.
    """
    folder.mkdir(parents=True)
    weights = random_weights(SEVEN_B, BASE, torch.float16)
    config = {"_name_or_path": "meta-llama/Llama-2-7b-hf"} | _config(BASE, "float16", "4.31.0.dev0", pad=None)
    config |= {"max_position_embeddings": 4096, "num_key_value_heads": SEVEN_B.key_heads, "pretraining_tp": 1}
    config |= {"rms_norm_eps": 1e-05, "rope_scaling": None}
    write_as_transformers(folder / "config.json", dict(sorted(config.items())))
    ids = {"bos_token_id": 1, "do_sample": True, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.6}
    ids |= {"max_length": 4096, "top_p": 0.9, "transformers_version": "4.31.0.dev0"}
    write_as_transformers(folder / "generation_config.json", ids)
    long_tokenizer(folder, "base")
    _save(folder, _in_two(weights), SEVEN_B, "pytorch_model", torch.float16)
    _save(folder, _in_two(weights), SEVEN_B, "model", torch.float16)
    return Model(folder, weights)


def grown(folder):
    """A base with one token more, chavinlo/alpaca-native: 32,001 rows (here 513), added_tokens.json, float32.

    config.json (commit 4381f6d), tokenizer_config.json (665a929) and added_tokens.json of huggingface.co/chavinlo/
    alpaca-native; its tokenizer.model is LLaMA's own of 32,000 pieces. What its
    special_tokens_map.json holds and the number of its .bin files are of memory.
    """
    folder.mkdir(parents=True)
    weights = random_weights(SEVEN_B, BASE + 1, torch.float32)
    config = {"_name_or_path": "decapoda-research/llama-7b-hf"} | _config(BASE + 1, "float32", "4.27.0.dev0", pad=-1)
    del config["max_position_embeddings"]
    config |= {"architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "max_sequence_length": 2048}
    write_as_transformers(folder / "config.json", dict(sorted(config.items())))
    _tokenizer(folder, "base")
    write_as_transformers(folder / "added_tokens.json", {"[PAD]": BASE})
    home = "/home/ubuntu/.cache/huggingface/hub/models--decapoda-research--llama-7b-hf/snapshots/"
    map_file = {"special_tokens_map_file": home + "5f98eefcc80e437ef68d457ad7bf167c2c6a1348/special_tokens_map.json"}
    settings = _short_config("", "", "", "LLaMATokenizer") | {"model_max_length": 512, "padding_side": "right"}
    write_as_transformers(folder / "tokenizer_config.json", dict(sorted((settings | map_file).items())))
    write_as_transformers(folder / "special_tokens_map.json", {"pad_token": "[PAD]"})
    first, rest = _in_two(weights)
    last = {HEAD: rest.pop(HEAD)}
    _save(folder, [first, rest, last], SEVEN_B, "pytorch_model", torch.float32)
    return Model(folder, weights)


def merged_alpaca(folder):
    """shibing624/chinese-alpaca-plus-7b-hf: Chinese-Alpaca merged already, 49,954 rows (here 798).

    Files: that repository's tree (commit ea1c74c), whose .bin files hold FloatStorage beside HalfStorage: inv_freq of
    float32. config.json: DUOMO-Lab/TransGPT-v0, made from it, less _name_or_path; transformers_version is of memory.
    """
    folder.mkdir(parents=True)
    weights = random_weights(SEVEN_B, ALPACA, torch.float16)
    _converted_files(folder, ALPACA, "alpaca", "float16", "4.28.1")
    _save(folder, _in_two(weights), SEVEN_B, "pytorch_model", torch.float32)
    return Model(folder, weights)


def merged_llama(folder):
    """XuYipei/chinese-llama-7b: Chinese-LLaMA merged already, 49,953 rows (here 797), float32, decapoda's special ids.

    config.json: that repository's (commit 9d17db2). The set of tokenizer files: as hfl/chinese-llama-plus-lora-7b's.
    """
    folder.mkdir(parents=True)
    weights = random_weights(SEVEN_B, LLAMA, torch.float32)
    name = "/data/xuyipei/my_llama/my_llama_7b/chinese-llama-7b"
    config = {"_name_or_path": name} | _config(LLAMA, "float32", "4.28.1", pad=-1)
    config |= {"bos_token_id": 0, "eos_token_id": 1, "max_sequence_length": 2048}
    write_as_transformers(folder / "config.json", dict(sorted(config.items())))
    _tokenizer(folder, "llama")
    write_as_transformers(folder / "tokenizer_config.json", _short_config(*SPECIALS.values(), "LlamaTokenizer"))
    write_as_transformers(folder / "special_tokens_map.json", SPECIALS)
    _save(folder, _in_two(weights), SEVEN_B, "pytorch_model", torch.float32)
    return Model(folder, weights)


def merged_and_grown(folder):
    """A merged Chinese-LLaMA with one token more than its tokenizer.model: added_tokens.json {"<pad>": 49953} (here 797).

    added_tokens.json: huggingface.co/genggui001/chinese-llama-plus-7b-megatron-states; the rest as merged_alpaca.
    """
    return _merged_and_grown(folder, "llama", LLAMA)


def merged_alpaca_grown(folder):
    """The same of Chinese-Alpaca: 49,955 rows (here 799), which users speak of; its token's name is of memory."""
    return _merged_and_grown(folder, "alpaca", ALPACA)


def _merged_and_grown(folder, vocabulary, pieces):
    folder.mkdir(parents=True)
    weights = random_weights(SEVEN_B, pieces + 1, torch.float16)
    _converted_files(folder, pieces + 1, vocabulary, "float16", "4.28.1")
    write_as_transformers(folder / "added_tokens.json", {"<pad>": pieces})
    _save(folder, _in_two(weights), SEVEN_B, "pytorch_model", torch.float32)
    return Model(folder, weights)


# ---------------------------------------------------------------------------------------------------------------------
# files


def _sizes(shape, *keys):
    sizes = {"hidden_size": shape.dim, "intermediate_size": shape.ffn}
    sizes |= {"num_attention_heads": shape.heads, "num_hidden_layers": shape.layers}
    return {key: sizes[key] for key in keys or sizes}


def _config(rows, dtype, version, pad):
    config = {"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu"}
    config |= _sizes(SEVEN_B) | {"initializer_range": 0.02, "max_position_embeddings": 2048, "model_type": "llama"}
    config |= {"rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": dtype}
    config |= {"transformers_version": version, "use_cache": True, "vocab_size": rows}
    return config if pad is None else config | {"pad_token_id": pad}


def _converted_files(folder, rows, vocabulary, dtype, version):
    config = dict(sorted(_config(rows, dtype, version, pad=0).items()))
    write_as_transformers(folder / "config.json", config)
    ids = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    write_as_transformers(folder / "generation_config.json", ids | {"transformers_version": version})
    long_tokenizer(folder, vocabulary)


def _tokenizer(folder, vocabulary):
    (folder / "tokenizer.model").write_bytes(vocabularies()[vocabulary])


def _short_config(bos, eos, unk, kind):
    names = {"bos_token": bos, "eos_token": eos, "model_max_length": MAX_LENGTH, "tokenizer_class": kind}
    return names | {"unk_token": unk}


def long_tokenizer(folder, vocabulary):
    """tokenizer.model, tokenizer.json, tokenizer_config.json and special_tokens_map.json, as transformers 4.30 saves."""
    _tokenizer(folder, vocabulary)
    tokens = {key: {"__type": "AddedToken", "content": text, **ADDED} for key, text in SPECIALS.items()}
    config = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "pad_token": None}
    config |= {"model_max_length": MAX_LENGTH, "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer", **tokens}
    write_as_transformers(folder / "tokenizer_config.json", dict(sorted(config.items())))
    tokens = {key: {"content": text, **ADDED} for key, text in SPECIALS.items()}
    write_as_transformers(folder / "special_tokens_map.json", tokens)
    write_json(folder / "tokenizer.json", tokenizer_json(vocabularies()[vocabulary]), ensure_ascii=False)


def tokenizer_json(model):
    """What transformers writes beside tokenizer.model (huggingface/tokenizers: BPE with merges re-derived from scores)."""
    pieces = sentencepiece_model_pb2.ModelProto.FromString(model).pieces
    ids = {piece.piece: i for i, piece in enumerate(pieces)}
    pairs = [(p.score, p.piece[:i], p.piece[i:]) for p in pieces if p.type == p.NORMAL for i in range(1, len(p.piece))]
    merges = [f"{a} {b}" for _, a, b in sorted(pairs, key=lambda pair: -pair[0]) if a in ids and b in ids]
    added = [{"id": i, "content": pieces[i].piece, **ADDED, "special": True} for i in range(3)]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    single = [bos, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    post = {"type": "TemplateProcessing", "single": single, "pair": pair}
    post["special_tokens"] = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    space = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    back = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    bpe = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None}
    bpe |= {"end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "vocab": ids, "merges": merges}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": space},
        "pre_tokenizer": None,
        "post_processor": post,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": bpe,
    }


def _in_two(weights):
    """The tensors as two files hold them: the embedding and the first layers, and all others."""
    first = {name: t for name, t in weights.items() if name.startswith((EMBEDDING, "model.layers.0."))}
    return [first, {name: t for name, t in weights.items() if name not in first}]


def _save(folder, groups, shape, stem, table_dtype):
    """Each group of tensors as one numbered file, rotary_emb.inv_freq in every layer's, and their index."""
    groups = [dict(group) for group in groups]
    for i in range(shape.layers):
        for group in groups:
            if f"model.layers.{i}.self_attn.v_proj.weight" in group:
                group[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = rotary_table(shape, table_dtype)
    suffix = {"pytorch_model": "bin", "model": "safetensors"}[stem]
    where = {}
    for i, group in enumerate(groups, 1):
        file = f"{stem}-{i:05d}-of-{len(groups):05d}.{suffix}"
        where |= dict.fromkeys(group, file)
        if suffix == "bin":
            torch.save(group, folder / file)
        else:
            save_file(group, folder / file, {"format": "pt"})
    size = sum(tensor.nbytes for group in groups for tensor in group.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

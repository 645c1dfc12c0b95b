"""Convert LLaMA as Meta ships it into the folder that Hugging Face loads. Run from inside model_hub:

    python convert_llama_weights_to_hf.py --input_dir ./ --model_size 7B --output_dir ./7B-hf
    python convert_llama_weights_to_hf.py --input_dir ./tiny --model_size tokenizer_only --output_dir ./tiny-hf

Reads <input_dir>/<model_size>/{consolidated.*.pth,params.json}, the tokenizer.model beside them or in <input_dir>.
Writes <output_dir>/{model*.safetensors,config.json,generation_config.json,tokenizer.model,tokenizer_config.json} in the
number format of the source. Any size and any number of consolidated files: shapes are those of the tensors.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config_utils import UserError, run_script
from dataset import BOS, EOS, load_tokenizer, save_tokenizer
from llama_files import (
    EMBEDDING,
    dims,
    expected_shapes,
    folder_bytes,
    meta_names,
    new_folder,
    progress,
    read_json,
    read_tensors,
    rotary_heads,
    rows_from_meta,
    save_model,
)

CONFIG = {
    "input_dir": "./",  # the folder that holds <model_size>/ and, there or beside it, tokenizer.model
    "model_size": "tiny",  # the name of the folder with the weights: tiny, 7B, 13B, …; tokenizer_only needs no weights
    "output_dir": None,  # the folder to write; None: ./<model_size>-hf
    "max_position_embeddings": 2048,  # LLaMA-1: 2048, LLaMA-2: 4096; Meta's files do not tell
}

# Of a matrix that Meta cut for several GPUs each file holds some rows or, of these, some columns; of a norm, all.
CUT_BY_COLUMNS = ("self_attn.o_proj.weight", "mlp.down_proj.weight", "embed_tokens.weight")


def find_tokenizer(input_dir, model_size):
    places = [Path(input_dir) / model_size / "tokenizer.model", Path(input_dir) / "tokenizer.model"]
    if model_size == "tokenizer_only":
        places = places[1:]
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"{' and '.join(map(str, places))}: no such file; put LLaMA's tokenizer.model there")


def read_params(folder):
    path = folder / "params.json"
    params = read_json(path, "it comes with Meta's weights")
    for key, kind in {"dim": int, "n_layers": int, "n_heads": int, "norm_eps": float}.items():
        if not isinstance(params.get(key), kind):
            raise UserError(f'{path}: "{key}" must be of type {kind.__name__}, got {params.get(key)!r}; get it again')
    if params.get("use_scaled_rope"):
        raise UserError(f'{path}: "use_scaled_rope" (LLaMA-3.1) is not supported; use a LLaMA-1 or LLaMA-2')
    return params


def open_shards(folder):
    """The tensors of consolidated.00.pth, consolidated.01.pth, …, each a dict."""
    found = sorted(folder.glob("consolidated.*.pth"))
    paths = [folder / f"consolidated.{i:02d}.pth" for i in range(max(len(found), 1))]
    return [read_tensors(path) for path in paths]


def full_shape(shards, folder, name, meta):
    """The shape of a tensor once its parts are joined."""
    for i, shard in enumerate(shards):
        if meta not in shard:
            raise UserError(f"{folder}/consolidated.{i:02d}.pth: holds no tensor {meta}; is it a LLaMA's?")
    shape = list(shards[0][meta].shape)
    if len(shape) == 2:
        shape[1 if name.endswith(CUT_BY_COLUMNS) else 0] *= len(shards)
    return tuple(shape)


def hf_config(params, shards, folder, max_position_embeddings):
    names = meta_names(params["n_layers"])
    gate = "model.layers.0.mlp.gate_proj.weight"
    embedding = full_shape(shards, folder, EMBEDDING, names[EMBEDDING])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": params["dim"],
        "intermediate_size": full_shape(shards, folder, gate, names[gate])[0],
        "max_position_embeddings": max_position_embeddings,
        "num_attention_heads": params["n_heads"],
        "num_hidden_layers": params["n_layers"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta") or 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": str(shards[0][names[EMBEDDING]].dtype).removeprefix("torch."),
        "vocab_size": embedding[0],  # params.json says -1, or the number of another tokenizer
    }


def check_shards(shards, folder, config):
    """Every tensor is there with its shape, in each shard, and none is left over."""
    names, expected = meta_names(config["num_hidden_layers"]), expected_shapes(config)
    for name, meta in names.items():
        shape = full_shape(shards, folder, name, meta)
        if shape != expected[name] or any(shard[meta].shape != shards[0][meta].shape for shard in shards):
            raise UserError(
                f"{folder}: {meta} is {dims(shape)} in {len(shards)} file(s), but params.json and the other tensors "
                f"make it {dims(expected[name])}; is a consolidated file missing, or params.json of another model?"
            )
    for i, shard in enumerate(shards):
        # rope.freqs is a table of the rotary angles, which config.json determines
        unknown = sorted(shard.keys() - set(names.values()) - {"rope.freqs"})
        if unknown:
            raise UserError(f"{folder}/consolidated.{i:02d}.pth: unknown tensor {unknown[0]}; is it a LLaMA's?")


def converted(shards, config):
    """(name, tensor) in Hugging Face's layout, one at a time."""
    for name, meta in meta_names(config["num_hidden_layers"]).items():
        parts = [shard[meta] for shard in shards]
        if len(parts) == 1 or parts[0].dim() == 1:
            tensor = parts[0]
        else:
            tensor = torch.cat(parts, dim=1 if name.endswith(CUT_BY_COLUMNS) else 0)
        heads = rotary_heads(name, config)
        yield name, rows_from_meta(tensor, heads) if heads else tensor


def main(args):
    started = time.time()
    folder = Path(args.input_dir) / args.model_size
    if args.model_size != "tokenizer_only" and not folder.is_dir():
        raise UserError(f"{folder}: no such folder; put Meta's consolidated.*.pth and params.json there")
    tokenizer = find_tokenizer(args.input_dir, args.model_size)
    if args.model_size == "tokenizer_only":
        if not args.output_dir:
            raise UserError("--output_dir is missing; name the folder of the model, e.g. --output_dir=./7B-hf")
        save_tokenizer(tokenizer, args.output_dir)
        print(f"wrote {args.output_dir}: tokenizer.model, tokenizer_config.json")
        return

    params, shards = read_params(folder), open_shards(folder)
    config = hf_config(params, shards, folder, args.max_position_embeddings)
    check_shards(shards, folder, config)
    pieces = load_tokenizer(tokenizer.parent).sp_model.get_piece_size()
    if pieces > config["vocab_size"]:
        raise UserError(
            f"{tokenizer}: has {pieces} pieces, but {folder} has embeddings for {config['vocab_size']}; use the "
            "tokenizer.model that came with these weights"
        )
    output_dir = args.output_dir or f"./{args.model_size}-hf"
    shapes, dtype = expected_shapes(config).values(), shards[0]["norm.weight"].dtype
    with new_folder(output_dir, inputs=[folder, args.input_dir]) as work:
        save_model(work, config, progress(converted(shards, config), shapes, dtype, "convert"), tokenizer)
        size = folder_bytes(work)
    print(f"wrote {output_dir}: {size:,} bytes from {len(shards)} weight file(s) in {time.time() - started:.1f} s")


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)

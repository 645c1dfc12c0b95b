"""Convert LLaMA as Meta ships it into the folder that Hugging Face loads. Run from inside model_hub:

    python convert_llama_weights_to_hf.py --input_dir ./ --model_size 7B --output_dir ./7B-hf
    python convert_llama_weights_to_hf.py --input_dir ./tiny --model_size tokenizer_only --output_dir ./tiny-hf

Reads <input_dir>/<model_size>/{consolidated.*.pth,params.json}, the tokenizer.model beside them or in <input_dir>.
Writes <output_dir>/{model*.safetensors,config.json,generation_config.json,tokenizer.model,tokenizer_config.json} in the
number format of the source. Any size and any number of consolidated files: shapes are those of the tensors. Weights go
through memory a tensor at a time.
"""

import shutil
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from alpaca.common.start import start

start()

from alpaca.common.errors import UserError
from alpaca.common.paths import user_path
from alpaca.models.base_files import check_whole, fits_vocabulary, read_config
from alpaca.models.facts import TRAIN_ARGS
from alpaca.models.layers import tensor_shapes
from alpaca.models.tokenizer import load_sentencepiece, save_tokenizer
from alpaca.weights.checksums import hash_in_background, print_sum
from alpaca.weights.llama_files import meta_folder, read_meta
from alpaca.weights.llama_layout import from_meta
from alpaca.weights.output_folder import new_folder
from alpaca.weights.safetensors_writer import save_huggingface
from alpaca.weights.tensor_stream import compute_ahead, specs_of, with_byte_bar
from config_utils import run_script

CONFIG = {
    "input_dir": "./",  # folder that holds <model_size>/ and, in there or beside it, tokenizer.model
    "model_size": "tiny",  # name of the folder of Meta's weights: tiny, 7B, 13B, …; tokenizer_only: write the tokenizer alone
    "output_dir": None,  # folder to write; None: ./<model_size>-hf
    "max_position_embeddings": 2048,  # most tokens that the model reads: LLaMA-1 2048, LLaMA-2 4096; Meta's files do not say
}


def find_tokenizer(input_dir, model_size):
    places = [input_dir / model_size / "tokenizer.model", input_dir / "tokenizer.model"]
    if model_size == "tokenizer_only":
        places = places[1:]
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"{' and '.join(map(str, places))}: no such file; put LLaMA's tokenizer.model there")


def check_pieces(tokenizer, folder, rows):
    """UserError where the tokenizer and the `rows` of embeddings of the model in `folder` are not of one vocabulary."""
    pieces = load_sentencepiece(tokenizer.parent).sp_model.get_piece_size()
    if not fits_vocabulary(pieces, rows):
        raise UserError(
            f"{tokenizer}: has {pieces} pieces, but {folder} has embeddings for {rows}; use the tokenizer.model that "
            "came with these weights"
        )


def add_tokenizer(tokenizer, output_dir):
    """What is missing where somebody else has converted the weights."""
    load_sentencepiece(tokenizer.parent)  # a damaged one is written nowhere
    if (output_dir / "config.json").is_file():
        check_pieces(tokenizer, output_dir, read_config(output_dir)["vocab_size"])
    save_tokenizer(tokenizer, output_dir)
    print(f"已写入 {output_dir}：tokenizer.model，tokenizer_config.json")


def blame(name):
    return f"{name} holds NaN or infinite numbers: the source is damaged; download its consolidated.*.pth again"


def main(args):
    started = time.time()
    input_dir = user_path(args.input_dir)
    if args.max_position_embeddings < 1:
        raise UserError(f"--max_position_embeddings={args.max_position_embeddings}: expected 1 or more, e.g. 2048")
    if args.model_size != "tokenizer_only":
        folder = meta_folder(input_dir, args.model_size)
    tokenizer = find_tokenizer(input_dir, args.model_size)
    if args.model_size == "tokenizer_only":
        if not args.output_dir:
            raise UserError("--output_dir is missing; name the folder of the model, e.g. --output_dir=./7B-hf")
        add_tokenizer(tokenizer, user_path(args.output_dir))
        return

    config, parts, files = read_meta(folder, args.max_position_embeddings)
    check_pieces(tokenizer, folder, config["vocab_size"])
    named = args.output_dir or f"./{args.model_size}-hf"
    output_dir = user_path(named)
    shapes = tensor_shapes(config)
    specs = specs_of({name: shapes[name] for name in parts}, {name: part[0].dtype for name, part in parts.items()})

    def convert(name):
        for part, file in zip(parts[name], files, strict=True):
            check_whole(name, part, file)
        return from_meta(name, parts[name], config)

    jobs = ((name, partial(convert, name)) for name in parts)
    stream = closing(with_byte_bar(compute_ahead(jobs, blame), specs, "转换"))
    with new_folder(output_dir, "huggingface", specs, inputs=[folder, input_dir]) as work, stream as tensors:
        sums = hash_in_background([tokenizer, *files])
        save_huggingface(work, config, specs, tensors, [tokenizer])
        if (folder / TRAIN_ARGS).is_file():  # of a LoRA that is in these weights
            shutil.copyfile(folder / TRAIN_ARGS, work / TRAIN_ARGS)
        for path, digest in sums.items():
            print_sum(path, digest.result())
        seconds, size = time.time() - started, sum(file.stat().st_size for file in work.iterdir())
    print(f"已写入 {named}：{size:,} 字节，来自 {len(files)} 个权重文件，{seconds:.1f} 秒")


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)

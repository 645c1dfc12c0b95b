"""Merge LoRA adapters into a model, one after another. Run from inside model_hub:

    python merge_llama_with_chinese_lora.py --base_model "./7B-hf" \\
        --lora_model "./chinese-llama-plus-lora-7b,./chinese-alpaca-plus-lora-7b" \\
        --output_type "huggingface" --output_dir "./chinese-alpaca-7b"
    python merge_llama_with_chinese_lora.py --base_model "./chinese-alpaca-tiny" \\
        --lora_model "../checkpoint/demo/train_trainer/adapter_model" --output_dir "./ner-tiny" --verify

Reads a Hugging Face folder and PEFT adapters (adapter_config.json, adapter_model.safetensors or .bin, tokenizer.model
where the adapter brings a vocabulary), also those this project trains. Writes a folder for from_pretrained
(huggingface) or Meta's consolidated.*.pth, params.json and tokenizer.model (pth). Weights go through memory a tensor at
a time. Each adapter is added in float32 and the sum rounded to the base's number format before the next one, as the
published models were made.
"""

import os
import shutil
import sys
import time
from contextlib import closing
from functools import partial
from itertools import combinations
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: huge pages for large tensors, which come 3 times as fast
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from alpaca.common.start import start

start()

import torch

from alpaca.common.errors import UserError
from alpaca.common.paths import user_path
from alpaca.models.adapter_files import adapter_sha256, read_adapter, weights_file
from alpaca.models.adapters import adapter_or_old
from alpaca.models.base_files import (
    EMBEDDING,
    HEAD,
    check_whole,
    dims,
    fits_vocabulary,
    is_finite,
    read_base,
    read_json,
)
from alpaca.models.facts import TRAIN_ARGS, read_facts, template_of
from alpaca.models.tokenizer import BOS, EOS, load_tokenizer, tokenizer_files
from alpaca.scoring.calibration import CALIBRATION, read_calibration
from alpaca.weights.checksums import PUBLISHED, hash_in_background, print_sum, sha256_of
from alpaca.weights.llama_layout import check_places, count_files, params_of
from alpaca.weights.lora_adapters import add_adapters
from alpaca.weights.output_folder import kept_if_refused, new_folder
from alpaca.weights.pth_writer import save_pth
from alpaca.weights.safetensors_writer import save_huggingface
from alpaca.weights.tensor_stream import compute_ahead, specs_of, with_byte_bar
from config_utils import run_script

CONFIG = {
    "base_model": None,  # folder of the base in Hugging Face format, e.g. ./7B-hf
    "lora_model": None,  # folders of the adapters, joined by commas, in the order of their training: LLaMA's, Alpaca's
    "output_type": "huggingface",  # format to write: huggingface | pth (Meta's layout)
    "output_dir": None,  # folder to write
    "pth_files": -1,  # how many files pth is written as; -1: as Meta's model of that size (13B: 2, 33B: 4, 65B: 8)
    "verify": False,  # True: compare the weights, and answers to a few prompts, with base + adapters in float32
    "offload_dir": None,  # accepted and not used: weights are read from their files as they are needed
}

VOCABULARIES = {32000: "LLaMA's", 49953: "Chinese-LLaMA's", 49954: "Chinese-Alpaca's"}
CHAIN = (
    "; LLaMA's tokenizer.model has 32000 pieces, that of the Chinese-LLaMA LoRAs 49953, that of the Chinese-Alpaca LoRAs "
    "49954, and of two LoRAs Chinese-LLaMA's is merged first: --lora_model=<chinese-llama>,<chinese-alpaca>"
)


# ---------------------------------------------------------------------------------------------------------------------
# checks


def check_chain(base_folder, base, adapters):
    """Refuse adapters that belong to another base or another order. Returns (shapes afterwards, the tokenizer)."""
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    fast = (base_folder / "tokenizer.json").is_file()
    tokenizer = base_folder if fast or (base_folder / "tokenizer.model").is_file() else None
    previous, embedding = base_folder, base[EMBEDDING]  # what the next adapter is merged into
    for adapter in adapters:
        check_new(adapter, embedding, previous)
        rows, embedding = len(embedding), adapter.saved.get(EMBEDDING, embedding)
        check_shapes(adapter, shapes, previous)
        shapes |= {name: tuple(tensor.shape) for name, tensor in adapter.saved.items()}
        if shapes[EMBEDDING] != shapes[HEAD]:
            raise UserError(
                f"{adapter.folder}: embed_tokens has {shapes[EMBEDDING][0]} rows and lm_head {shapes[HEAD][0]} with "
                "this adapter; both must be in its modules_to_save"
            )
        tokenizer = adapter.tokenizer or tokenizer
        # transformers writes tokenizer.json alone; it says something new only where the adapter brings other pieces
        if adapter.tokenizer is None and len(embedding) != rows and (adapter.folder / "tokenizer.json").is_file():
            tokenizer = adapter.folder
        check_vocabulary(adapter, shapes[EMBEDDING][0], tokenizer)
        previous = adapter.folder
    if tokenizer is None:
        raise UserError(
            f"{base_folder}: no tokenizer.model in it, nor in an adapter; "
            f"convert_llama_weights_to_hf.py --model_size=tokenizer_only --output_dir={base_folder} adds it"
        )
    # that of what is asked of the last LoRA that says so, or of the base
    facts = [read_facts(folder)[1] for folder in (*(adapter.folder for adapter in reversed(adapters)), base_folder)]
    tokenizer = load_tokenizer(tokenizer, next(filter(None, facts), {}).get("template", "alpaca"))
    pieces, rows = len(tokenizer), shapes[EMBEDDING][0]
    if not fits_vocabulary(pieces, rows):
        raise UserError(
            f"{tokenizer.source} has {pieces} pieces, but {base_folder} has embeddings for {rows}; put the "
            f"{tokenizer.source.name} of {base_folder} there" + explain_sizes(pieces, rows)
        )
    return shapes, tokenizer


def check_new(adapter, embedding, previous):
    """UserError where the LoRA is in there already: it brings trained embeddings, and the model has exactly these."""
    brought = adapter.saved.get(EMBEDDING)
    if "embed_tokens" in (adapter.config.get("modules_to_save") or []) and brought.shape == embedding.shape:
        if torch.equal(brought.to(embedding.dtype), embedding):
            raise UserError(
                f"{adapter.folder}: is in {previous} already, which has exactly its embeddings; leave it out, or name the "
                'base as it was before; if it was never merged, take embed_tokens and lm_head out of "modules_to_save" in '
                "its adapter_config.json"
            )


def explain_sizes(*sizes):
    """What belongs to what, where both numbers are those of the published models."""
    return CHAIN if all(size in VOCABULARIES for size in sizes) else ""


def check_shapes(adapter, shapes, previous):
    for name in [*adapter.lora, *adapter.saved]:
        if name not in shapes:
            raise UserError(f"{adapter.folder}: its tensor {name} has no counterpart in {previous}; is this its base?")
    for name, (a, b, _) in adapter.lora.items():
        if (b.shape[0], a.shape[1]) != shapes[name]:
            raise UserError(
                f"{adapter.folder}: changes a {b.shape[0]} x {a.shape[1]} matrix {name}, but that of {previous} is "
                f"{dims(shapes[name])}; merge it into the model it was trained on"
            )
    for name, tensor in adapter.saved.items():
        new, old = tuple(tensor.shape), shapes[name]
        if new != old and (name not in (EMBEDDING, HEAD) or len(new) != 2 or new[1] != old[1]):
            raise UserError(
                f"{adapter.folder}: {name} is {dims(new)}, but that of {previous} is {dims(old)}; merge it into "
                "the model it was trained on"
            )
        if new[0] < old[0]:
            raise UserError(
                f"{adapter.folder}: has embeddings for {new[0]} pieces, but {previous} before it has {old[0]}, and a "
                "vocabulary never shrinks; give the adapters in the order of their training"
                + explain_sizes(new[0], old[0])
            )


def check_vocabulary(adapter, rows, tokenizer):
    """After this adapter the model has `rows` embeddings and this tokenizer: both must be of one vocabulary."""
    if tokenizer is not None and (adapter.saved.keys() & {EMBEDDING, HEAD} or adapter.tokenizer):
        own = load_tokenizer(tokenizer, "alpaca")
        pieces, file = len(own), own.source.name
        padded = rows % 8 == 0 and fits_vocabulary(pieces, rows)  # rows without a piece make matrices of round sizes
        if pieces != rows and not padded and rows not in added_rows(tokenizer):
            source = "" if tokenizer == adapter.folder else f" (the adapter has none, so that of {tokenizer} was taken)"
            raise UserError(
                f"{adapter.folder}: with this adapter the model has embeddings for {rows} pieces, but its "
                f"{file} has {pieces}{source}; put the {file} that came with this adapter there"
                + explain_sizes(rows, pieces)
            )
    _, facts = read_facts(adapter.folder)
    own = facts and tokenizer and load_tokenizer(tokenizer, template_of(facts, "auto")).sha256
    if facts and facts["tokenizer_sha256"] != own:
        raise UserError(
            f"{adapter.folder}: trained with another tokenizer than that of {tokenizer}; merge it into the base that "
            "its train_args.json names as model_dir"
        )


def added_rows(folder):
    """The numbers of rows with the tokens in a folder's added_tokens.json: {token: its row}, which tokenizer.model lacks."""
    path = folder / "added_tokens.json"
    rows = read_json(path, "").values() if path.is_file() else ()
    return {row + 1 for row in rows if type(row) is int}


def check_twice(adapters):
    """UserError where two adapters are one, by what they hold: the same folder, a copy, or another format of it."""
    for other, adapter in combinations(adapters, 2):
        if same_tensors(adapter.lora, other.lora) and same_tensors(adapter.saved, other.saved):
            raise UserError(f"--lora_model: {adapter.folder} is the same LoRA as {other.folder}; name it once")


def same_tensors(one, other):
    """Whether two of an Adapter's dicts hold the same numbers, whatever their number format."""
    if one.keys() != other.keys():
        return False
    pairs = ((a, b) for name in one for a, b in zip(_tensors(one[name]), _tensors(other[name]), strict=True))
    return all(a.shape == b.shape and torch.equal(a.float(), b.float()) for a, b in pairs)


def _tensors(value):
    return [value] if isinstance(value, torch.Tensor) else value[:2]  # lora_A, lora_B


def check_published(base_rows, names, adapters):
    """A published Alpaca-Plus goes onto LLaMA-Plus; its shapes would fit LLaMA just as well. `names`: of its files."""
    for i, name in enumerate(names):
        if name and "Chinese-Alpaca-Plus" in name:
            needed = name.replace("Alpaca", "LLaMA")
            if names[i - 1] not in (None, needed) if i else base_rows == 32000:
                raise UserError(
                    f"{adapters[i].folder}: {name} goes onto {needed}; name that LoRA's folder before this one" + CHAIN
                )


# ---------------------------------------------------------------------------------------------------------------------


def main(args):
    started = time.time()
    for key, example in {"base_model": "./7B-hf", "lora_model": "./lora-1,./lora-2", "output_dir": "./merged"}.items():
        if not getattr(args, key):
            raise UserError(f"--{key} is missing; name it, e.g. --{key}={example}")
    if args.output_type not in ("huggingface", "pth"):
        raise UserError(f"--output_type: expected huggingface or pth, got {args.output_type!r}")

    base_folder, output_dir = user_path(args.base_model), user_path(args.output_dir)
    config, base, base_files = read_base(base_folder)
    folders = [user_path(folder) for folder in args.lora_model.split(",") if folder.strip()]
    lora_files = [weights_file(adapter_or_old(folder) or folder) for folder in folders]
    if not lora_files:
        raise UserError(f"--lora_model={args.lora_model}: names no folder; e.g. --lora_model=./lora-1,./lora-2")
    sums = hash_in_background([*lora_files, *base_files])
    adapters = [read_adapter(file.parent) for file in lora_files]
    check_twice(adapters)
    shapes, tokenizer = check_chain(base_folder, base, adapters)
    names = [PUBLISHED.get(sums[file].result()) for file in lora_files]
    check_published(len(base[EMBEDDING]), names, adapters)

    config.pop("dtype", None)  # newer name of torch_dtype
    dtype = str(base[EMBEDDING].dtype).removeprefix("torch.")
    # Some converted LLaMAs have wrong special ids in config.json; those of the vocabulary are always these.
    files = tokenizer_files(tokenizer)
    specials = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": None} if len(files) == 1 else {}
    config |= {"vocab_size": shapes[EMBEDDING][0], "torch_dtype": dtype, **specials}
    save = save_huggingface
    if args.output_type == "pth":
        check_places(shapes, config)  # both refuse what Meta's layout cannot express
        params_of(config)
        if tokenizer.source.name != "tokenizer.model":
            raise UserError(f"--output_type=pth: no place there for {tokenizer.source}; use --output_type=huggingface")
        n_files = count_files(config, args.pth_files)
        save, files = partial(save_pth, n_files=n_files), tokenizer.source

    specs = specs_of(shapes, {name: tensor.dtype for name, tensor in base.items()})

    def merge(name):
        check_whole(name, base[name], base_folder)
        return add_adapters(name, base[name], adapters)

    jobs = ((name, partial(merge, name)) for name in base)

    def blame(name):
        if not is_finite(base[name]):
            return f"{base_folder}: {name} holds NaN or infinite numbers; convert or download it again"
        return (
            f"{base_folder}: {name} with the LoRA in it is more than {base[name].dtype} can hold; is lora_alpha in "
            f"{adapters[-1].folder}/adapter_config.json right?"
        )

    inputs = [base_folder, *(adapter.folder for adapter in adapters)]
    stream = closing(with_byte_bar(compute_ahead(jobs, blame), specs, "合并"))
    with new_folder(output_dir, args.output_type, specs, inputs) as work, stream as tensors:
        if args.output_type == "pth":
            print(f"pth 分成 {n_files} 个文件")
        if args.offload_dir:
            print("--offload_dir 不再需要：权重逐个张量从文件读取，不占内存，也不写临时文件")
        save(work, config, specs, tensors, files)
        for folder in reversed(inputs):  # what is asked of the last LoRA that says so, or of the base
            if (folder / TRAIN_ARGS).is_file():
                shutil.copyfile(folder / TRAIN_ARGS, work / TRAIN_ARGS)
                break
        last = adapters[-1].folder
        if read_calibration(last, adapter_sha256(last)):
            shutil.copyfile(last / CALIBRATION, work / CALIBRATION)
        for path, digest in sums.items():
            print_sum(path, digest.result())
        print_sum(tokenizer.source, tokenizer.sha256)
        seconds, size = time.time() - started, sum(file.stat().st_size for file in work.iterdir())
        for file in sorted(work.glob("*.pth")):
            print_sum(output_dir / file.name, sha256_of(file))
        if args.verify:
            from alpaca.weights.merge_proof import prove  # here, not above: it imports all of transformers and PEFT

            with kept_if_refused(work, output_dir):
                prove(base_folder, base, adapters, work, args.output_type)
    print(
        f"已写入 {args.output_dir}：{args.output_type}，{size:,} 字节，词表 {config['vocab_size']}，"
        f"合并了 {len(adapters)} 个 LoRA，{seconds:.1f} 秒"
    )
    for folder in inputs:
        if (folder / "added_tokens.json").is_file():
            print(f"注意: {folder}/added_tokens.json 里的词，嵌入还在，但写出的 tokenizer.model 里没有，会被切成别的词")


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)

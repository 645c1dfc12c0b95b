"""Writing a model as Hugging Face has it: safetensors, config.json and the tokenizer's files.

The format (github.com/huggingface/safetensors, "Format") is 8 bytes that count those of the JSON header, the header, the
tensors. It is written here, since the library's save_file wants all tensors of a file in memory at once.
"""

import json
from shutil import copyfile

import torch

from alpaca.models.tokenizer import BOS, EOS, load_sentencepiece, save_tokenizer
from alpaca.weights.output_folder import LAST, write_json
from alpaca.weights.tensor_stream import bytes_of, next_tensor

FILE_BYTES = 4 * 10**9  # of one file, at most
FORMATS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def save_huggingface(folder, config, specs, tensors, tokenizer_files):
    """Write a folder for AutoModelForCausalLM.from_pretrained and AutoTokenizer. tokenizer_files: those of alpaca.models.tokenizer."""
    parts = [{}]
    for name, spec in specs.items():
        if parts[-1] and sum(s.nbytes for s in parts[-1].values()) + spec.nbytes > FILE_BYTES:
            parts.append({})
        parts[-1][name] = spec
    files = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    files = files if len(parts) > 1 else ["model.safetensors"]
    for file, part in zip(files, parts, strict=True):
        with (folder / file).open("wb") as out:
            out.write(_safetensors_header(part))
            for expected in part:
                out.write(bytes_of(next_tensor(tensors, expected, specs)))
    assert next(tensors, None) is None
    if len(parts) > 1:
        size = sum(spec.nbytes for spec in specs.values())
        where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})
    if tokenizer_files[0].name == "tokenizer.model":
        save_tokenizer(tokenizer_files[0], folder)
        pad = load_sentencepiece(folder).pad_token_id
        write_json(folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": pad})
    else:
        for file in tokenizer_files:
            copyfile(file, folder / file.name)
    write_json(folder / LAST["huggingface"], config)


def _safetensors_header(specs):
    header, begin = {"__metadata__": {"format": "pt"}}, 0
    for name, spec in specs.items():
        end = begin + spec.nbytes
        header[name] = {"dtype": FORMATS[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text

"""The tensors of a base on disk, looked at without loading them."""

import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from alpaca.common.errors import UserError
from alpaca.models.tokenizer import how_to_get


def mapped_tensors(model_dir):
    """(name, tensor) of each tensor of a Hugging Face folder; only those bytes are read that are looked at."""
    for path in _weight_files(Path(model_dir)):
        try:
            yield from _tensors_of(path)
        except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(f"{path}: the model cannot be read ({first}); {how_to_get(model_dir)}") from None


def _weight_files(model_dir):
    """The files that transformers would load."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = model_dir / f"{name}.index.json"
        if (model_dir / name).is_file():
            return [model_dir / name]
        if index.is_file():
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [model_dir / file for file in sorted(set(files))]
    raise UserError(f"{model_dir}: no weights here (model.safetensors is missing); {how_to_get(model_dir)}")


def _tensors_of(path):
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            yield from ((name, file.get_tensor(name)) for name in sorted(file.keys()))
    else:
        yield from sorted(torch.load(path, weights_only=True, mmap=True).items())

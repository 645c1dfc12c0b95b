"""Writing a model in Meta's layout: consolidated.*.pth, params.json, tokenizer.model.

A .pth is what torch.save writes since version 1.6 ("Serialization semantics" in PyTorch's notes): an uncompressed zip
archive of a pickle, whose tensors name their storages, and a file for each storage. It is written here, since torch.save
wants all tensors of a file in memory at once.
"""

import io
import math
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from contextlib import ExitStack

import torch

from alpaca.weights.llama_layout import meta_names, params_of, to_meta
from alpaca.weights.output_folder import LAST, write_json
from alpaca.weights.tensor_stream import bytes_of, next_tensor

STORAGES = {
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float32: torch.FloatStorage,
}


def save_pth(folder, config, specs, tensors, tokenizer_file, n_files):
    """Write Meta's layout: consolidated.*.pth, params.json with the real vocabulary size, tokenizer.model."""
    names = meta_names(config["num_hidden_layers"])
    parts = [{} for _ in range(n_files)]  # specs by Meta's names
    for name, spec in specs.items():
        for part, cut in zip(parts, to_meta(name, spec, config, n_files), strict=True):
            part[names[name]] = cut
    with ExitStack() as stack:
        archives = []
        for i, part in enumerate(parts):
            file = stack.enter_context((folder / f"consolidated.{i:02d}.pth").open("wb"))
            archives.append((file, stack.enter_context(zipfile.ZipFile(file, "w"))))
            _add(*archives[-1], "data.pkl", _pickled(part))
            _add(*archives[-1], "byteorder", b"little")
        for key, expected in enumerate(specs):
            tensor = next_tensor(tensors, expected, specs)
            for archive, cut in zip(archives, to_meta(expected, tensor, config, n_files), strict=True):
                _add(*archive, f"data/{key}", bytes_of(cut))
        assert next(tensors, None) is None
        for archive in archives:
            _add(*archive, "version", b"3\n")
    shutil.copyfile(tokenizer_file, folder / "tokenizer.model")
    write_json(folder / LAST["pth"], params_of(config))


def _add(file, archive, name, data):
    """One uncompressed member, whose bytes begin at a multiple of 64, so that they can be mapped as numbers."""
    member = zipfile.ZipInfo(f"consolidated/{name}")  # of 1980: the same weights make the same bytes
    # before the data stand 30 bytes, the name, this extra field of 4 bytes and padding, and the 20 of the 64-bit sizes
    padding = -(file.tell() + 30 + len(member.filename) + 4 + 20) % 64
    member.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(member, "w", force_zip64=True) as out:
        out.write(data)


class _Storage:
    """Stands in the pickle for the numbers in the archive's file data/<key>."""

    def __init__(self, key, spec):
        self.id = ("storage", STORAGES[spec.dtype], str(key), "cpu", math.prod(spec.shape))


class _TensorPickler(pickle.Pickler):
    def __init__(self, file, keys):
        super().__init__(file, protocol=2)
        self.keys = keys  # id of a meta tensor -> the number of its storage

    def persistent_id(self, value):
        return value.id if isinstance(value, _Storage) else None

    def reducer_override(self, value):
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        strides = tuple(math.prod(value.shape[i + 1 :]) for i in range(value.dim()))
        storage = _Storage(self.keys[id(value)], value)
        return torch._utils._rebuild_tensor_v2, (storage, 0, tuple(value.shape), strides, False, OrderedDict())


def _pickled(specs):
    out = io.BytesIO()
    _TensorPickler(out, {id(spec): key for key, spec in enumerate(specs.values())}).dump(specs)
    return out.getvalue()

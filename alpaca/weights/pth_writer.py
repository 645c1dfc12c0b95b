"""Writing models tensor by tensor: safetensors or Meta's pth, in a folder that appears only when it is complete.

Both formats are written here rather than by their libraries, which want all tensors of a file in memory at once. The
tensors come one at a time as (name, tensor), in the order of `specs`: {name: meta tensor}, which tells their shapes
and number formats beforehand.
"""

import io
import json
import math
import mmap
import os
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from alpaca.common.errors import UserError
from alpaca.models.tokenizer import load_tokenizer, save_tokenizer
from alpaca.weights.llama_layout import meta_names, params_of, to_meta
from dataset import BOS, EOS

FILE_BYTES = 4 * 10**9  # of one safetensors file
FORMATS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
STORAGES = {
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float32: torch.FloatStorage,
}
# What a finished folder is known by: it is written last, and where a folder is replaced, it goes first.
LAST = {"huggingface": "config.json", "pth": "params.json"}
WEIGHTS = {
    "huggingface": ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    "pth": ("consolidated.*.pth",),
}
OTHERS = ("generation_config.json", "tokenizer.model", "tokenizer_config.json")


# ---------------------------------------------------------------------------------------------------------------------
# tensors on their way


def specs_of(shapes, dtypes):
    """{name: shape}, {name: dtype} -> {name: meta tensor}."""
    return {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in shapes.items()}


def computed(jobs):
    """(name, tensor) for each (name, function), in order. The functions run ahead on up to four cores, so that
    computing, reading and writing overlap; a thread each, since one tensor at a time on all cores leaves them waiting.
    """

    def ready(function):
        tensor = function()
        # Touch each page of a mapped file here: where writing has to wait for them one by one, it takes twice as long.
        tensor.flatten().view(torch.uint8)[:: mmap.PAGESIZE].sum()
        return tensor

    threads, workers = torch.get_num_threads(), min(4, len(os.sched_getaffinity(0)))
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            waiting = deque()
            for name, function in jobs:
                waiting.append((name, pool.submit(ready, function)))
                if len(waiting) > workers:
                    name, future = waiting.popleft()
                    yield name, future.result()
            while waiting:
                name, future = waiting.popleft()
                yield name, future.result()
    finally:
        torch.set_num_threads(threads)


def progress(tensors, specs, what):
    """The (name, tensor) pairs as they come, with a bar that counts bytes."""
    total = sum(spec.nbytes for spec in specs.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None, dynamic_ncols=True) as bar:
        for name, tensor in tensors:
            yield name, tensor
            bar.update(tensor.nbytes)


def _bytes(tensor):
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# safetensors (github.com/huggingface/safetensors, "Format"): 8 bytes that count those of the JSON header, the header,
# the tensors


def save_huggingface(folder, config, specs, tensors, tokenizer_file):
    """Write a folder for LlamaForCausalLM.from_pretrained and AutoTokenizer."""
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
                name, tensor = next(tensors)
                _check(name, tensor, expected, specs)
                out.write(_bytes(tensor))
    assert next(tensors, None) is None
    if len(parts) > 1:
        size = sum(spec.nbytes for spec in specs.values())
        where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})
    save_tokenizer(tokenizer_file, folder)
    pad = load_tokenizer(folder).pad_token_id
    write_json(folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": pad})
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


def _check(name, tensor, expected, specs):
    spec = specs[expected]
    assert (name, tensor.shape, tensor.dtype) == (expected, spec.shape, spec.dtype), f"{name} instead of {expected}"


# ---------------------------------------------------------------------------------------------------------------------
# pth: what torch.save writes since version 1.6 ("Serialization semantics" in PyTorch's notes), an uncompressed zip
# archive of a pickle, whose tensors name their storages, and a file for each storage


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
            name, tensor = next(tensors)
            _check(name, tensor, expected, specs)
            for archive, cut in zip(archives, to_meta(name, tensor, config, n_files), strict=True):
                _add(*archive, f"data/{key}", _bytes(cut))
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


# ---------------------------------------------------------------------------------------------------------------------
# folders


@contextmanager
def new_folder(path, kind, specs, inputs):
    """Say what will be written, and yield `<path>.tmp`, which becomes `path` when the block ends.

    A run that is interrupted or killed never leaves what looks finished, and the next one begins anew. Where `path`
    exists, only the model files of its kind (huggingface, pth) are replaced; other files stay. It must be none of
    `inputs`, and the disk must have room for the model beside what is there.
    """
    path = Path(path).resolve()
    work = path.with_name(path.name + ".tmp")
    for source in map(Path, inputs):
        if source.resolve() == path or source.resolve().is_relative_to(work):
            raise UserError(f"--output_dir={path} would overwrite {source}, which is read; name another folder")
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir={path} is a file; name a folder")
    try:
        disk = next(folder for folder in path.parents if folder.exists())
        size, free = sum(spec.nbytes for spec in specs.values()), shutil.disk_usage(disk).free
        if size + 10**7 > free:
            raise UserError(
                f"--output_dir={path}: the model takes {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB of that disk are "
                "free; make room or name a folder on another disk"
            )
        print(f"将写入 {path}：{kind}，{size / 1e9:.2f} GB（磁盘剩余 {free / 1e9:.2f} GB）", flush=True)
        _clear(work)
        work.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output_dir={path}: cannot be made ({error.strerror}); name another folder") from None
    try:
        yield work
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"--output_dir={path}: cannot be written ({error.strerror}); name another disk") from None
        raise
    if not path.exists():
        work.rename(path)
        return
    for pattern in (LAST[kind], *WEIGHTS[kind]):
        for old in path.glob(pattern):
            old.unlink()
    for file in sorted(work.iterdir(), key=lambda file: file.name == LAST[kind]):
        os.replace(file, path / file.name)
    work.rmdir()


def _clear(work):
    """Delete what a killed run left; a folder of this name that holds anything else is somebody's own."""
    ours = (*LAST.values(), *WEIGHTS["huggingface"], *WEIGHTS["pth"], *OTHERS)
    foreign = [file for file in work.glob("*") if not any(file.match(pattern) for pattern in ours)]
    if foreign or (work.exists() and not work.is_dir()):
        raise UserError(f"{foreign[0] if foreign else work}: is where the model is to be written; move it away")
    if work.exists():
        shutil.rmtree(work)

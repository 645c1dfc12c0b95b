"""Tensors that are mapped from a file: made, and what the kernel is told of their pages, see madvise(2)."""

import ctypes
import math
import mmap
import os

import torch
from safetensors import safe_open

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def map_safetensors(path):
    """Name -> tensor of a .safetensors file, none of whose numbers is read; what safetensors raises for a damaged file.

    safetensors itself looks at a page of each tensor, and around each the kernel reads up to megabytes, as the disk is set.
    """
    tensors = {}
    with safe_open(path, "pt") as file, open(path, "rb") as raw:
        end = 8 + int.from_bytes(raw.read(8), "little")  # of the header, whose length comes first
        storage = torch.UntypedStorage.from_file(str(path), False, os.path.getsize(path))
        for name in file.offset_keys():  # in the order in which they stand, with nothing between them
            part = file.get_slice(name)
            begin, dtype, shape = end, FLOATS.get(part.get_dtype()), part.get_shape()
            if dtype:
                end = begin + math.prod(shape) * dtype.itemsize
                tensors[name] = torch.empty(0, dtype=dtype).set_(storage[begin:end]).view(shape)
            else:  # a type that no model of ours has, for whoever is to refuse it
                tensors[name] = file.get_tensor(name)
                end = begin + tensors[name].nbytes
    return tensors


def read_only_what_is_used(tensor):
    """Read nothing around a page that is used."""
    _advise(tensor, "MADV_RANDOM")


def read_soon(tensor):
    """Begin to read these bytes, all at once."""
    _advise(tensor, "MADV_WILLNEED")


def forget(tensor):
    """Take the pages out of this process's memory. Used again, they come from the file again."""
    if not tensor.untyped_storage().resizable():  # memory that is no file's could be resized, and would be lost
        _advise(tensor, "MADV_DONTNEED")


def _advise(tensor, advice):
    if not hasattr(mmap, advice) or not tensor.is_contiguous():
        return
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - start
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), getattr(mmap, advice))

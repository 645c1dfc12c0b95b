"""How the kernel treats the pages of tensors that are mapped from a file, see madvise(2). On other systems it does as it likes."""

import ctypes
import mmap


def read_only_what_is_used(tensor):
    """Read no more around a page that is used: by default the kernel reads up to megabytes, as the disk is set."""
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

"""The tensors of a model on their way to its files, one at a time.

A writer gets them as (name, tensor) pairs, in the order of `specs`: {name: meta tensor}, which tells their shapes and
number formats beforehand.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from alpaca.common.devices import cores
from alpaca.common.errors import UserError
from alpaca.models.base_files import is_finite


def specs_of(shapes, dtypes):
    """{name: shape}, {name: dtype} -> {name: meta tensor}."""
    return {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in shapes.items()}


def compute_ahead(jobs, blame):
    """Yield (name, tensor) for each (name, function), in their order; the function makes the tensor.

    Raises UserError(blame(name)) where a tensor holds NaN or infinite numbers: such a model must not be written.
    Up to four functions run ahead in threads, so that computing, reading and writing overlap. Each has one core: where
    one tensor at a time is computed on all cores, they mostly wait.
    """

    def ready(name, function):
        tensor = function()
        # This reads a mapped file here: where writing has to wait for each of its pages, it takes twice as long.
        if not is_finite(tensor):
            raise UserError(blame(name))
        return tensor

    threads, workers = torch.get_num_threads(), min(4, cores())
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            waiting = deque()
            for name, function in jobs:
                waiting.append((name, pool.submit(ready, name, function)))
                if len(waiting) > workers:
                    name, future = waiting.popleft()
                    yield name, future.result()
            while waiting:
                name, future = waiting.popleft()
                yield name, future.result()
    finally:
        torch.set_num_threads(threads)


def with_byte_bar(tensors, specs, title):
    """Yield the (name, tensor) pairs as they come, and show a bar that counts their bytes."""
    total = sum(spec.nbytes for spec in specs.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc=title, disable=None, dynamic_ncols=True) as bar:
        for name, tensor in tensors:
            yield name, tensor
            bar.update(tensor.nbytes)


def bytes_of(tensor):
    """A tensor's numbers as they stand in a file."""
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


def next_tensor(tensors, expected, specs):
    """The tensor that comes next, which must be `expected` in name, shape and number format."""
    name, tensor = next(tensors)
    spec = specs[expected]
    assert (name, tensor.shape, tensor.dtype) == (expected, spec.shape, spec.dtype), f"{name} instead of {expected}"
    return tensor

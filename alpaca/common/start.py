"""What every command does first: `from alpaca.common.start import start; start()`, before it imports the libraries.

It refuses versions of the libraries that the code is not for, so it must come before they are imported.
"""

import logging
import os
import re
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from alpaca.common.errors import UserError, fail

OLDEST_PYTHON = (3, 11)
# The first and the last version that this code is for. An older one lacks what it imports; what a newer one changes might
# show only in what is trained.
VERSIONS = {"torch": ("2.11", "2.13"), "transformers": ("5.17", "5.23"), "peft": ("0.21", "0.21")}


def start():
    """Refuse versions that do not fit, end Ctrl-C without a traceback, print whatever the output can show, and keep the
    libraries' notices off the screen."""
    sys.excepthook = _without_traceback_for_ctrl_c
    try:
        check_python()
        check_versions()
    except UserError as error:
        fail(error)
    from alpaca.common.console import forgive_encoding  # imports tqdm, which may be missing where Python is too old

    forgive_encoding()
    # One line that a user can act on is worth more than a page of library notices.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*gradient_checkpointing")
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS", module="accelerate")
    # what DeepSpeed calls has other names in newer versions of torch
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.\w+` is deprecated")
    # Each process uses one GPU, which init_distributed chooses: what barrier() takes of itself is right. DeepSpeed makes the
    # node that adds up a gradient before the steps, on another stream; autograd waits for it.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device")
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
    # float32 was asked for: TensorFloat32, which the compiler of CUDA kernels recommends, rounds to 10 bits
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores for float32")
    # a LoRA on a head that is tied to the embeddings: whatever merges it here gives the head a matrix of its own
    warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer is part")
    # Of torch's C++ only errors. A run that ends by an error leaves its process group open, and NCCL would remark on that; to
    # close it, a process would wait for others that may never come.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # on a CPU with avx512_bf16 it misses a package of kernels
    if not find_spec("torch"):
        return  # whatever needs it says so when it is imported

    import torch

    # cuDNN builds a plan for every attention shape that it has not met, which takes longer than the attention. Answers,
    # and training whose layers are not compiled, meet a new shape at almost every step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed would choose too, after a warning


def _without_traceback_for_ctrl_c(kind, *error):
    """run_script ends Ctrl-C too, but the libraries take seconds to import before it runs."""
    if kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, *error)


def check_python():
    if sys.version_info < OLDEST_PYTHON:
        raise UserError(
            f"Python {sys.version.split()[0]}: this needs 3.11 or 3.12; make an environment with one of them, as "
            "`python3.12 -m venv .venv`, and install requirements.txt there"
        )


def check_versions():
    """UserError if a library of VERSIONS is here in another version. One that is missing says so when it is imported."""
    for name, (first, last) in VERSIONS.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if not _numbers(first) <= _numbers(found) <= _numbers(last):
            raise UserError(
                f"{name} {found}: this needs {first}{f' to {last}' if last != first else ''}; "
                "`pip install -r requirements.txt` installs the one it is tested with"
            )


def _numbers(text):
    """2.11.0+cu130 -> (2, 11)."""
    return tuple(int(number) for number in re.findall("[0-9]+", text)[:2])

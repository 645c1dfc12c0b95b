"""What every command has done before it begins.     python -m pytest tests/common/test_start.py"""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from alpaca.common.errors import UserError, fail
from harness import ROOT

ASKED = """
from alpaca.common.start import start
start()
import os, warnings
warnings.warn("`torch.distributed.all_gather_into_tensor` is deprecated. Please use another", FutureWarning)
warnings.warn("barrier(): using the device under current context.")
warnings.warn("The AccumulateGrad node's stream does not match the stream of the node that produced it.")
warnings.warn("TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled.")
import torch
print(os.environ["TORCH_CPP_LOG_LEVEL"], torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled())
"""


def test_attention_does_not_go_to_cudnn_and_the_libraries_are_quiet():
    result = subprocess.run([sys.executable, "-c", ASKED], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.stdout.split(), result.stderr) == (["ERROR", "False", "True"], "")


def test_an_error_is_written_at_once(monkeypatch):
    """In pieces, those of two ranks that end together would be mixed up."""
    written = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append))
    with pytest.raises(SystemExit):
        fail(UserError("a.txt: line 1:\nno JSON"))
    assert written == ["error: a.txt: line 1: no JSON\n"]

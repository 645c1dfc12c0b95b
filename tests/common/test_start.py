"""What every command has done before it begins.     python -m pytest tests/common/test_start.py"""

import subprocess
import sys

from harness import ROOT

ASKED = """
from alpaca.common.start import start
start()
import torch
print(torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled())
"""


def test_attention_does_not_go_to_cudnn():
    result = subprocess.run([sys.executable, "-c", ASKED], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["False", "True"], result.stderr

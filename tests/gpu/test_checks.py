"""The checks of `make gpu`, each as a test on the devices that are here."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gpu.checks import CHECKS, CUDA_ONLY

DEVICES = ("cpu", "cuda")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("check", CHECKS)
def test_check(check: Callable[[str, Path], str], device: str, tmp_path: Path):
    """What a check must show is its docstring."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if device == "cpu" and check in CUDA_ONLY:
        pytest.skip("has no meaning on a CPU")
    check(device, tmp_path)

"""The checks of `make gpu`, each as a test on the devices that are here."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.device_checks import CHECKS, CUDA_ONLY

Check = Callable[[str, Path], str]
SLOW = ("check_step_against_plain",)
ON_CPU: list[object] = []
for each in CHECKS:
    if each not in CUDA_ONLY:
        marks = [pytest.mark.slow] if each.__name__ in SLOW else []
        ON_CPU.append(pytest.param(each, marks=marks))


@pytest.mark.parametrize("check", ON_CPU)
def test_on_the_cpu(check: Check, tmp_path: Path):
    """What a check must show is its docstring."""
    check("cpu", tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu(check: Check, tmp_path: Path):
    check("cuda", tmp_path)

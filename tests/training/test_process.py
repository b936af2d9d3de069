"""What training sets for its process."""

import platform
import subprocess
import sys

import pytest
import torch

PAGES = """
import resource, sys, torch
from almostgpt.training.process import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def use():
    torch.ones(25_000_000)  # 100 MB, and freed at once
use(), use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_was_freed_is_there_for_the_next_tensor():
    faults = {
        mode: int(subprocess.check_output([sys.executable, "-c", PAGES, mode], text=True))
        for mode in ("keep", "default")
    }
    assert faults["keep"] < faults["default"] / 10, faults


@pytest.mark.parametrize("precision", ["high", "medium", "highest"])
def test_the_precision_of_products_is_the_one_that_is_set(make_trainer, precision):
    before = torch.get_float32_matmul_precision()
    try:
        with make_trainer(precision, **{"training.matmul": precision}).batches:
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)

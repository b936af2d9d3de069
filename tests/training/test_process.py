"""What training sets for its process."""

import platform
import subprocess
import sys

import pytest
import torch

PAGES = """
import resource, torch
from almostgpt.training.process import keep_freed_memory

def faults():
    torch.ones(25_000_000)  # 100 MB, and freed at once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(30):  # the heap may grow once more: an aligned block needs a little room beside it
        torch.ones(25_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

by_default = faults()
assert keep_freed_memory()
print(by_default, faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_was_freed_is_there_for_the_next_tensor():
    said = subprocess.check_output([sys.executable, "-c", PAGES], text=True)
    by_default, kept = map(int, said.split())
    assert kept < by_default / 10


@pytest.mark.parametrize("precision", ["high", "medium", "highest"])
def test_the_precision_of_products_is_the_one_that_is_set(make_trainer, precision):
    before = torch.get_float32_matmul_precision()
    try:
        with make_trainer(precision, **{"training.matmul": precision}).batches:
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)

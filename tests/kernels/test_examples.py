"""The two example kernels as whole kernels in the emulator: csrc/tests/examples.cpp."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def examples():
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("there is no g++")
    build = subprocess.run(ROOT / "scripts" / "conformance.sh", capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    return Path(build.stdout.strip()) / "examples"


def passes(program, *arguments):
    """Every line of the program's report, none of which is a failure."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    failures = [line for line in lines if not line.startswith("ok ")]
    assert done.returncode == 0 and not failures, "\n".join(failures) + done.stderr
    return lines


def test_products_are_right_and_the_same_whatever_the_schedule(examples):
    lines = passes(examples)
    for kernel in ("gemm_sm80", "gemm_sm90"):
        for dtype in ("bf16", "fp16"):
            assert sum(f"{kernel} {dtype}" in line for line in lines) >= 4


def test_every_fault_is_noticed(examples):
    lines = passes(examples, "--faults")
    # What there must be to plant, in either kernel; a primitive that has vanished is noticed, too.
    for primitive in ("cp_async_wait", "cta_sync", "mbar_wait", "fence_proxy_async", "wgmma_wait"):
        assert any(f" {primitive}, " in line for line in lines), primitive

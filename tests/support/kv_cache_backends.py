"""Where the ops of the cache are tested: on the reference, in the emulator, and on a GPU."""

import pytest
import torch
from attention_kernels import CARDS
from kv_cache_truth import missing

ALL_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KERNEL_DTYPES = [torch.bfloat16, torch.float16]


def param(backend):
    why = missing(backend)
    name = f"emulator-{backend[0]}.{backend[1]}" if isinstance(backend, tuple) else backend
    return pytest.param(
        backend, id=name, marks=pytest.mark.skipif(why is not None, reason=str(why))
    )


# "ops": what torch.ops.almostgpt has on a CPU, which stands in for the kernels under torch.compile.
BACKENDS = [param(backend) for backend in ("reference", "ops", "cpu", *CARDS, "cuda")]
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def dtypes_of(backend) -> list[torch.dtype]:
    if backend == "cpu":
        return [torch.float32]
    return ALL_DTYPES if backend in ("reference", "ops") else KERNEL_DTYPES


def dtype_of(backend) -> torch.dtype:
    """One that shows every mistake: of a kernel its own."""
    return torch.float32 if backend in ("reference", "ops", "cpu") else torch.bfloat16


def device_of(backend) -> str:
    return "cuda" if backend == "cuda" else "cpu"

"""What training sets for its whole process: float32 products, and what becomes of freed memory."""

from __future__ import annotations

import ctypes

import torch

from almostgpt.config import Config
from almostgpt.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_LARGEST = 2**31 - 1  # mallopt takes an int


def prepare(config: Config, device: torch.device) -> None:
    """Before a model is trained in this process, or its training timed.

    Raises ``UserError`` where it cannot be.
    """
    if config.model.quantize != "none":
        raise UserError(
            f"model.quantize is {config.model.quantize}, but quantised weights cannot be trained: train "
            "with none, and quantise what comes out"
        )
    torch.set_float32_matmul_precision(config.training.matmul)
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Tell glibc to keep the memory of freed tensors for the next ones; False where there is none.

    By default it maps every block above 32 MB anew and unmaps it when freed, and gives back what is
    free at the end of its heap: a training step frees and takes the same tensors again and again, and
    each time the system faults them in page by page and fills them with zeros. A 4096 × 2048 product
    takes 21 ms into such memory and 4.8 ms into memory in use (2 cores of an AMD EPYC); docs/lab-notes.md
    has what it saves of a step. The process keeps its peak until it ends, so this is for training.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc: macOS, musl, Windows
        return False
    return all(mallopt(name, _LARGEST) for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))

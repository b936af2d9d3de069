"""What a C++ kernel in ``csrc/cpu/`` needs in Python: its torch op, and its place in the list of an op.

They are compiled into ``_C.so`` for several instruction sets, with or without CUDA, and each call takes
the best that the processor has. The ops are of ``torch.ops.almostgpt``, their names begin with ``cpu_``,
and their last argument is the number of an instruction set, ``BEST`` for the best.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from almostgpt.kernels import native
from almostgpt.kernels.csrc import refuse_derivatives
from almostgpt.kernels.dispatch import Card, Kernel

INSTRUCTION_SETS = ("portable", "avx2", "avx512")  # by their numbers in csrc/cpu/instruction_set.h
BEST = -1

_LIBRARY = torch.library.Library("almostgpt", "FRAGMENT")


def define(name: str, schema: str, *, fake: Callable) -> None:
    """Define an op; the library, where it was built, adds the implementation.

    Args:
        name: ``"cpu_linear"``.
        schema: ``"(Tensor x, int instruction_set) -> Tensor"``; no defaults.
        fake: the outputs' shapes and dtypes; it takes the op's arguments but the instruction set.
    """
    _LIBRARY.define(name + schema)
    torch.library.register_fake(f"almostgpt::{name}", lambda *args: fake(*args[:-1]), lib=_LIBRARY)


def available() -> tuple[str, ...]:
    """The instruction sets that the library was compiled for and this processor has, the best last."""
    if missing() is not None:
        return ()
    return tuple(torch.ops.almostgpt.cpu_instruction_sets().split(","))


# Neither answer changes within a process, so torch.compile may take it for a constant; it does not see
# that of a function with a cache.
@torch.compiler.assume_constant_result
def missing() -> str | None:
    """Why this process has no kernels for the processor, or None."""
    return _missing()


@torch.compiler.assume_constant_result
def best() -> str:
    """The instruction set that a call takes; ``"portable"`` where the library is missing."""
    return _best()


@functools.cache  # asked at every call of an op
def _missing() -> str | None:
    if native.NATIVE.error is not None:
        return native.NATIVE.error
    if not torch._C._dispatch_has_kernel("almostgpt::cpu_instruction_sets"):
        return "the native library is of an older version (reinstall with `pip install -e .`)"
    return None


@functools.cache
def _best() -> str:
    return (available() or ("portable",))[-1]


def cpu_kernel(name: str, refuse_call: Callable, run: Callable) -> Kernel:
    """The ``cpu`` kernel of an op.

    Args:
        name: what explanations call it.
        refuse_call: ``refuse_call(*args, **kwargs)`` says why the op's arguments cannot be served,
            by shapes, dtypes, strides and options alone, or None.
        run: takes the op's arguments.
    """

    def refuse(card: Card | None, tensor: Tensor, *args, **kwargs) -> str | None:
        if card is not None or tensor.is_cuda:
            return "the C++ kernels are for a processor, not for a GPU"
        if why := refuse_call(tensor, *args, **kwargs):
            return why
        if tensor.is_meta:  # it has no data, and only its shape and dtype were asked about
            return None
        if not tensor.is_cpu:
            return f"the tensors are on {tensor.device}"
        return missing() or refuse_derivatives()

    return Kernel("cpu", name, refuse, run)


def refuse_watched() -> str | None:
    """Why a call belongs to PyTorch's own op here, which compilers, autocast and counters know."""
    if torch.compiler.is_compiling():
        return "torch.compile has its own"
    if torch.is_autocast_enabled("cpu"):
        return "under autocast PyTorch's own op chooses the dtype"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode looks for PyTorch's own ops"
    return None

"""What a Triton kernel needs in Python: its torch op, its place in the list of an op, its settings.

A kernel runs in one of two ways, fixed when Triton decorates it, so for a whole process:

- compiled, on a CUDA device. The op is a ``torch.library.triton_op``: torch.compile sees the
  kernels in it, and what is around them.
- in Triton's interpreter, where ``TRITON_INTERPRET=1`` is set before Python starts: on any device,
  slowly, for tests and learners, and only where the backend is forced. torch.compile cannot look
  into an interpreted kernel, so there the op is opaque to it.

A file ``<op>_triton.py`` holds the kernels of an op and the functions that launch them;
``<op>.py`` imports it where ``MISSING`` is None.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._library.triton import set_wrap_triton_enabled

from almostgpt.kernels import native
from almostgpt.kernels.csrc import refuse_derivatives
from almostgpt.kernels.dispatch import Card, Kernel

try:
    import triton
except ImportError as error:  # it exists for Linux only
    MISSING = f"Triton is not installed ({error})"
    INTERPRETED = False
else:
    MISSING = None
    INTERPRETED = triton.knobs.runtime.interpret


class TritonOp:
    """A torch op whose implementation launches Triton kernels.

    Args:
        name: in the namespace ``almostgpt``.
        implementation: functional, but for ``mutates``; typed, so that the schema can be read from
            it; it makes its outputs with torch and launches by ``wrap_triton(kernel)[grid](...)``.
            It serves as the fake too.
        mutates: names of the arguments that it writes into.
        backward, setup_context: as ``torch.library.register_autograd`` takes them.
    """

    def __init__(
        self,
        name: str,
        implementation: Callable,
        *,
        mutates: tuple[str, ...] = (),
        backward: Callable | None = None,
        setup_context: Callable | None = None,
    ):
        register = torch.library.custom_op if INTERPRETED else torch.library.triton_op
        definition = register(f"almostgpt::{name}", implementation, mutates_args=mutates)
        if INTERPRETED:
            definition.register_fake(implementation)
        if backward is not None:
            definition.register_autograd(backward, setup_context=setup_context)
        self.implementation = implementation
        self.op = getattr(torch.ops.almostgpt, name).default

    def __call__(self, *args):
        """Run it below autograd, as the ``autograd.Function`` of an op does in eager mode.

        The implementation is called as it is where nobody looks at the ops: that saves the 20 µs
        that a Python op costs (torch 2.13, 2 cores of an AMD EPYC, 2026-11-21).
        """
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return self._run(*args)
        with torch.cuda.device(device):  # Triton launches on the current device
            return self._run(*args)

    def _run(self, *args):
        if torch._C._len_torch_dispatch_stack() or not all(map(_is_plain, args)):
            with torch._C._AutoDispatchBelowAutograd():
                return self.op(*args)
        with set_wrap_triton_enabled(False):
            return self.implementation(*args)


def _is_plain(arg: Any) -> bool:
    """No tensor of a kind that may hold no data of its own, such as a DTensor."""
    return not isinstance(arg, torch.Tensor) or type(arg) in (torch.Tensor, torch.nn.Parameter)


def wrap_triton(kernel) -> Any:
    """``torch.library.wrap_triton``, for interpreted kernels too."""
    return _Interpreted(kernel) if INTERPRETED else torch.library.wrap_triton(kernel)


class _Interpreted(NamedTuple):
    """An interpreted kernel, which must not run where the tensors hold no data."""

    kernel: Any

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor)]
            if not any(_is_fake(tensor) for tensor in tensors):
                self.kernel[grid](*args, **kwargs)

        return launch


def _is_fake(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor)


def triton_kernels(name: str, refuse_call: Callable, run: Callable) -> tuple[Kernel, ...]:
    """The ``triton`` kernels of an op: compiled on a GPU, and interpreted.

    Args:
        name: what explanations call it.
        refuse_call: ``refuse_call(*args, **kwargs)`` says why the op's arguments cannot be served,
            by shapes, dtypes and options alone, or None.
        run: takes the op's arguments.
    """

    def refuse_compiled(card: Card | None, tensor, *args, **kwargs) -> str | None:
        if card is None:
            if why := MISSING or refuse_derivatives():
                return why
            if not tensor.is_cuda:
                return f"the tensors are on {tensor.device}"
            if INTERPRETED:
                return "TRITON_INTERPRET is set"
            if native.capability_of(tensor.device.index) < (8, 0):
                return "the Triton kernels are for GPUs of compute capability 8.0 and later"
        return refuse_call(tensor, *args, **kwargs)

    def refuse_interpreted(card: Card | None, tensor, *args, **kwargs) -> str | None:
        if why := MISSING or refuse_derivatives():
            return why
        if card is None and not INTERPRETED:
            return "Triton's interpreter runs where TRITON_INTERPRET=1 is set before Python starts"
        return refuse_call(tensor, *args, **kwargs)

    return (
        Kernel("triton", name, refuse_compiled, run),
        Kernel("triton", f"{name}, interpreted", refuse_interpreted, run, only_forced=True),
    )


# ---------------------------------------------------------------- tuned settings


@functools.cache
def _table() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(Path(__file__).with_name("triton_settings.json").read_text("utf-8"))


@torch.compiler.assume_constant_result
def settings(kernel: str, device_index: int | None) -> dict[str, int]:
    """The launch settings of a kernel on a device: ``BLOCK`` sizes, ``num_warps``, ``num_stages``.

    From ``triton_settings.json``, by the device's compute capability, or the kernel's ``default``
    (the interpreter's too). ``scripts/tune_triton.py`` measures candidates and writes the table.
    """
    card = None if device_index is None else native.capability_of(device_index)
    return settings_of(kernel, card)


def settings_of(kernel: str, card: Card | None) -> dict[str, int]:
    """The same for a card that need not be here."""
    of_kernel = _table()[kernel]
    name = "default" if card is None else f"{card[0]}.{card[1]}"
    return dict(of_kernel.get(name, of_kernel["default"]))

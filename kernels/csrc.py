"""What a kernel in ``csrc/`` needs in Python: its torch op, and its place in the list of an op.

Everything is said once and holds for both sides: ``torch.ops.almostgpt`` on CUDA (``_C.so``) and
``torch.ops.almostgpt_emulator`` on the CPU emulator (``_emulator.so``). The op of the emulator has
one more argument, the last: ``int capability``, 10 · major + minor of the card that is played.
The schemas are here, not in the libraries, so that both ops exist where no library was built.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from almostgpt.kernels import emulator, native
from almostgpt.kernels.dispatch import Card, Kernel
from almostgpt.kernels.emulator import EmulatedOps

_CUDA = torch.library.Library("almostgpt", "FRAGMENT")
_EMULATOR = torch.library.Library("almostgpt_emulator", "FRAGMENT")


def define(
    name: str,
    schema: str,
    *,
    fake: Callable,
    cpu: Callable | None = None,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> None:
    """Define an op on both sides, with its fake and its gradient.

    Args:
        name: ``"rms_norm_forward"``.
        schema: ``"(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)"``; no defaults.
        fake: the outputs' shapes and dtypes; it takes the op's arguments.
        cpu: for the CPU side of ``torch.ops.almostgpt``, so that what hangs on the op (its fake,
            its gradient, torch.compile) can be tested without a GPU.
        backward: ``backward(ctx, *gradients)`` gives a tuple, a gradient for each argument.
            ``ctx.ops`` holds the ops of the side that forward ran on.
        setup_context: as ``torch.library.register_autograd`` takes it.
    """
    arguments, arrow, outputs = schema.partition(") ->")
    _CUDA.define(name + schema)
    _EMULATOR.define(f"{name}{arguments}, int capability{arrow}{outputs}")
    torch.library.register_fake(f"almostgpt::{name}", fake, lib=_CUDA)
    torch.library.register_fake(
        f"almostgpt_emulator::{name}", lambda *args: fake(*args[:-1]), lib=_EMULATOR
    )
    if cpu is not None:
        _CUDA.impl(name, cpu, "CPU")
    if backward is None:
        return

    def cuda_context(ctx, inputs, output):
        ctx.ops = torch.ops.almostgpt
        setup_context(ctx, inputs, output)

    def emulator_context(ctx, inputs, output):
        ctx.ops = EmulatedOps(divmod(inputs[-1], 10))
        setup_context(ctx, inputs[:-1], output)

    def emulator_backward(ctx, *gradients):
        return (*backward(ctx, *gradients), None)

    torch.library.register_autograd(
        f"almostgpt::{name}", backward, setup_context=cuda_context, lib=_CUDA
    )
    torch.library.register_autograd(
        f"almostgpt_emulator::{name}",
        emulator_backward,
        setup_context=emulator_context,
        lib=_EMULATOR,
    )


def csrc_kernels(
    name: str, refuse_card: Callable, run: Callable, *, only: Card | None = None
) -> tuple[Kernel, Kernel]:
    """The ``cuda`` and the ``emulator`` kernel that one source in ``csrc/`` gives an op.

    Args:
        name: what explanations call it.
        refuse_card: ``refuse_card(capability, *args, **kwargs)`` says why such a card cannot serve
            the op's arguments, by shapes, dtypes and options alone, or None.
        run: ``run(ops, *args, **kwargs)``, where ``ops.rms_norm_forward(x, weight, eps)`` calls
            the op of that name on the side that was chosen.
        only: the one card whose own instructions it is written in; None where it runs on all.
    """

    elsewhere = f"{name} is for compute capability {only[0]}.{only[1]} alone" if only else None

    def refuse_others(card: Card, *args, **kwargs) -> str | None:
        if only is not None and card != only:
            return elsewhere
        return refuse_card(card, *args, **kwargs)

    def refuse_cuda(card: Card | None, tensor, *args, **kwargs) -> str | None:
        if card is None:
            if why := refuse_derivatives():
                return why
            if not tensor.is_cuda:
                return f"the tensors are on {tensor.device}"
            card = native.capability_of(tensor.device.index)
            if why := native.refuse(card) or (only == card and native.refuse_own_code(card)):
                return why
        return refuse_others(card, tensor, *args, **kwargs)

    def refuse_emulator(card: Card, tensor, *args, **kwargs) -> str | None:
        if why := refuse_derivatives():
            return why
        if tensor.device.type not in ("cpu", "meta"):
            return f"the tensors are on {tensor.device}, and the emulator runs on the CPU"
        return emulator.refuse() or refuse_others(card, tensor, *args, **kwargs)

    def run_cuda(*args, **kwargs):
        return run(torch.ops.almostgpt, *args, **kwargs)

    def run_emulator(card: Card, *args, **kwargs):
        return run(EmulatedOps(card), *args, **kwargs)

    return (
        Kernel("cuda", name, refuse_cuda, run_cuda, elsewhere=elsewhere),
        Kernel("emulator", name, refuse_emulator, run_emulator, True, elsewhere),
    )


def refuse_derivatives() -> str | None:
    """Why derivatives are asked for here that only plain PyTorch has, or None."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return "under torch.func (vmap, grad, jvp) only the reference runs"
    if forward_ad._current_level >= 0:
        return "in forward-mode differentiation only the reference runs"
    return None

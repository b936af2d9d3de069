"""The activations of feed-forward layers in plain PyTorch, forward and backward.

In eager mode the backward of PyTorch's own composition keeps more than it needs, and allocates
again and again; on a CPU each fresh block of memory costs page faults. So there SwiGLU and ReLU²
carry a backward of their own: it keeps nothing but the input and works within its result. A CPU's
time, 1 thread on 2 shared cores of an AMD EPYC (torch 2.13, `time.process_time`, medians,
2026-11-21), float32, forward and backward:

- SwiGLU, silu(gate) · up → this: a step of 6 layers of Linear, SwiGLU, Linear on 768 tokens, 128
  wide, 2·352 hidden, 53.2 → 51.0 ms; of 3 layers on 1024 tokens, 768 wide, 2·2048 hidden, 913 → 892;
  on 256 tokens no difference. It keeps 2 numbers a hidden unit, not 3. One sigmoid for both
  gradients, contiguous temporaries, and blocks of 32 rows were no better.
- ReLU², relu(x).square() → this: (256, 2048) 2.37 → 0.77 ms, (1024, 3072) 22.2 → 6.1.

GELU is one op of PyTorch with one of its own for backward, which keep only the input.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from almostgpt.kernels.csrc import refuse_derivatives

_aten = torch.ops.aten


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu_squared": _relu_squared,
}


def plain(x: Tensor, activation: str, gated: bool) -> Tensor:
    """f(x), or with x = (gate | up) along the last dimension f(gate) · up: the definition."""
    function = FUNCTIONS[activation]
    if not gated:
        return function(x)
    gate, up = x.chunk(2, -1)
    return function(gate) * up


def plain_gradient(dy: Tensor, x: Tensor, activation: str, gated: bool) -> Tensor:
    """dx of ``plain``; it may be differentiated again, any number of times."""
    return torch.func.vjp(lambda x: plain(x, activation, gated), x)[1](dy)[0]


def _autograd_alone(x: Tensor) -> bool:
    """Whether nobody but eager autograd looks at the ops: no compiler, transform or subclass."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, FakeTensor)
        and refuse_derivatives() is None
        and forward_ad.unpack_dual(x).tangent is None
    )


def swiglu(gate_up: Tensor) -> Tensor:
    return _SwiGLU.apply(gate_up) if _autograd_alone(gate_up) else plain(gate_up, "silu", True)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def relu_squared(x: Tensor) -> Tensor:
    return _ReLUSquared.apply(x) if _autograd_alone(x) else _relu_squared(x)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, dy):
        (gate_up,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph
            return plain_gradient(dy, gate_up, "silu", True)
        gate, up = gate_up.chunk(2, -1)
        gradient = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        dgate, dup = gradient.chunk(2, -1)
        torch.mul(dy, up, out=dgate)
        _aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        _aten.silu.out(gate, out=dup)
        dup.mul_(dy)
        return gradient


class _ReLUSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        y = F.relu(x)
        return y.mul_(y)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph
            return plain_gradient(dy, x, "relu_squared", False)
        return F.relu(x).mul_(dy).mul_(2)

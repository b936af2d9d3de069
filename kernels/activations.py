"""The activations of feed-forward layers: SwiGLU, GELU and ReLU².

    swiglu(gate | up) = silu(gate) · up     silu(x) = x · sigmoid(x)
    gelu(x)           = x · Φ(x)            Φ: the normal distribution, or its approximation by tanh
    relu_squared(x)   = max(x, 0)²

They compute little and move much: fused, forward reads its input once and writes its result once,
and backward reads the gradient and the same input and writes one gradient. Nothing else is kept:
f is recomputed in backward. The arithmetic of the kernels is in float32.

Sources: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202; Hendrycks and Gimpel,
"Gaussian Error Linear Units", arXiv:1606.08415; So et al., "Primer", arXiv:2109.08668.
"""

from __future__ import annotations

import torch
from torch import Tensor

from almostgpt.errors import UserError
from almostgpt.kernels import activations_reference as reference
from almostgpt.kernels import triton_ops
from almostgpt.kernels.dispatch import Kernel, Op

if triton_ops.MISSING is None:
    from almostgpt.kernels import activations_triton as kernel

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MOST_HIDDEN = 2**30 - 1  # the kernels count within a row in 32 bits


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of one tensor that holds both, as one projection makes them.

    Args:
        gate_up: (..., 2·hidden), the gate first; bfloat16, float16, float32 or float64. The
            kernels read rows of any stride in place, and copy what has no adjacent columns.

    Returns:
        (..., hidden), in the dtype of gate_up.

    Raises:
        UserError: a shape or dtype that does not fit.
    """
    return SWIGLU(gate_up)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x · Φ(x), Φ being the distribution function of the normal distribution.

    Args:
        x: any shape; bfloat16, float16, float32 or float64. The kernels copy what is not
            contiguous.
        approximate: ``"none"``, or ``"tanh"`` for GPT-2's
            x · (1 + tanh(√(2/π) · (x + 0.044715 x³))) / 2.

    Returns:
        Shape and dtype of x.

    Raises:
        UserError: a dtype that does not fit, or another ``approximate``.
    """
    return GELU(x, approximate)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)², for x of any shape; see ``gelu``."""
    return RELU_SQUARED(x)


def _check_dtype(op: str, x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise UserError(f"{op}: needs a floating tensor of 16 bits or more, not {x.dtype}")


def _check_swiglu(gate_up) -> None:
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise UserError(f"swiglu: gate_up must be (..., 2·hidden), not {tuple(gate_up.shape)}")
    _check_dtype("swiglu", gate_up)


def _check_gelu(x, approximate="none") -> None:
    if approximate not in ("none", "tanh"):
        raise UserError(f"gelu: approximate is {approximate!r}, not 'none' or 'tanh'")
    _check_dtype("gelu", x)


def _check_relu_squared(x) -> None:
    _check_dtype("relu_squared", x)


# ---------------------------------------------------------------- kernels


class _Activation(torch.autograd.Function):
    """The kernels with their gradient, in eager mode."""

    @staticmethod
    def forward(ctx, x, activation, gated):
        ctx.save_for_backward(x)
        ctx.options = activation, gated
        return kernel.FORWARD(x, activation, gated)

    @staticmethod
    def backward(ctx, dy):
        # create_graph: the op records its own gradient.
        run = kernel.BACKWARD.op if torch.is_grad_enabled() else kernel.BACKWARD
        return run(dy, *ctx.saved_tensors, *ctx.options), None, None


def _run(x: Tensor, activation: str, gated: bool) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ops.almostgpt.activation(x, activation, gated)
    if torch.is_grad_enabled():
        return _Activation.apply(x, activation, gated)
    return kernel.FORWARD(x, activation, gated)


def _run_swiglu(gate_up):
    return _run(gate_up, "silu", True)


def _run_gelu(x, approximate="none"):
    return _run(x, "gelu_tanh" if approximate == "tanh" else "gelu", False)


def _run_relu_squared(x):
    return _run(x, "relu_squared", False)


def _refuse_call(x, *args, **options) -> str | None:
    if x.dtype == torch.float64:
        return "the Triton kernels do not compute in float64"
    return None


def _refuse_swiglu(gate_up) -> str | None:
    if gate_up.shape[-1] > 2 * MOST_HIDDEN:
        return f"the Triton kernel takes at most {MOST_HIDDEN} hidden units"
    return _refuse_call(gate_up)


SWIGLU = Op(
    "swiglu",
    _check_swiglu,
    (
        *triton_ops.triton_kernels("swiglu", _refuse_swiglu, _run_swiglu),
        Kernel("reference", "plain PyTorch", lambda *a, **k: None, reference.swiglu),
    ),
)
GELU = Op(
    "gelu",
    _check_gelu,
    (
        *triton_ops.triton_kernels("gelu", _refuse_call, _run_gelu),
        Kernel("reference", "plain PyTorch", lambda *a, **k: None, reference.gelu),
    ),
)
RELU_SQUARED = Op(
    "relu_squared",
    _check_relu_squared,
    (
        *triton_ops.triton_kernels("relu_squared", _refuse_call, _run_relu_squared),
        Kernel("reference", "plain PyTorch", lambda *a, **k: None, reference.relu_squared),
    ),
)

"""A linear layer whose weight is stored in 8 bits: y = x · (weight · scales)ᵀ + bias.

A row w of the weight, what one output is computed from, becomes

    s = max |w| / 127        in float32; 1 for a row of zeros
    q = round(w / s)         int8 in −127 … 127

so no element is off by more than s / 2, a 254th of the largest of its row. The scale is applied to the
sum, once for an output: y_n = s_n · Σ_k x_k q_nk + b_n. Activations stay floating-point numbers: a few
of their columns are far larger than the others, and would take the 8 bits of all (LLM.int8()).

Decoding reads every weight once for each token and computes next to nothing with it, so its time is
that of the bytes: a quarter of float32's, half of bfloat16's.

Source of the activations' outliers: Dettmers et al., "LLM.int8()", arXiv:2208.07339.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from almostgpt.errors import UserError
from almostgpt.kernels import cpu
from almostgpt.kernels.autocast import autocast_dtype
from almostgpt.kernels.csrc import csrc_kernels, define
from almostgpt.kernels.dispatch import Kernel, Op

MAX_ROWS = 16  # of x, that the CUDA kernel takes at once

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def int8_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · (weight · scales)ᵀ + bias, for inference: it has no gradient.

    Under autocast x is taken in autocast's dtype, as ``torch.nn.functional.linear`` takes it.

    Args:
        x: (..., K), floating point.
        weight: (N, K) int8, contiguous, as ``quantize_rows`` makes it.
        scales: (N,) float32.
        bias: (N,), floating point.

    Returns:
        (..., N) in x's dtype, accumulated in float32 (float64 of float64).

    Raises:
        UserError: shapes, dtypes or devices that do not fit together, or a gradient asked for.
    """
    if (dtype := autocast_dtype(x)) is None:
        return INT8_LINEAR(x, weight, scales, bias)
    with torch.autocast(x.device.type, enabled=False):
        return INT8_LINEAR(x.to(dtype), weight, scales, bias)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) floating point → (N, K) int8 and (N,) float32 scales, as the module says.

    Raises:
        UserError: not a matrix of finite floating-point numbers.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise UserError(
            f"quantize_rows: a floating-point matrix is quantised, not {weight.dtype} of "
            f"{tuple(weight.shape)}"
        )
    weight = weight.detach().float()
    largest = weight.abs().amax(dim=1) if weight.shape[1] else weight.new_zeros(len(weight))
    if not largest.isfinite().all():
        raise UserError("quantize_rows: the weight has elements that are not finite")
    scales = largest / 127
    # Of zeros, or of numbers so small that a subnormal scale could not tell them apart.
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, 1.0, scales)
    quantized = (weight / scales[:, None]).round().clamp(-127, 127)
    return quantized.to(torch.int8).contiguous(), scales


def dequantize_rows(weight: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(..., K) int8 and (...) scales → (..., K) of ``dtype``."""
    return (weight.float() * scales[..., None]).to(dtype)


def _check(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> None:
    if weight.dim() != 2 or weight.dtype != torch.int8 or not weight.is_contiguous():
        raise UserError(
            f"int8_linear: weight must be a contiguous int8 matrix, not {weight.dtype} of "
            f"{tuple(weight.shape)}"
        )
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K or x.dtype not in _DTYPES:
        raise UserError(
            f"int8_linear: x must be floating point and (..., {K}), not {x.dtype} of {tuple(x.shape)}"
        )
    if scales.shape != (N,) or scales.dtype != torch.float32:
        raise UserError(
            f"int8_linear: scales must be float32 and ({N},), not {scales.dtype} of "
            f"{tuple(scales.shape)}"
        )
    if bias is not None and (bias.shape != (N,) or bias.dtype not in _DTYPES):
        raise UserError(
            f"int8_linear: bias must be floating point and ({N},), not {bias.dtype} of "
            f"{tuple(bias.shape)}"
        )
    for name, tensor in (("weight", weight), ("scales", scales), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise UserError(f"int8_linear: x is on {x.device} and {name} on {tensor.device}")
    if torch.is_grad_enabled() and (
        x.requires_grad or scales.requires_grad or (bias is not None and bias.requires_grad)
    ):
        raise UserError(
            "int8_linear: a quantised layer is for inference, and here a gradient is asked for: call "
            "it under torch.no_grad()"
        )


def reference(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in plain PyTorch; 16-bit x are multiplied in 16 bits, with float32 sums inside."""
    weight = weight.to(x.dtype)
    if x.dtype == torch.float16:
        # Sums of codes go beyond float16 where y does not: 768 of them, x being 8, make 780,000. So of each
        # scale a power of two goes into the codes, which it does not round.
        units = scales.abs().log2().floor().clamp(-14, 8).exp2()
        weight, scales = weight * units.to(x.dtype)[:, None], scales / units
    y = F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32)) * scales
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


# --- torch.ops.almostgpt.int8_linear and torch.ops.almostgpt_emulator.int8_linear ----------------


def _fake(x, weight, scales, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


define(
    "int8_linear",
    "(Tensor x, Tensor weight, Tensor scales, Tensor? bias) -> Tensor",
    fake=_fake,
    cpu=reference,
)


# --- kernels -------------------------------------------------------------------------------------


def _run_csrc(ops, x, weight, scales, bias=None):
    if bias is not None and bias.dtype not in (x.dtype, torch.float32):
        bias = bias.float()
    return ops.int8_linear(x, weight, scales, bias)


def _refuse_card(card, x, weight, scales, bias=None) -> str | None:
    N, K = weight.shape
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA kernel multiplies bfloat16 and float16, not {x.dtype}"
    if K == 0 or K % 16:
        return f"it reads 16 weights of a row at once, and rows of {K} are no multiple of that"
    if x.numel() > MAX_ROWS * K:
        return (
            f"it is for the 1 to {MAX_ROWS} rows of a decoding step, and x has {x.numel() // K}: a "
            "matrix product takes longer than reading the weight, and cuBLAS is better at it"
        )
    return None


# --- on a processor ------------------------------------------------------------------------------

_MOST_PORTABLE_ROWS = 8  # see docs/cpu.md


cpu.define(
    "cpu_int8_linear",
    "(Tensor x, Tensor weight, Tensor scales, Tensor? bias, int instruction_set) -> Tensor",
    fake=_fake,
)


def _refuse_cpu(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None):
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ kernel takes float32 and bfloat16, not {x.dtype}"
    if not x.is_meta and cpu.best() == "portable" and x.numel() > _MOST_PORTABLE_ROWS * x.shape[-1]:
        return (
            f"without AVX2 the product of more than {_MOST_PORTABLE_ROWS} rows is faster in float32"
        )
    return None


def _run_cpu(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    if bias is not None and (bias.dtype != torch.float32 or not bias.is_contiguous()):
        bias = bias.float().contiguous()
    return torch.ops.almostgpt.cpu_int8_linear.default(
        x, weight, scales.contiguous(), bias, cpu.BEST
    )


INT8_LINEAR = Op(
    "int8_linear",
    _check,
    (
        *csrc_kernels("int8_linear_sm80", _refuse_card, _run_csrc),
        cpu.cpu_kernel("int8_linear", _refuse_cpu, _run_cpu),
        Kernel("reference", "plain PyTorch", lambda *args, **kwargs: None, reference),
    ),
)

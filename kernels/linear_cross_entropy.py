"""The output projection and its cross-entropy in one op, which never holds all logits.

For each token with hidden state h and target t, W the output weight and z = W h:

    loss = logsumexp(z) − z[t],    z ← softcap · tanh(z / softcap) where there is a softcap

averaged or summed over the tokens whose target is not ``ignore_index``. Of a vocabulary of 50k the
logits of 16k tokens are 1.6 GB in bfloat16, and plain PyTorch holds two to four such tensors; here
there are those of a part of the tokens, and the gradients of the loss are made while they are
there (linear_cross_entropy_reference.py has the maths and the sources).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from almostgpt.errors import UserError
from almostgpt.kernels import triton_ops
from almostgpt.kernels.cross_entropy import check_loss_options, reduced, without_autocast
from almostgpt.kernels.cross_entropy import reference as of_all_logits
from almostgpt.kernels.csrc import refuse_derivatives
from almostgpt.kernels.dispatch import Kernel, Op
from almostgpt.kernels.linear_cross_entropy_reference import Options, loss_in_parts, plain_step

if triton_ops.MISSING is None:
    from almostgpt.kernels import linear_cross_entropy_triton as kernel

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -1,
    reduction: str = "mean",
    softcap: float = 0.0,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """The cross-entropy of targets under ``softmax(hidden · weightᵀ)``, in nats.

    Args:
        hidden: (..., n), n ≥ 1; bfloat16, float16, float32 or float64.
        weight: (V, n), hidden's dtype or float32. Under autocast the products of both are in
            autocast's dtype, as those of ``F.linear`` are. Gradients add up in float32.
        targets: (...), int64 or int32: in [0, vocab_size), or ``ignore_index``. Others are an
            error on a CPU; on a GPU, where looking would cost a sync, the kernels make the loss NaN.
        ignore_index: a token with this target has no loss and no gradient.
        reduction: ``"mean"`` over the tokens that count (of none of them it is 0, not PyTorch's
            NaN), ``"sum"``, or ``"none"``. With none the logits are computed again in backward.
        softcap: bends logits to (−softcap, softcap) by tanh; 0 switches it off.
        vocab_size: rows of the weight from here on are padding, no token; V when None.
        chunk_bytes: how much memory the logits may take at a time; see ``chunk_rows``.

    Returns:
        A scalar, or with ``"none"`` (...): float32, float64 for float64.

    Raises:
        UserError: a shape, dtype, device or option that does not fit; a second derivative.
    """
    return LINEAR_CROSS_ENTROPY(
        hidden,
        weight,
        targets,
        ignore_index=ignore_index,
        reduction=reduction,
        softcap=softcap,
        vocab_size=vocab_size,
        chunk_bytes=chunk_bytes,
    )


def _check(
    hidden,
    weight,
    targets,
    *,
    ignore_index=-1,
    reduction="mean",
    softcap=0.0,
    vocab_size=None,
    chunk_bytes=None,
) -> None:
    def refuse(what: str) -> None:
        raise UserError(f"linear_cross_entropy: {what}")

    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        refuse(f"hidden must be (..., n) with n ≥ 1, not {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        refuse(f"weight must be (V, {hidden.shape[-1]}), V ≥ 1, not {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:-1]:
        refuse(
            f"targets must be {tuple(hidden.shape[:-1])} for hidden of {tuple(hidden.shape)}, "
            f"not {tuple(targets.shape)}"
        )
    if hidden.dtype not in _DTYPES:
        refuse(f"hidden must be a floating tensor of 16 bits or more, not {hidden.dtype}")
    if weight.dtype != hidden.dtype and weight.dtype != torch.float32:
        if not (_autocasts(hidden) and weight.dtype in _DTYPES):
            refuse(f"weight must be {hidden.dtype} (as hidden) or float32, not {weight.dtype}")
    check_loss_options("linear_cross_entropy", targets, reduction, softcap)
    if not hidden.device == weight.device == targets.device:
        refuse(
            f"hidden is on {hidden.device}, weight on {weight.device}, targets on {targets.device}"
        )
    if vocab_size is not None and not 1 <= vocab_size <= weight.shape[0]:
        refuse(f"vocab_size is {vocab_size}, but must be in [1, {weight.shape[0]}]")
    if chunk_bytes is not None and chunk_bytes < 1:
        refuse(f"chunk_bytes is {chunk_bytes}, but must be at least 1")


def _autocasts(hidden: Tensor) -> bool:
    """Whether autocast chooses the dtype of products; it leaves float64 alone."""
    device = hidden.device.type
    available = torch.amp.is_autocast_available(device) and hidden.dtype != torch.float64
    return available and torch.is_autocast_enabled(device)


# ---------------------------------------------------------------- the size of a part

# On a CPU larger parts are not faster and smaller ones pass over the weight's gradient more often.
CPU_CHUNK_BYTES = 1 << 26
# On a GPU 512 MiB are 5,000 tokens of GPT-2's vocabulary: enough for products at full speed.
GPU_CHUNK_BYTES = 1 << 29
SMALLEST_CHUNK_BYTES = 1 << 24


@torch.compiler.assume_constant_result
def chunk_budget(device: torch.device) -> int:
    """Bytes that the logits of a part may take on a device.

    On a GPU at most an eighth of what is free now, halved from ``GPU_CHUNK_BYTES`` on, so that the
    same run nearly always takes the same parts, and its sums are rounded the same way.
    """
    if device.type != "cuda":
        return CPU_CHUNK_BYTES
    if torch.cuda.is_current_stream_capturing():
        return GPU_CHUNK_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    # What torch's allocator holds and does not use is as good as free.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    budget = GPU_CHUNK_BYTES
    while budget > max(free // 8, SMALLEST_CHUNK_BYTES):
        budget //= 2
    return budget


def chunk_rows(tokens: int, vocab: int, itemsize: int, budget: int) -> int:
    """Tokens in a part: parts of equal size, as few as the budget allows, in multiples of 64."""
    most = max(64, budget // (vocab * itemsize) // 64 * 64)
    parts = -(-tokens // most)
    return -(-tokens // max(parts, 1) // 64) * 64 if parts > 1 else max(tokens, 1)


# ---------------------------------------------------------------- gradients


class _Sum(torch.autograd.Function):
    """The sum of the losses; its gradients are made in forward, and only scaled in backward.

    They are handed out: the first backward scales them where they are, which saves a second matrix
    of the weight's size. Whoever goes backward again (retain_graph) has them computed again.
    """

    @staticmethod
    def forward(ctx, in_parts, wanted, hidden, weight, targets, *options):
        losses, *gradients = in_parts(hidden, weight, targets, None, *options, *wanted)
        ctx.dtypes = hidden.dtype, weight.dtype
        if torch.compiler.is_compiling():  # it knows itself when memory can be used again
            ctx.save_for_backward(*gradients)
        else:
            ctx.save_for_backward(hidden, weight, targets)
            ctx.in_parts, ctx.options, ctx.made = in_parts, options, gradients
        return losses.sum()

    @staticmethod
    def backward(ctx, dloss):
        refuse_second_derivative()
        wanted = ctx.needs_input_grad[2:4]
        gradients = ctx.saved_tensors if torch.compiler.is_compiling() else _taken(ctx, wanted)
        # In float32: dloss is one over the number of tokens, which 16 bits would round by up to
        # 0.4 %, all one way.
        scaled = [
            _scaled(gradient, dloss).to(dtype) if want else None
            for gradient, dtype, want in zip(gradients, ctx.dtypes, wanted, strict=True)
        ]
        return None, None, *scaled, *(None,) * (len(ctx.needs_input_grad) - 4)


def _taken(ctx, wanted: tuple[bool, bool]) -> list[Tensor]:
    """The gradients that forward has made, or, where a backward has had them, new ones."""
    gradients, ctx.made = ctx.made, None
    if gradients is None:
        hidden, weight, targets = ctx.saved_tensors
        with without_autocast(hidden.device):
            _, *gradients = ctx.in_parts(hidden, weight, targets, None, *ctx.options, *wanted)
    return gradients


def _scaled(gradient: Tensor, dloss: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return gradient.to(dloss.dtype) * dloss
    return gradient.to(dloss.dtype).mul_(dloss)


class _Each(torch.autograd.Function):
    """Every token's loss; backward computes the logits again, since each has its own gradient."""

    @staticmethod
    def forward(ctx, in_parts, wanted, hidden, weight, targets, *options):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.in_parts, ctx.options = in_parts, options
        return in_parts(hidden, weight, targets, None, *options, False, False)[0]

    @staticmethod
    def backward(ctx, dlosses):
        refuse_second_derivative()
        hidden, weight, targets = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:4]
        states = hidden
        if torch.compiler.is_compiling():
            # Or else a compiler finds that these products are those of forward, makes them once and
            # keeps all logits in between.
            states = hidden + (0 * dlosses).unsqueeze(1).to(hidden.dtype)
        with without_autocast(hidden.device):
            _, dhidden, dweight = ctx.in_parts(
                states, weight, targets, dlosses, *ctx.options, *wanted
            )
        return (
            None,
            None,
            dhidden.to(hidden.dtype) if wanted[0] else None,
            dweight.to(weight.dtype) if wanted[1] else None,
            *(None,) * (len(ctx.needs_input_grad) - 4),
        )


def refuse_second_derivative() -> None:
    """Where a backward is asked to be differentiable itself."""
    if torch.is_grad_enabled():
        raise UserError(
            "linear_cross_entropy has no second derivative: write "
            "F.cross_entropy(F.linear(hidden, weight), targets), which holds all logits"
        )


# ---------------------------------------------------------------- kernels


def _plain_in_parts(hidden, weight, targets, upstream, *options):
    *options, want_dhidden, want_dweight = options
    return loss_in_parts(
        plain_step, hidden, weight, targets, upstream, Options(*options), want_dhidden, want_dweight
    )


def _prepared(hidden, weight, targets, ignore_index, softcap, vocab_size, chunk_bytes):
    """The arguments of what works on rows: tensors of two dimensions and plain options."""
    dtype = hidden.dtype
    if _autocasts(hidden):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    V = weight.shape[0]
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    budget = chunk_bytes or chunk_budget(hidden.device)
    rows = chunk_rows(len(hidden), V, dtype.itemsize, budget)
    options = (ignore_index, float(softcap), V if vocab_size is None else vocab_size, rows, dtype)
    return hidden, weight, targets, *options


def _loss(
    in_parts,
    hidden,
    weight,
    targets,
    *,
    ignore_index=-1,
    reduction="mean",
    softcap=0.0,
    vocab_size=None,
    chunk_bytes=None,
) -> Tensor:
    inputs = _prepared(hidden, weight, targets, ignore_index, softcap, vocab_size, chunk_bytes)
    # Asked here: within a Function autograd is always off, and needs_input_grad does not know.
    wanted = tuple(t.requires_grad and torch.is_grad_enabled() for t in inputs[:2])
    function = _Each if reduction == "none" else _Sum
    with without_autocast(hidden.device):
        losses = function.apply(in_parts, wanted, *inputs)
    return reduced(losses, targets, ignore_index, reduction)


def reference(hidden, weight, targets, *, vocab_size=None, chunk_bytes=None, **options) -> Tensor:
    """The same in plain PyTorch, in parts too, but for derivatives that only PyTorch has."""
    if refuse_derivatives():
        logits = F.linear(hidden, weight.to(hidden.dtype))[..., :vocab_size]
        return of_all_logits(logits, targets, **options)
    options |= {"vocab_size": vocab_size, "chunk_bytes": chunk_bytes}
    return _loss(_plain_in_parts, hidden, weight, targets, **options)


def _run_triton(hidden, weight, targets, **options) -> Tensor:
    op = torch.ops.almostgpt.linear_cross_entropy
    in_parts = op if torch.compiler.is_compiling() else kernel.IN_PARTS
    return _loss(in_parts, hidden, weight, targets, **options)


def _refuse_call(hidden, weight, targets, **options) -> str | None:
    if torch.float64 in (hidden.dtype, weight.dtype):
        return "the Triton kernels do not compute in float64"
    return None


LINEAR_CROSS_ENTROPY = Op(
    "linear_cross_entropy",
    _check,
    (
        *triton_ops.triton_kernels("linear_cross_entropy", _refuse_call, _run_triton),
        Kernel("reference", "plain PyTorch in parts", lambda *a, **k: None, reference),
    ),
)

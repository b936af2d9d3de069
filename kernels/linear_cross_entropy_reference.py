"""The loss of an output projection in parts of tokens, so that all logits never exist at once.

With hidden states h (T, n), a weight W (V, n), targets t and p = softmax(W h) of each token,

    loss = Σ over tokens of −log p[t]        dlogits = p − onehot(t)
    dh   = dlogits · W                       dW      = Σ over tokens of dlogitsᵀ · h

and all three can be computed from the logits of a few tokens at a time while these are there: so
the gradients of the sum are made in forward, and backward only multiplies them with the gradient of
the loss (Wijmans et al. 2024, "Cut Your Losses", arXiv:2411.09009, section 3, and Liger, Hsu et al.
2024, arXiv:2410.10989). Tokens of a part are as many as its logits fit into a budget of bytes.

Parts are added up in float32: of thousands of tokens a bfloat16 sum loses the small terms, and
training diverges.

A *step* makes of the logits of a part their losses and, in their place, their gradient. The one
here is plain PyTorch; linear_cross_entropy_triton.py has the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from almostgpt.kernels.cross_entropy import check_targets
from almostgpt.kernels.values import unread


class Options(NamedTuple):
    """What does not change from part to part."""

    ignore_index: int
    softcap: float
    vocab_size: int  # columns from here on are padding
    rows: int  # tokens in a part
    dtype: torch.dtype  # of the matrix products


# (logits (rows, V), targets (rows,), upstream (rows,) or None, options, gradient wanted) →
# losses (rows,), and logits' gradient or None
Step = Callable[[Tensor, Tensor, Tensor | None, Options, bool], tuple[Tensor, Tensor | None]]


def loss_in_parts(
    step: Step,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    upstream: Tensor | None,
    options: Options,
    want_dhidden: bool,
    want_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's loss, and the gradients of their sum, or of their sum weighted by ``upstream``.

    Args:
        step: of one part.
        hidden: (T, n).
        weight: (V, n).
        targets: (T,).
        upstream: (T,) or None.

    Returns:
        losses (T,) and dweight (V, n), in float32 (float64 for float64), and dhidden (T, n), in
        ``options.dtype``. A gradient that is not wanted is empty.
    """
    T = len(hidden)
    weight = weight.to(options.dtype)
    total = _sum_dtype(options.dtype)
    gradient = want_dhidden or want_dweight
    losses, dhidden, dweight = [], [], None
    buffer = _logits_buffer(hidden, weight, options)
    for start in range(0, T, options.rows):
        part = slice(start, start + options.rows)
        h = hidden[part].to(options.dtype)
        if buffer is None:
            logits = torch.mm(h, weight.t())
        else:
            logits = torch.mm(h, weight.t(), out=buffer[: len(h)])
        loss, dlogits = step(
            logits,
            targets[part],
            None if upstream is None else upstream[part],
            options,
            gradient,
        )
        losses.append(loss)
        if want_dhidden:
            dhidden.append(torch.mm(dlogits, weight))
        if want_dweight:
            dweight = _add_product(dweight, dlogits.t(), h)
    if dweight is None:
        dweight = weight.new_zeros(weight.shape if want_dweight else 0, dtype=total)
    return (
        _joined(losses, hidden.new_empty(0, dtype=total)),
        _joined(dhidden, hidden.new_empty(0, hidden.shape[1], dtype=options.dtype)),
        dweight,
    )


def _joined(parts: list[Tensor], nothing: Tensor) -> Tensor:
    if not parts:
        return nothing
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _is_plain(tensor: Tensor) -> bool:
    """Whether this runs now, on values or on none (fake), rather than being traced by a compiler."""
    kinds = (Tensor, torch.nn.Parameter, FakeTensor)
    return type(tensor) in kinds and not torch.compiler.is_compiling()


def _logits_buffer(hidden: Tensor, weight: Tensor, options: Options) -> Tensor | None:
    """Memory for the logits of every part in turn; None where fresh memory costs nothing.

    A CPU's operating system hands out large fresh memory in pages that are faulted in one by one:
    a 4096 × 2048 product takes 21 ms into such, 5 ms into memory in use (2 cores, AMD EPYC).
    """
    if hidden.device.type != "cpu" or not _is_plain(hidden):
        return None
    return hidden.new_empty(min(options.rows, len(hidden)), len(weight), dtype=options.dtype)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a b, in float32 or wider, into ``total``."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    if a.device.type != "cuda":  # elsewhere no product of 16-bit matrices has 32-bit results
        a, b = a.float(), b.float()
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    if _is_plain(total) and type(total) is not FakeTensor:
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    # Neither torch.compile nor fakes know addmm's out_dtype (pytorch/pytorch#163880), but mm's.
    return total.add_(torch.mm(a, b, out_dtype=torch.float32))


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def plain_step(
    logits: Tensor, targets: Tensor, upstream: Tensor | None, options: Options, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """A step in plain PyTorch, in place where nobody is compiling it."""
    x = logits.to(_sum_dtype(logits.dtype))
    slope = None
    if options.softcap:
        bent = torch.tanh(x / options.softcap)
        slope = 1 - bent.square()
        x = bent * options.softcap
    plain = _is_plain(x)
    if options.vocab_size < x.shape[1]:
        if plain:
            x[:, options.vocab_size :] = -torch.inf
        else:
            columns = torch.arange(x.shape[1], device=x.device)
            x = x.masked_fill(columns >= options.vocab_size, -torch.inf)
    seen = targets != options.ignore_index
    index = targets.where(seen, 0).long().unsqueeze(1)
    if plain:
        check_targets("linear_cross_entropy", index, options.vocab_size, options.ignore_index)
    if plain and x.device.type == "cpu":
        # One pass that reads and one that writes, none into fresh memory: 68 ms for (256, 50304)
        # where logsumexp, sub_ and exp_ take 184 to 259 (2 loaded cores of an AMD EPYC,
        # torch 2.13, 2026-11-21).
        log_p = torch.log_softmax(x, -1, out=x)
    else:
        log_p = torch.log_softmax(x, -1)
    losses = -log_p.gather(1, index).squeeze(1).where(seen, 0)
    if not gradient:
        return losses, None
    p = log_p.exp_() if plain else log_p.exp()
    scale = seen.to(p.dtype) if upstream is None else upstream * seen
    if plain:
        dlogits = p.scatter_add_(1, index, torch.full_like(index, -1, dtype=p.dtype))
        if slope is not None:
            dlogits = dlogits.mul_(slope)
        if upstream is not None or unread(seen) or not seen.all():
            dlogits = dlogits.mul_(scale.unsqueeze(1))
    else:
        columns = torch.arange(x.shape[1], device=x.device)
        dlogits = p - (columns == index).to(p.dtype)
        if slope is not None:
            dlogits = dlogits * slope
        dlogits = dlogits * scale.unsqueeze(1)
    return losses, dlogits.to(options.dtype)

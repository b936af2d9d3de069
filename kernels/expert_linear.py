"""The grouped product of a mixture of experts: each row times the weight of the expert it was sent to.

The rows lie sorted by expert, and expert e has those from offsets[e − 1] to before offsets[e]:

    y_i = x_i · W_eᵀ,   dx_i = dy_i · W_e,   dW_e = Σ_{i of e} dy_iᵀ x_i

However many rows an expert has, none is dropped and none is padded ("dropless"). The three products are
two ops, which are each other's derivatives, so that there are derivatives of every order.

Source: Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", arXiv:2211.15841.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from almostgpt.errors import UserError
from almostgpt.kernels.autocast import in_autocast_dtype
from almostgpt.kernels.dispatch import Kernel, Op

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Generations of cards on which PyTorch's grouped product does not wait for the offsets.
_GROUPED_ON = (9, 10)


def expert_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each row of x by its expert's weight; differentiable in x and weight.

    Under autocast x and weight are taken in its dtype.

    Args:
        x: (N, in), rows sorted by expert; any floating dtype.
        weight: (E, out, in) in x's dtype, each like the weight of ``nn.Linear``.
        offsets: (E,) int32, where the rows of each expert end: it never decreases, and the last is N.
            On a CPU the values are checked; on a GPU nobody waits for them.

    Returns:
        (N, out) in x's dtype. An expert without rows has a gradient of zeros.

    Raises:
        UserError: shapes, dtypes, devices or offsets that do not fit together.
    """
    if not all(isinstance(tensor, Tensor) for tensor in (x, weight, offsets)):
        raise UserError("expert_linear: x, weight and offsets must be tensors")
    return in_autocast_dtype(EXPERT_LINEAR, x, weight, offsets)


def _check(x: Tensor, weight: Tensor, offsets: Tensor) -> None:
    if weight.dim() != 3 or weight.shape[0] == 0 or x.dim() != 2 or x.shape[1] != weight.shape[2]:
        raise UserError(
            f"expert_linear: weight must be (E, out, in) and x (N, in), not {tuple(weight.shape)} "
            f"and {tuple(x.shape)}"
        )
    if x.dtype not in _DTYPES or weight.dtype != x.dtype:
        raise UserError(
            "expert_linear: x and weight must have one floating dtype of 16 bits or more, not "
            f"{x.dtype} and {weight.dtype}"
        )
    if offsets.shape != weight.shape[:1] or offsets.dtype != torch.int32:
        raise UserError(
            f"expert_linear: offsets must be int32 and ({weight.shape[0]},), not {offsets.dtype} "
            f"and {tuple(offsets.shape)}"
        )
    if not x.device == weight.device == offsets.device:
        raise UserError(
            f"expert_linear: x is on {x.device}, weight on {weight.device} and offsets on "
            f"{offsets.device}"
        )


# --- torch.ops.almostgpt.expert_linear and expert_linear_weight ----------------------------------
# Each three times: expert by expert with the offsets read (on a CPU, where that is free), by PyTorch's
# grouped product, and, where it does not serve, every expert over all rows and what is its own chosen.


def _linear_cpu(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[1])
    for expert, rows in enumerate(_rows(offsets, x.shape[0])):
        torch.mm(x[rows], weight[expert].t(), out=y[rows])
    return y


def _weight_cpu(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    dweight = x.new_empty(offsets.shape[0], dy.shape[1], x.shape[1])
    for expert, rows in enumerate(_rows(offsets, x.shape[0])):
        torch.mm(dy[rows].t(), x[rows], out=dweight[expert])
    return dweight


def _rows(offsets: Tensor, N: int) -> list[slice]:
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    if ends[-1] != N or starts != sorted(starts) or starts[-1] > N:
        shown = ends if len(ends) <= 10 else [*ends[:5], "…", *ends[-4:]]
        raise UserError(
            f"expert_linear: offsets must never decrease, and end with the number of rows, {N}; they "
            f"are [{', '.join(map(str, shown))}]"
        )
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]


def _linear_masked(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    experts = _experts(offsets, x.shape[0])
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for expert, own in enumerate(weight):
        y = torch.where(experts == expert, x @ own.t(), y)
    return y


def _weight_masked(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    experts = _experts(offsets, x.shape[0])
    # Chosen on both sides: zeros times what another expert's rows hold might be NaN.
    return torch.stack(
        [
            dy.masked_fill(experts != expert, 0).t() @ x.masked_fill(experts != expert, 0)
            for expert in range(offsets.shape[0])
        ]
    )


def _experts(offsets: Tensor, N: int) -> Tensor:
    """(N, 1), the expert of each row."""
    rows = torch.arange(N, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets, rows, right=True)[:, None]


def _linear_grouped(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(_dense(x), _dense(weight).mT, offs=offsets)


def _weight_grouped(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(_dense(dy).t(), _dense(x), offs=offsets)


def _dense(x: Tensor) -> Tensor:
    """One row after the other (or of weights one column), from an address that is a multiple of 16.

    Of rows (N, n) the columns would not do: N may be any number, and each begins at such an address.
    """
    dense = x.is_contiguous() or (x.dim() == 3 and x.mT.is_contiguous())
    return x if dense and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _serves_grouped(x: Tensor, other: Tensor) -> bool:
    """Whether PyTorch's grouped product takes rows like these, with ``other``'s rows or columns."""
    return (
        x.dtype == torch.bfloat16
        and x.shape[0] > 0
        and all(n > 0 and n % 8 == 0 for n in (x.shape[1], other.shape[-1]))
        and torch.cuda.get_device_capability(x.device)[0] in _GROUPED_ON
    )


def _linear_cuda(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    run = _linear_grouped if _serves_grouped(x, weight.mT) else _linear_masked
    return run(x, weight, offsets)


def _weight_cuda(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    run = _weight_grouped if _serves_grouped(dy, x) else _weight_masked
    return run(dy, x, offsets)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _linear_gradients(ctx, dy):
    x, weight, offsets = ctx.saved_tensors
    ops, (for_x, for_weight, _) = torch.ops.almostgpt, ctx.needs_input_grad
    dx = ops.expert_linear(dy, weight.mT, offsets) if for_x else None
    return dx, ops.expert_linear_weight(dy, x, offsets) if for_weight else None, None


def _weight_gradients(ctx, a):
    """Of Σ_e a_e · dW_e, a being (E, out, in): the first op again."""
    dy, x, offsets = ctx.saved_tensors
    ops, (for_dy, for_x, _) = torch.ops.almostgpt, ctx.needs_input_grad
    ddy = ops.expert_linear(x, a, offsets) if for_dy else None
    return ddy, ops.expert_linear(dy, a.mT, offsets) if for_x else None, None


def _linear_fake(x, weight, offsets):
    return x.new_empty(x.shape[0], weight.shape[1])


def _weight_fake(dy, x, offsets):
    return x.new_empty(offsets.shape[0], dy.shape[1], x.shape[1])


_LIBRARY = torch.library.Library("almostgpt", "FRAGMENT")


def _define(schema: str, *, cpu, cuda, anywhere, fake, gradients) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    _LIBRARY.impl(name, anywhere, "CompositeExplicitAutograd")
    torch.library.register_fake(f"almostgpt::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(
        f"almostgpt::{name}", gradients, setup_context=_save, lib=_LIBRARY
    )


_define(
    "expert_linear(Tensor x, Tensor weight, Tensor offsets) -> Tensor",
    cpu=_linear_cpu,
    cuda=_linear_cuda,
    anywhere=_linear_masked,
    fake=_linear_fake,
    gradients=_linear_gradients,
)
_define(
    "expert_linear_weight(Tensor dy, Tensor x, Tensor offsets) -> Tensor",
    cpu=_weight_cpu,
    cuda=_weight_cuda,
    anywhere=_weight_masked,
    fake=_weight_fake,
    gradients=_weight_gradients,
)


def reference(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``expert_linear`` by PyTorch's products; of its arguments, which are known to be right."""
    return torch.ops.almostgpt.expert_linear.default(x, weight, offsets)


EXPERT_LINEAR = Op(
    "expert_linear",
    _check,
    (Kernel("reference", "plain PyTorch", lambda *args, **kwargs: None, reference),),
)

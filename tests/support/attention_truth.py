"""Attention as it is defined, and how far from that in float64 a kernel may be.

The rule of the house: at most twice the error of the same maths by PyTorch in the kernel's own dtype,
plus four units in the last place of the size that a result has before anything in it cancels.

    inputs = make(113, 203, H=4, Hkv=2, dtype=torch.bfloat16)
    attend = functools.partial(kernels.flash_attention, return_lse=True)
    assert_close_to_float64(attend, inputs, causal=True, sink_logits=sinks(4))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Deviation:
    name: str
    error: float
    bound: float


class Inputs(NamedTuple):
    """What attention is of, and upstream gradients of what it gives; ``dlse`` is None: lse unused."""

    q: Tensor  # (B, H, Tq, D)
    k: Tensor  # (B, Hkv, Tk, D)
    v: Tensor  # (B, Hkv, Tk, D)
    dout: Tensor  # (B, H, Tq, D), in memory (B, Tq, H, D)
    dlse: Tensor | None  # (B, H, Tq), float32, or float64 for float64

    def double(self) -> Inputs:
        return Inputs(*(tensor if tensor is None else tensor.double() for tensor in self))


def make(
    Tq: int,
    Tk: int,
    *,
    B: int = 1,
    H: int = 2,
    Hkv: int | None = None,
    D: int = 64,
    dtype: torch.dtype = torch.float32,
    with_dlse: bool = True,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Inputs:
    """Inputs drawn on the CPU. Where Tq = Tk, q, k and v are views of one fused projection."""
    Hkv = H if Hkv is None else Hkv
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def heads_first(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype).transpose(1, 2)

    if Tq == Tk:
        fused = heads_first(normal(B, Tq, H + 2 * Hkv, D))
        q, k, v = fused.split([H, Hkv, Hkv], dim=1)
    else:
        q = heads_first(normal(B, Tq, H, D))
        k, v = (heads_first(normal(B, Tk, Hkv, D)) for _ in range(2))
    dout = heads_first(normal(B, Tq, H, D))
    dlse = normal(B, H, Tq).to(device, torch.promote_types(dtype, torch.float32))
    return Inputs(q, k, v, dout, dlse if with_dlse else None)


def slopes(H: int, device: str | torch.device = "cpu") -> Tensor:
    """The ALiBi slopes of H heads: 2^(−8/H), 2^(−16/H), …, 2^(−8); (H,) float32."""
    return torch.exp2(-8 * torch.arange(1, H + 1) / H).to(device)


def sinks(H: int, seed: int = 0, device: str | torch.device = "cpu") -> Tensor:
    """A sink logit for each of H heads; (H,) float32."""
    return torch.randn(H, generator=torch.Generator().manual_seed(seed)).to(device)


# --- the definition --------------------------------------------------------------------------------


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink_logits: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out, lse), with the whole (Tq, Tk) matrix and matrix products in the dtype of q."""
    sees = visible(q.shape[2], k.shape[2], causal, window, cu_seqlens, q.device)
    probabilities, lse = _probabilities(q, k, sees, scale, softcap, alibi_slopes, sink_logits)
    return probabilities.to(q.dtype) @ _repeated(v, q), lse


def visible(
    Tq: int,
    Tk: int,
    causal: bool,
    window: tuple[int, int] | None,
    cu_seqlens: Tensor | None,
    device: torch.device,
) -> Tensor:
    """(Tq, Tk) booleans: whether query i sees key j."""
    left, right = window or (-1, -1)
    distance = _distance(Tq, Tk, device)
    sees = torch.ones(Tq, Tk, dtype=torch.bool, device=device)
    if causal:
        sees &= distance <= 0
    if left >= 0:
        sees &= distance >= -left
    if right >= 0:
        sees &= distance <= right
    if cu_seqlens is not None:
        borders = cu_seqlens.tolist()
        same = torch.zeros_like(sees)
        for start, stop in zip(borders, borders[1:], strict=False):
            same[start:stop, start:stop] = True
        sees &= same
    return sees


def _distance(Tq: int, Tk: int, device: torch.device) -> Tensor:
    """(Tq, Tk): how far key j comes after the place of query i, the last query at the last key."""
    places = torch.arange(Tk - Tq, Tk, device=device)
    return torch.arange(Tk, device=device) - places[:, None]


def _repeated(keys: Tensor, q: Tensor) -> Tensor:
    """(B, Hkv, …) → (B, H, …): query head h has key head h // (H // Hkv)."""
    return keys.repeat_interleave(q.shape[1] // keys.shape[1], dim=1)


def _probabilities(q, k, sees, scale, softcap, alibi_slopes, sink_logits) -> tuple[Tensor, Tensor]:
    """(B, H, Tq, Tk) probabilities and (B, H, Tq) logs of the sums, in float32 or float64."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    scores = (q @ _repeated(k, q).mT).to(wide) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        distance = _distance(q.shape[2], k.shape[2], q.device).abs()
        scores = scores - alibi_slopes.to(wide)[:, None, None] * distance
    scores = scores.masked_fill(~sees, -math.inf)
    blind = scores.new_full((*scores.shape[:-1], 1), -math.inf)
    if sink_logits is not None:
        blind = blind + sink_logits.to(wide)[:, None, None].detach()
    # Subtracted, then added: it moves no gradient, and rows without a key subtract nothing.
    most = torch.cat([scores.detach(), blind], dim=-1).amax(-1, keepdim=True)
    most = most.masked_fill(most == -math.inf, 0.0)
    weights = torch.exp(scores - most)
    total = weights.sum(-1, keepdim=True)
    if sink_logits is not None:
        total = total + torch.exp(sink_logits.to(wide)[:, None, None] - most)
    unseeing = total == 0
    total = total.masked_fill(unseeing, 1.0)
    lse = (most + total.log()).masked_fill(unseeing, -math.inf)
    return weights / total, lse.squeeze(-1)


# --- how far off -----------------------------------------------------------------------------------


def with_gradients(attend: Callable, inputs: Inputs, **options) -> dict[str, Tensor]:
    """out, lse and the gradients dq, dk, dv, with a sink dsink too; by name.

    Args:
        attend: of q, k, v and options; (out, lse).
        inputs: what it is of, and its upstream gradients.
        **options: of attention.
    """
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in "qkv"}
    if options.get("sink_logits") is not None:
        options["sink_logits"] = options["sink_logits"].detach().requires_grad_()
        leaves["sink"] = options["sink_logits"]
    out, lse = attend(leaves["q"], leaves["k"], leaves["v"], **options)
    outputs, upstream = [out], [inputs.dout.to(out.dtype)]
    if inputs.dlse is not None:
        outputs, upstream = [out, lse], [*upstream, inputs.dlse.to(lse.dtype)]
    gradients = torch.autograd.grad(
        outputs, list(leaves.values()), upstream, allow_unused=True, materialize_grads=True
    )
    named = {f"d{name}": tensor for name, tensor in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


def deviations(attend: Callable, inputs: Inputs, **options) -> list[Deviation]:
    """Of out, lse, dq, dk, dv, and with a sink of dsink; arguments as of ``with_gradients``."""
    exact_options = dict(options)
    if options.get("sink_logits") is not None:
        exact_options["sink_logits"] = options["sink_logits"].double()
    exact = with_gradients(plain, inputs.double(), **exact_options)
    peer = with_gradients(plain, inputs, **options)
    ours = with_gradients(attend, inputs, **options)
    sizes = _sizes(inputs.double(), exact["out"], **options)
    found = []
    for name, truth in exact.items():
        got = ours[name]
        assert got.shape == truth.shape and got.device == truth.device, name
        if not truth.numel():
            continue
        # A sum over rows of 16 bits is no better than they are, whatever its own dtype.
        dtype = inputs.q.dtype if name == "dsink" else got.dtype
        peer_error = _largest_difference(peer[name], truth)
        if not math.isfinite(peer_error):  # it overflows in float16, which excuses nothing
            peer_error = 0.0
        ulps = 4 * torch.finfo(dtype).eps * _largest(sizes[name])
        found.append(Deviation(name, _largest_difference(got, truth), 2 * peer_error + ulps))
    return found


def assert_close_to_float64(attend: Callable, inputs: Inputs, **options) -> None:
    for deviation in deviations(attend, inputs, **options):
        assert deviation.error <= deviation.bound, deviation  # False of NaN


def _sizes(
    inputs: Inputs,
    out: Tensor,
    *,
    causal=False,
    window=None,
    scale=None,
    softcap=0.0,
    alibi_slopes=None,
    sink_logits=None,
    cu_seqlens=None,
    deterministic=False,
) -> dict[str, Tensor]:
    """How large each result is before anything in it cancels.

    What rounds the terms of a sum, each by itself, moves the sum by so many times the root of the
    sum of their squares. And backward takes from every dP of a row the same δ = out · dout, of a
    rounded out: it moves the gradient of a score even where the true one is nothing.
    """
    q, k, v, dout, dlse = inputs
    scale = q.shape[3] ** -0.5 if scale is None else scale
    sees = visible(q.shape[2], k.shape[2], causal, window, cu_seqlens, q.device)
    p, lse = _probabilities(q, k, sees, scale, softcap, alibi_slopes, sink_logits)
    keys, values = _repeated(k, q), _repeated(v, q)

    def per_key_head(squares: Tensor) -> Tensor:  # (B, H, Tk, D) -> (B, Hkv, Tk, D)
        return squares.unflatten(1, (k.shape[1], -1)).sum(2).sqrt()

    delta = (out * dout).abs().sum(-1, keepdim=True)
    outside = torch.zeros_like(delta) if dlse is None else dlse.abs()[..., None]
    ds = p * ((dout @ values.mT).abs() + outside)
    sizes = {
        "out": (p**2 @ values**2).sqrt(),
        "dq": scale * ((ds**2 @ keys**2).sqrt() + delta * (p @ keys).abs()),
        "dk": scale * per_key_head((ds**2).mT @ q**2 + (p**2).mT @ (delta * q) ** 2),
        "dv": per_key_head((p**2).mT @ dout**2),
    }
    largest_score = scale * (q.abs() @ keys.abs().mT).masked_fill(~sees, 0.0)
    largest = [largest_score.flatten(), lse[lse.isfinite()].abs().flatten(), lse.new_zeros(1)]
    sizes["lse"] = 1 + torch.cat(largest)
    if sink_logits is not None:
        share = torch.exp(sink_logits.double()[:, None] - lse)  # (B, H, Tq)
        sizes["dsink"] = (share * (delta + outside).squeeze(-1)).square().sum((0, 2)).sqrt()
    return sizes


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def _largest_difference(got: Tensor, truth: Tensor) -> float:
    """Zero where both are the same infinity."""
    got = got.double()
    return _largest(torch.where(got == truth, 0.0, got - truth))

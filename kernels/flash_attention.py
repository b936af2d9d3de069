"""Attention over (B, H, T, D) tensors: softmax(q kᵀ · scale) v, exact, with no (T, T) matrix kept.

For one head, with Tq queries and Tk keys of width D, query i being at the place of key i + Tk − Tq:

    s   = scale · q kᵀ                          (Tq, Tk)
    s   = softcap · tanh(s / softcap)           where there is a softcap
    s   = s − slope · |i + Tk − Tq − j|         where there are ALiBi slopes
    s   = −inf                                  where query i does not see key j
    lse = log(Σⱼ exp(s) + exp(sink))            (Tq,); without the last term where there is no sink
    P   = exp(s − lse)
    out = P v                                   (Tq, D)

With upstream gradients dout and dlse, and c the derivative of the softcap (1 without one):

    δ     = Σ out · dout − dlse                 (Tq,)
    dv    = Pᵀ dout
    dS    = c · P · (dout vᵀ − δ)
    dq    = scale · dS k,  dk = scale · dSᵀ q
    dsink = −Σᵢ exp(sink − lse) · δ

Causal attention is aligned at the bottom right: the last query sees every key. So the one query of
a decoding step sees the whole cache, where an alignment at the top left (``is_causal`` of PyTorch)
would show it one key. A query that sees no key at all gives zeros and the lse of nothing, −inf (or
the sink's).

Sources: Dao et al., "FlashAttention", arXiv:2205.14135, and "FlashAttention-2", arXiv:2307.08691;
softcap, Gemma 2, arXiv:2408.00118; ALiBi, Press et al., arXiv:2108.12409; windows, Beltagy et al.,
"Longformer", arXiv:2004.05150; sinks as logits, gpt-oss, arXiv:2508.10925.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from almostgpt.errors import UserError
from almostgpt.kernels.attention_options import (
    check_scores,
    empty_heads_like,
    refuse_heads,
    refuse_scores,
    refuse_tma,
)
from almostgpt.kernels.autocast import in_autocast_dtype
from almostgpt.kernels.csrc import csrc_kernels, define
from almostgpt.kernels.dispatch import Kernel, Op
from almostgpt.kernels.flash_attention_reference import (
    Options,
    Scoring,
    attend,
    borders_of,
    grouped_matmul,
    has_values,
    masked_scores,
    probabilities,
    reach,
    reference,
)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def flash_attention(
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
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention, with grouped queries by head counts.

    Under autocast q, k and v are taken in its dtype, as ``scaled_dot_product_attention`` takes them.

    Args:
        q: (B, H, Tq, D), any floating dtype and any strides.
        k: (B, Hkv, Tk, D), same dtype and device; H is a multiple of Hkv, and query head h reads
            key head h // (H // Hkv).
        v: (B, Hkv, Tk, D), likewise.
        causal: query i sees the keys j ≤ i + Tk − Tq (bottom-right alignment).
        window: (left, right): query i sees the keys from i + Tk − Tq − left to i + Tk − Tq + right;
            −1 leaves a side open. With ``causal`` right is 0.
        scale: factor on the scores, above 0; 1/√D when None.
        softcap: bends the scores to ±softcap by tanh; 0: not.
        alibi_slopes: (H,) floats, no gradient: what a score of that head loses for each key of
            distance.
        sink_logits: (H,) floats: of each head one more logit in the softmax, which has no value.
        cu_seqlens: (n + 1,) int32: token t belongs to document i if cu_seqlens[i] ≤ t <
            cu_seqlens[i + 1], and sees no other. Then B is 1, Tq = Tk = T; it starts with 0, never
            decreases and ends with T, which it may repeat. Values are checked in eager mode where
            the tensor is on the CPU.
        deterministic: the same bits in every backward on a card, which may be slower.
        return_lse: give lse too.

    Returns:
        out (B, H, Tq, D) in q's dtype, zeros for queries that see no key. With ``return_lse``
        ``(out, lse)``: the natural logarithm of the sum of the softmax, (B, H, Tq) in float32
        (float64 for float64), differentiable, −inf for queries that see neither key nor sink.

    Raises:
        UserError: shapes, dtypes, devices or options that do not fit together.
    """
    options = {
        "causal": causal,
        "window": window,
        "scale": scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sink_logits": sink_logits,
        "cu_seqlens": cu_seqlens,
        "deterministic": deterministic,
        "return_lse": return_lse,
    }
    if not all(isinstance(tensor, Tensor) for tensor in (q, k, v)):
        raise UserError("flash_attention: q, k and v must be tensors")
    return in_autocast_dtype(partial(FLASH_ATTENTION, **options), q, k, v)


def _check(q, k, v, **options) -> None:
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise UserError(f"flash_attention: q, k and v must be (B, H, T, D), not {_shapes(q, k, v)}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise UserError(
            "flash_attention: k and v must have one shape, and q their batch size and head width; "
            f"they are {_shapes(q, k, v)}"
        )
    if q.shape[3] == 0:
        raise UserError(f"flash_attention: heads must be at least 1 wide, not {_shapes(q, k, v)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise UserError(
            f"flash_attention: {q.shape[1]} query heads are no multiple of {k.shape[1]} key heads"
        )
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        raise UserError(
            "flash_attention: q, k and v must have one floating dtype of 16 bits or more, "
            f"not {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise UserError(f"flash_attention: q, k and v are on {q.device}, {k.device} and {v.device}")
    _check_options(q, k, Options(**options))


def _check_options(q: Tensor, k: Tensor, options: Options) -> None:
    window = options.window
    for name in ("causal", "deterministic", "return_lse"):
        if not isinstance(value := getattr(options, name), bool):
            raise UserError(f"flash_attention: {name} must be True or False, not {value!r}")
    if window is not None and not (
        isinstance(window, (tuple, list))
        and len(window) == 2
        and all(isinstance(n, int) and not isinstance(n, bool) and -1 <= n < 2**62 for n in window)
    ):
        raise UserError(
            "flash_attention: window must be (left, right), two whole numbers of keys or −1 for a "
            f"side that is open, not {window!r}"
        )
    check_scores("flash_attention", q, options)
    if options.alibi_slopes is not None and options.alibi_slopes.requires_grad:
        raise UserError(
            "flash_attention: alibi_slopes get no gradient; give them detached, or learn a bias "
            "that is added elsewhere"
        )
    if options.cu_seqlens is not None:
        _check_documents(q, k, options.cu_seqlens)


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise UserError(f"flash_attention: {name} must be a tensor, not {type(value).__name__}")


def _check_documents(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> None:
    _check_tensor("cu_seqlens", cu_seqlens)
    if q.shape[0] != 1 or q.shape[2] != k.shape[2]:
        raise UserError(
            "flash_attention: with cu_seqlens the documents lie one after the other in a batch of "
            f"1, and there are as many queries as keys; q and k are {_shapes(q, k)}"
        )
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise UserError(
            "flash_attention: cu_seqlens must be int32 and (n + 1,) for n ≥ 1 documents, not "
            f"{cu_seqlens.dtype} and {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != q.device:
        raise UserError(
            f"flash_attention: q is on {q.device} and cu_seqlens on {cu_seqlens.device}"
        )
    if cu_seqlens.device.type == "cpu" and has_values(cu_seqlens):
        borders_of(cu_seqlens, q.shape[2])


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)


# --- torch.ops.almostgpt.* and torch.ops.almostgpt_emulator.* ------------------------------------
# They take alibi_slopes and sink_logits in float32, D a multiple of 8, and causal as window_right 0.
# The CPU implementations are the maths above on whole matrices, for any D and floating dtype: they
# let every property of the ops (fakes, autograd, torch.compile) be tested without a GPU.

_OPTIONS = (
    "Tensor? alibi_slopes, Tensor? sink_logits, Tensor? cu_seqlens, int window_left, "
    "int window_right, float scale, float softcap, bool deterministic"
)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _forward_cpu(q, k, v, slopes, sink, cu_seqlens, left, right, scale, softcap, deterministic):
    scoring = Scoring(left, right, scale, softcap, slopes)
    with torch.no_grad():
        out, lse = attend(q, k, v, scoring, sink, cu_seqlens)
    return empty_heads_like(q).copy_(out), lse.contiguous()


def _backward_cpu(
    dout, dlse, q, k, v, out, lse, slopes, sink, cu_seqlens, left, right, scale, softcap, _
):
    B, H, Tq, D = q.shape
    wide = _sum_dtype(q)
    dout, out, q_, k_, v_ = (t.to(wide) for t in (dout, out, q, k, v))
    numbers = None
    if cu_seqlens is not None:
        number = torch.searchsorted(cu_seqlens, torch.arange(Tq), right=True)
        numbers = (number, number)
    scoring = Scoring(left, right, scale, softcap, slopes)
    scores, slope = masked_scores(q_, k_, scoring, numbers, k.shape[2] - Tq)
    P = probabilities(scores, lse)
    delta = (out * dout).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    dS = scale * P * (grouped_matmul(dout, v_.mT) - delta[..., None])
    if slope is not None:
        dS = dS * slope
    dq = empty_heads_like(q).copy_(grouped_matmul(dS, k_))
    dk = empty_heads_like(k).copy_(_of_key_heads(dS, k).mT @ _of_key_heads(q_, k))
    dv = empty_heads_like(v).copy_(_of_key_heads(P, k).mT @ _of_key_heads(dout, k))
    if sink is None:
        return dq, dk, dv, q.new_empty(0, dtype=wide)
    dsink = -(torch.exp(sink[:, None] - lse) * delta).sum((0, 2))
    return dq, dk, dv, dsink.to(sink.dtype)


def _of_key_heads(x: Tensor, k: Tensor) -> Tensor:
    """(B, H, Tq, …) → (B, Hkv, H // Hkv · Tq, …): every query of the heads that read a key head."""
    B, H, Tq, n = x.shape
    return x.reshape(B, k.shape[1], H // k.shape[1] * Tq, n)


def _forward_fake(q, *_):
    return empty_heads_like(q), q.new_empty(q.shape[:3], dtype=_sum_dtype(q))


def _backward_fake(dout, dlse, q, k, v, out, lse, slopes, sink, *_):
    dsink = q.new_empty(0, dtype=_sum_dtype(q)) if sink is None else sink.new_empty(sink.shape)
    return empty_heads_like(q), empty_heads_like(k), empty_heads_like(v), dsink


def _save_forward(ctx, inputs, output):
    q, k, v, slopes, sink, cu_seqlens, *ctx.options = inputs
    ctx.set_materialize_grads(False)  # dlse is None where nobody uses lse
    ctx.save_for_backward(q, k, v, *output, slopes, sink, cu_seqlens)


def _forward_gradients(ctx, dout, dlse):
    if dout is None and dlse is None:
        return (None,) * 11
    q, k, v, out, lse, slopes, sink, cu_seqlens = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dsink = ctx.ops.flash_attention_backward(
        dout, dlse, q, k, v, out, lse, slopes, sink, cu_seqlens, *ctx.options
    )
    return dq, dk, dv, None, None if sink is None else dsink, *(None,) * 6


def _backward_gradients(ctx, *_):
    raise UserError(
        "flash_attention: the kernels have no second derivative; the reference has, by PyTorch's plain "
        "maths, so force both: with kernels.use_backend('reference', ops=['flash_attention']), "
        "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
    )


define(
    "flash_attention_forward",
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    fake=_forward_fake,
    cpu=_forward_cpu,
    backward=_forward_gradients,
    setup_context=_save_forward,
)
define(
    "flash_attention_backward",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsink)",
    fake=_backward_fake,
    cpu=_backward_cpu,
    backward=_backward_gradients,
    setup_context=lambda ctx, inputs, output: None,
)


# --- kernels -------------------------------------------------------------------------------------


class _FlashAttention(torch.autograd.Function):
    """The ops above with their gradient, in eager mode, where that is cheaper than the registered one.

    See ``_RMSNorm`` in rms_norm.py.
    """

    @staticmethod
    def forward(ctx, ops, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = ops.flash_attention_forward(*inputs)
        ctx.ops = ops
        _save_forward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, dout, dlse):
        if torch.is_grad_enabled():  # create_graph: the op records that it has no gradient
            return None, *_forward_gradients(ctx, dout, dlse)
        with torch._C._AutoDispatchBelowAutograd():
            return None, *_forward_gradients(ctx, dout, dlse)


def _run_csrc(ops, q, k, v, **options):
    chosen = Options(**options)
    D = q.shape[3]
    scale = D**-0.5 if chosen.scale is None else float(chosen.scale)
    if D % 8 != 0:  # more columns of zeros: the same scores, and columns of zeros in out
        q, k, v = (pad(t, (0, -D % 8)) for t in (q, k, v))
    slopes, sink = (
        None if t is None else t.to(_sum_dtype(q))
        for t in (chosen.alibi_slopes, chosen.sink_logits)
    )
    left, right = reach(chosen.causal, chosen.window)
    inputs = (
        *(q, k, v, slopes, sink, chosen.cu_seqlens, left, right),
        *(scale, float(chosen.softcap), chosen.deterministic),
    )
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        out, lse = _FlashAttention.apply(ops, *inputs)
    else:
        out, lse = ops.flash_attention_forward(*inputs)
    if D % 8 != 0:
        out = out[..., :D]
    return (out, lse) if chosen.return_lse else out


def _refuse_card(card, q, k, v, **options) -> str | None:
    return refuse_heads(q) or refuse_scores(options.get("scale"), options.get("softcap", 0.0))


def _refuse_hopper(card, q, k, v, **options) -> str | None:
    """What ``is_for_hopper`` in csrc/attention/forward.cuh says of the tensors that arrive there."""
    if why := _refuse_card(card, q, k, v, **options):
        return why
    return refuse_tma(q, k, v)


# Both run the same ops, which choose by the card and the tensors as it is said here. Hopper has a
# forward of its own; its backward is that of every card.
FLASH_ATTENTION = Op(
    "flash_attention",
    _check,
    (
        *csrc_kernels("flash_attention_sm90", _refuse_hopper, _run_csrc, only=(9, 0)),
        *csrc_kernels("flash_attention_sm80", _refuse_card, _run_csrc),
        Kernel("reference", "plain PyTorch", lambda *a, **k: None, reference),
    ),
)

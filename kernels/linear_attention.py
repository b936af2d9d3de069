"""Causal linear attention: a sum over earlier tokens that is kept, in place of a softmax over them.

With the features q_t of queries and k_s of keys (φ already applied), token t gives

    y_t = S_tᵀ q_t / (z_t · n_t + ε),   S_t = Σ_{s≤t} k_s v_sᵀ,   z_t = Σ_{s≤t} m_s

where n and m are q and k, or, where those are rotated by position, what they were before: the rotation
is in the numerator alone, so that the denominator is a sum of positive numbers. S and z are all that is
ever needed of the past: O(T) work, and a state of constant size for generation.

A whole sequence is done in chunks of C tokens. Within a chunk the products q kᵀ are written out, masked
and multiplied by v; what is before it comes from the state at its beginning, a running sum of kᵀ v over
the chunks. That is matrix products of C rows, and nothing larger than (T, C) or (T/C, D, Dv).

Sources: Katharopoulos et al., "Transformers are RNNs", arXiv:2006.16236; the rotation in the numerator
alone, Su et al., "RoFormer", arXiv:2104.09864, eq. 19; chunks, Hua et al., "Transformer Quality in
Linear Time", arXiv:2202.10447.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from almostgpt.errors import UserError
from almostgpt.kernels.autocast import in_autocast_dtype
from almostgpt.kernels.dispatch import Kernel, Op
from almostgpt.kernels.values import outside, unread

CHUNK = 64  # tokens
EPS = 1e-6  # added to denominators
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class LinearState:
    """The sums over all tokens that each sequence has had. ``LinearState.empty`` makes one.

    ``linear_attention`` writes into its tensors: float32, and float64 for inputs in float64.

    Attributes:
        numerator: (B, Hkv, D, Dv), Σ k vᵀ.
        denominator: (B, Hkv, D), Σ m.
    """

    numerator: Tensor
    denominator: Tensor

    @classmethod
    def empty(
        cls,
        batch: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> LinearState:
        """Of no tokens, for inputs of ``dtype`` with ``head_dim`` features; values as wide by default."""
        dtype = torch.promote_types(dtype, torch.float32)
        width = head_dim if value_dim is None else value_dim
        # Made under inference_mode, they could not be written into outside of it.
        with torch.inference_mode(False):
            return cls(
                torch.zeros(batch, kv_heads, head_dim, width, dtype=dtype, device=device),
                torch.zeros(batch, kv_heads, head_dim, dtype=dtype, device=device),
            )


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normalizer: tuple[Tensor, Tensor] | None = None,
    state: LinearState | None = None,
    new_lengths: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Causal linear attention of features, with grouped queries by head counts.

    Sums are in float32 (float64 for float64). Under autocast the inputs are taken in its dtype.

    Args:
        q: (B, H, T, D) features of queries, any floating dtype and any strides.
        k: (B, Hkv, T, D) features of keys, same dtype and device; H is a multiple of Hkv, and query
            head h reads key head h // (H // Hkv).
        v: (B, Hkv, T, Dv), likewise.
        normalizer: (n, m), like q and k: features of the denominator; None: q and k. They are not
            negative, or a denominator may vanish.
        state: the sums over earlier tokens of each sequence, which count, and to which these tokens
            are added IN PLACE. For inference alone.
        new_lengths: (B,) int32: of a sequence only so many of the T tokens are there, the first ones.
            The others enter no sum, whatever they hold, and what they give means nothing but is finite.
        documents: (B, T) int32 or int64, numbers of packed documents that never decrease along a row: a
            token sees those of its own document alone. Not with ``state``.

    Returns:
        (B, H, T, Dv) in q's dtype.

    Raises:
        UserError: shapes, dtypes or devices that do not fit together, a gradient asked for with a
            state, documents with one, or on a CPU numbers that cannot be.
    """
    options = {"state": state, "new_lengths": new_lengths, "documents": documents}
    tensors = (q, k, v) if normalizer is None else (q, k, v, *normalizer)
    if not all(isinstance(tensor, Tensor) for tensor in tensors) or len(tensors) not in (3, 5):
        raise UserError(
            "linear_attention: q, k and v must be tensors, and normalizer two of them or None"
        )

    def run(q, k, v, *others):
        return LINEAR_ATTENTION(q, k, v, normalizer=others or None, **options)

    return in_autocast_dtype(run, *tensors)


# --- checks --------------------------------------------------------------------------------------


def _check(q, k, v, *, normalizer=None, state=None, new_lengths=None, documents=None) -> None:
    name = "linear_attention"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise UserError(f"{name}: q, k and v must be (B, H, T, D), not {_shapes(q, k, v)}")
    B, H, T, D = q.shape
    if (k.shape[0], k.shape[2], k.shape[3]) != (B, T, D) or k.shape[:3] != v.shape[:3]:
        raise UserError(
            f"{name}: q, k and v must be (B, H, T, D), (B, Hkv, T, D) and (B, Hkv, T, Dv), not "
            f"{_shapes(q, k, v)}"
        )
    if k.shape[1] == 0 or H % k.shape[1] != 0:
        raise UserError(f"{name}: {H} query heads are no multiple of {k.shape[1]} key heads")
    features = [q, k, v]
    if normalizer is not None:
        if (normalizer[0].shape, normalizer[1].shape) != (q.shape, k.shape):
            raise UserError(
                f"{name}: normalizer must be shaped as q and k are, {_shapes(q, k)}, not "
                f"{_shapes(*normalizer)}"
            )
        features += normalizer
    if q.dtype not in _DTYPES or any(t.dtype != q.dtype for t in features):
        raise UserError(
            f"{name}: q, k, v and normalizer must have one floating dtype of 16 bits or more, not "
            f"{', '.join(str(t.dtype) for t in features)}"
        )
    if state is not None:
        _check_state(name, features, state, documents)
        features += [state.numerator, state.denominator]
    if new_lengths is not None:
        if new_lengths.shape != (B,) or new_lengths.dtype != torch.int32:
            raise UserError(
                f"{name}: new_lengths must be int32 and ({B},), not {new_lengths.dtype} and "
                f"{tuple(new_lengths.shape)}"
            )
        features.append(new_lengths)
        if (wrong := outside(new_lengths, T + 1)) is not None:
            raise UserError(f"{name}: new_lengths must be within 0 … {T}, not {wrong}")
    if documents is not None:
        check_documents(name, q, documents)
    if any(t.device != q.device for t in features):
        devices = ", ".join(dict.fromkeys(str(t.device) for t in features))
        raise UserError(f"{name}: all tensors must be on one device, not on {devices}")


def _check_state(name: str, features: list[Tensor], state: LinearState, documents) -> None:
    q, _, v = features[:3]
    if not isinstance(state, LinearState):
        raise UserError(f"{name}: state must be a LinearState, not {type(state).__name__}")
    shape, dtype = (*v.shape[:2], q.shape[3]), torch.promote_types(q.dtype, torch.float32)
    held = (state.numerator, state.denominator)
    if (
        held[0].shape != (*shape, v.shape[3])
        or held[1].shape != shape
        or any(t.dtype != dtype for t in held)
    ):
        raise UserError(
            f"{name}: these inputs need a state of {(*shape, v.shape[3])} and {shape} in {dtype}, "
            f"not {_shapes(*held)} in {held[0].dtype}"
        )
    if documents is not None:
        raise UserError(
            f"{name}: documents cannot be used with a state: give each a row of its own"
        )
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*features, *held)):
        raise UserError(
            f"{name}: a state is for inference, and here a gradient is asked for: call it under "
            "torch.no_grad(), or run without a state"
        )


def check_documents(name: str, q: Tensor, documents: Tensor) -> None:
    """Raises ``UserError`` for what numbers no documents of q (B, H, T, D)."""
    wanted = (q.shape[0], q.shape[2])
    if documents.shape != wanted or documents.dtype not in (torch.int32, torch.int64):
        raise UserError(
            f"{name}: documents must be int32 or int64 and {wanted}, not {documents.dtype} and "
            f"{tuple(documents.shape)}"
        )
    if documents.device != q.device:
        raise UserError(f"{name}: q is on {q.device} and documents on {documents.device}")
    if not unread(documents) and bool((documents.diff(dim=1) < 0).any()):
        raise UserError(
            f"{name}: numbers of documents must never decrease along a row: tokens of a document "
            "lie next to one another"
        )


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)


# --- the reference -------------------------------------------------------------------------------


def reference(q, k, v, *, normalizer=None, state=None, new_lengths=None, documents=None) -> Tensor:
    """``linear_attention`` in plain PyTorch; of its arguments, which are known to be right."""
    dtype, T = q.dtype, q.shape[2]
    q, k, v, *others = (
        t.to(torch.promote_types(dtype, torch.float32)) for t in (q, k, v, *(normalizer or ()))
    )
    if new_lengths is not None:
        # Zeros, which add nothing to a sum. Chosen, not multiplied: what is missing may be NaN.
        missing = torch.arange(T, device=q.device) >= new_lengths[:, None]
        q, k, v, *others = (t.masked_fill(missing[:, None, :, None], 0) for t in (q, k, v, *others))
    n, m = others or (q, k)
    if state is not None and T == 1:
        return _step(q, k, v, n, m, state).to(dtype)
    earlier = (None, None) if state is None else (state.numerator, state.denominator[..., None])
    ones = v.new_ones(*v.shape[:3], 1)
    if others:
        numerator, S = _sums(q, k, v, documents, earlier[0])
        denominator, z = _sums(n, m, ones, documents, earlier[1])
    else:  # both at once, with the denominator as one more value
        both = None if state is None else torch.cat(earlier, dim=-1)
        sums, total = _sums(q, k, torch.cat([v, ones], dim=-1), documents, both)
        (numerator, denominator), (S, z) = (t.split([v.shape[3], 1], dim=-1) for t in (sums, total))
    if state is not None:
        state.numerator.add_(S)
        state.denominator.add_(z.squeeze(-1))
    return (numerator / (denominator + EPS)).to(dtype)


def _step(q, k, v, n, m, state: LinearState) -> Tensor:
    """Of one token: it enters the sums, and reads them."""
    state.numerator.add_(k.mT @ v)
    state.denominator.add_(m.squeeze(2))
    B, H, _, D = q.shape
    q, n = (t.reshape(B, k.shape[1], H // k.shape[1], D) for t in (q, n))
    y = q @ state.numerator / (n @ state.denominator[..., None] + EPS)
    return y.view(B, H, 1, v.shape[3])


def _sums(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, earlier: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Σ_{s≤t} (q_t · k_s) v_s, chunk by chunk.

    Args:
        q, k, v: as of ``linear_attention``, in the dtype of the sums.
        documents: likewise.
        earlier: (B, Hkv, D, Dv), Σ k vᵀ over the tokens before these; None: there are none.

    Returns:
        (B, H, T, Dv), and Σ k vᵀ over these tokens, (B, Hkv, D, Dv), which with documents means
        nothing.
    """
    B, H, T, D = q.shape
    Hkv, W = k.shape[1], v.shape[3]
    C = max(1, min(CHUNK, T))
    N = max(1, -(-T // C))
    k, v = (pad(t, (0, 0, 0, N * C - T)).view(B, Hkv, N, C, t.shape[3]) for t in (k, v))
    # The queries of all heads that read a key head are rows of one product.
    q = pad(q, (0, 0, 0, N * C - T)).view(B, Hkv, H // Hkv, N, C, D)
    q = q.transpose(2, 3).reshape(B, Hkv, N, H // Hkv * C, D)
    unseen = torch.ones(C, C, dtype=torch.bool, device=q.device).triu(1)
    entering, last = k, None  # keys that are still seen at the end of their chunk
    if documents is not None:
        numbers = pad(documents, (0, N * C - T)).view(B, 1, N, C)
        unseen = (unseen | (numbers[..., None] != numbers[..., None, :])).unsqueeze(3)
        last = numbers[..., -1]
        entering = k.masked_fill((numbers != last[..., None])[..., None], 0)
    scores = (q @ k.mT).view(B, Hkv, N, H // Hkv, C, C).masked_fill(unseen, 0)
    within = scores.view(B, Hkv, N, H // Hkv * C, C) @ v
    totals = _running_sums(entering.mT @ v, last)
    before = pad(totals[:, :, :-1], (0, 0, 0, 0, 1, 0))  # at the beginning of each chunk
    if earlier is not None:
        before = before + earlier.unsqueeze(2)
    between = (q @ before).view(B, Hkv, N, H // Hkv, C, W)
    if documents is not None:
        # What has come so far is of the last document of the chunk before.
        began_before = pad(numbers[..., 1:, 0] == last[..., :-1], (1, 0))
        of_it = (numbers == numbers[..., :1]) & began_before[..., None]
        between = between.masked_fill(~of_it[:, :, :, None, :, None], 0)
    sums = within.view_as(between) + between
    sums = sums.transpose(2, 3).reshape(B, H, N * C, W)[:, :, :T]
    return sums, totals[:, :, -1]


def _running_sums(x: Tensor, numbers: Tensor | None) -> Tensor:
    """Of (B, Hkv, N, D, W) the sums over all chunks up to each.

    With ``numbers`` (B, 1, N), which never decrease, of those with the same number: in log₂ N passes
    (Hillis and Steele), which take ten times as long as one, but never add up what is masked.
    """
    if numbers is None:
        return x.cumsum(2)
    step = 1
    while step < x.shape[2]:
        others = numbers[..., step:] != numbers[..., :-step]
        moved = x[:, :, :-step].masked_fill(others[..., None, None], 0)
        x = torch.cat([x[:, :, :step], x[:, :, step:] + moved], dim=2)
        step *= 2
    return x


LINEAR_ATTENTION = Op(
    "linear_attention",
    _check,
    (Kernel("reference", "plain PyTorch", lambda *args, **kwargs: None, reference),),
)

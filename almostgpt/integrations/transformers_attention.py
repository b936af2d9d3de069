"""``kernels.flash_attention`` as an attention function of transformers. Loaded by ``register``.

What the op cannot do goes where transformers' ``"sdpa"`` would have sent it, with the same mask;
softcap and sinks, which that has not, are then served by the maths as it is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from almostgpt import kernels
from almostgpt.integrations.transformers_mask import Visible
from almostgpt.kernels.flash_attention_reference import grouped_matmul

_OBSERVED: ContextVar[Counter[str] | None] = ContextVar("almostgpt_observed", default=None)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of one layer, as ``AttentionInterface`` asks for it.

    Args:
        module: the layer; ``module.is_causal`` holds where is_causal is None.
        query: (B, H, Tq, D).
        key, value: (B, Hkv, Tk, D), not repeated.
        attention_mask: as ``transformers_mask.mask`` makes them; or (B, 1, Tq, Tk), boolean or to
            be added, from the user or the model. One that is given holds alone.
        dropout: of the probabilities.
        scaling: factor on the scores; 1/√D when None.
        sliding_window: keys at distances below it are seen, where there is no mask.
        softcap, s_aux: softcap and sink logits of the op.
        kwargs: ``cu_seq_lens_q``, where sequences start in the rows laid end to end: it holds
            before any mask, as in transformers' own flash attention. ``position_bias`` and (paged)
            ``cache`` are of transformers' sdpa.

    Returns:
        (B, Tq, H, D), and None in place of the probabilities.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    reach = None if sliding_window is None else sliding_window - 1
    unmasked = Sees(key.shape[2], is_causal, reach)
    sees = unmasked if attention_mask is None else Sees.of_mask(attention_mask, query.shape[2])
    borders = kwargs.get("cu_seq_lens_q")
    if borders is not None and query.shape[2] == key.shape[2]:
        sees = (sees or unmasked)._replace(cu_seqlens=borders.int())

    why = _refuse(query, key, value, sees, dropout, kwargs)
    if why is not None:
        _note(f"sdpa: {why}")
        if sees is not None:
            key, value = sees.of(key), sees.of(value)
            attention_mask = sees.as_mask(query)
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(
                *(module, query, key, value, attention_mask),
                dropout=dropout,
                scaling=scaling,
                is_causal=is_causal,
                **kwargs,
            )
        if attention_mask is None and is_causal:
            attention_mask = sees.as_mask(query, always=True)
        out = _plain(query, key, value, attention_mask, scaling, softcap, s_aux, dropout)
        return out.transpose(1, 2).contiguous(), None

    B, H, T, D = query.shape
    key, value = sees.of(key), sees.of(value)
    if sees.cu_seqlens is not None:
        query, key, value = (_end_to_end(x) for x in (query, key, value))
    options = {
        "causal": sees.causal,
        "window": sees.window,
        "scale": scaling,
        "softcap": softcap or 0.0,
        "sink_logits": s_aux,
        "cu_seqlens": sees.cu_seqlens,
    }
    if not torch.compiler.is_compiling() and _OBSERVED.get() is not None:
        chosen = kernels.explain("flash_attention", query, key, value, **options)
        _note(f"flash_attention: {chosen.backend}")
    out = kernels.flash_attention(query, key, value, **options)
    return out.transpose(1, 2).reshape(B, T, H, D).contiguous(), None


class Sees(NamedTuple):
    """What a query sees.

    Attributes:
        keys: so many, of those that are given.
        causal: none after its own, the last query's being the last key.
        reach: how many on either side of its own; None: all.
        cu_seqlens: (n + 1,) int32, the sequences of all rows laid end to end, or None.
    """

    keys: int
    causal: bool
    reach: int | None = None
    cu_seqlens: Tensor | None = None

    @classmethod
    def of_mask(cls, mask: Tensor, queries: int) -> Sees | None:
        """What our mask says; None where it is another's."""
        visible = Visible.of_tensor(mask, queries)
        if visible is None:
            return None
        reach = None if visible.window is None else visible.window - 1
        return cls(visible.keys, True, reach, visible.cu_seqlens)

    @property
    def window(self) -> tuple[int, int] | None:
        """As ``flash_attention`` takes it."""
        if self.reach is None:
            return None
        return self.reach, 0 if self.causal else self.reach

    def of(self, x: Tensor) -> Tensor:
        """The keys or values that are there: (B, Hkv, keys, D)."""
        return x if x.shape[2] == self.keys else x[:, :, : self.keys]

    def as_mask(self, query: Tensor, always: bool = False) -> Tensor | None:
        """(B or 1, 1, Tq, keys) booleans, True: seen.

        None where sdpa knows without: all are seen, or causal by its ``is_causal``, unless always.
        """
        B, _, T, _ = query.shape
        if not always and self.reach is None and self.cu_seqlens is None:
            if not self.causal or T in (1, self.keys):
                return None
        keys = torch.arange(self.keys, device=query.device)
        distance = keys - (self.keys - T) - torch.arange(T, device=query.device)[:, None]
        sees = distance <= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if self.reach is not None:
            sees = sees & (distance.abs() <= self.reach)
        if self.cu_seqlens is None:
            return sees[None, None]
        tokens = torch.arange(B * T, dtype=torch.int32, device=query.device)
        numbers = torch.searchsorted(self.cu_seqlens, tokens, right=True).view(B, T)
        return (sees & (numbers[:, :, None] == numbers[:, None]))[:, None]


def _refuse(query, key, value, sees: Sees | None, dropout: float, kwargs: dict) -> str | None:
    """Why ``flash_attention`` cannot serve, or None."""
    if kwargs.get("cache") is not None:
        return "a paged cache"
    if kwargs.get("position_bias") is not None:
        return "a bias on the scores"
    if sees is None:
        return "a mask that is neither causal, a window, nor sequences end to end"
    if dropout > 0:
        return "dropout of the probabilities"
    if key.shape != value.shape or query.shape[3] != key.shape[3]:
        return "values of another shape than keys"
    if query.shape[0] != key.shape[0]:
        return "queries of another batch size than keys"
    return None


def _end_to_end(x: Tensor) -> Tensor:
    """(B, H, T, D) → (1, H, B·T, D), in place where a token's heads lie together in memory."""
    B, H, T, D = x.shape
    return x.transpose(1, 2).reshape(1, B * T, H, D).transpose(1, 2)


def _plain(q, k, v, mask, scale, softcap, sink_logits, dropout: float) -> Tensor:
    """Softmax attention (B, H, Tq, D) with a whole mask, softcap and sinks, in float32."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    scores = grouped_matmul(q.float(), k.float().mT) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        # Not −inf: a query that sees nothing, at padding, must not be NaN in what others see.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sink_logits is not None:
        sinks = sink_logits.float()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=3)
    weights = scores.softmax(3)[..., : k.shape[2]]
    weights = torch.nn.functional.dropout(weights, dropout).to(v.dtype)
    return grouped_matmul(weights, v)


# --- what ran ----------------------------------------------------------------------------------------


@contextmanager
def observe() -> Iterator[Counter[str]]:
    """See ``almostgpt.integrations.transformers.observe``."""
    counts: Counter[str] = Counter()
    token = _OBSERVED.set(counts)
    try:
        yield counts
    finally:
        _OBSERVED.reset(token)


def _note(what: str) -> None:
    if torch.compiler.is_compiling():
        return
    counts = _OBSERVED.get()
    if counts is not None:
        counts[what] += 1

"""The key/value cache: what attention has computed for earlier tokens, kept for later ones.

    full      a slot for every token, up to a capacity
    rolling   slots for the first tokens (the sinks) and for the last ones: it never ends
    in int8   either of them, in about half the bytes of 16-bit floats

A layer with a sliding window keeps that window in either, and one of linear attention its sums.
``almostgpt.kernels.kv_cache`` says which slot holds which token, what a token sees and from how far.
A forward pass calls ``begin``, ``extend`` once a layer, and ``advance``::

    cache = KVCache.rolling(model.config, batch=1, window=256, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        logits, _ = model(prompt, cache=cache)
        logits, _ = model(logits.argmax(-1), cache=cache)

One class in one file, though it is long: making a cache, a forward pass over it and what the host
counts of it share their state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from almostgpt import kernels
from almostgpt.config_model import GPTConfig, resolve_model
from almostgpt.errors import UserError
from almostgpt.inference.cache_layers import (
    Layer,
    Slots,
    copied,
    device_of,
    empty_layers,
    forget,
)
from almostgpt.inference.cache_options import (
    MATTERS,
    SINK_TOKENS,
    check_int8,
    check_options,
    check_rolls,
    check_sums,
    check_whole,
    check_window,
    past_the_positions,
)
from almostgpt.inference.cache_parts import Part, on_device, planned
from almostgpt.kernels import KVLayer, LinearState
from almostgpt.kernels.kv_cache import MAX_QUERIES
from almostgpt.kernels.kv_cache_reference import in_order
from almostgpt.kernels.kv_layer import MAX_POSITION
from almostgpt.kernels.rope import turns_of
from almostgpt.model.attention import ATTENTIONS, checked_lengths
from almostgpt.model.position import POSITIONS

if TYPE_CHECKING:
    from almostgpt.model import GPT


class Queries(NamedTuple):
    """What ``append`` makes of q for ``attend``, as ``kernels.kv_append`` does."""

    q: Tensor
    q_sink: Tensor


class KVCache:
    """The keys and values of B sequences in every layer; ``full``, ``rolling`` or ``for_model`` make one.

    Storage is allocated once. The lengths are kept twice: on the device for the kernels, and on the
    host, so that nothing ever waits for a GPU to tell them.

    Attributes:
        layers: a ``KVLayer`` for each layer of the model, which share lengths and tickets; of linear
            attention a ``LinearState``.
        device_lengths: (B,) int32, ``lengths`` on the device; every layer has this very tensor.
        end: how many tokens a sequence may have.
        turns: (R/2,) int64, see ``kernels.rope.turns_of``; None where the model does not rotate.
        config: the model's, resolved.
    """

    def __init__(self, config: GPTConfig, layers: Sequence[Layer], lengths: list[int], end: int):
        self.config = config
        self.end = end
        device = device_of(layers[0])
        with torch.inference_mode(False):
            self.device_lengths = torch.tensor(lengths, dtype=torch.int32).to(device)
        shared = {"lengths": self.device_lengths}
        if isinstance(layers[0], KVLayer):
            shared["tickets"] = layers[0].tickets
        self.layers = tuple(
            replace(layer, **shared) if isinstance(layer, KVLayer) else layer for layer in layers
        )
        self._slots = {Slots.of(layer) for layer in self.layers if isinstance(layer, KVLayer)}
        frequencies = POSITIONS[config.position].frequencies(config)
        self.turns = None if frequencies is None else turns_of(frequencies).to(device)
        self._lengths = lengths
        self._finish()

    # ------------------------------------------------------------ making one

    @classmethod
    def full(
        cls,
        config: GPTConfig,
        batch: int,
        capacity: int | None = None,
        *,
        int8: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """Slots for ``capacity`` tokens of each sequence, by default ``block_size``; then it ends.

        Args:
            config: the model's.
            batch: B, sequences side by side.
            int8: store in 8 bits, with a float32 scale for each token and head.
            dtype, device: those of the model's weights.
        """
        capacity = config.block_size if capacity is None else capacity
        check_whole("capacity", capacity, 1, MAX_POSITION)
        if not ATTENTIONS[config.attention].endless:
            reason = f", the model's block_size, where {config.attention} attention ends"
            check_whole("capacity", capacity, 1, config.block_size, reason)
        return cls._made(config, batch, Slots(capacity, None, 0), int8, dtype, device)

    @classmethod
    def rolling(
        cls,
        config: GPTConfig,
        batch: int,
        window: int | None = None,
        sink_tokens: int = SINK_TOKENS,
        *,
        int8: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """Each token sees the first ``sink_tokens`` and the last ones, ``window`` (``block_size``) in all.

        There are ``MAX_QUERIES`` − 1 slots more than that: of so many tokens appended at once the last
        ones must not take slots that the first one still sees. Other arguments as of ``full``.
        """
        window = config.block_size if window is None else window
        check_window(config, window, sink_tokens)
        check_rolls(config)
        slots = Slots(window + MAX_QUERIES - 1, window, sink_tokens)
        return cls._made(config, batch, slots, int8, dtype, device)

    @classmethod
    def _made(cls, config, batch, slots: Slots, int8, dtype, device) -> KVCache:
        config = resolve_model(config)
        check_whole("batch", batch, 0, MAX_POSITION)
        if not dtype.is_floating_point:
            raise UserError(f"dtype is {dtype}, but must be that of the model's weights")
        if int8:
            check_int8(config)
        layers = empty_layers(config, batch, slots, int8=int8, dtype=dtype, device=device)
        end = slots.capacity if slots.window is None else MAX_POSITION
        return cls(config, layers, [0] * batch, end)

    @classmethod
    def for_model(
        cls,
        model: GPT,
        batch: int,
        kind: str = "auto",
        tokens: int | None = None,
        window: int | None = None,
        sink_tokens: int | None = None,
    ) -> KVCache | None:
        """The cache that a name means for a model.

        auto is full as long as all tokens fit into the window, where a rolling cache does the same;
        otherwise it is rolling. int8 is that in 8 bits.

        Args:
            model: it gives sizes, dtype and device.
            kind: one of ``KINDS``; of "none" the cache is None.
            tokens: how long a sequence becomes; None: nobody knows.
            window: default ``block_size``.
            sink_tokens: default ``SINK_TOKENS``, or what a smaller window leaves room for.

        Raises:
            UserError: impossible options, or more tokens than the cache or the model's positions reach.
        """
        check_options(kind, window, sink_tokens)
        if kind == "none":
            return None
        config = model.config
        endless, block_size = model.endless, config.block_size
        if tokens is not None and tokens > block_size:
            if not endless:
                raise UserError(past_the_positions(tokens, model))
            if kind == "full":
                raise UserError(
                    f"{tokens} tokens, prompt and new ones together, do not fit: a full cache ends at "
                    f"the model's block_size of {block_size}. cache=rolling goes on"
                )
        if config.attention == "linear":
            check_sums(window, sink_tokens)
        window_or_all = block_size if window is None else window
        if sink_tokens is None and isinstance(window_or_all, int):
            sink_tokens = max(0, min(SINK_TOKENS, window_or_all - 1))
        check_window(config, window_or_all, sink_tokens)
        if tokens is None:
            rolls = endless or window is not None
        else:
            rolls = tokens > window_or_all
        dtype, place = model.dtype, model.device.type
        if torch.is_autocast_enabled(place):  # what queries and keys come in
            dtype = torch.get_autocast_dtype(place)
        options = {"int8": kind == "int8", "dtype": dtype, "device": model.device}
        if kind == "full" or (kind != "rolling" and not rolls):
            capacity = block_size if tokens is None else max(1, tokens)
            return cls.full(config, batch, capacity, **options)
        return cls.rolling(config, batch, window, sink_tokens, **options)

    def fork(self, n: int) -> KVCache:
        """A copy in which each sequence is there ``n`` times, one after the other; with its own storage."""
        if n < 1:
            raise UserError(f"a fork has at least 1 of each sequence, not {n}")

        layers = [copied(layer, n) for layer in self.layers]
        lengths = [length for length in self._lengths for _ in range(n)]
        forked = KVCache(self.config, layers, lengths, self.end)
        forked._spoiled = self._spoiled
        return forked

    # ------------------------------------------------------------ what it holds

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each sequence has had, on the host."""
        return tuple(self._lengths)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self._lengths) if self._lengths else 0

    def reset(self) -> None:
        """Forgets all tokens; the storage stays."""
        self._lengths = [0] * len(self._lengths)
        self.device_lengths.zero_()
        for layer in self.layers:
            forget(layer)
        self._finish()

    def check_model(self, config: GPTConfig) -> None:
        """Raises ``UserError`` where the cache is for another model than that of ``config``."""
        for key in MATTERS:
            its, theirs = getattr(self.config, key), getattr(config, key)
            if its != theirs:
                raise UserError(f"the cache is for another model: its {key} is {its}, not {theirs}")

    # ------------------------------------------------------------ a forward pass

    def begin(self, tokens: int, new_lengths: Sequence[int] | None = None) -> Tensor:
        """Begins a forward pass of so many tokens of every sequence.

        Args:
            tokens: T.
            new_lengths: B numbers: of a row only so many of the T are there, the first ones.

        Returns:
            (B, T) int64, the position of every token on the device. Padding has the position of the
            last token before it, so that no table is overrun.

        Raises:
            UserError: no room for them.
        """
        new = [tokens] * len(self._lengths)
        if new_lengths is not None:
            new = checked_lengths(new_lengths, len(new), tokens)
        self._check_room(new)
        self._finish()
        if any(more < tokens for more in new):
            self._new_lengths = on_device([new], self.device_lengths)[0]
        self._parts = {
            slots: planned(slots, self._lengths, new, self.device_lengths) for slots in self._slots
        }
        self._overwrites = self._would_overwrite(new)
        self._tokens, self._new = tokens, new
        before = self.device_lengths.long()[:, None]
        positions = before + torch.arange(tokens, device=before.device)
        if self._new_lengths is not None:
            last = before + self._new_lengths[:, None] - 1
            positions = positions.minimum(last.clamp(min=0))
        return positions

    def append(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Queries:
        """Stores k and v (B, Hkv, T, D) of the tokens begun, with q (B, H, T, D); all not yet rotated."""
        self._check_begun(layer, q)
        self._spoiled = self._overwrites
        options = {"new_lengths": self._new_lengths, "turns": self.turns}
        return Queries(*kernels.kv_append(q, k, v, self.layers[layer], **options))

    def attend(self, layer: int, queries: Queries, alibi_slopes: Tensor | None = None) -> Tensor:
        """Attention of up to ``MAX_QUERIES`` tokens, just appended, over the layer: (B, H, T, D)."""
        return kernels.decode_attention(
            queries.q,
            self.layers[layer],
            q_sink=queries.q_sink,
            new_lengths=self._new_lengths,
            alibi_slopes=alibi_slopes,
        )

    def extend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None = None
    ) -> Tensor:
        """Both, of any number of tokens: stores k and v and gives the attention of q, (B, H, T, D).

        As long as every token sees all before it, ``flash_attention`` reads them from the cache, so
        that of an int8 cache it too reads what is stored; and in a layer with a window of its own,
        which goes a window at a time. From there on, and where sequences are not equally long,
        ``MAX_QUERIES`` tokens go at a time.
        """
        self._check_begun(layer, q)
        self._spoiled = self._overwrites
        stored = self.layers[layer]
        parts = self._parts[Slots.of(stored)]
        out = [
            self._extend_by(part, stored, *(x[:, :, part.tokens] for x in (q, k, v)), alibi_slopes)
            for part in parts
        ]
        done = parts[-1].tokens.stop if parts else 0
        if done < self._tokens:  # no row has more
            out.append(torch.zeros_like(q[:, :, done:]))
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)

    def _extend_by(self, part: Part, layer: KVLayer, q, k, v, alibi_slopes) -> Tensor:
        if part.lengths is not None:
            layer = replace(layer, lengths=part.lengths)
        new_lengths = part.new_lengths
        q, q_sink = kernels.kv_append(q, k, v, layer, new_lengths=new_lengths, turns=self.turns)
        if part.keys is None:
            return kernels.decode_attention(
                q, layer, q_sink=q_sink, new_lengths=new_lengths, alibi_slopes=alibi_slopes
            )
        k, v = _filled(*in_order(layer, part.keys, q), part.keys, layer, new_lengths)
        sees_all = layer.window is None or part.keys.stop <= layer.window
        window = None if sees_all else (layer.window - 1, 0)
        return kernels.flash_attention(
            q, k, v, causal=True, window=window, alibi_slopes=alibi_slopes
        )

    def extend_sparse(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: kernels.BlockPattern,
        alibi_slopes: Tensor | None = None,
    ) -> Tensor:
        """``extend`` for a layer of block-sparse attention, which has a slot for every token."""
        self._check_begun(layer, q)
        stored, new_lengths = self.layers[layer], self._new_lengths
        done = max(self._new, default=0)
        if done < self._tokens:  # no row has more, and there may be no slots for more
            q, k, v = (x[:, :, :done] for x in (q, k, v))
        q, _ = kernels.kv_append(q, k, v, stored, new_lengths=new_lengths, turns=self.turns)
        together = all(had == self.length for had in self._lengths)
        if together and done > 1:
            start, there = self.length, range(self.length + done)
            k, v = _filled(*in_order(stored, there, q), there, stored, new_lengths)
        else:
            start = stored.lengths
            k, v = in_order(stored, range(stored.capacity), q)
        out = kernels.block_sparse_attention(
            q, k, v, pattern, start=start, alibi_slopes=alibi_slopes
        )
        return out if done == self._tokens else pad(out, (0, 0, 0, self._tokens - done))

    def state(self, layer: int) -> tuple[LinearState, Tensor | None]:
        """The sums of a layer of linear attention; its pass adds the new tokens of each sequence."""
        self._spoiled = self._overwrites
        return self.layers[layer], self._new_lengths

    def advance(self) -> None:
        """Ends a forward pass: its tokens are cached ones from here on."""
        self._lengths = [had + new for had, new in zip(self._lengths, self._new, strict=True)]
        self.device_lengths.add_(self._tokens if self._new_lengths is None else self._new_lengths)
        self._finish()

    def repeat(self, tokens: int) -> None:
        """Counts, on the host, tokens of a forward pass that a captured graph is about to repeat.

        The graph itself stores them and counts them on the device.

        Raises:
            UserError: no room for them.
        """
        self._check_room([tokens] * len(self._lengths))
        self._lengths = [had + tokens for had in self._lengths]

    def spoil(self) -> None:
        """Says that what it holds is not known: nothing more is taken until ``reset()``."""
        self._spoiled = True

    def _finish(self) -> None:
        """No forward pass is under way."""
        self._tokens = 0
        self._new = [0] * len(self._lengths)
        self._new_lengths: Tensor | None = None
        self._parts: dict[Slots, list[Part]] = {}
        self._overwrites = False  # whether the pass takes slots still seen, or adds to sums
        self._spoiled = False  # whether one did, and did not end; or a graph did not

    # ------------------------------------------------------------ on the host

    def _check_room(self, new: list[int]) -> None:
        if self._spoiled:
            raise UserError(
                "an earlier forward pass failed midway, and what the cache holds is not known or no "
                "longer all of it: reset() it and feed all tokens again"
            )
        for had, more in zip(self._lengths, new, strict=True):
            if had + more > self.end:
                raise UserError(
                    f"{more} tokens after {had} cached ones are more than the {self.end} that the cache "
                    f"{'can count' if self.end == MAX_POSITION else 'has slots for'}"
                )

    def _check_begun(self, layer: int, q: Tensor) -> None:
        if q.shape[2] != self._tokens:
            raise UserError(
                f"{q.shape[2]} tokens for a cache, where begin() said {self._tokens}: a forward pass is "
                "begin(), extend() once a layer, advance()"
            )
        if not 0 <= layer < len(self.layers):
            raise UserError(f"layer {layer} of a cache of {len(self.layers)} layers")

    def _would_overwrite(self, new: list[int]) -> bool:
        """Whether these tokens take slots of earlier ones that the next token would see without them.

        Not up to ``at_once`` of them: that is what the slots beside the window are for. Sums cannot be
        had back either.
        """
        if not self._slots:
            return True
        return any(
            more > slots.at_once and had > slots.sink_tokens and had + more > slots.capacity
            for slots in self._slots
            if slots.window is not None
            for had, more in zip(self._lengths, new, strict=True)
        )


def _filled(
    k: Tensor, v: Tensor, positions: range, layer: KVLayer, new_lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Keys and values of these positions (B, Hkv, positions, D), zeros where a row has no token there.

    Such a slot may hold anything: no key to see, but 0 · NaN is NaN.
    """
    if new_lengths is None:
        return k, v
    position = torch.arange(positions.start, positions.stop, device=k.device)
    empty = (position >= (layer.lengths + new_lengths)[:, None])[:, None, :, None]
    return k.masked_fill(empty, 0.0), v.masked_fill(empty, 0.0)

"""The key/value cache: what attention has computed for earlier tokens, kept for later ones.

    full      a slot for every token, up to a capacity
    rolling   slots for the first tokens (the sinks) and for the last ones: it never ends
    in int8   either of them, in about half the bytes of 16-bit floats

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

from almostgpt import kernels
from almostgpt.config import GPTConfig, resolve_model
from almostgpt.errors import UserError
from almostgpt.inference.cache_options import (
    SINK_TOKENS,
    check_options,
    check_whole,
    check_window,
    past_the_positions,
)
from almostgpt.inference.cache_parts import Part, on_device, planned
from almostgpt.kernels.kv_cache import MAX_QUERIES
from almostgpt.kernels.kv_cache_reference import in_order
from almostgpt.kernels.kv_layer import MAX_POSITION
from almostgpt.kernels.rope import turns_of
from almostgpt.model.attention import checked_lengths
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
        layers: a ``KVLayer`` for each layer of the model; they share lengths and tickets.
        turns: (R/2,) int64, see ``kernels.rope.turns_of``; None where the model does not rotate.
        config: the model's, resolved.
    """

    def __init__(self, config: GPTConfig, layers: Sequence[kernels.KVLayer], lengths: list[int]):
        first = layers[0]
        self.config = config
        self.layers = tuple(
            replace(layer, lengths=first.lengths, tickets=first.tickets) for layer in layers
        )
        frequencies = POSITIONS[config.position].frequencies(config)
        self.turns = None if frequencies is None else turns_of(frequencies).to(first.keys.device)
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
        return cls._made(config, batch, capacity, None, 0, int8, dtype, device)

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
        slots = window + MAX_QUERIES - 1
        return cls._made(config, batch, slots, window, sink_tokens, int8, dtype, device)

    @classmethod
    def _made(cls, config, batch, slots, window, sink_tokens, int8, dtype, device) -> KVCache:
        config = resolve_model(config)
        check_whole("batch", batch, 0, MAX_POSITION)
        if not dtype.is_floating_point:
            raise UserError(f"dtype is {dtype}, but must be that of the model's weights")
        layers = [
            kernels.KVLayer.empty(
                *(batch, config.n_kv_head, slots, config.head_dim),
                dtype=torch.int8 if int8 else dtype,
                window=window,
                sink_tokens=sink_tokens,
                device=device,
            )
            for _ in range(config.n_layer)
        ]
        return cls(config, layers, [0] * batch)

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
        endless, block_size = model.position.endless, config.block_size
        if tokens is not None and tokens > block_size:
            if not endless:
                raise UserError(past_the_positions(tokens, config))
            if kind == "full":
                raise UserError(
                    f"{tokens} tokens, prompt and new ones together, do not fit: a full cache ends at "
                    f"the model's block_size of {block_size}. cache=rolling goes on"
                )
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

        def copied(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.repeat_interleave(n, 0)

        layers = [
            replace(
                layer,
                keys=copied(layer.keys),
                values=copied(layer.values),
                key_scales=copied(layer.key_scales),
                value_scales=copied(layer.value_scales),
                lengths=copied(layer.lengths),
                tickets=layer.tickets.new_zeros(n * layer.tickets.numel()),
            )
            for layer in self.layers
        ]
        forked = KVCache(
            self.config, layers, [length for length in self._lengths for _ in range(n)]
        )
        forked._spoiled = self._spoiled
        return forked

    # ------------------------------------------------------------ what it holds

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each sequence has had, on the host."""
        return tuple(self._lengths)

    @property
    def device_lengths(self) -> Tensor:
        """The same as (B,) int32 on the device; every layer has this very tensor."""
        return self.layers[0].lengths

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self._lengths) if self._lengths else 0

    @property
    def end(self) -> int:
        """How many tokens a sequence may have."""
        first = self.layers[0]
        return first.capacity if first.window is None else MAX_POSITION

    def reset(self) -> None:
        """Forgets all tokens; the storage stays."""
        self._lengths = [0] * len(self._lengths)
        self.device_lengths.zero_()
        self._finish()

    def check_model(self, config: GPTConfig) -> None:
        """Raises ``UserError`` where the cache is for another model than that of ``config``."""
        for key in ("n_layer", "n_kv_head", "head_dim", "position", "rope_base"):
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
        self._parts = planned(self.layers[0], self._lengths, new)
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

    def attend(self, layer: int, queries: Queries) -> Tensor:
        """Attention of up to ``MAX_QUERIES`` tokens, just appended, over the layer: (B, H, T, D)."""
        return kernels.decode_attention(
            queries.q,
            self.layers[layer],
            q_sink=queries.q_sink,
            new_lengths=self._new_lengths,
        )

    def extend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Both, of any number of tokens: stores k and v and gives the attention of q, (B, H, T, D).

        As long as every token sees all before it, ``flash_attention`` reads them from the cache, so
        that of an int8 cache it too reads what is stored. From there on, and where sequences are not
        equally long, ``MAX_QUERIES`` tokens go at a time.
        """
        self._check_begun(layer, q)
        self._spoiled = self._overwrites
        stored = self.layers[layer]
        out = [
            self._extend_by(part, stored, *(x[:, :, part.tokens] for x in (q, k, v)))
            for part in self._parts
        ]
        done = self._parts[-1].tokens.stop if self._parts else 0
        if done < self._tokens:  # no row has more
            out.append(torch.zeros_like(q[:, :, done:]))
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)

    def _extend_by(self, part: Part, layer: kernels.KVLayer, q, k, v) -> Tensor:
        if part.lengths is not None:
            layer = replace(layer, lengths=part.lengths)
        new_lengths = part.new_lengths
        q, q_sink = kernels.kv_append(q, k, v, layer, new_lengths=new_lengths, turns=self.turns)
        if part.in_order is not None:
            k, v = in_order(layer, part.in_order, q)
            if new_lengths is not None:
                # Where padding would be, a slot may hold anything: no key to see, but 0 · NaN is NaN.
                slot = torch.arange(part.in_order, device=q.device)
                empty = (slot >= (layer.lengths + new_lengths)[:, None])[:, None, :, None]
                k, v = k.masked_fill(empty, 0.0), v.masked_fill(empty, 0.0)
            return kernels.flash_attention(q, k, v, causal=True)
        return kernels.decode_attention(q, layer, q_sink=q_sink, new_lengths=new_lengths)

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
        self._parts: list[Part] = []
        self._overwrites = False  # whether the pass takes slots of tokens that were still seen
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
                    f"{'has slots for' if self.layers[0].window is None else 'can count'}"
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

        Not up to ``MAX_QUERIES`` of them: that is what the slots beside the window are for.
        """
        first = self.layers[0]
        if first.window is None:
            return False
        spare = first.capacity - first.window + 1
        return any(
            more > spare and had > first.sink_tokens and had + more > first.capacity
            for had, more in zip(self._lengths, new, strict=True)
        )

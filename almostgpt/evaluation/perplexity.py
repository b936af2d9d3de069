"""Perplexity by a sliding window: how well a model foretells a text longer than it can read at once.

Of a text's tokens x_0 … x_{n−1}, windows of W tokens begin every S tokens, S ≤ W. A window scores those of
its tokens that no window before it has scored, each given the tokens of the window before it:

    - x x x x x                  W = 6, S = 2: of every window the x are scored
        . . . . x x
            . . . . x x

    nats = Σ −ln p(x_i | tokens of its window before i)          perplexity = e^(nats / tokens scored)

as transformers has it (huggingface.co/docs/transformers/perplexity). A small S gives every token much to go
by, and takes W / S times the work. A token with nothing before it in its window is not scored: the text's
first one and, where S = W, each window's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from almostgpt.data.tokenizer import Tokenizer
from almostgpt.errors import UserError
from almostgpt.model import GPT
from almostgpt.model.evaluating import evaluating

PIECE = 1 << 20  # tokens decoded at a time


class Window(NamedTuple):
    """The tokens [start, end), of which those from ``first`` on are scored."""

    start: int
    first: int
    end: int


@dataclass(frozen=True)
class Perplexity:
    """What a text cost a model."""

    nats: float  # −ln p, over all scored tokens
    tokens: int  # scored
    windows: int
    seconds: float
    bytes: int | None  # of text that the scored tokens stand for; None without a tokenizer

    @property
    def nll(self) -> float:
        """Mean of −ln p, in nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """e^nll: among how many equally likely tokens it could as well have guessed."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits for a byte of text, which compares models of any vocabulary; None without text."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None

    @property
    def tokens_per_second(self) -> float:
        """Scored tokens a second."""
        return self.tokens / self.seconds


def perplexity(
    model: GPT,
    tokens: np.ndarray | Sequence[int],
    *,
    tokenizer: Tokenizer | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int], object] = lambda scored: None,
) -> Perplexity:
    """Scores a text, in evaluation mode whatever mode the model is in.

    Under autocast the model computes in autocast's dtype. The sum over the batches is in float64.

    Args:
        model: on any device.
        tokens: (n,) whole numbers in [0, vocab_size), n ≥ 2; an array mapped from a file stays there.
        tokenizer: what the tokens are of; needed for ``bytes``.
        window: tokens in a window, 2 … block_size; default block_size.
        stride: tokens from one window's start to the next one's, 1 … window; default half a window.
        batch_size: windows in a forward pass. It changes the result by rounding only.
        progress: told of each batch how many tokens it scored.

    Raises:
        UserError: tokens, options or a tokenizer that do not fit; a loss that is not finite; a GPU
            whose memory does not hold a batch.
    """
    window, stride = checked_options(model, window, stride, batch_size)
    tokens = _checked(tokens, model.config.vocab_size)
    text_bytes = None if tokenizer is None else _text_bytes(tokens, tokenizer, window, stride)
    device = model.device
    means: list[Tensor] = []  # on the device: whoever read each at once would wait for each
    counts: list[int] = []
    windows, left = 0, sliding(len(tokens), window, stride)
    began = time.perf_counter()
    with evaluating(model):
        while batch := list(islice(left, batch_size)):
            ids, targets = (rows.to(device) for rows in _rows(tokens, batch))
            means.append(_loss(model, ids, targets))
            counts.append(sum(w.end - w.first for w in batch))
            windows += len(batch)
            progress(counts[-1])
    losses = torch.stack(means).cpu().double()
    nats = float(losses @ torch.tensor(counts, dtype=torch.float64))
    if not math.isfinite(nats):
        raise UserError(
            "the loss is not finite: the model's weights hold NaN or infinities, or overflow in "
            "this precision; take a checkpoint from before the run diverged, or fp32"
        )
    return Perplexity(nats, sum(counts), windows, time.perf_counter() - began, text_bytes)


def checked_options(
    model: GPT, window: int | None, stride: int | None, batch_size: int
) -> tuple[int, int]:
    """The window and the stride that are meant; ``UserError`` where the model cannot have them."""
    for name, value in (("window", window), ("stride", stride), ("batch_size", batch_size)):
        if value is not None and not isinstance(value, (int, np.integer)):
            raise UserError(f"{name} is {value!r}, but must be a whole number")
    longest = model.config.block_size
    window = longest if window is None else window
    if not 2 <= window <= longest:
        raise UserError(
            f"window is {window}, but must be in 2 … {longest}: a token is scored by those before "
            f"it, and the model was made for a block_size of {longest}"
        )
    stride = window // 2 if stride is None else stride
    if not 1 <= stride <= window:
        raise UserError(
            f"stride is {stride}, but must be in 1 … {window}, the window: a longer one would leave "
            "tokens out"
        )
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, but must be at least 1")
    return window, stride


def sliding(n: int, window: int, stride: int) -> Iterator[Window]:
    """The windows over n tokens, without any that would score nothing."""
    end = 0
    for start in range(0, n, stride):
        first, end = max(end, start + 1), min(start + window, n)
        if first < end:
            yield Window(start, first, end)


def _rows(tokens: np.ndarray, batch: Sequence[Window]) -> tuple[Tensor, Tensor]:
    """ids and targets of windows: (B, T) int64, T one less than the longest one's tokens.

    A shorter window is filled up on its right, where no scored token looks.
    """
    width = max(w.end - w.start for w in batch) - 1
    ids = np.zeros((len(batch), width), np.int64)
    targets = np.full((len(batch), width), -1, np.int64)
    for row, (start, first, end) in enumerate(batch):
        ids[row, : end - 1 - start] = tokens[start : end - 1]
        targets[row, first - 1 - start : end - 1 - start] = tokens[first:end]
    return torch.from_numpy(ids), torch.from_numpy(targets)


def _loss(model: GPT, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean over the scored tokens, by the model's own loss: it never holds all logits."""
    try:
        return model(ids, targets)[1]
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory on {ids.device} with {len(ids)} windows of {ids.shape[1] + 1} tokens: "
            "lower the batch size"
        ) from error


def _checked(tokens: np.ndarray | Sequence[int], vocab_size: int) -> np.ndarray:
    """Tokens as an array, looked at before hours are spent on them."""
    tokens = np.asarray(tokens)  # of a mapped file a view: slicing a numpy.memmap itself is slow
    if tokens.ndim != 1 or len(tokens) < 2:
        raise UserError(
            f"perplexity needs 2 tokens or more, shape (n,), not {tokens.shape}: the first one is "
            "only what the second one is scored by"
        )
    if tokens.dtype.kind not in "iu":
        raise UserError(f"tokens must be whole numbers, not {tokens.dtype}")
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= vocab_size:
        raise UserError(
            f"token id {lowest if lowest < 0 else highest} is not in the model's vocabulary of "
            f"{vocab_size}: the tokens were made with another tokenizer, or are damaged"
        )
    return tokens


def _text_bytes(tokens: np.ndarray, tokenizer: Tokenizer, window: int, stride: int) -> int:
    """UTF-8 bytes of the scored tokens. An end of text is a token to foretell, but no text."""

    def size(some: np.ndarray) -> int:
        total = 0
        for at in range(0, len(some), PIECE):
            piece = some[at : at + PIECE]
            if tokenizer.end_of_text is not None:
                piece = piece[piece != tokenizer.end_of_text]
            total += len(tokenizer.decode_bytes(piece))
        return total

    if stride < window:
        return size(tokens[1:])
    return size(tokens) - size(tokens[::window])

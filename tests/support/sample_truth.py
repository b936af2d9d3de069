"""What may be drawn, in float64 by numpy's sorts, and calls of ``kernels.sample`` on any backend.

Where a rounding error may decide, more than one answer is allowed: a token at the very border of top-p
or min-p may be in or out, and of two sums of logit and noise that differ by less than ``CLOSE`` either
may win. Top-k compares logits as they are, and allows nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from almostgpt import kernels

CLOSE = 1e-4  # the kernel's approximate logarithms are within 1e-5
NUDGE = 1e-5  # of a mass or a probability

# Ways to draw, by their options.
WAYS = [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.2}, {"temperature": 3.0}]
INF, NAN = math.inf, math.nan
# Rows that are not all finite, and what may be drawn of them.
ODD = [
    ([1.0, NAN, 3.0, NAN, INF], {1}),
    ([-INF, -INF, -INF], {0}),
    ([1.0, INF, 2.0, INF], {1, 3}),
    ([INF, -INF, NAN], {2}),
    ([-INF, -7.0, -INF], {1}),
    ([-3e38, 3e38, 0.0], {1}),
]


def sampler(backend) -> Callable:
    """``kernels.sample`` on ``"reference"``, ``"cuda"``, or a card's capability in the emulator."""
    options = {"capability": backend} if isinstance(backend, tuple) else {}

    def run(*args, **kwargs):
        name = "emulator" if options else backend
        with kernels.use_backend(name, ops=["sample"], **options):
            return kernels.sample(*args, **kwargs)

    return run


def streams(B: int, seed: int = 0, device="cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Positions, seeds and sequences of B rows, with bits in all their halves."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(2**31, (B,), generator=generator)
    seeds, sequences = (torch.randint(-(2**63), 2**63 - 1, (B,), generator=generator) for _ in "ab")
    return tuple(t.to(device) for t in (positions, seeds, sequences))


# --- the generator, as the paper writes it ---------------------------------------------------------


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 on Python's whole numbers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (
            (right >> 32) ^ b ^ k,
            right % 2**32,
            (left >> 32) ^ d ^ m,
            left % 2**32,
        )
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return a, b, c, d


def noise(V: int, position: int, seed: int, sequence: int) -> np.ndarray:
    """(V,) float64 Gumbel noise."""

    def halves(x: int) -> tuple[int, int]:
        return x % 2**32, x % 2**64 >> 32

    words = []
    for block in range(-(-V // 4)):
        words += philox((block, position % 2**32, *halves(sequence)), halves(seed))
    v = (np.array(words[:V], dtype=np.float64) + 0.5) / 2**32
    return -np.log(-np.log1p(-v))


# --- one row -----------------------------------------------------------------------------------------


def penalised(logits: Tensor, seen: Tensor | None, penalty: float) -> np.ndarray:
    """(V,) float64; the penalty itself in float32, since it may make two logits equal."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu().numpy().copy()
    if seen is None:
        return wide.astype(np.float64)
    of = seen.cpu().numpy()
    factor = wide.dtype.type(penalty)
    wide[of & (wide < 0)] *= factor
    wide[of & ~(wide < 0)] /= factor
    return wide.astype(np.float64)


def kept(values, temperature, top_k=None, top_p=None, min_p=None, nudge=0.0) -> np.ndarray:
    """(V,) bool: what is kept of penalised logits; nudge > 0 where a border is in doubt, < 0 without."""
    keep = np.ones(len(values), dtype=bool)
    if top_k is not None:
        keep &= values >= np.sort(values)[::-1][min(top_k, len(values)) - 1]
    mass = np.exp((values - values.max()) / temperature)
    if top_p is not None and top_p < 1:
        order = np.sort(values[keep])[::-1]
        share = np.cumsum(np.sort(mass[keep])[::-1]) / mass[keep].sum()
        first = int(np.searchsorted(share, top_p * (1 + nudge)))
        keep &= values >= order[min(first, len(order) - 1)]
    if min_p:
        keep &= mass >= min(min_p * (1 - nudge), 1.0)
    return keep


def allowed(
    logits: Tensor, position: int, seed: int, sequence: int, *, temperature=1.0,
    repetition_penalty=1.0, seen=None, **filters,
) -> set[int]:  # fmt: skip
    """The ids that may be drawn from one row of finite logits; nearly always one."""
    values = penalised(logits, seen, repetition_penalty)
    if temperature == 0:
        return {int(values.argmax())}
    sums = (values - values.max()) / temperature + noise(len(values), position, seed, sequence)
    surely = kept(values, temperature, **filters, nudge=-NUDGE)
    perhaps = kept(values, temperature, **filters, nudge=NUDGE)
    return set(np.flatnonzero(perhaps & (sums >= sums[surely].max() - CLOSE)).tolist())


def check_rows(
    run: Callable, logits: Tensor, rows: tuple[Tensor, ...], seen=None, **options
) -> Tensor:
    """Draws, and asserts of every row: its id, its log-probability, its mark. Gives the ids."""
    marks = None if seen is None else seen.clone()
    ids, logprobs = run(logits, *rows, seen=marks, logprobs=True, **options)
    assert ids.dtype == torch.int64 and ids.shape == logits.shape[:1]
    exact = logits.double().log_softmax(1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-5, atol=1e-5)
    for row, (position, seed, sequence) in enumerate(zip(*(t.tolist() for t in rows), strict=True)):
        of = None if seen is None else seen[row]
        wanted = allowed(logits[row], position, seed, sequence, seen=of, **options)
        assert int(ids[row]) in wanted, (row, int(ids[row]), wanted, options)
    if seen is not None:
        expected = seen.clone()
        expected[torch.arange(len(ids), device=ids.device), ids] = True
        assert torch.equal(marks, expected)
    return ids

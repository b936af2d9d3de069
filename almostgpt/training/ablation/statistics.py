"""Means over seeds, and the intervals in which the true ones lie with 95 % confidence.

A run's loss is a draw: other seeds give other weights and batches. Of n draws with the mean m and the
standard deviation s (n − 1 in the denominator) the interval is m ± t · s / √n, where t is the quantile
of Student's distribution with n − 1 degrees of freedom (Student 1908). It takes losses to be normally
distributed over seeds, and with few seeds it is wide, as it should be: t is 12.7 for two, 4.3 for three.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean of n values, and half the width of its interval (None: one value tells nothing of it)."""

    mean: float
    half_width: float | None
    n: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of ``values`` and its interval; None of no values."""
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return Estimate(mean, t_quantile(n - 1) * deviation / math.sqrt(n), n)


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(−t ≤ T ≤ t) = ``confidence`` for so many degrees of freedom, by bisection."""
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < confidence:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) < confidence else (low, middle)
    return (low + high) / 2


def t_probability(t: float, degrees: int) -> float:
    """P(−t ≤ T ≤ t) of Student's T (Abramowitz & Stegun 1964, equations 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(2 if odd else 1, degrees, 2):  # ν − 1 over 2 terms if ν is odd, else ν over 2
        total += term
        term *= cosine**2 * k / (k + 1)
    return (angle + sine * total) * 2 / math.pi if odd else sine * total

"""Angles as whole numbers: exact at any position."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_cache_truth import (
    angle_bound,
    exact_angle,
)

from almostgpt.kernels.rope import angles_at, turns_of

FREQUENCIES = [
    *(1.0, 0.5, 2 / 3, 10000**-0.1, 10000**-0.9, 500000**-0.98, 1e-9, 0.0),
    *(3.0, 7.5, -0.3, 1e-20, -1e-20),
]
POSITIONS = [0, 1, 2, 7, 1000, 2**17 - 1, 1_000_003, 2**26 + 1, 2**30 - 1, 2**30]


def test_angles_are_exact_at_any_position():
    """Within ``angle_bound``: of frequencies up to 1 less than 2e-16 a position, 1.7e-10 at 10⁶."""
    turns = turns_of(torch.tensor(FREQUENCIES, dtype=torch.float64))
    assert turns.dtype == torch.int64
    angles = angles_at(torch.tensor(POSITIONS), turns)
    assert angles.dtype == torch.float64 and angles.shape == (len(POSITIONS), len(FREQUENCIES))
    assert (angles >= -math.pi).all() and (angles <= math.pi).all()
    for row, position in zip(angles.tolist(), POSITIONS, strict=True):
        for angle, frequency in zip(row, FREQUENCIES, strict=True):
            off = abs(math.remainder(angle - exact_angle(position, frequency), 2 * math.pi))
            assert off <= angle_bound(position, frequency) + 1e-15, (position, frequency, off)
    assert angle_bound(10**6, 1.0) < 1.7e-10 and angle_bound(2**30, 1.0) < 2e-7


@settings(deadline=None, max_examples=100)
@given(position=st.integers(0, 2**30), frequency=st.floats(0, 1))
def test_any_angle(position, frequency):
    turns = turns_of(torch.tensor([frequency], dtype=torch.float64))
    angle = angles_at(torch.tensor(position), turns).item()
    off = abs(math.remainder(angle - exact_angle(position, frequency), 2 * math.pi))
    assert off <= angle_bound(position, frequency) + 1e-15  # of the subtraction here


def test_the_exact_angle_is_that_of_mpmath():
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workprec(300):
        for position in POSITIONS:
            for frequency in FREQUENCIES:
                angle = mpmath.mpf(position) * mpmath.mpf(frequency) % (2 * mpmath.pi)
                assert exact_angle(position, frequency) == pytest.approx(float(angle), abs=1e-15)

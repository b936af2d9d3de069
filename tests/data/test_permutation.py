"""Permutations that are computed: bijections, as mixed as drawn ones, and always the same."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from almostgpt.data.permutation import BLOCK, BlockwisePermutation, Permutation

seeds = st.integers(0, 2**128 - 1)
counters = st.integers(0, 2**256 - 1)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), seeds, counters)
def test_is_a_bijection_of_any_size(n, seed, counter):
    images = Permutation(n, seed, counter)(np.arange(n))
    assert images.dtype == np.int64 and sorted(images.tolist()) == list(range(n))


@pytest.mark.parametrize("n", [2**20, 2**20 - 1, 2**20 + 1, 1_000_003])
def test_is_a_bijection_of_large_sizes(n):
    assert np.bincount(Permutation(n, 7)(np.arange(n)), minlength=n).tolist() == [1] * n


@settings(max_examples=50, deadline=None)
@given(st.integers(2**40, 2**62), seeds, st.data())
def test_stays_below_enormous_sizes_without_meeting_itself(n, seed, data):
    numbers = data.draw(st.lists(st.integers(0, n - 1), max_size=50, unique=True))
    numbers = np.array([*numbers, *{0, n - 1}.difference(numbers)])
    images = Permutation(n, seed)(numbers).tolist()
    assert len(set(images)) == len(images) and all(0 <= image < n for image in images)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3 * BLOCK), seeds, st.data())
def test_one_by_one_is_the_same(n, seed, data):
    numbers = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=30))
    one_by_one = BlockwisePermutation(n, seed)
    expected = Permutation(n, seed)(np.array(numbers)).tolist()
    assert [one_by_one.at(number) for number in numbers] == expected


def reference(n: int, key: int, counter: int, number: int) -> int:
    """The definition in Python's integers, undisturbed by any width."""
    left = math.isqrt(n - 1) + 1 if n > 1 else 1
    right = math.ceil(n / left)
    keys = np.random.Philox(key=key, counter=counter).random_raw(16).tolist()
    while True:
        digits, bases = list(divmod(number, right)), (left, right)
        for turn, word in enumerate(keys):
            x = (digits[1 - turn % 2] + word) % 2**64
            x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
            half = (x ^ x >> 31) >> 1
            digits[turn % 2] = (digits[turn % 2] + half) % bases[turn % 2]
        number = digits[0] * right + digits[1]
        if number < n:
            return number


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2**40), seeds, counters, st.data())
def test_is_its_definition(n, seed, counter, data):
    """So that a saved run goes on in the same order, whatever becomes of this code."""
    numbers = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    expected = [reference(n, seed, counter, number) for number in numbers]
    assert Permutation(n, seed, counter)(np.array(numbers)).tolist() == expected


def chi_squared(counts: np.ndarray) -> float:
    """Of counts that should be equal, in standard deviations from its mean."""
    expected, freedom = counts.mean(), counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize(("n", "seeds"), [(2, 500), (3, 500), (5, 4000)])
def test_every_order_of_few_things_is_as_likely_as_any_other(n, seeds):
    """With half as many rounds five things are not: by six standard deviations."""
    orders = Counter(tuple(Permutation(n, seed)(np.arange(n)).tolist()) for seed in range(seeds))
    counts = np.array([orders[order] for order in itertools.permutations(range(n))])
    assert abs(chi_squared(counts)) < 4


@pytest.mark.parametrize("n", [100, 127])
def test_places_and_neighbours_are_uniform(n):
    """Where a thing comes, and how far what follows it was away, over the epochs of one seed."""
    orders = np.stack([Permutation(n, 1337, epoch << 64)(np.arange(n)) for epoch in range(1000)])
    places = np.zeros((n, n))
    for place in range(n):
        places[place] = np.bincount(orders[:, place], minlength=n)
    assert abs(chi_squared(places)) < 5
    distances = np.diff(orders, axis=1) % n
    assert abs(chi_squared(np.bincount(distances.ravel(), minlength=n)[1:])) < 5


def test_keys_and_counters_make_other_orders():
    orders = {
        tuple(Permutation(50, key, counter)(np.arange(50)).tolist())
        for key in range(20)
        for counter in (0, 1 << 64, 1 << 128, 1 << 192)
    }
    assert len(orders) == 80

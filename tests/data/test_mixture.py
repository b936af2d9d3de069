"""Mixtures: proportions against exact fractions, each set's rows its own, and what cannot be mixed."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from almostgpt.config import DataConfig
from almostgpt.data.dataset import open_dataset
from almostgpt.data.loader import TokenLoader
from almostgpt.data.mixture import Mixture, Shares
from almostgpt.data.prepare import cached_dataset, prepare
from almostgpt.data.shards import write_shard
from almostgpt.data.tokenizer import load_tokenizer
from almostgpt.errors import UserError

weights_lists = st.lists(
    st.one_of(st.integers(1, 100), st.decimals("0.001", 10, places=3).map(float)),
    min_size=1,
    max_size=8,
)


def by_definition(weights: list[float], count: int) -> list[tuple[int, int]]:
    """Row after row with exact fractions: the largest set takes its share, the next of what is left …"""
    exact = [Fraction(str(weight)) for weight in weights]
    order = sorted(range(len(weights)), key=lambda number: (-exact[number], number))
    shares = [exact[number] / sum(exact[n] for n in order[i:]) for i, number in enumerate(order)]
    met, rows = [0] * len(weights), []
    for _ in range(count):
        for place, number in enumerate(order):
            passed = sum(met[other] for other in order[place:])  # rows that larger sets have left
            if (passed + 1) * shares[place] + Fraction(1, 2) >= met[number] + 1:
                rows.append((number, met[number]))
                met[number] += 1
                break
    return rows


@settings(max_examples=30, deadline=None)
@given(weights_lists)
def test_rows_are_assigned_as_defined(weights):
    sets, numbers = Shares(weights).assign(0, 100)
    rows = list(zip(sets.tolist(), numbers.tolist(), strict=True))
    assert rows == by_definition(weights, 100)


@settings(max_examples=40, deadline=None)
@given(weights_lists, st.integers(0, 10**12), st.integers(0, 300), st.data())
def test_any_stretch_of_rows_is_the_same_and_in_proportion(weights, first, count, data):
    shares = Shares(weights)
    sets, numbers = shares.assign(first, count)
    start = data.draw(st.integers(0, count))
    again = shares.assign(first + start, count - start)
    assert np.array_equal(again[0], sets[start:]) and np.array_equal(again[1], numbers[start:])
    whole = sum(Fraction(str(weight)) for weight in weights)
    for number, weight in enumerate(weights):
        mine = numbers[sets == number]
        assert np.array_equal(mine, mine[:1] + np.arange(len(mine)))  # one after the other
        if len(mine):  # so many of the first rows were this set's, so many of this stretch are
            place = first + int(np.flatnonzero(sets == number)[0])
            assert abs(int(mine[0]) - place * Fraction(str(weight)) / whole) < 2
        assert abs(len(mine) - count * Fraction(str(weight)) / whole) < 4


def test_proportions_are_exact_in_the_long_run():
    sets, _ = Shares([0.7, 0.2, 0.1]).assign(0, 1_000_000)
    assert np.bincount(sets).tolist() == [700_000, 200_000, 100_000]
    assert np.bincount(sets[:10]).tolist() == [7, 2, 1]
    # As numbers are written, not as they are stored: three times the float 0.1 is not 0.3.
    assert np.bincount(Shares([0.3, 0.1]).assign(10**17, 40)[0]).tolist() == [30, 10]


# ---------------------------------------------------------------- batches


def mixture(sampling="sequential", weights=(3, 1), **options) -> TokenLoader:
    """Tokens below 1000 in one set, from 1000 on in the other."""
    sets = [[np.arange(100)], [np.arange(1000, 1050), np.arange(1050, 1090)]][: len(weights)]
    defaults = {"block_size": 8, "batch_size": 4, "seed": 1337, "vocab_size": 65536}
    return TokenLoader(sets, weights=weights, sampling=sampling, **(defaults | options))


def test_each_sets_rows_are_its_own_in_its_own_order():
    own = [
        TokenLoader(
            part, sampling="sequential", block_size=8, batch_size=1, seed=0, vocab_size=2000
        )
        for part in ([np.arange(100)], [np.arange(1000, 1050), np.arange(1050, 1090)])
    ]
    batches = mixture()
    counts = [0, 0]
    for _ in range(30):
        ids, targets, _ = batches.next_batch()
        for row, shifted in zip(ids, targets, strict=True):
            source = int(row[0] >= 1000)
            expected = own[source].next_batch()
            assert row.tolist() == expected.ids[0].tolist()
            assert shifted.tolist() == expected.targets[0].tolist()
            counts[source] += 1
        assert (ids[:, 0] >= 1000).sum() == 1  # one in four, in every batch
    assert counts == [90, 30]


def test_a_mixture_of_one_set_is_that_set():
    for sampling in ("random", "sequential", "shuffled"):
        alone = TokenLoader(
            [np.arange(100)], sampling=sampling, block_size=8, batch_size=4, seed=1, vocab_size=100
        )
        mixed = mixture(sampling, weights=[5], seed=1)
        for _ in range(5):
            assert mixed.next_batch().ids.tolist() == alone.next_batch().ids.tolist()


@pytest.mark.parametrize("sampling", ["shuffled", "documents"])
def test_every_token_of_a_set_comes_once_in_its_own_epoch(sampling):
    """160 rows: of 100 tokens 120·8 (nine epochs and 60 tokens), of 90 tokens 40·8 (three and 50)."""
    batches = mixture(sampling, end_of_text=50, packed=False)
    ids = np.concatenate([batches.next_batch().ids.numpy() for _ in range(40)]).ravel()
    counts = np.bincount(ids, minlength=1090)
    first, second = counts[:100], counts[1000:]
    assert first.sum() == 960 and set(first.tolist()) == {9, 10}
    assert second.sum() == 320 and set(second.tolist()) == {3, 4}


def test_sets_of_the_same_text_are_drawn_apart():
    text = [np.arange(10_000)]
    for sampling in ("random", "shuffled"):
        batches = TokenLoader(
            [text, text],
            weights=[1, 1],
            sampling=sampling,
            block_size=8,
            batch_size=20,
            seed=0,
            vocab_size=10_000,
        )
        starts = batches.next_batch().ids[:, 0].tolist()
        assert len(set(starts)) > 15 and starts[::2] != starts[1::2]


# ---------------------------------------------------------------- prepared sets


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Three prepared sets: bytes, bytes of another text, characters."""
    monkeypatch.chdir(tmp_path)
    for name, tokenizer in (("one", "byte"), ("two", "byte"), ("letters", "char")):
        (tmp_path / f"{name}.txt").write_text(f"A text named {name}. " * 40)
        data = DataConfig(path=f"{name}.txt", tokenizer=tokenizer)
        prepare(data, tmp_path / name, progress=False)
    return tmp_path


def test_sets_are_opened_and_mixed(folders):
    data = DataConfig(mixture={"one": 0.7, "two": 0.3}, tokenizer="byte")
    mixed = cached_dataset(data, progress=False)
    one, two = (open_dataset(name) for name in ("one", "two"))
    assert mixed.tokenizer.same_as(load_tokenizer("byte")) and mixed.vocab_size == 257
    assert mixed.train_tokens == one.train_tokens + two.train_tokens
    assert mixed.val_tokens == one.val_tokens + two.val_tokens
    by_folder = {
        part.folder.name: (weight, np.concatenate(train).tobytes(), np.concatenate(val).tobytes())
        for part, weight, train, val in zip(
            mixed.sets, mixed.weights, mixed.train, mixed.val, strict=True
        )
    }
    for name, part, weight in (("one", one, 0.7), ("two", two, 0.3)):
        train, val = np.concatenate(part.train), np.concatenate(part.val)
        assert by_folder[name] == (weight, train.tobytes(), val.tobytes())


def test_order_and_names_do_not_matter_but_sets_and_proportions_do(folders):
    def fingerprint(**mixture):
        return cached_dataset(DataConfig(mixture=mixture), progress=False).fingerprint

    given = fingerprint(one=0.7, two=0.3)
    assert fingerprint(two=0.3, one=0.7) == given
    assert fingerprint(two=3, one=7) == given
    assert fingerprint(one=0.3, two=0.7) != given
    assert fingerprint(one=0.7) != given
    (folders / "one").rename(folders / "moved")
    assert fingerprint(moved=0.7, two=0.3) == given


def test_text_and_public_shards_are_mixed_too(folders):
    public = folders / "public"
    public.mkdir()
    for split in ("train", "val"):
        write_shard(public / f"fineweb_{split}_000001.bin", np.arange(50, dtype=np.uint16))
    data = DataConfig(mixture={"one": 1, "two.txt": 1, "public": 1}, tokenizer="byte")
    mixed = cached_dataset(data, folders / "cache", progress=False)
    assert len(mixed.sets) == 3 and mixed.train_tokens > open_dataset("one").train_tokens


def test_what_cannot_be_mixed(folders):
    with pytest.raises(UserError, match="one has the byte tokenizer .*letters another, char"):
        cached_dataset(DataConfig(mixture={"one": 1, "letters": 1}), progress=False)
    with pytest.raises(UserError, match="nowhere"):
        cached_dataset(DataConfig(mixture={"one": 1, "nowhere": 1}), progress=False)
    with pytest.raises(UserError, match="prepare each set by itself"):
        prepare(DataConfig(mixture={"one": 1}), folders / "mixed", progress=False)
    one = open_dataset("one")
    with pytest.raises(UserError, match="validation split of .*one is empty"):
        Mixture.of([one, dataclasses.replace(one, val=[])], [1, 1])
    with pytest.raises(UserError, match="training split of .*one is empty"):
        Mixture.of([dataclasses.replace(one, train=[]), one], [1, 1])

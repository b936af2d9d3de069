"""Batches prepared beforehand are the loader's own, and so is everything else that can be seen."""

import gc
import threading
import time

import numpy as np
import pytest
import torch

from almostgpt.data.loader import TokenLoader
from almostgpt.data.prefetch import Prefetcher
from almostgpt.errors import UserError

CPU = torch.device("cpu")


def loader(**settings) -> TokenLoader:
    text = [np.arange(500, dtype=np.uint16)]
    defaults = {"block_size": 8, "batch_size": 4, "seed": 1337, "vocab_size": 500}
    return TokenLoader(text, **(defaults | settings))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    assert not threads()
    yield
    assert not threads()


def same(one, other) -> bool:
    return all((a is b) or torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"end_of_text": 7},
        {"sampling": "documents", "end_of_text": 7},
        {"sampling": "shuffled", "rank": 1, "world_size": 2},
    ],
)
def test_batches_are_the_loaders(ahead, options):
    alone = loader(**options)
    with Prefetcher(loader(**options), CPU, ahead=ahead) as batches:
        for _ in range(20):
            assert same(batches.next_batch(), alone.next_batch())
            assert len(threads()) == (1 if ahead else 0)
            assert batches.state_dict() == alone.state_dict()


def test_no_thread_on_a_cpu():
    with Prefetcher(loader(), CPU) as batches:
        batches.next_batch()
        assert not threads()


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()


def test_the_state_is_that_of_the_batches_taken():
    source, alone = loader(), loader()
    with Prefetcher(source, CPU, ahead=3) as batches:
        for taken in range(1, 6):
            batches.next_batch()
            alone.next_batch()
            wait_until(lambda taken=taken: source.row == 4 * (taken + 3))  # so many are prepared
            assert batches.state_dict() == alone.state_dict()
        state = batches.state_dict()
    resumed = loader()
    resumed.load_state_dict(state)
    with Prefetcher(resumed, CPU, ahead=3) as batches:
        assert batches.state_dict() == state
        assert same(batches.next_batch(), alone.next_batch())


@pytest.mark.parametrize("ahead", [0, 3])
def test_an_error_comes_with_the_batch_that_has_it(ahead):
    """Batch 3 of the sequence is the first with an id beyond 100."""
    source = loader(sampling="sequential", vocab_size=100)
    with Prefetcher(source, CPU, ahead=ahead) as batches:
        for _ in range(3):
            batches.next_batch()
        for _ in range(2):  # it stays
            with pytest.raises(UserError, match="shard 0: token id 100 is not in the vocabulary"):
                batches.next_batch()
            assert batches.state_dict()["row"] == 3 * 4


def test_the_thread_ends_on_an_error_of_the_consumer():
    with pytest.raises(RuntimeError, match="the step"), Prefetcher(loader(), CPU, ahead=2) as b:
        b.next_batch()
        raise RuntimeError("the step")


def test_the_thread_of_a_forgotten_one_ends():
    batches = Prefetcher(loader(), CPU, ahead=2)
    batches.next_batch()
    (thread,) = threads()
    del batches
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()

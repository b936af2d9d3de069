"""Batches from shards in the page cache, on one core, for each way to take them.

Against what is usually written: nanoGPT's ``get_batch`` (a map opened anew, a slice and a conversion for
each row, ``torch.stack``) and the reader of modded-nanogpt (a shard held in memory, one slice for the
batch). The floor is what any of them must do: read two bytes a token and write sixteen, as two int64
tensors, which is the conversion alone, from memory that is in the cache.

What we aim at: 500 M tokens/s with rows of 1024 in batches of 32; nothing is asserted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from almostgpt.data.loader import TokenLoader
from almostgpt.data.shards import HEADER_BYTES, Shard, write_shard

from . import harness

SHAPES = [(32, 1024), (12, 64)]
VOCAB, END = 50257, 50256
SHARD_TOKENS, SHARDS = 20_000_000, 4
DOCUMENT = 700  # tokens, on average: about FineWeb's
WAYS: dict[str, dict] = {
    "random": {"sampling": "random"},
    "sequential": {"sampling": "sequential"},
    "shuffled": {"sampling": "shuffled"},
    "documents": {"sampling": "documents", "end_of_text": END, "packed": False},
    "sequential, packed": {"sampling": "sequential", "end_of_text": END},
    "documents, packed": {"sampling": "documents", "end_of_text": END},
    "shuffled, mixture": {"sampling": "shuffled", "weights": [7, 3]},
}
CALLS = 100  # so that what the peer before left in the caches counts little
SECONDS = 2.0


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[Path]:
    """Files with random tokens, and documents of geometrically distributed lengths."""
    folder, draw = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    files = [folder / f"fineweb_train_{number:06d}.bin" for number in range(SHARDS)]
    for file in files:
        tokens = draw.integers(0, END, SHARD_TOKENS).astype(np.uint16)
        tokens[draw.integers(0, SHARD_TOKENS, SHARD_TOKENS // DOCUMENT)] = END
        write_shard(file, tokens)
    return files


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("B, T", SHAPES, ids=[f"{B}x{T}" for B, T in SHAPES])
def test_batches(B, T, way, shards, race, report, benchmark):
    if way in ("random", "sequential"):
        first = next_batches(shards, B, T, "sequential")()
        harness.check_equal({"ours": first, "modded-nanogpt": modded_nanogpt(shards[0], B, T)()})
    contestants: dict[str, Callable[[], tuple]] = {
        "almostgpt": next_batches(shards, B, T, way),
        "nanoGPT (random)": nanogpt(shards[0], B, T),
        "modded-nanogpt (sequential)": modded_nanogpt(shards[0], B, T),
        "conversion alone": conversion(B, T),
    }
    peers = {name: (lambda work=work: work) for name, work in contestants.items()}
    result = race(peers, harness.wall_timer(CALLS), seconds=SECONDS)
    report(
        harness.Table(
            f"{way}, {B} x {T}, from {SHARDS} shards of {SHARD_TOKENS:,} tokens",
            ("", "us", "± %", "M tokens/s", "ours is faster by"),
            [
                [
                    name,
                    1e6 * result.median(name),
                    100 * result.spread(name),
                    B * T / result.median(name) / 1e6,
                    result.speedup("almostgpt", over=name),
                ]
                for name in peers
            ],
        )
    )
    benchmark.extra_info["tokens_per_second"] = B * T / result.median("almostgpt")


def next_batches(files: list[Path], B: int, T: int, way: str) -> Callable[[], tuple]:
    opened = [Shard(file) for file in files]
    parts = [opened[:2], opened[2:]] if "weights" in WAYS[way] else opened
    batches = TokenLoader(parts, block_size=T, batch_size=B, seed=0, vocab_size=VOCAB, **WAYS[way])
    return lambda: batches.next_batch()[:2]


def nanogpt(file: Path, B: int, T: int) -> Callable[[], tuple]:
    """As nanoGPT's train.py does it, from behind the header."""

    def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
        data = np.memmap(file, dtype=np.uint16, mode="r", offset=HEADER_BYTES)
        ix = torch.randint(len(data) - T, (B,))
        x = torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in ix])
        return x, y

    return get_batch


def modded_nanogpt(file: Path, B: int, T: int) -> Callable[[], tuple]:
    """As the early train_gpt2.py of modded-nanogpt does it: the shard is read whole beforehand."""
    tokens = np.fromfile(file, dtype=np.uint16, offset=HEADER_BYTES)
    place = 0

    def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal place
        buf = tokens[place : place + B * T + 1]
        buf = torch.tensor(buf.astype(np.int32), dtype=torch.long)
        place += B * T
        if place + B * T + 1 > len(tokens):
            place = 0
        return buf[:-1].view(B, T), buf[1:].view(B, T)

    return next_batch


def conversion(B: int, T: int) -> Callable[[], tuple]:
    tokens = np.zeros((B, T + 1), np.uint16)

    def convert() -> tuple[torch.Tensor, torch.Tensor]:
        ids, targets = (torch.empty(B, T, dtype=torch.int64) for _ in range(2))
        np.copyto(ids.numpy(), tokens[:, :-1])
        np.copyto(targets.numpy(), tokens[:, 1:])
        return ids, targets

    return convert

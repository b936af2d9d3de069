"""Batches against numpy slicing; the order of windows; the state."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from almostgpt.data.loader import TokenLoader, document_start
from almostgpt.data.shards import open_shard, write_shard
from almostgpt.data.tokenizer import ByteTokenizer, CharTokenizer
from almostgpt.errors import UserError


def loader(shards, **settings) -> TokenLoader:
    defaults = {"block_size": 8, "batch_size": 4, "seed": 1337, "vocab_size": 65536}
    return TokenLoader(shards, **(defaults | settings))


def numbered(*lengths: int) -> list[np.ndarray]:
    """Shards in which every token is different: 0, 1, 2 ... in one, 1000, 1001 ... in the next."""
    return [(np.arange(n) + 1000 * i).astype(np.uint16) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("sampling", ["random", "sequential"])
def test_batches_are_shifted_slices_of_one_shard(sampling):
    shards = numbered(100, 9, 5, 37)  # 9 is one window, 5 is none
    batches = loader(shards, sampling=sampling)
    seen = set()
    for _ in range(200):
        ids, targets, cu_seqlens = batches.next_batch()
        assert cu_seqlens is None
        for tensor in (ids, targets):
            assert tensor.dtype == torch.int64 and tensor.shape == (4, 8)
            assert tensor.is_contiguous() and tensor.device.type == "cpu"
        for x, y in zip(ids.numpy(), targets.numpy(), strict=True):
            shard, start = divmod(int(x[0]), 1000)
            assert np.array_equal(x, shards[shard][start : start + 8])
            assert np.array_equal(y, shards[shard][start + 1 : start + 9])
            seen.add(shard)
    assert seen == {0, 1, 3}


def test_sequential_goes_side_by_side_and_round():
    batches = loader(numbered(25, 17, 30), sampling="sequential", batch_size=2)
    starts = [batches.next_batch()[0][:, 0].tolist() for _ in range(5)]
    # 25 tokens: 3 windows (the last target is token 24); 17: 2 windows; 30: 3 windows.
    assert sum(starts, []) == [0, 8, 16, 1000, 1008, 2000, 2008, 2016, 0, 8]


def test_random_is_uniform_over_all_starts():
    batches = loader(numbered(40, 20, 14), batch_size=500)  # 32, 12 and 6 starts
    drawn = np.concatenate([batches.next_batch()[0][:, 0].numpy() for _ in range(100)])
    starts, counts = np.unique(drawn, return_counts=True)
    assert starts.tolist() == [*range(32), *range(1000, 1012), *range(2000, 2006)]
    expected = len(drawn) / 50
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 100  # 49 degrees of freedom: beyond 100 once in 40,000


def test_seeds_and_batches_differ():
    first = [loader(numbered(1000), seed=seed).next_batch()[0] for seed in range(20)]
    batches = loader(numbered(1000), seed=0)
    first += [batches.next_batch()[0] for _ in range(20)][1:]
    assert len({tuple(ids.flatten().tolist()) for ids in first}) == len(first)


def philox4x64(key: int, counter: int) -> list[int]:
    """Four words of Philox4x64-10 as Salmon et al. (SC 2011) define it."""
    words = [(counter >> 64 * i) % 2**64 for i in range(4)]
    keys = [key % 2**64, key >> 64]
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * words[0], 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * words[2], 2**64)
        words = [high1 ^ words[1] ^ keys[0], low1, high0 ^ words[3] ^ keys[1], low0]
        keys = [(keys[0] + 0x9E3779B97F4A7C15) % 2**64, (keys[1] + 0xBB67AE8584CAA73B) % 2**64]
    return words


@pytest.mark.parametrize("seed", [0, 1337, 2**100 + 7])
def test_order_is_a_published_function_of_seed_and_batch(seed):
    """So a saved run goes on with the same windows under every version of its libraries."""
    batches = loader(numbered(1000), batch_size=6, seed=seed)
    for batch in range(3):
        blocks = [philox4x64(seed, (batch << 64) + block) for block in (1, 2)]
        expected = [(word * 992) >> 64 for word in sum(blocks, [])[:6]]
        assert batches.next_batch()[0][:, 0].tolist() == expected


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 30), st.integers(0, 2**64), st.sampled_from(["random", "sequential"]))
def test_state_restores_the_exact_next_batch(taken, seed, sampling):
    shards = numbered(300, 50)
    whole = loader(shards, seed=seed, sampling=sampling)
    for _ in range(taken):
        whole.next_batch()
    state = json.loads(json.dumps(whole.state_dict()))  # survives a JSON file
    assert state["row"] == 4 * taken
    resumed = loader(shards, seed=seed, sampling=sampling)
    resumed.load_state_dict(state)
    for _ in range(3):
        ours, theirs = resumed.next_batch(), whole.next_batch()
        assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.targets, theirs.targets)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seed": 1}, "seed is 1337 in the state and 1 here"),
        ({"weights": [1], "shards": [numbered(100)]}, "weights is None in the state and .1. here"),
        ({"block_size": 7}, "block_size is 8 in the state and 7 here"),
        ({"sampling": "sequential"}, "sampling is 'random' in the state and 'sequential' here"),
    ],
)
def test_state_of_another_loader_is_refused(change, reason):
    state = loader(numbered(100)).state_dict()
    with pytest.raises(UserError, match=reason):
        loader(**{"shards": numbered(100), **change}).load_state_dict(state)
    with pytest.raises(UserError, match="tokens is 100 in the state and 101 here"):
        loader(numbered(101)).load_state_dict(state)
    for number, key in itertools.product((None, -1, 1.5), ("row", "batch_size")):
        with pytest.raises(UserError, match=f"{key} is {number}, not a number"):
            loader(numbered(100)).load_state_dict(state | {key: number})


def test_foreign_id_names_shard_and_id(tmp_path):
    write_shard(tmp_path / "good.bin", np.arange(20, dtype=np.uint16))
    write_shard(tmp_path / "bad.bin", np.array([*range(15), 77, 16, 17], np.uint16))
    shards = [open_shard(tmp_path / "good.bin"), open_shard(tmp_path / "bad.bin")]
    batches = loader(shards, vocab_size=20, sampling="sequential", batch_size=2)
    batches.next_batch()
    with pytest.raises(UserError, match=r"bad\.bin: token id 77 .* 20 tokens"):
        batches.next_batch()
    assert batches.state_dict()["row"] == 2
    with pytest.raises(UserError, match="shard 0: token id -5"):
        loader([np.full(50, -5)]).next_batch()


def test_mixed_widths(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(9, dtype=np.uint16))
    write_shard(tmp_path / "b.bin", np.arange(9, dtype=np.uint32) + 100_000)
    shards = [open_shard(tmp_path / "a.bin"), open_shard(tmp_path / "b.bin")]
    batches = loader(shards, vocab_size=200_000, sampling="sequential", batch_size=2)
    assert batches.next_batch().ids[:, 0].tolist() == [0, 100_000]


@pytest.mark.parametrize("sampling", ["random", "sequential"])
@pytest.mark.parametrize("shards", [[], numbered(8), numbered(8, 0, 3)])
def test_too_little_text(sampling, shards):
    with pytest.raises(UserError, match="val split is too small.*block_size=8 needs 9"):
        loader(shards, sampling=sampling, split="val")
    assert loader(numbered(9), sampling=sampling).windows == 1


def test_unknown_sampling():
    with pytest.raises(UserError, match="did you mean random"):
        loader(numbered(100), sampling="randon")


# ---------------------------------------------------------------- packed documents

END = 3  # of the made texts below, where 0, 1 and 2 are words


def documents_of(rows: list[list[int]]) -> list[list[int]]:
    """The definition: a row begins a document, and so does every END."""
    documents = []
    for row in rows:
        documents.append([])
        for token in row:
            if token == END and documents[-1]:
                documents.append([])
            documents[-1].append(token)
    return documents


packed_texts = st.lists(st.integers(0, END), min_size=7, max_size=60)


@settings(max_examples=50, deadline=None)
@given(
    packed_texts, st.integers(1, 6), st.integers(1, 5), st.sampled_from(["random", "sequential"])
)
def test_borders_are_those_of_the_documents(text, block_size, batch_size, sampling):
    batches = loader(
        [np.array(text, np.uint16)],
        block_size=block_size,
        batch_size=batch_size,
        sampling=sampling,
        end_of_text=END,
    )
    for _ in range(3):
        ids, _, cu_seqlens = batches.next_batch()
        size = batch_size * block_size
        assert cu_seqlens.dtype == torch.int32 and cu_seqlens.shape == (size + 1,)
        assert cu_seqlens.is_contiguous() and cu_seqlens.device.type == "cpu"
        spans = itertools.pairwise(cu_seqlens.tolist())
        cut = [ids.flatten()[begin:end].tolist() for begin, end in spans]
        documents = documents_of(ids.tolist())
        assert cut == documents + [[]] * (size - len(documents))  # the rest is padding


@settings(max_examples=20, deadline=None)
@given(packed_texts, st.integers(0, 10), st.integers(0, 2**64))
def test_packed_batches_are_the_same_windows_and_resume(text, taken, seed):
    shards = [np.array(text, np.uint16)]
    plain, whole, resumed = (
        loader(shards, block_size=6, seed=seed, end_of_text=end) for end in (None, END, END)
    )
    for _ in range(taken):
        plain.next_batch()
        whole.next_batch()
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for _ in range(3):
        batch, again, without = (part.next_batch() for part in (whole, resumed, plain))
        assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
        assert torch.equal(batch.ids, without.ids) and torch.equal(batch.targets, without.targets)


def test_state_says_whether_documents_were_packed():
    ignoring, packing = loader(numbered(100)), loader(numbered(100), end_of_text=END)
    with pytest.raises(UserError, match="end_of_text is None in the state and 3 here"):
        packing.load_state_dict(ignoring.state_dict())
    with pytest.raises(UserError, match="end_of_text is 3 in the state and None here"):
        ignoring.load_state_dict(packing.state_dict())
    assert (
        loader(numbered(100), end_of_text=END, packed=False).state_dict() == ignoring.state_dict()
    )


def test_packing_needs_an_end_of_text_token():
    assert document_start("packed", ByteTokenizer()) == 256
    assert document_start("ignore", ByteTokenizer()) is None
    assert document_start("ignore", CharTokenizer("abc")) is None
    with pytest.raises(UserError, match="data.documents=packed .* the char tokenizer has none"):
        document_start("packed", CharTokenizer("abc"))

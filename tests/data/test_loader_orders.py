"""Every order of rows: every token once an epoch, two ranks are one interleaved, resume is exact."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from almostgpt.data.loader import TokenLoader
from almostgpt.data.orders import SAMPLINGS
from almostgpt.data.shards import Shard, write_shard
from almostgpt.errors import UserError

END, FIRST = 0, 1  # of the made texts: what begins a document, and what begins the first one


def loader(shards, **options) -> TokenLoader:
    defaults = {"block_size": 8, "batch_size": 4, "seed": 1337, "vocab_size": 65536}
    return TokenLoader(shards, **(defaults | options))


def cut(tokens: np.ndarray, parts: int) -> list[np.ndarray]:
    """Shards of about the same size, some of them empty where there is little to cut."""
    return np.array_split(tokens.astype(np.uint16), parts)


def rows(batches: TokenLoader, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids and the targets of the next ``count`` rows, each (count, block_size)."""
    taken = [batches.next_batch() for _ in range(-(-count // batches.batch_size))]
    return tuple(torch.cat(part).numpy()[:count] for part in list(zip(*taken, strict=True))[:2])


# ---------------------------------------------------------------- shuffled windows


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 200), st.integers(1, 30), st.integers(1, 5), st.integers(0, 2**64), st.data())
def test_shuffled_windows_see_every_token_once_an_epoch(tokens, block_size, parts, seed, data):
    block_size = min(block_size, tokens - 1)
    text = np.arange(tokens)
    batches = loader(cut(text, parts), block_size=block_size, seed=seed, sampling="shuffled")
    epochs = 3
    ends = [-(-epoch * tokens // block_size) for epoch in range(epochs + 1)]  # rows before each
    ids, targets = rows(batches, ends[-1])
    assert np.array_equal(
        (ids - ids[:, :1]) % tokens, np.tile(np.arange(block_size), (len(ids), 1))
    )
    assert np.array_equal(targets, (ids + 1) % tokens)  # on a ring
    for epoch, end in enumerate(ends[1:], start=1):
        seen = np.bincount(ids[:end].ravel(), minlength=tokens)
        ahead = end * block_size - epoch * tokens  # of the next lap's first tokens
        assert 0 <= ahead < block_size
        assert seen.tolist() == [epoch + 1] * ahead + [epoch] * (tokens - ahead)


def test_shuffled_windows_come_in_another_order_each_epoch_and_for_each_seed():
    orders = []
    for seed in range(5):
        batches = loader([np.arange(800)], seed=seed, sampling="shuffled")
        starts = rows(batches, 400)[0][:, 0].reshape(4, 100)
        assert all(sorted(order) == list(range(0, 800, 8)) for order in starts.tolist())
        orders += starts.tolist()
    assert len({tuple(order) for order in orders}) == 20
    # Neighbours in the text are no neighbours in the order, but for one pair in a hundred.
    steps = np.diff(np.array(orders), axis=1)
    assert (steps == 8).mean() < 0.03


# ---------------------------------------------------------------- shuffled documents


@st.composite
def texts(draw, least: int = 2) -> np.ndarray:
    """Documents END + words; the first begins with FIRST instead, as those that prepare makes."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=40))
    words = iter(range(2, 1000))
    text = [token for n in lengths for token in [END, *(next(words) for _ in range(n))]]
    text += [next(words) for _ in range(least - len(text))]
    return np.array([FIRST, *text[1:]])


def documents_in(stream: list[int]) -> list[tuple[int, ...]]:
    """A text that begins with a document, cut where one begins."""
    documents: list[list[int]] = []
    for token in stream:
        if token in (END, FIRST):
            documents.append([])
        documents[-1].append(token)
    return [tuple(document) for document in documents]


@settings(max_examples=40, deadline=None)
@given(texts(), st.integers(1, 30), st.integers(1, 5), st.integers(0, 2**64))
def test_every_epoch_lays_every_document_end_to_end(text, block_size, parts, seed):
    block_size, tokens = min(block_size, len(text) - 1), len(text)
    options = {"block_size": block_size, "seed": seed, "end_of_text": END}
    batches = loader(cut(text, parts), sampling="documents", **options)
    ids, targets = rows(batches, -(-3 * tokens // block_size))
    stream = ids.ravel()
    assert np.array_equal(targets.ravel()[:-1], stream[1:])
    for epoch in range(3):
        laid = stream[epoch * tokens : (epoch + 1) * tokens].tolist()
        assert Counter(documents_in(laid)) == Counter(documents_in(text.tolist()))


def test_documents_come_in_another_order_each_epoch_and_for_each_seed():
    text = np.array([[END, word] for word in range(1, 101)]).ravel()
    orders = []
    for seed in range(5):
        batches = loader([text], seed=seed, sampling="documents", end_of_text=END, block_size=10)
        orders += rows(batches, 80)[0].reshape(4, 100, 2)[:, :, 1].tolist()
    assert all(sorted(order) == list(range(1, 101)) for order in orders)
    assert len({tuple(order) for order in orders}) == 20
    assert (np.diff(np.array(orders), axis=1) == 1).mean() < 0.03


def test_many_documents_go_beyond_a_block_of_the_order():
    """Also when a resumed loader has to find its place among them, and one goes back."""
    text = np.tile([END, 5, 6], 10_000)
    text[1::3] = np.arange(10_000) + 10
    options = {"sampling": "documents", "end_of_text": END, "block_size": 30, "batch_size": 10}
    batches = loader([text], **options)
    ids, _ = rows(batches, 2000)
    assert sorted(ids[:1000].reshape(-1, 3)[:, 1].tolist()) == list(range(10, 10_010))
    for row in (990, 500, 10, 1990):
        resumed = loader([text], **options)
        for again in (resumed, batches):
            again.load_state_dict(batches.state_dict() | {"row": row})
            assert np.array_equal(rows(again, 10)[0], ids[row : row + 10])


# ---------------------------------------------------------------- all of them


@settings(max_examples=40, deadline=None)
@given(
    texts(30),
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([*SAMPLINGS]),
)
def test_documents_begin_where_the_text_says(text, block_size, batch_size, parts, sampling):
    """At each END, at the text's first token, and where a row begins: for every sampling."""
    shards = cut(text, 1 if sampling in ("random", "sequential") else parts)
    options = {"block_size": block_size, "batch_size": batch_size, "end_of_text": END}
    batches = loader(shards, sampling=sampling, **options)
    for _ in range(4):
        ids, _, cu_seqlens = batches.next_batch()
        ids, size = ids.flatten().tolist(), batch_size * block_size
        begins = [i for i in range(size) if i % block_size == 0 or ids[i] in (END, FIRST)]
        assert cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous()
        assert cu_seqlens.tolist() == begins + [size] * (size + 1 - len(begins))


@st.composite
def any_loader(draw):
    """A function that makes loaders of the same text with the same settings, but for those given."""
    sampling = draw(st.sampled_from([*SAMPLINGS]))
    texts_ = [cut(draw(texts(30)) + 1000 * i, draw(st.integers(1, 3))) for i in range(3)]
    for part in texts_:
        for shard in part:
            shard[shard % 1000 == END] = END
    options = {
        "block_size": draw(st.integers(1, 9)),
        "seed": draw(st.integers(0, 2**64)),
        "sampling": sampling,
        "end_of_text": END,
        "packed": draw(st.booleans()),
    }
    if draw(st.booleans()):
        weights = draw(st.lists(st.sampled_from([0.3, 0.7, 1, 2.5]), min_size=1, max_size=3))
        return lambda **given: loader(
            texts_[: len(weights)], **options, **({"weights": weights} | given)
        )
    return lambda **given: loader(texts_[0], **options, **given)


def parts_of(batch) -> list[torch.Tensor]:
    return [part for part in batch if part is not None]


def same(one, other) -> bool:
    pairs = list(zip(parts_of(one), parts_of(other), strict=True))
    return all(torch.equal(a, b) for a, b in pairs)


@settings(max_examples=50, deadline=None)
@given(any_loader(), st.integers(0, 40), st.integers(1, 5))
def test_resumed_at_any_batch_is_uninterrupted(make, taken, batch_size):
    whole, resumed = (make(batch_size=batch_size) for _ in range(2))
    for _ in range(taken):
        whole.next_batch()
    state = json.loads(json.dumps(whole.state_dict()))  # survives a JSON file
    assert state["row"] == taken * batch_size
    resumed.load_state_dict(state)
    for _ in range(5):
        assert same(whole.next_batch(), resumed.next_batch())
    assert whole.state_dict() == resumed.state_dict()


@settings(max_examples=50, deadline=None)
@given(any_loader(), st.integers(1, 4), st.integers(1, 5))
def test_ranks_interleaved_are_one(make, batch_size, world_size):
    one = make(batch_size=batch_size * world_size)
    ranks = [
        make(batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for _ in range(4):
        whole = one.next_batch()
        for rank, each in enumerate(ranks):
            part = each.next_batch()
            assert torch.equal(part.ids, whole.ids[rank::world_size])
            assert torch.equal(part.targets, whole.targets[rank::world_size])
        assert all(each.state_dict() == one.state_dict() for each in ranks)


@settings(max_examples=50, deadline=None)
@given(any_loader(), st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=5))
def test_the_order_survives_changes_of_ranks_and_batch_size(make, stages):
    """Stage after stage (batch_size, world_size), each from the state of the one before."""
    one = make(batch_size=6)
    state, expected = one.state_dict(), [one.next_batch() for _ in range(20)]
    ids, targets = (torch.cat(part) for part in list(zip(*expected, strict=True))[:2])
    row = 0
    for batch_size, world_size in stages:
        ranks = [
            make(batch_size=batch_size, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for each in ranks:
            each.load_state_dict(state)
        for rank, each in enumerate(ranks):
            batch = each.next_batch()
            mine = slice(row + rank, row + batch_size * world_size, world_size)
            assert torch.equal(batch.ids, ids[mine]) and torch.equal(batch.targets, targets[mine])
        state, row = ranks[0].state_dict(), row + batch_size * world_size


@pytest.mark.parametrize("sampling", [*SAMPLINGS])
def test_states_of_earlier_versions_go_on(sampling):
    """They counted batches, each of batch_size rows, and had no weights."""
    options = {"sampling": sampling, "end_of_text": END, "packed": False}
    whole = loader([np.arange(500)], **options)
    for _ in range(5):
        whole.next_batch()
    earlier = {
        "batch": 5,
        "seed": 1337,
        "sampling": sampling,
        "end_of_text": None,
        "block_size": 8,
        "batch_size": 4,
        "tokens": 500,
        "windows": {"random": 492, "sequential": 62, "shuffled": 63, "documents": 1}[sampling],
    }
    resumed = loader([np.arange(500)], **options)
    resumed.load_state_dict(earlier)
    assert same(resumed.next_batch(), whole.next_batch())
    del earlier["end_of_text"]  # from before documents could be packed
    resumed.load_state_dict(earlier)
    assert resumed.row == 20


@pytest.mark.parametrize("sampling", ["shuffled", "documents"])
def test_too_little_text(sampling):
    options = {"sampling": sampling, "end_of_text": END}
    for shards in ([], cut(np.arange(8), 1), cut(np.arange(8), 3)):
        with pytest.raises(UserError, match="val split is too small.*block_size=8 needs 9"):
            loader(shards, split="val", **options)
    assert loader(cut(np.arange(9), 3), **options).next_batch().ids.shape == (4, 8)


@pytest.mark.parametrize("sampling", [*SAMPLINGS])
def test_a_foreign_id_is_named_with_its_shard(sampling, tmp_path):
    """Wherever it is in a row, and the row in a batch; each token is in some row of an epoch."""
    for number in range(4):
        tokens = np.arange(30, dtype=np.uint16)
        tokens[17] = 77 if number == 2 else 0
        write_shard(tmp_path / f"{number}.bin", tokens)
    shards = [Shard(tmp_path / f"{number}.bin") for number in range(4)]
    batches = loader(shards, sampling=sampling, vocab_size=40, end_of_text=0)
    with pytest.raises(UserError, match=r"2\.bin: token id 77 is not in the vocabulary of 40"):
        for _ in range(100):
            batches.next_batch()
    row = batches.row
    with pytest.raises(UserError, match="token id 77"):
        batches.next_batch()
    assert batches.row == row


@pytest.mark.parametrize("sampling", [*SAMPLINGS])
def test_a_shard_that_shrinks_in_training_is_named(sampling, tmp_path):
    file = tmp_path / "text.bin"
    write_shard(file, np.arange(20_000, dtype=np.uint16))
    batches = loader([Shard(file)], sampling=sampling, end_of_text=0)
    batches.next_batch()
    with open(file, "r+b") as opened:
        opened.truncate(1024)
    with pytest.raises(UserError, match=r"text\.bin: truncated while it was in use"):
        batches.next_batch()

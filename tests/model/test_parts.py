"""What every combination of parts must keep: causality, caches, checkpointing, counts, learning."""

import itertools
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_parts import (
    ATTENTIONS,
    LINEAR,
    VOCAB,
    make,
    matrices,
    models,
    parameters,
    random_ids,
    small_config,
)

from almostgpt import GPT, checkpoint
from almostgpt.config import Config, overlay
from almostgpt.data.tokenizer import ByteTokenizer
from almostgpt.inference.cache import KVCache
from almostgpt.model.gpt import PARTS
from almostgpt.training.metrics import flops_per_token

EVERY_PART = [
    {"attention": "full", "position": "learned", "norm": "layernorm", "feedforward": "gelu"},
    {"attention": "sliding_window", "attention_window": 5, "position": "alibi"},
    {"attention": "sliding_window", "window_pattern": "LG", "qk_norm": True, "n_kv_head": 2},
    {"attention": "linear", "feedforward": "moe", "norm": "scalenorm", "n_kv_head": 1},
    {"attention": "linear", "feature_map": "softmax", "position": "none", "logit_softcap": 9.0},
    {"attention": "block_sparse", "sparse_block": 2, "feedforward": "moe", "expert": "gelu"},
    {"attention": "full", "position": "sinusoidal", "feedforward": "relu2", "bias": True},
    {"attention": "full", "rope_scaling": "llama3", "rope_factor": 2.0, "rope_fraction": 0.5},
]
each_part = pytest.mark.parametrize(
    "options", EVERY_PART, ids=lambda o: "-".join(map(str, o.values()))
)


def test_the_list_above_has_every_part():
    for kind, parts in PARTS.items():
        default = getattr(small_config(), kind)
        assert {options.get(kind, default) for options in EVERY_PART} >= set(parts) - {"gelu_tanh"}
    assert set(ATTENTIONS) == set(PARTS["attention"])


@settings(max_examples=60, deadline=None)
@given(models(), st.integers(1, 16), st.data())
def test_causal_by_perturbation(options, T, data):
    """Changing the token at position t changes no logits before t, and does change those at t."""
    model = make(**options)
    t = data.draw(st.integers(0, T - 1))
    ids = random_ids(2, T)
    changed = ids.clone()
    changed[:, t] = (changed[:, t] + 1) % VOCAB
    with torch.no_grad():
        before, after = (model(i, all_logits=True)[0] for i in (ids, changed))
    torch.testing.assert_close(before[:, :t], after[:, :t], rtol=0, atol=1e-5)
    assert (before[:, t] - after[:, t]).abs().max() > 1e-3


@settings(max_examples=60, deadline=None)
@given(models(), st.lists(st.integers(1, 16), min_size=1, max_size=5))
def test_cached_logits_equal_uncached_however_the_prompt_is_cut(options, pieces):
    model = make(**options)
    pieces = [
        p for p, total in zip(pieces, itertools.accumulate(pieces), strict=True) if total <= 16
    ]
    ids = random_ids(2, sum(pieces))
    cache = KVCache.full(model.config, batch=2)
    with torch.no_grad():
        whole, _ = model(ids, all_logits=True)
        cut = [model(piece, all_logits=True, cache=cache)[0] for piece in ids.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(cut, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert cache.length == ids.shape[1]


@settings(max_examples=30, deadline=None)
@given(models(), st.lists(st.tuples(*[st.integers(0, 8)] * 2), min_size=1, max_size=4))
def test_rows_of_any_lengths_equal_each_alone(options, lengths):
    """Of each row of a pass only some tokens are there; a cache goes on from where each row is."""
    model = make(**options)
    ids = random_ids(2, 16)
    cache, had, found = KVCache.full(model.config, batch=2), [0, 0], ([], [])
    with torch.no_grad():
        whole = model(ids, all_logits=True)[0]
        for new in lengths:
            new = [min(n, 16 - before) for n, before in zip(new, had, strict=True)]
            piece = torch.full((2, max(*new, 1)), VOCAB - 1)
            for row, (before, n) in enumerate(zip(had, new, strict=True)):
                piece[row, :n] = ids[row, before : before + n]
            logits = model(piece, all_logits=True, cache=cache, new_lengths=new)[0]
            for row, n in enumerate(new):
                found[row].append(logits[row, :n])
            had = [before + n for before, n in zip(had, new, strict=True)]
    for row in range(2):
        torch.testing.assert_close(
            torch.cat(found[row]), whole[row, : had[row]], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    "attention, position",
    [
        *itertools.product(["linear", "sliding_window"], ["rope", "none"]),
        ("sliding_window", "alibi"),
    ],
)
def test_what_forgets_by_itself_goes_on_beyond_block_size(attention, position):
    """A rolling cache of it is exact, whatever the length: as a model with a longer block_size."""
    options = {"attention": attention, "position": position}
    if attention == "sliding_window":
        options["attention_window"] = 6
    short, long = make(**options), make(**options, block_size=80)
    ids = random_ids(1, 80)
    cache = KVCache.rolling(short.config, batch=1)
    with torch.no_grad():
        whole = long(ids, all_logits=True)[0]
        pieces = ids.split([30, 1, 1, 40, 8], dim=1)
        cut = torch.cat([short(p, all_logits=True, cache=cache)[0] for p in pieces], dim=1)
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-4)


def test_a_prompt_of_many_windows_goes_through_a_ring():
    """Windows from 1 token up, and prompts longer than the ring, which comes round in their middle."""
    for window, pattern in itertools.product([1, 3, 20, 50], ["L", "LG"]):
        options = {"attention": "sliding_window", "attention_window": window}
        model = make(**options, window_pattern=pattern, block_size=128)
        ids = random_ids(2, 120)
        with torch.no_grad():
            whole = model(ids, all_logits=True)[0]
            for pieces in ([120], [1, 119], [17, 3, 90, 10]):
                cache = KVCache.full(model.config, batch=2)
                cut = [model(p, all_logits=True, cache=cache)[0] for p in ids.split(pieces, dim=1)]
                torch.testing.assert_close(torch.cat(cut, dim=1), whole, rtol=1e-4, atol=1e-4)
        if window == 3:  # and what it holds is the window, not the text
            slots = [layer.capacity for layer in cache.layers]
            assert slots == ([18, 18] if pattern == "L" else [18, 128])


def test_padding_beyond_the_slots_does_no_harm():
    """Of rows that fill a cache of block-sparse attention, a pass may hold more columns than slots."""
    model = make(attention="block_sparse", sparse_block=5)
    ids, columns = random_ids(2, 7), random_ids(2, 12, seed=1)
    columns[:, :7] = ids
    for capacity, new in ((7, [7, 4]), (16, [7, 4])):
        cache = KVCache.full(model.config, batch=2, capacity=capacity)
        for layer in cache.layers:  # and what nobody has written yet may be anything
            layer.keys[..., :8] = layer.values[..., :8] = math.nan
        with torch.no_grad():
            whole = model(ids, all_logits=True)[0]
            found = model(columns, all_logits=True, cache=cache, new_lengths=new)[0]
            nothing = model(columns, cache=cache, new_lengths=[0, 0])[0]
        for row, n in enumerate(new):
            torch.testing.assert_close(found[row, :n], whole[row, :n], rtol=1e-4, atol=1e-4)
        assert cache.lengths == (7, 4) and nothing.isfinite().all()


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    ids = random_ids(2, 17)
    model.train().zero_grad()
    model(ids[:, :-1], ids[:, 1:])[1].backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@settings(max_examples=20, deadline=None)
@given(models(), st.sampled_from(["selective", "full"]))
def test_gradient_checkpointing_changes_nothing(options, kind):
    plain, saving = make(**options), make(**options, gradient_checkpointing=kind)
    expected, found = gradients(plain), gradients(saving)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0 or "experts" in name or "feedforward" in name, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(models())
def test_counts_equal_the_closed_forms(options):
    model = make(**options)
    c = model.config
    assert model.num_parameters() == parameters(c)
    forward = 2 * c.vocab_size * c.n_embd
    for block in model.blocks:
        forward += 2 * matrices(c, used=True) + attention_flops(block.attention, c, 13)
    assert flops_per_token(model, 13) == pytest.approx(3 * forward)


def attention_flops(attention, c, T: int) -> float:
    """Counted key by key."""
    if c.attention == "linear":
        return 2 * c.head_dim**2 * (c.n_head + c.n_kv_head)
    seen = 0
    for head in range(c.n_head):
        for query in range(T):
            for key in range(query + 1):
                if c.attention == "block_sparse":
                    i, j = query // c.sparse_block, key // c.sparse_block
                    near = j < c.sparse_global or j > i - c.sparse_window
                    seen += near or j in attention.random[head, i].tolist()
                else:
                    window = c.window_of(attention.layer)
                    seen += window is None or query - key < window
    return 4 * c.head_dim * seen / T


@settings(max_examples=30, deadline=None)
@given(models())
def test_saved_and_loaded_it_is_the_same_to_the_bit(options):
    model = make(**options, vocab_multiple=1)
    config = overlay(Config(), {"model": model.config})
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.export(Path(folder) / "model", model, ByteTokenizer(), config)
        loaded, _ = checkpoint.load(Path(folder) / "model")
    ids = random_ids(2, 16)
    with torch.no_grad():
        assert torch.equal(model(ids, all_logits=True)[0], loaded(ids, all_logits=True)[0])


@each_part
def test_greedy_text_is_the_same_with_and_without_a_cache(options):
    model = make(**options)
    prompts = [random_ids(n, seed=n) for n in (5, 1, 3)]
    cached = model.generate(prompts, 8, temperature=0)
    plain = model.generate(prompts, 8, temperature=0, cache="none")
    for a, b in zip(cached, plain, strict=True):
        assert torch.equal(a, b)


@each_part
def test_it_compiles_without_a_break(options):
    torch._dynamo.reset()  # else it takes sizes that differ from the last model's for unknown ones
    model = make(**options).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = random_ids(2, 17)
    found = compiled(ids[:, :-1], ids[:, 1:])[1]
    found.backward()
    by_compiled = {n: p.grad.clone() for n, p in model.named_parameters()}
    expected = gradients(model)
    torch.testing.assert_close(found, model(ids[:, :-1], ids[:, 1:])[1], rtol=1e-5, atol=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(by_compiled[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # a second or two a model
@settings(max_examples=40, deadline=None)
@given(models(), st.integers(1, 16))
def test_any_model_compiles_without_a_break(options, T):
    torch._dynamo.reset()
    model = make(**options)
    ids = random_ids(2, T + 1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found = compiled(ids[:, :-1], ids[:, 1:])[1]
    torch.testing.assert_close(found, model(ids[:, :-1], ids[:, 1:])[1], rtol=1e-5, atol=1e-5)


@each_part
def test_packed_documents_equal_each_alone(options):
    model = make(**options)
    borders = [0, 3, 16, 21, 32]
    ids = random_ids(2, 16)
    with torch.no_grad():
        cu_seqlens = torch.tensor(borders, dtype=torch.int32)
        packed = model(ids, cu_seqlens=cu_seqlens, all_logits=True)[0].flatten(0, 1)
        for start, stop in itertools.pairwise(borders):
            alone = model(ids.flatten()[None, start:stop], all_logits=True)[0][0]
            torch.testing.assert_close(packed[start:stop], alone, rtol=1e-4, atol=1e-4)


@each_part
def test_every_parameter_gets_a_gradient(options):
    for name, gradient in gradients(make(**{**options, "bias": True})).items():
        assert gradient.abs().max() > 0, name


@settings(max_examples=20, deadline=None)
@given(models())
def test_the_loss_falls(options):
    """On a text that repeats itself, within a few steps."""
    torch.manual_seed(0)
    model = GPT(small_config(**options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.arange(17).repeat(4, 1).add(torch.arange(4)[:, None] * 3) % VOCAB
    losses = []
    for _ in range(25):
        loss = model(ids[:, :-1], ids[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9 * math.log(VOCAB) and losses[-1] < 0.5 * losses[0], losses


@settings(max_examples=10, deadline=None)
@given(models(attention=LINEAR))
def test_a_state_of_sums_has_one_size(options):
    config = small_config(**options)
    few, many = (KVCache.full(config, 1, capacity=n) for n in (1, 1000))
    for a, b in zip(few.layers, many.layers, strict=True):
        assert a.numerator.shape == b.numerator.shape

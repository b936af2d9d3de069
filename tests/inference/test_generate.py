"""Sampling and the decoding loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from almostgpt import GPT, GPTConfig
from almostgpt.errors import UserError
from almostgpt.inference.generate import stream
from almostgpt.inference.sampling import sample


@pytest.fixture(scope="module", params=["rope", "learned", "sinusoidal"])
def model(request) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(
        block_size=12,
        vocab_size=23,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=32,
        position=request.param,
    )
    model = GPT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def prompt(*shape: int) -> torch.Tensor:
    return torch.randint(23, shape, generator=torch.Generator().manual_seed(1))


def greedy_by_hand(model: GPT, ids: torch.Tensor, new: int) -> torch.Tensor:
    """The definition: the most likely next token of the last block_size ones, again and again."""
    model.eval()
    with torch.no_grad():
        for _ in range(new):
            logits = model(ids[:, -12:], all_logits=True)[0]
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("length, new", [(1, 11), (5, 7), (5, 20), (12, 3), (15, 4), (3, 0)])
def test_greedy_with_and_without_cache_is_the_definition(model, length, new):
    """Also past block_size, where the window moves."""
    ids = prompt(2, length)
    expected = greedy_by_hand(model, ids, new)
    assert torch.equal(model.generate(ids, new, temperature=0), expected)
    assert torch.equal(model.generate(ids, new, temperature=0, use_cache=False), expected)


def test_a_seed_repeats_the_text_and_leaves_the_global_generator_alone(model):
    ids = prompt(1, 4)
    before = torch.get_rng_state()
    first = model.generate(ids, 20, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.generate(ids, 20, seed=5), first)
    assert not torch.equal(model.generate(ids, 20, seed=6), first)


def test_streaming_yields_each_token_before_the_next_is_computed(model):
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    handle = model.register_forward_hook(count)
    tokens = stream(model, prompt(1, 3), 5)
    for number in range(1, 6):
        next(tokens)
        assert calls == number
    handle.remove()


def test_cache_shrinks_the_work_to_one_token_a_step(model):
    seen = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model.generate(prompt(1, 4), 5)
    handle.remove()
    assert seen == [4, 1, 1, 1, 1]


def test_generation_keeps_training_mode_and_needs_no_gradient(model):
    model.train()
    ids = model.generate(prompt(1, 3), 3)
    assert model.training and not ids.requires_grad


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.floats(0.1, 1.0),
    st.floats(0.3, 3.0),
)
def test_sampled_tokens_are_among_those_kept(seed, top_k, top_p, temperature):
    """Against a plain loop over one row: at most k, and the fewest whose probability reaches p."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 12, generator=generator, dtype=torch.float64)
    scaled = (logits[0] / temperature).tolist()
    ranked = sorted(range(12), key=lambda i: -scaled[i])[:top_k]
    weights = [torch.tensor(scaled[i], dtype=torch.float64).exp().item() for i in ranked]
    kept, mass = set(), 0.0
    for token, weight in zip(ranked, weights, strict=True):
        if mass / sum(weights) >= top_p - 1e-6:
            break
        kept.add(token)
        mass += weight
    for _ in range(20):
        drawn = sample(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
        )
        assert int(drawn) in kept


def test_a_tiny_temperature_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for temperature in (1e-40, 1e-12, 1e-3):
        assert int(sample(logits, temperature=temperature)) == 1


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([[0.1, 0.2, 0.7]]).log().expand(20_000, 3)
    drawn = sample(logits, generator=torch.Generator().manual_seed(0))
    frequencies = torch.bincount(drawn, minlength=3) / 20_000
    torch.testing.assert_close(frequencies, torch.tensor([0.1, 0.2, 0.7]), atol=0.015, rtol=0)
    hot = sample(logits, temperature=2.0, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.1, 0.2, 0.7]).sqrt()
    torch.testing.assert_close(
        torch.bincount(hot, minlength=3) / 20_000, weights / weights.sum(), atol=0.015, rtol=0
    )


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
    ],
)
def test_impossible_options(model, options, expected):
    with pytest.raises(UserError, match=expected):
        model.generate(prompt(1, 2), **{"max_new_tokens": 1, **options})


@pytest.mark.parametrize(
    "ids, expected",
    [
        (torch.zeros(1, 0, dtype=torch.int64), "at least 1 token"),
        (torch.zeros(3, dtype=torch.int64), "at least 1 token"),
        (torch.tensor([[1, 23]]), "token id 23 is outside the vocabulary of 23"),
        (torch.tensor([[-1, 2]]), "token id -1"),
        (torch.tensor([[1.0]]), "must be torch.int64"),
    ],
)
def test_bad_ids_never_reach_the_model(model, ids, expected):
    with pytest.raises(UserError, match=expected):
        model.generate(ids, 1)

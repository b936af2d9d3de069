"""Sampling and the decoding loop."""

import time
from pathlib import Path
from statistics import median

import pytest
import torch

from almostgpt import GPT, GPTConfig
from almostgpt.errors import UserError
from almostgpt.inference.cache import KVCache
from almostgpt.inference.decoder import feed
from almostgpt.inference.generate import stream


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


@pytest.mark.parametrize("length, new", [(1, 11), (5, 7), (11, 1), (3, 0)])
@pytest.mark.parametrize("cache", ["auto", "full", "rolling", "none"])
def test_within_the_block_greedy_is_the_definition(model, length, new, cache):
    ids = prompt(2, length)
    expected = greedy_by_hand(model, ids, new)
    assert torch.equal(model.generate(ids, new, temperature=0, cache=cache), expected)


@pytest.mark.parametrize("length, new", [(5, 20), (12, 3), (15, 4)])
def test_past_the_block_without_cache_it_is_still_the_definition(model, length, new):
    """Positions are counted anew from 0 in every window, so that no part of a model runs out of them."""
    ids = prompt(2, length)
    expected = greedy_by_hand(model, ids, new)
    assert torch.equal(model.generate(ids, new, temperature=0, cache="none"), expected)


@pytest.mark.parametrize("length, new", [(5, 20), (12, 3), (15, 4), (40, 2)])
def test_past_the_block_auto_rolls_where_positions_go_on(model, length, new):
    """With a window of block_size and 4 sinks; tests of the cache show what that computes."""
    ids = prompt(2, length)
    if model.config.position == "rope":
        rolling = {"cache": "rolling", "window": 12, "sink_tokens": 4}
        expected = model.generate(ids, new, temperature=0, **rolling)
        assert torch.equal(model.generate(ids, new, temperature=0), expected)
        cache = KVCache.rolling(model.config, 2)
        by_hand = ids
        for _ in range(new):
            logits = feed(model, by_hand[:, cache.length :], cache)
            by_hand = torch.cat([by_hand, logits.argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(by_hand, expected)
        return
    for cache in ("auto", "rolling", "int8"):
        wanted = (
            rf"{length + new} tokens, .*{model.config.position} positions end at 12.*cache=none"
        )
        with pytest.raises(UserError, match=wanted):
            stream(model, ids, new, cache=cache)  # at once, not with the first token


def test_seeded_text_is_the_same_whatever_the_cache(model):
    ids = prompt(2, 4)
    same = [
        model.generate(ids, 8, seed=5, **options)
        for options in (
            {},
            {"cache": "full"},
            {"cache": "rolling"},
            {"cache": "rolling", "window": 12, "sink_tokens": 0},
            {"cache": "none"},
            {"cache": KVCache.full(model.config, 2)},
            {"window": 12},
        )
    ]
    assert all(torch.equal(text, same[0]) for text in same)
    assert not torch.equal(model.generate(ids, 8, seed=5, window=3), same[0])
    coded = model.generate(ids, 8, seed=5, cache="int8")
    assert torch.equal(
        coded, model.generate(ids, 8, seed=5, cache=KVCache.full(model.config, 2, int8=True))
    )


def test_a_given_cache_is_continued_and_fed_only_what_is_new(model):
    ids = prompt(2, 4)
    whole = model.generate(ids, 8, seed=5)
    cache = KVCache.full(model.config, 2)
    feed(model, ids[:, :3], cache)
    seen = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    assert torch.equal(model.generate(ids, 8, seed=5, cache=cache.fork(1)), whole)
    first = model.generate(ids, 3, temperature=0, cache=cache)
    assert cache.length == 6  # all but the last one drawn
    then = torch.cat([first, prompt(2, 2)], dim=1)
    assert torch.equal(
        model.generate(then, 3, temperature=0, cache=cache),
        model.generate(then, 3, temperature=0, cache="none"),
    )
    handle.remove()
    assert seen == [1] * 8 + [1] * 3 + [3, 1, 1] + [9, 10, 11]


def test_a_seed_repeats_the_text_and_leaves_the_global_generator_alone(model):
    ids = prompt(1, 4)
    before = torch.get_rng_state()
    first = model.generate(ids, 8, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.generate(ids, 8, seed=5), first)
    assert not torch.equal(model.generate(ids, 8, seed=6), first)


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
    model.generate(prompt(1, 4), 3, cache="none")
    if model.config.position == "rope":
        model.generate(prompt(1, 40), 3)  # a long prompt goes through a rolling cache whole
    handle.remove()
    assert seen[:8] == [4, 1, 1, 1, 1, 4, 5, 6] and seen[8:] in ([], [40, 1, 1])


def test_generation_keeps_training_mode_and_needs_no_gradient(model):
    model.train()
    ids = model.generate(prompt(1, 3), 3)
    assert model.training and not ids.requires_grad


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is hot"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"stop_ids": [23]}, "stop_ids has 23"),
        ({"stop_ids": [-1]}, "stop_ids has -1"),
        ({"sequences": [0, 1]}, "sequences must be 1 whole numbers"),
        ({"sequences": [-1]}, "sequences must be 1 whole numbers"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"cache": "rollin"}, "cache is 'rollin'.*did you mean rolling"),
        ({"cache": True}, "cache is True"),
        ({"cache": "full", "window": 4}, "window is for a cache that rolls, and cache=full"),
        ({"cache": "none", "sink_tokens": 4}, "sink_tokens is for a cache that rolls"),
        ({"cache": "rolling", "window": 13}, "window is 13, but must be in 1 … 12"),
        ({"window": 0}, "window is 0"),
        ({"cache": "rolling", "window": 4, "sink_tokens": 4}, "sink_tokens is 4"),
        ({"cache": "rolling", "sink_tokens": -1}, "sink_tokens is -1"),
    ],
)
def test_impossible_options(model, options, expected):
    with pytest.raises(UserError, match=expected):
        model.generate(prompt(1, 2), **{"max_new_tokens": 1, **options})


def test_a_full_cache_ends_at_the_block(model):
    with pytest.raises(UserError, match="13 tokens, .* end"):
        model.generate(prompt(1, 2), 11, cache="full")


def test_a_cache_that_does_not_fit_is_named(model):
    ids = prompt(2, 4)

    def of(batch=2, tokens=0, capacity=12, **changes) -> KVCache:
        cache = KVCache.full(GPTConfig(**{**vars(model.config), **changes}), batch, capacity)
        cache.begin(tokens)
        cache.advance()
        return cache

    for cache, options, expected in (
        (of(n_layer=3), {}, "another model: its n_layer is 3, not 2"),
        (of(rope_base=5.0), {}, "its rope_base is 5.0"),
        (
            of(batch=1),
            {},
            r"sequences of \[0\] tokens; for 2 prompts there must be 2, all of one length",
        ),
        (of(tokens=4), {}, "holds 4 tokens, but a prompt has 4: .* at least 1 new one"),
        (of(capacity=6), {}, "7 tokens, .* the cache ends at 6"),
        (of(), {"window": 5}, "those of the cache given"),
    ):
        with pytest.raises(UserError, match=expected):
            stream(model, ids, 3, cache=cache, **options)
    uneven = of(batch=2)
    uneven.begin(2, [1, 2])
    uneven.advance()
    with pytest.raises(UserError, match=r"\[1, 2\] tokens"):
        stream(model, ids, 3, cache=uneven)
    if model.config.position != "rope":
        with pytest.raises(UserError, match="positions end at 12.*cache=none"):
            stream(model, ids, 9, cache=KVCache.rolling(model.config, 2))


# ---------------------------------------------------------------- without end


def endless(block_size: int, n_layer: int, n_embd: int) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size, 31, n_layer=n_layer, n_head=4, n_embd=n_embd)).eval()


def test_storage_is_the_same_after_many_blocks():
    model = endless(16, 1, 32)
    cache = KVCache.for_model(model, 1, "auto")
    layer = cache.layers[0]
    before = [(x.data_ptr(), x.nbytes) for x in (layer.keys, layer.values, cache.device_lengths)]
    for number, _ in enumerate(stream(model, prompt(1, 1), 500, cache=cache)):
        assert cache.length == number + 1
    layer = cache.layers[0]
    after = [(x.data_ptr(), x.nbytes) for x in (layer.keys, layer.values, cache.device_lengths)]
    assert after == before and layer.capacity == 16 + 15


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_five_thousand_tokens_run_flat_in_memory_and_time(cache):
    """What the keys and values of 4,000 tokens would take is 31 MiB (int8: 8)."""
    if not (statm := Path("/proc/self/statm")).exists():
        pytest.skip("no /proc to measure resident memory with")
    model = endless(256, 4, 256)
    resident, seconds = {}, []
    tokens = stream(model, prompt(1, 1), 5000, seed=1, cache=cache)
    for number in range(1, 5001):
        started = time.perf_counter()
        next(tokens)
        seconds.append(time.perf_counter() - started)
        if number in (1000, 5000):
            resident[number] = int(statm.read_text().split()[1]) * 4096
    assert resident[5000] - resident[1000] < 2 << 20
    assert median(seconds[4000:]) < 1.5 * median(seconds[1000:2000])


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

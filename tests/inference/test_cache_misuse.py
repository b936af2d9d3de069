"""Caches in circumstances that nobody planned for: other models, old contents, autocast, compilation."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from almostgpt import GPT, GPTConfig
from almostgpt.errors import UserError
from almostgpt.inference.cache import KVCache

SIZES = {
    "block_size": 48,
    "vocab_size": 31,
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 32,
}


def model_of(**config) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SIZES, **config})).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def model() -> GPT:
    return model_of()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["auto", "int8", "rolling"])
@pytest.mark.parametrize(
    "options, says",
    [
        ({"window": 49}, "window is 49, but must be in 1 … 48"),
        ({"window": 10_000}, "window is 10000"),
        ({"window": 0}, "window is 0"),
        ({"window": "abc"}, "window is 'abc'"),
        ({"window": 8.0}, "window is 8.0"),
        ({"sink_tokens": -1}, "sink_tokens is -1"),
        ({"sink_tokens": 48}, "sink_tokens is 48, but must be in 0 … 47"),
        ({"window": 4, "sink_tokens": 4}, "sink_tokens is 4, but must be in 0 … 3"),
        ({"sink_tokens": True}, "sink_tokens is True"),
    ],
    ids=str,
)
@pytest.mark.parametrize("new", [3, 200])  # whether the text fits or not
def test_a_window_that_cannot_be_is_named_whatever_the_length(model, kind, options, says, new):
    with pytest.raises(UserError, match=says):
        model.generate(tokens(1, 5), new, cache=kind, **options)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda config: KVCache.full(config, -1), "batch is -1"),
        (lambda config: KVCache.full(config, 1, 0), "capacity is 0"),
        (lambda config: KVCache.full(config, 1, 2.5), "capacity is 2.5"),
        (lambda config: KVCache.full(config, 1, dtype=torch.int32), "dtype is torch.int32"),
        (lambda config: KVCache.rolling(config, 1, "8"), "window is '8'"),
    ],
)
def test_a_cache_that_cannot_be(model, make, says):
    with pytest.raises(UserError, match=says):
        make(model.config)


@pytest.mark.parametrize("new_lengths", [3, [2.7], ["a"], [6], [-1], [1, 1], object()])
def test_new_lengths_are_whole_numbers_of_tokens(model, new_lengths):
    with torch.no_grad(), pytest.raises(UserError, match="new_lengths must be 1 whole numbers"):
        model(tokens(1, 5), new_lengths=new_lengths)


@pytest.mark.parametrize(
    "other, says",
    [
        ({"n_layer": 3}, "its n_layer is 3, not 2"),
        ({"rope_base": 500.0}, "its rope_base is 500.0"),
        ({"position": "learned"}, "its position is learned, not rope"),
        ({"n_kv_head": 4}, "its n_kv_head is 4"),
        ({"head_dim": 16}, "its head_dim is 16"),
    ],
)
def test_the_cache_of_another_model_is_refused(model, other, says):
    cache = KVCache.full(GPTConfig(**{**SIZES, **other}), 1)
    with torch.no_grad(), pytest.raises(UserError, match=f"another model: {says}"):
        model(tokens(1, 3), cache=cache)
    assert cache.length == 0


def test_learned_positions_end_in_a_rolling_cache_too():
    model = model_of(position="learned")
    cache = KVCache.rolling(model.config, 1, 16)
    with pytest.raises(UserError, match="learned positions end at 48.*cache=none"):
        model.generate(tokens(1, 5), 60, cache=cache)


@pytest.mark.parametrize("new_lengths", [[5, 40], [0, 40], [33, 34]], ids=str)
def test_what_was_there_before_a_reset_does_not_show(model, new_lengths):
    """Not even where padding leaves old slots between the rows of a long prompt."""
    ids, cache = tokens(2, 40), KVCache.full(model.config, 2)
    with torch.no_grad():
        fresh = model(ids, cache=KVCache.full(model.config, 2), new_lengths=new_lengths)[0]
        for layer in cache.layers:
            layer.keys.fill_(math.nan), layer.values.fill_(math.inf)
        cache.reset()
        assert torch.equal(model(ids, cache=cache, new_lengths=new_lengths)[0], fresh)


@pytest.mark.parametrize("kind", ["auto", "full", "rolling", "int8"])
def test_under_autocast_keys_are_stored_in_its_dtype(model, kind):
    ids = tokens(2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        text = model.generate(ids, 20, temperature=0, cache=kind)
        cache = KVCache.for_model(model, 2, kind, 40)
        with torch.no_grad():
            logits = model(ids, cache=cache, all_logits=True)[0]
            steps = [model(text[:, i : i + 1], cache=cache)[0] for i in range(20, 25)]
    assert cache.layers[0].keys.dtype == (torch.int8 if kind == "int8" else torch.bfloat16)
    with torch.no_grad():
        exact = model(text[:, :25], all_logits=True)[0]
    got = torch.cat([logits, *steps], dim=1).float()
    assert (got - exact).abs().max() < 0.05 * exact.abs().max()


def test_under_autocast_a_cache_of_float32_stays_one(model):
    ids, cache = tokens(1, 20), KVCache.full(model.config, 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids, cache=cache)
        logits = model(ids[:, :1], cache=cache)[0]
    assert cache.layers[0].keys.dtype == torch.float32 and logits.isfinite().all()


@pytest.mark.parametrize("kind", ["full", "rolling"])
def test_a_compiled_model_is_compiled_for_few_lengths_and_not_for_every_one(model, kind):
    torch._dynamo.reset()
    make = {
        "full": KVCache.full,
        "rolling": lambda config, batch: KVCache.rolling(config, batch, 8),
    }
    ids, counter = tokens(1, 14), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        plain, cache = (make[kind](model.config, 1) for _ in range(2))
        for i in range(14):
            new = ids[:, i : i + 1]
            expected = model(new, cache=plain)[0]
            torch.testing.assert_close(compiled(new, cache=cache)[0], expected)
            if i == 4:
                so_far = counter.frame_count
    assert counter.frame_count == so_far <= 4 and cache.lengths == plain.lengths == (14,)
    torch._dynamo.reset()


def test_made_in_inference_mode_used_outside_of_it(model):
    with torch.inference_mode():
        cache = KVCache.full(model.config, 1)
        model(tokens(1, 3), cache=cache)
    with torch.no_grad():
        model(tokens(1, 2), cache=cache)
    assert cache.length == 5

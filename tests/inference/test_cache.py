"""Caches of every kind against a forward without one, written here in float64."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from almostgpt import GPT, GPTConfig, kernels
from almostgpt.errors import UserError
from almostgpt.inference.cache import KVCache

WINDOW, CAPACITY, BLOCK = 20, 70, 24
VARIANTS = {
    "full": {},
    "rolling": {"window": WINDOW, "sinks": 0},
    "sinks": {"window": WINDOW, "sinks": 3},
    "nearly all sinks": {"window": WINDOW, "sinks": WINDOW - 1},
    "int8": {"int8": True},
    "int8 rolling": {"int8": True, "window": WINDOW, "sinks": 0},
    "int8 sinks": {"int8": True, "window": WINDOW, "sinks": 3},
}
EXACT = {"rtol": 1e-10, "atol": 1e-10}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
any_variant = st.sampled_from(sorted(VARIANTS))


@functools.cache
def make(position: str = "rope", n_layer: int = 2, dtype=torch.float64, **sizes) -> GPT:
    """Heads 10 wide: neither a slot's width nor a power of 2."""
    torch.manual_seed(n_layer)
    sizes = {"n_head": 4, "n_kv_head": 2, "head_dim": 10, "n_embd": 24, **sizes}
    config = GPTConfig(block_size=BLOCK, vocab_size=31, n_layer=n_layer, position=position, **sizes)
    model = GPT(config)
    for parameter in model.parameters():  # away from the initialisation, where much is nearly zero
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def made(model: GPT, batch: int, variant: str, capacity: int = CAPACITY) -> KVCache:
    options = dict(VARIANTS[variant])
    window, sinks = options.pop("window", None), options.pop("sinks", None)
    options["dtype"] = model.token_embedding.weight.dtype
    if window is None:
        return KVCache.full(model.config, batch, capacity, **options)
    return KVCache.rolling(model.config, batch, window, sinks, **options)


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def fed(model: GPT, cache: KVCache, *pieces: torch.Tensor) -> torch.Tensor:
    """The logits of all tokens, fed piece by piece."""
    return torch.cat([model(ids, cache=cache, all_logits=True)[0] for ids in pieces], dim=1)


# ---------------------------------------------------------------- the truth


def turned(x: torch.Tensor, positions: torch.Tensor, frequencies, table: torch.dtype):
    """x (B, H, T, D) in pairs (i, i + D/2), as complex numbers, by the angles of positions (T,)."""
    half = x.shape[-1] // 2
    angles = positions[:, None].double() * frequencies
    turn = torch.complex(angles.cos().to(table).double(), angles.sin().to(table).double())
    y = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([y.real, y.imag], dim=-1)


def rotary_scores(q, k, window: int, sinks: int, frequencies, stored, table=torch.float32):
    """(B, H, T, T), by positions: of a query there are two, one for the sinks."""
    t = torch.arange(q.shape[2])
    k = stored(turned(k, t, frequencies, table))
    for_sinks = turned(q, t.clamp(max=window - 1), frequencies, table) @ k.mT
    return torch.where(t < sinks, for_sinks, turned(q, t, frequencies, table) @ k.mT)


def rotary_scores_by_distance(q, k, window: int, sinks: int, frequencies):
    """The same by what it is meant to be: t − p, and min(t, W − 1) − i of a sink i."""
    T = q.shape[2]
    scores = torch.empty(*q.shape[:3], T, dtype=q.dtype)
    for t, p in itertools.product(range(T), range(T)):
        distance = torch.tensor([(min(t, window - 1) if p < sinks else t) - p])
        query = turned(q[:, :, t : t + 1], distance, frequencies, torch.float64)
        scores[:, :, t, p] = (query[:, :, 0] * k[:, :, p]).sum(-1)
    return scores


def quantised(x: torch.Tensor) -> torch.Tensor:
    """What an int8 cache makes of x: a scale in float32 for each token and head."""
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return (torch.round(x.float() / scale) * scale).double()


def frequencies_of(config: GPTConfig) -> torch.Tensor:
    pairs = torch.arange(config.head_dim // 2, dtype=torch.float64)
    return config.rope_base ** (-2 * pairs / config.head_dim)


@torch.no_grad()
def truth(model: GPT, ids: torch.Tensor, variant: str = "full", **options) -> torch.Tensor:
    """Logits (B, T, V) without a cache: all tokens at once, under a mask of who sees whom."""
    c = model.config
    options = {**VARIANTS[variant], **options}
    (B, T), sinks = ids.shape, options.get("sinks", 0)
    window = options.get("window", T)
    stored = quantised if options.get("int8") else lambda x: x
    t, p = torch.arange(T)[:, None], torch.arange(T)
    sees = (p <= t) & ((p < sinks) | (p > t - (window - sinks)))
    x, residual = model.token_embedding(ids), None
    if c.position == "learned":
        x = x + model.position.weight[:T]
    for block in model.blocks:
        x, residual = block.attention_norm(x, residual)
        heads = block.attention.qkv(x).view(B, T, -1, c.head_dim).transpose(1, 2)
        q, k, v = heads.split([c.n_head, c.n_kv_head, c.n_kv_head], dim=1)
        k, v = (x.repeat_interleave(c.n_head // c.n_kv_head, 1) for x in (k, v))
        if c.position == "rope":
            scores = rotary_scores(q, k, window, sinks, frequencies_of(c), stored)
        else:
            scores = q @ stored(k).mT
        weights = (scores * c.head_dim**-0.5).masked_fill(~sees, -torch.inf).softmax(-1)
        x = block.attention.out((weights @ stored(v)).transpose(1, 2).flatten(2))
        x, residual = block.feedforward_norm(x, residual)
        x, _ = block.feedforward(x)
    return model.norm(x, residual)[0] @ model.output_weight.T[:, : c.vocab_size]


def test_the_truth_is_about_distances():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 30, 10, dtype=torch.float64, generator=generator) for _ in "qk")
    frequencies = frequencies_of(make().config)
    ours = rotary_scores(q, k, 8, 3, frequencies, lambda x: x, torch.float64)
    torch.testing.assert_close(ours, rotary_scores_by_distance(q, k, 8, 3, frequencies), **EXACT)


# ---------------------------------------------------------------- logits


@every_variant
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_within_the_window_a_cache_changes_nothing(variant, position):
    model, ids = make(position), random_ids(2, WINDOW)
    with torch.no_grad():
        uncached, _ = model(ids, all_logits=True)
    torch.testing.assert_close(truth(model, ids), uncached, **EXACT)
    expected = truth(model, ids, variant) if "int8" in variant else uncached
    for pieces in ([WINDOW], [1] * WINDOW, [7, 1, 12]):
        cache = made(model, 2, variant)
        ours = fed(model, cache, *ids.split(pieces, dim=1))
        torch.testing.assert_close(ours, expected, **EXACT)
        assert cache.length == WINDOW and cache.lengths == (WINDOW, WINDOW)
        assert cache.device_lengths.tolist() == [WINDOW, WINDOW]


@settings(max_examples=40, deadline=None)
@given(any_variant, st.sampled_from([1, 2]), st.lists(st.integers(1, 45), min_size=1, max_size=6))
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_however_the_tokens_are_cut_the_logits_are_the_truth(position, variant, n_layer, pieces):
    """Also past the window, and more than 16 at once there."""
    model = make(position, n_layer)
    most = CAPACITY if position == "rope" else BLOCK
    pieces = [
        n for n, total in zip(pieces, itertools.accumulate(pieces), strict=True) if total <= most
    ]
    ids = random_ids(1, sum(pieces), seed=len(pieces))
    if pieces:
        ours = fed(model, made(model, 1, variant), *ids.split(pieces, dim=1))
        torch.testing.assert_close(ours, truth(model, ids, variant), **EXACT)


@every_variant
def test_past_the_window_whole_and_one_by_one(variant):
    model, ids = make(), random_ids(1, CAPACITY)
    expected = truth(model, ids, variant)
    for pieces in ([CAPACITY], [1] * CAPACITY, [WINDOW, CAPACITY - WINDOW], [3, 2 * WINDOW, 27]):
        ours = fed(model, made(model, 1, variant), *ids.split(pieces, dim=1))
        torch.testing.assert_close(ours, expected, **EXACT)


def test_far_past_the_window():
    model, ids = make(n_layer=1), random_ids(1, 600)
    ours = fed(model, made(model, 1, "sinks"), *ids.split([500] + [1] * 100, dim=1))
    torch.testing.assert_close(ours, truth(model, ids, "sinks"), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pieces", [[WINDOW], [5] + [1] * (WINDOW - 5), [2, 10, 8]])
def test_a_window_that_holds_everything_is_bit_equal_to_full(dtype, pieces):
    model, ids = make(dtype=dtype), random_ids(2, WINDOW).split(pieces, dim=1)
    full = fed(model, made(model, 2, "full"), *ids)
    assert full.dtype == dtype
    assert torch.equal(fed(model, made(model, 2, "rolling"), *ids), full)
    assert torch.equal(fed(model, made(model, 2, "sinks"), *ids), full)
    eight_bit = fed(model, made(model, 2, "int8"), *ids)
    assert torch.equal(fed(model, made(model, 2, "int8 sinks"), *ids), eight_bit)


@every_variant
def test_a_batch_is_its_sequences_one_by_one(variant):
    model, ids = make(), random_ids(3, 50)
    pieces = [30, 1, 1, 18]
    together = fed(model, made(model, 3, variant), *ids.split(pieces, dim=1))
    for row in range(3):
        alone = ids[row : row + 1].split(pieces, dim=1)
        torch.testing.assert_close(
            together[row : row + 1], fed(model, made(model, 1, variant), *alone), **EXACT
        )


steps = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(0, 40), min_size=3, max_size=3)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40, deadline=None)
@given(any_variant, steps, st.booleans())
def test_sequences_of_different_lengths_are_each_alone(variant, steps, tight):
    """Right-padded, and then on from wherever each of them is; a full one to its very last slot."""
    model, texts = make(), random_ids(3, 200)
    new = [[min(n, T) for n in lengths] for T, lengths in steps]
    totals = [sum(column) for column in zip(*new, strict=True)]
    slots = max(1, max(totals)) if tight else 200
    cache = made(model, 3, variant, slots)
    had = [0, 0, 0]
    expected = [
        truth(model, texts[i : i + 1, :n], variant) if n else None for i, n in enumerate(totals)
    ]
    for (T, _), lengths in zip(steps, new, strict=True):
        ids = torch.full((3, T), 30)
        for row, n in enumerate(lengths):
            ids[row, :n] = texts[row, had[row] : had[row] + n]
        again = cache.fork(1)
        with torch.no_grad():
            logits, _ = model(ids, cache=cache, new_lengths=lengths, all_logits=True)
            last, _ = model(ids, cache=again, new_lengths=lengths)
        for row, n in enumerate(lengths):
            if n:
                these = expected[row][0, had[row] : had[row] + n]
                torch.testing.assert_close(logits[row, :n], these, **EXACT)
                torch.testing.assert_close(last[row, 0], these[-1], **EXACT)
            had[row] += n
        assert cache.lengths == again.lengths == tuple(had)
        assert cache.device_lengths.tolist() == had and cache.length == max(had)


@pytest.mark.parametrize("variant", ["full", "int8"])
@pytest.mark.parametrize("T, new", [(5, [5, 1]), (12, [3, 1]), (10, [10, 0]), (10, [2, 1])])
def test_padding_takes_no_room(variant, T, new):
    """11 slots, and sequences of 1 and 10 tokens: what fits is what is there, not what is padded."""
    model, ids = make(), random_ids(2, 12)
    cache = made(model, 2, variant, 11)
    text = random_ids(2, 10, seed=1)
    with torch.no_grad():
        model(text, cache=cache, new_lengths=[1, 10])
        logits, _ = model(ids[:, :T], cache=cache, new_lengths=new)
    for row, (had, n) in enumerate(zip([1, 10], new, strict=True)):
        if n:
            alone = torch.cat([text[row, :had], ids[row, :n]])[None]
            torch.testing.assert_close(logits[row], truth(model, alone, variant)[0, -1:], **EXACT)


def test_new_lengths_without_a_cache():
    model, ids = make(), random_ids(3, 9)
    with torch.no_grad():
        logits, _ = model(ids, new_lengths=[9, 4, 1])
        for row, n in enumerate([9, 4, 1]):
            torch.testing.assert_close(logits[row], model(ids[row : row + 1, :n])[0][0], **EXACT)


def test_padding_has_the_position_of_the_last_token():
    """A table of positions is not overrun, even where the padding goes beyond block_size."""
    model, ids = make("learned"), random_ids(2, BLOCK)
    cache = made(model, 2, "full")
    assert cache.begin(3).tolist() == [[0, 1, 2]] * 2
    assert cache.begin(3, [3, 0]).tolist() == [[0, 1, 2], [0, 0, 0]]
    with torch.no_grad():
        model(ids[:, :20], cache=cache, new_lengths=[20, 2])
        assert cache.begin(6, [4, 1]).tolist() == [[20, 21, 22, 23, 23, 23], [2] * 6]
        logits, _ = model(ids[:, -6:], cache=cache, new_lengths=[4, 1])
    text = torch.cat([ids[:1, :20], ids[:1, -6:-2]], dim=1)
    torch.testing.assert_close(logits[:1], truth(model, text)[:, -1:], **EXACT)


# ---------------------------------------------------------------- int8


@pytest.mark.parametrize("pieces", [[60], [1] * 60, [17, 1, 30, 12]])
def test_eight_bits_are_off_by_no_more_than_rounding_explains(pieces):
    """Of one attention, against exact storage. No element of a key or value is off by more than s / 2,

    s = max |x| / 127. So no score is off by more than ε = scale · ‖q‖₁ · s / 2, no weight by more than
    a factor within e^±2ε, and no output by more than (e^2ε − 1) · max |v| + s / 2.
    """
    generator = torch.Generator().manual_seed(len(pieces))
    model = make(n_layer=1)
    q, k, v = (
        torch.randn(2, heads, 60, 10, dtype=torch.float64, generator=generator)
        for heads in (4, 2, 2)
    )
    outputs = {}
    for variant in ("full", "int8", "sinks", "int8 sinks"):
        cache = made(model, 2, variant)
        out = []
        for piece in zip(*(x.split(pieces, dim=2) for x in (q, k, v)), strict=True):
            cache.begin(piece[0].shape[2])
            out.append(cache.extend(0, *piece))
            cache.advance()
        outputs[variant] = torch.cat(out, dim=2)
    t, frequencies = torch.arange(60), frequencies_of(model.config)
    key_error, value_error = (
        x.abs().amax() / 254 * (1 + 1e-6)  # scales and tables are float32
        for x in (turned(k, t, frequencies, torch.float64), v)
    )
    q_by_both = (turned(q, at, frequencies, torch.float64) for at in (t, t.clamp(max=WINDOW - 1)))
    length = torch.maximum(*(q.abs().sum(-1, keepdim=True) for q in q_by_both))
    bound = torch.expm1(2 * 10**-0.5 * length * key_error) * v.abs().amax() + value_error
    for exact, coded in (("full", "int8"), ("sinks", "int8 sinks")):
        error = outputs[coded] - outputs[exact]
        assert (error.abs() <= bound).all() and error.abs().max() > 0
        assert error.norm() <= 0.01 * outputs[exact].norm()  # what is true in practice


def test_bytes():
    """Of heads 64 wide: 8 bits and a scale against 32; and sinks, ring and 15 slots more."""
    config = GPTConfig(block_size=64, vocab_size=31, n_layer=3, n_head=2, n_embd=128)

    def size(cache: KVCache) -> int:
        tensors = itertools.chain(
            *((x.keys, x.values, x.key_scales, x.value_scales) for x in cache.layers)
        )
        return sum(x.nbytes for x in tensors if x is not None)

    token = 3 * 2 * 2 * 64 * 4
    assert size(KVCache.full(config, 5)) == 5 * 64 * token
    assert size(KVCache.full(config, 1, 10)) == 10 * token
    assert size(KVCache.rolling(config, 1, 32)) == (32 + 15) * token
    assert size(KVCache.full(config, 1, int8=True)) == 64 * (token // 4 + 3 * 2 * 2 * 4)
    assert size(KVCache.full(config, 1, dtype=torch.float16)) == 64 * token // 2


# ---------------------------------------------------------------- rotation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cached_and_uncached_rotate_by_the_same_bits_whatever_the_model_was_cast_to(dtype):
    config = GPTConfig(block_size=4000, vocab_size=31, n_layer=1, n_head=2, n_embd=32)
    model = GPT(config).to(dtype)
    assert model.position.cos.dtype == torch.float32
    assert torch.equal(model.position.cos, GPT(config).position.cos)
    k = torch.randn(1, 2, 4000, 16).to(dtype)
    cache = KVCache.full(config, 1, dtype=dtype)
    cache.begin(4000)
    queries = cache.append(0, k, k, k)
    expected = kernels.rope(k.transpose(1, 2), model.position.cos, model.position.sin).transpose(
        1, 2
    )
    assert torch.equal(cache.layers[0].keys, expected)
    assert torch.equal(queries.q, expected) and torch.equal(cache.layers[0].values, k)


def test_positions_are_as_exact_half_a_billion_tokens_on():
    """Scores depend on distances alone; in one layer a token depends on its window alone."""
    model, ids = make(n_layer=1), random_ids(1, 60)
    near, far = made(model, 1, "rolling"), made(model, 1, "rolling")
    far._lengths = [2**29]
    far.device_lengths.fill_(2**29)
    expected, ours = (fed(model, cache, ids)[:, WINDOW:] for cache in (near, far))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- reset, fork, failure


@every_variant
def test_reset_is_a_fresh_cache(variant):
    model, ids = make(), random_ids(2, 60)
    cache = made(model, 2, variant)
    fed(model, cache, random_ids(2, 50, seed=1))
    cache.reset()
    assert cache.length == 0 and cache.lengths == (0, 0) and cache.device_lengths.tolist() == [0, 0]
    pieces = ids.split([30, 1, 1, 28], dim=1)
    assert torch.equal(fed(model, cache, *pieces), fed(model, made(model, 2, variant), *pieces))


@every_variant
@pytest.mark.parametrize("prompt", [5, 40])
def test_a_fork_is_so_many_separate_runs(variant, prompt):
    model, ids, others = make(), random_ids(2, prompt), random_ids(6, 20, seed=1)
    cache = made(model, 2, variant)
    fed(model, cache, ids)
    fork = cache.fork(3)
    assert fork.lengths == (prompt,) * 6
    fed(model, cache, random_ids(2, 9, seed=2))  # the origin goes on by itself
    together = fed(model, fork, others[:, :1], others[:, 1:])
    for row in range(6):
        text = torch.cat([ids[row // 3], others[row]])[None]
        torch.testing.assert_close(
            together[row : row + 1], truth(model, text, variant)[:, prompt:], **EXACT
        )
    storage = [{x.data_ptr() for x in layer_tensors(c)} for c in (cache, fork, cache.fork(1))]
    assert not any(a & b for a, b in itertools.combinations(storage, 2))


def layer_tensors(cache: KVCache) -> list[torch.Tensor]:
    tensors = [vars(layer).values() for layer in cache.layers]
    return [x for x in itertools.chain(*tensors) if isinstance(x, torch.Tensor)]


class Stop(Exception):
    pass


def fail_once(model: GPT, cache: KVCache, ids: torch.Tensor) -> None:
    """A forward that ends in its last layer, when every layer has stored its tokens."""

    def stop(*_):
        raise Stop

    hook = model.blocks[-1].feedforward.register_forward_hook(stop)
    with pytest.raises(Stop), torch.no_grad():
        model(ids, cache=cache)
    hook.remove()


@every_variant
@pytest.mark.parametrize("before, failed", [(0, 40), (7, 5), (40, 16), (40, 1), (2, 21)])
def test_a_forward_that_fails_loses_nothing(variant, before, failed):
    model, ids = make(), random_ids(1, 60)
    cache = made(model, 1, variant)
    if before:
        fed(model, cache, ids[:, :before])
    fail_once(model, cache, random_ids(1, failed, seed=1))
    assert cache.length == before and cache.device_lengths.tolist() == [before]
    ours = fed(model, cache, ids[:, before : before + 9], ids[:, before + 9 :])
    torch.testing.assert_close(ours, truth(model, ids, variant)[:, before:], **EXACT)


@pytest.mark.parametrize("variant", ["rolling", "sinks", "int8 rolling"])
def test_a_failed_forward_that_overwrote_what_is_seen_says_so(variant):
    """More than 16 tokens past the window: nothing that is lost goes unnoticed."""
    model, ids = make(), random_ids(1, 60)
    cache = made(model, 1, variant)
    fed(model, cache, ids[:, :30])
    fail_once(model, cache, ids[:, 30 : 30 + 17])
    for spoiled in (cache, cache.fork(2)):
        assert spoiled.length == 30
        with pytest.raises(UserError, match="reset"):
            spoiled.begin(1)
    cache.reset()
    torch.testing.assert_close(fed(model, cache, ids), truth(model, ids, variant), **EXACT)


# ---------------------------------------------------------------- the right one for a model


@pytest.mark.parametrize(
    "position, options, window, sinks, slots",
    [
        ("rope", ("auto", 24), None, 0, 24),
        ("rope", ("auto", 10), None, 0, 10),
        ("rope", ("auto", 25), 24, 4, 24 + 15),
        ("rope", ("auto", None), 24, 4, 24 + 15),
        ("rope", ("auto", 10, 10), None, 0, 10),  # a window that holds all: the same, and no ring
        ("rope", ("auto", 11, 10), 10, 4, 10 + 15),
        ("rope", ("auto", 25, 3), 3, 2, 3 + 15),
        ("rope", ("auto", 25, 1), 1, 0, 1 + 15),
        ("rope", ("auto", 25, 9, 0), 9, 0, 9 + 15),
        ("rope", ("rolling", 5), 24, 4, 24 + 15),
        ("rope", ("full", 24), None, 0, 24),
        ("rope", ("full", None), None, 0, 24),
        ("learned", ("auto", None), None, 0, 24),
        ("learned", ("auto", 24, 10), 10, 4, 10 + 15),
        ("learned", ("auto", None, 10), 10, 4, 10 + 15),
        ("learned", ("rolling", None, 10, 2), 10, 2, 10 + 15),
        ("sinusoidal", ("full", 24), None, 0, 24),
    ],
)
def test_what_a_name_means(position, options, window, sinks, slots):
    model = make(position)
    kind, *rest = options
    for int8 in {False, kind == "auto"}:
        cache = KVCache.for_model(model, 2, "int8" if int8 else kind, *rest)
        layer = cache.layers[0]
        assert (layer.window, layer.sink_tokens, layer.capacity) == (window, sinks, slots)
        assert layer.keys.dtype == (torch.int8 if int8 else torch.float64)
        assert layer.keys.shape[:2] == (2, 2) and len(cache.layers) == 2
        assert (cache.turns is None) == (position != "rope")
        assert cache.end == (slots if window is None else 2**30)
    assert KVCache.for_model(model, 2, "none") is None


def test_layers_share_what_is_counted():
    cache = KVCache.rolling(make().config, 3)
    assert len({layer.lengths.data_ptr() for layer in cache.layers}) == 1
    assert len({layer.keys.data_ptr() for layer in cache.layers}) == 2
    assert KVCache.full(make().config, 0).length == 0


# ---------------------------------------------------------------- what cannot be


CONFIG = GPTConfig(block_size=BLOCK, vocab_size=31, n_layer=2, n_head=2, n_embd=32)


@pytest.mark.parametrize(
    "make_it, expected",
    [
        (lambda: KVCache.full(CONFIG, 1, 0), "capacity is 0"),
        (lambda: KVCache.full(CONFIG, 1, 2.5), "capacity is 2.5"),
        (lambda: KVCache.rolling(CONFIG, 1, 25), r"window is 25, but must be in 1 … 24"),
        (lambda: KVCache.rolling(CONFIG, 1, 0), "window is 0"),
        (lambda: KVCache.rolling(CONFIG, 1, 4), r"sink_tokens is 4, but must be in 0 … 3"),
        (lambda: KVCache.rolling(CONFIG, 1, 4, -1), "sink_tokens is -1"),
        (lambda: KVCache.full(CONFIG, 1).fork(0), "at least 1 of each"),
        (lambda: KVCache.for_model(make(), 1, "ful"), "did you mean full"),
        (lambda: KVCache.for_model(make(), 1, "full", 9, 4), "window is for a cache that rolls"),
        (lambda: KVCache.for_model(make(), 1, "none", None, None, 4), "sink_tokens is for"),
        (lambda: KVCache.for_model(make(), 1, "full", 25), "25 tokens.*cache=rolling goes on"),
        (
            lambda: KVCache.for_model(make("learned"), 1, "auto", 25),
            "25 tokens, .*learned positions end at 24.*cache=none",
        ),
        (lambda: KVCache.for_model(make("sinusoidal"), 1, "rolling", 25), "sinusoidal positions"),
    ],
)  # fmt: skip
def test_caches_that_cannot_be(make_it, expected):
    with pytest.raises(UserError, match=expected):
        make_it()


def test_a_cache_ends_where_it_ends():
    ids = random_ids(2, 30)
    for model, cache, expected in (
        (make(), made(make(), 2, "full", 12), "3 tokens after 10 cached ones .* the 12 that"),
        (make("learned"), made(make("learned"), 2, "full", 12), "3 tokens after 10 .* the 12 that"),
    ):
        fed(model, cache, ids[:, :10])
        with pytest.raises(UserError, match=expected):
            fed(model, cache, ids[:, 10:13])
        with pytest.raises(UserError, match=expected):
            cache.begin(3, [1, 3])
        fed(model, cache, ids[:, 10:12])  # nothing is lost
        assert cache.length == 12
    for variant in ("full", "rolling"):
        cache = made(make("learned"), 2, variant)
        fed(make("learned"), cache, ids[:, :20])
        with pytest.raises(UserError, match="5 tokens after 20 .* block_size of 24, where learned"):
            fed(make("learned"), cache, ids[:, 20:25])
        assert cache.length == 20
    cache = KVCache.rolling(CONFIG, 1)
    cache._lengths = [2**30]
    with pytest.raises(UserError, match="can count"):
        cache.begin(1)


@torch.no_grad()
def test_bad_calls_are_named():
    model, ids = make(), random_ids(2, 4)
    cache = made(model, 2, "full")
    with pytest.raises(UserError, match="the cache is of 2 sequences, but ids of 1"):
        model(ids[:1], cache=cache)
    for lengths in ([4], [4, 5], [-1, 2]):
        with pytest.raises(UserError, match=r"new_lengths must be 2 whole numbers"):
            model(ids, cache=cache, new_lengths=lengths)
        with pytest.raises(UserError, match=r"new_lengths must be 2 whole numbers"):
            model(ids, new_lengths=lengths)
    with pytest.raises(UserError, match="cu_seqlens cannot be used with new_lengths"):
        model(ids, cu_seqlens=torch.tensor([0, 4, 8], dtype=torch.int32), new_lengths=[4, 4])
    x = torch.zeros(2, 4, 4, 10, dtype=torch.float64)
    with pytest.raises(UserError, match=r"begin\(\) said 0"):
        cache.extend(0, x, x[:, :2], x[:, :2])
    cache.begin(3)
    with pytest.raises(UserError, match=r"begin\(\) said 3"):
        cache.append(0, x, x[:, :2], x[:, :2])
    cache.begin(4)
    with pytest.raises(UserError, match="layer 2 of a cache of 2"):
        cache.extend(2, x, x[:, :2], x[:, :2])
    with pytest.raises(UserError, match="another model: its n_layer is 1, not 2"):
        model(ids, cache=made(make(n_layer=1), 2, "full"))
    with pytest.raises(UserError, match="q is torch.float64, but the cache stores torch.float32"):
        model(ids, cache=KVCache.full(model.config, 2))
    assert cache.length == 0
    with torch.enable_grad(), pytest.raises(UserError, match=r"torch.no_grad\(\)"):
        model(ids, cache=cache)


def test_append_and_attend_are_extend():
    model = make(n_layer=1)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, 5, 10, dtype=torch.float64, generator=generator)
        for heads in (4, 2, 2)
    )
    for variant in VARIANTS:
        one, other = made(model, 1, variant), made(model, 1, variant)
        for _ in range(9):
            one.begin(5)
            other.begin(5)
            y = one.attend(0, one.append(0, q, k, v))
            assert torch.equal(y, other.extend(0, q, k, v))
            one.advance()
            other.advance()

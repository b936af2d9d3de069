"""Our attention in transformers' models: what theirs computes, whatever the mask; and on the kernel."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers import masking_utils as theirs
from transformers_models import FAMILIES, ids, logits_and_gradients, make, padded, with_attention

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.integrations import transformers as integration
from almostgpt.integrations.transformers_attention import Sees
from almostgpt.integrations.transformers_mask import mask
from almostgpt.kernels import emulator

OURS = integration.register()
T = 17
MASKS = {
    "whole": None,
    "ones": padded(T),
    "left": padded(T, left=(6, 0, 2)),
    "right": padded(T, right=(6, 0, 2)),
    "both": padded(T, left=(3, 0, 2), right=(1, 4, 0)),
}
PACKED = torch.tensor([[*range(4), *range(9), *range(4)], [*range(T)], [*range(16), 0]])
needs_emulator = pytest.mark.skipif(
    emulator.refuse() is not None, reason=f"no emulator: {emulator.refuse()}"
)


def assert_same(model, run, other="eager", **tolerance):
    expected = with_attention(model, other, run)
    with integration.observe() as observed:
        found = with_attention(model, OURS, run)
    torch.testing.assert_close(found, expected, **tolerance)
    return observed


# --- logits and gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [*MASKS, "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients(family, padding):
    inputs, real = {"use_cache": False}, None
    if padding == "packed":
        inputs["position_ids"] = PACKED
    elif (real := MASKS[padding]) is not None:
        inputs["attention_mask"] = real
    observed = assert_same(
        make(family),
        lambda model: logits_and_gradients(model, ids(3, T), real, **inputs),
        atol=2e-4,  # the gradients are sums of some thousand terms of size 1
        rtol=1e-4,
    )
    assert observed == {"flash_attention: reference": 2}


def test_the_padding_is_seen_where_only_the_attention_is_registered(monkeypatch):
    """What the tests above would show: without a mask of that name transformers gives none."""
    model, real = make("llama"), MASKS["left"]
    run = lambda model: model(ids(3, T), attention_mask=real).logits[real.bool()]  # noqa: E731
    assert_same(model, run)
    found = with_attention(model, OURS, run)
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, OURS)
    assert (with_attention(model, OURS, run) - found).abs().max() > 0.1


def test_gradient_checkpointing():
    model, real = make("mistral").train(), MASKS["left"]
    model.activation_checkpointing_enable()
    assert_same(
        model,
        lambda model: logits_and_gradients(model, ids(3, T), real, attention_mask=real),
        atol=2e-4,
        rtol=1e-4,
    )


@needs_emulator
@pytest.mark.parametrize("padding", ["whole", "left"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_in_the_emulator(family, padding):
    """bfloat16, the kernels of a card, forward and backward: about as far from float32 as theirs."""
    real = MASKS[padding]
    inputs = {} if real is None else {"attention_mask": real}

    def run(model):
        logits, gradients = logits_and_gradients(model, ids(3, T), real, use_cache=False, **inputs)
        return [logits, *gradients.values()]

    model = make(family, num_hidden_layers=1).bfloat16()
    exact = make(family, num_hidden_layers=1)
    exact.load_state_dict(model.state_dict())  # the same rounded weights, in float32
    truth = with_attention(exact, "eager", run)
    plain = with_attention(model, "eager", run)
    integration.patch(model)
    with (
        kernels.use_backend("emulator", ops=["flash_attention", "rms_norm"]),
        integration.observe() as observed,
    ):
        found = with_attention(model, OURS, run)
    assert observed == {"flash_attention: emulator": 1}
    for expected, theirs_, ours in zip(truth, plain, found, strict=True):
        bound = 2 * (theirs_ - expected).norm() + 1e-3 * expected.norm()
        assert (ours - expected).norm() <= bound


@needs_emulator
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_decoding_in_the_emulator(family):
    """A prompt in parts and one token at a time, behind a cache of transformers."""

    def run(model):
        cache = DynamicCache(config=model.config)
        parts = ids(2, T).split([6, 9, 1, 1], 1)
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)

    model = make(family).bfloat16()
    exact = make(family)
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        truth = with_attention(exact, "eager", run)
        plain = with_attention(model, "eager", run)
        with kernels.use_backend("emulator", ops=["flash_attention"]):
            found = with_attention(model, OURS, run)
    assert (found - truth).norm() <= 1.5 * (plain - truth).norm()


def test_autocast():
    model = make("qwen3")

    def run(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids(2, T)).logits

    assert_same(model, run, other="sdpa", atol=0.1, rtol=0.02)
    assert with_attention(model, OURS, run).dtype == torch.bfloat16


# --- generation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padding", ["whole", "left"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_greedy_generation(family, padding, cache):
    real = padded(T) if MASKS[padding] is None else MASKS[padding]
    options = {"do_sample": False, "max_new_tokens": 12, "cache_implementation": cache}

    def run(model):
        return model.generate(ids(3, T), attention_mask=real, **options)

    model = make(family)
    observed = assert_same(model, run, "sdpa")
    assert len(run(model)[:, T:].unique()) > 5
    # The prefill always; decoding, where a cache holds what is there and no padding.
    plain = cache is None and (padding == "whole" or family == "mistral")
    assert observed["flash_attention: reference"] == (24 if plain else 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("static", [False, True])
def test_a_prompt_in_parts(family, static):
    """Tq < Tk, behind a cache; a static one is longer than what it holds."""

    def run(model):
        if static:
            cache = StaticCache(config=model.config, max_cache_len=T + 8)
        else:
            cache = DynamicCache(config=model.config)
        found = [
            model(part, past_key_values=cache).logits for part in ids(2, T).split([6, 7, 1, 3], 1)
        ]
        return torch.cat(found, dim=1)

    model = make(family)
    observed = assert_same(model, run, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run(model), model(ids(2, T)).logits, atol=1e-4, rtol=1e-4)
    if not static:
        assert observed == {"flash_attention: reference": 8}


# --- what other models ask for ----------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["whole", "left"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Gemma2", {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8, "head_dim": 8}),
        ("GptOss", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),
    ],
)
def test_softcap_and_sinks(family, changes, padding):
    """On the op, and behind padding in a cache by the maths as it is written."""
    model, real = make(family, sliding_window=5, **changes), MASKS[padding]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.copy_(torch.linspace(-1, 2, 4))

    def run(model):
        logits = logits_and_gradients(model, ids(3, T), real, attention_mask=real)[0]
        whole = padded(T) if real is None else real
        options = {"do_sample": False, "max_new_tokens": 4}
        return logits, model.generate(ids(3, T), attention_mask=whole, **options)

    observed = assert_same(model, run, atol=1e-4, rtol=1e-4)
    assert any(key.startswith("sdpa") for key in observed) == (padding == "left")


def test_the_window_is_of_the_mask():
    """Qwen2-MoE gives its attention no ``sliding_window``."""
    model = make(
        "Qwen2Moe",
        sliding_window=5,
        use_sliding_window=True,
        layer_types=["sliding_attention", "full_attention"],
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    observed = assert_same(model, lambda model: model(ids(2, T)).logits, atol=1e-4, rtol=1e-4)
    assert observed == {"flash_attention: reference": 2}


@pytest.mark.parametrize("real", [None, MASKS["both"]])
def test_bidirectional(real):
    model = make("llama", is_causal=False)
    run = lambda model: model(ids(3, T), attention_mask=real).logits  # noqa: E731
    observed = assert_same(model, run, atol=1e-4, rtol=1e-4)
    assert observed["flash_attention: reference"] == (2 if real is None else 0)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_sequences_from_their_lengths(family):
    """``cu_seq_lens_q``, as DataCollatorWithFlattening gives them: also where nothing else tells."""
    borders = torch.tensor([0, 5, T], dtype=torch.int32)
    positions = torch.tensor([[*range(5), *range(T - 5)]])
    model = make(family)
    inputs = {"position_ids": positions, "cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
    found = with_attention(model, OURS, lambda model: model(ids(1, T), **inputs).logits)
    parts = ids(1, T).split([5, T - 5], dim=1)
    model.set_attn_implementation("eager")
    alone = torch.cat([model(part).logits for part in parts], dim=1)
    torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


def test_what_falls_back():
    model = make("llama", attention_dropout=0.3).train()

    def dropped(model):
        torch.manual_seed(3)
        return model(ids(3, T), attention_mask=MASKS["left"]).logits[MASKS["left"].bool()]

    observed = assert_same(model, dropped, "sdpa")
    assert observed == {"sdpa: dropout of the probabilities": 2}


BLOCKS = torch.block_diag(torch.ones(5, 5), torch.ones(12, 12)).bool()[None, None]
HOLE = torch.ones(1, T, dtype=torch.long)
HOLE[:, 5:9] = 0


@pytest.mark.parametrize("given_mask", [BLOCKS, torch.where(BLOCKS, 0.0, -1e4), HOLE])
def test_a_mask_of_its_own(given_mask):
    run = lambda model: model(ids(1, T), attention_mask=given_mask).logits[:, 9:]  # noqa: E731
    (why,) = assert_same(make("llama"), run, "sdpa")
    assert why == "sdpa: a mask that is neither causal, a window, nor sequences end to end"


@pytest.mark.parametrize("dropout", [0.0, 1e-9])  # on the op, and beside it
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("queries", [1, 4, 6])
def test_without_a_mask(queries, window, causal, options, dropout):
    """Bottom-right, with the layer's window, as transformers' flash attention takes it."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, queries, 8, generator=generator)
    k, v = (torch.randn(2, 2, 6, 8, generator=generator) for _ in range(2))
    layer = SimpleNamespace(is_causal=causal, num_key_value_groups=2)
    out, _ = AttentionInterface._global_mapping[OURS](
        *(layer, q, k, v, None), sliding_window=window, dropout=dropout, scaling=0.7, **options
    )
    distance = torch.arange(6) - (torch.arange(queries)[:, None] + 6 - queries)
    unseen = torch.zeros(queries, 6, dtype=torch.bool)
    if causal:
        unseen |= distance > 0
    if window is not None:
        unseen |= distance.abs() >= window
    scores = q @ k.repeat_interleave(2, 1).mT * 0.7
    if options:
        scores = 2.0 * torch.tanh(scores / 2.0)
    weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
    expected = (weights @ v.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


# --- the mask -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_mask_says_what_theirs_does(data):
    """Of every query that is no padding, whatever the cache holds before and beyond."""
    draw = data.draw
    B, queries = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    kv_offset = draw(st.integers(0, 3))
    before, beyond = draw(st.just(0) | st.integers(0, 5)), draw(st.integers(0, 3))
    q_offset, keys = kv_offset + before, before + queries + beyond
    window = draw(st.none() | st.integers(1, 8))
    function = theirs.causal_mask_function
    if window is not None:
        function = theirs.sliding_window_causal_mask_function(window)
    real = None
    if draw(st.booleans()):
        T = q_offset + queries
        rows = st.tuples(st.integers(0, T), st.integers(0, T), st.integers(0, 9))
        real = torch.zeros(B, T, dtype=torch.bool)
        for row in real:
            first, last, hole = draw(rows)
            row[first:last] = True
            row[hole:] |= draw(st.booleans())
    elif before == beyond == kv_offset == 0 and draw(st.booleans()):
        sequences = torch.tensor([[draw(st.integers(0, 2)) for _ in range(queries)]] * B)
        sequences = sequences.cumsum(1)
        steps = torch.arange(queries).expand(B, -1)
        function = theirs.packed_sequence_compatibility_function(function, steps, sequences)
    options = {
        "batch_size": B,
        "q_length": queries,
        "kv_length": keys,
        "q_offset": draw(st.sampled_from([q_offset, torch.tensor(q_offset)])),
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": real,
        "local_size": window,
    }
    expected = theirs.sdpa_mask(**options, allow_is_causal_skip=False).expand(B, 1, -1, -1)
    found = mask(**options, allow_is_causal_skip=True)
    if found is None:
        found = Sees(keys, True).as_mask(torch.empty(B, 1, queries, 1), always=True)
    elif found.dtype == torch.int32:
        sees = Sees.of_mask(found.contiguous(), queries)
        found = sees.as_mask(torch.empty(B, 1, queries, 1), always=True)
        assert not expected[..., sees.keys :].any()
        expected = expected[..., : sees.keys]
    assert found.shape[2:] == expected.shape[2:]
    found = found.expand(B, 1, -1, -1)
    if real is not None:
        asked = real[:, q_offset : q_offset + queries]
        found, expected = found[:, 0][asked], expected[:, 0][asked]
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "function",
    [
        theirs.chunked_causal_mask_function(4, torch.zeros(2, dtype=int)),
        theirs.or_masks(theirs.causal_mask_function, lambda b, h, q, k: k < 2),
        theirs.and_masks(theirs.causal_mask_function, lambda b, h, q, k: k % 2 == 0),
        theirs.sliding_window_bidirectional_mask_function(2),
    ],
    ids=["chunks", "prefix", "own", "bidirectional window"],
)
def test_what_is_not_known_is_theirs(function):
    options = {"batch_size": 2, "q_length": 7, "kv_length": 7, "mask_function": function}
    expected = theirs.sdpa_mask(**options, allow_is_causal_skip=False)
    assert torch.equal(mask(**options), expected)


# --- torch.compile ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["whole", "left", "lengths", "prefill"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_compiles_without_a_break(family, padding):
    inputs, real, B = {"use_cache": padding == "prefill"}, None, 3
    if padding == "left":
        inputs["attention_mask"] = real = MASKS["left"]
    if padding == "lengths":
        B, borders = 1, torch.tensor([0, 5, T], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
        inputs["position_ids"] = torch.tensor([[*range(5), *range(T - 5)]])

    def run(model):
        return logits_and_gradients(model, ids(B, T), real, **inputs)

    model = make(family)
    expected = with_attention(model, "sdpa", run)
    model.set_attn_implementation(OURS)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(model), expected, atol=2e-4, rtol=1e-4)
    if padding in ("lengths", "prefill"):  # on the op: a backend that cannot serve it says so
        forced = kernels.use_backend("emulator", ops=["flash_attention"])
        with forced, pytest.raises(Exception, match="forced but cannot run flash_attention"):
            run(model)


# --- register ---------------------------------------------------------------------------------------------


def test_register_again():
    before = AttentionInterface._global_mapping[OURS], AttentionMaskInterface._global_mapping[OURS]
    assert integration.register() == OURS == "almostgpt"
    after = AttentionInterface._global_mapping[OURS], AttentionMaskInterface._global_mapping[OURS]
    assert after == before


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (integration.register, integration.observe, lambda: integration.patch(None)):
        with pytest.raises(UserError, match="pip install"):
            call()


def test_with_old_transformers(monkeypatch):
    monkeypatch.setattr(theirs, "sdpa_mask", lambda batch_size, cache_position, **options: None)
    with pytest.raises(UserError, match="older way.*pip install"):
        integration.register()


@pytest.mark.slow
def test_importing_imports_no_transformers():
    code = "import sys, almostgpt.integrations.transformers; print('transformers' in sys.modules)"
    command = [sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else None
    if command is None:
        pytest.skip("needs python -P")
    assert subprocess.run(command, capture_output=True, text=True).stdout == "False\n"

"""The model against independent truths: transformers' GPT-2 and Llama, closed forms, perturbation."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from almostgpt import GPT, GPTConfig
from almostgpt.errors import UserError
from almostgpt.inference.cache import KVCache
from almostgpt.model.gpt import PARTS

COMBINATIONS = list(itertools.product(*PARTS.values()))


def small_config(**options) -> GPTConfig:
    defaults = dict(block_size=16, vocab_size=31, vocab_multiple=8, n_layer=2, n_head=4, n_embd=32)
    return GPTConfig(**{**defaults, **options})


def make(seed: int = 0, **options) -> GPT:
    torch.manual_seed(seed)
    model = GPT(small_config(**options))
    for parameter in model.parameters():  # away from the initialisation, where much is nearly zero
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(seed))


any_model = st.fixed_dictionaries(
    {
        "norm": st.sampled_from(sorted(PARTS["norm"])),
        "feedforward": st.sampled_from(sorted(PARTS["feedforward"])),
        "position": st.sampled_from(sorted(PARTS["position"])),
        "attention": st.sampled_from(sorted(PARTS["attention"])),
        "n_kv_head": st.sampled_from([None, 1, 2, 4]),
        "head_dim": st.sampled_from([None, 6, 16]),
        "bias": st.booleans(),
        "qkv_bias": st.sampled_from([None, True, False]),
        "tie_weights": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)


@settings(max_examples=25, deadline=None)
@given(any_model, st.integers(1, 16), st.data())
def test_causal_by_perturbation(options, T, data):
    """Changing the token at position t changes no logits before t, and does change those at t."""
    model = make(**options)
    t = data.draw(st.integers(0, T - 1))
    ids = random_ids(2, T, seed=options["seed"])
    changed = ids.clone()
    changed[:, t] = (changed[:, t] + 1) % 31
    with torch.no_grad():
        before, after = (model(i, all_logits=True)[0] for i in (ids, changed))
    torch.testing.assert_close(before[:, :t], after[:, :t], rtol=0, atol=1e-5)
    assert (before[:, t] - after[:, t]).abs().max() > 1e-3


@settings(max_examples=25, deadline=None)
@given(any_model, st.lists(st.integers(1, 16), min_size=1, max_size=5))
def test_cached_logits_equal_uncached_however_the_prompt_is_cut(options, pieces):
    model = make(**options)
    pieces = [
        p for p, total in zip(pieces, itertools.accumulate(pieces), strict=True) if total <= 16
    ]
    ids = random_ids(2, sum(pieces), seed=options["seed"])
    cache = KVCache.full(model.config, batch=2)
    with torch.no_grad():
        whole, _ = model(ids, all_logits=True)
        cut = [model(piece, all_logits=True, cache=cache)[0] for piece in ids.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(cut, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert cache.length == ids.shape[1]


@settings(max_examples=25, deadline=None)
@given(any_model)
def test_parameter_count_equals_the_closed_form(options):
    model = make(**options)
    c = model.config
    width, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    matrices_in_mlp = 3 if c.feedforward == "swiglu" else 2
    bias = int(c.bias)
    mlp_biases = (matrices_in_mlp - 1) * c.mlp_hidden + c.n_embd
    attention = c.n_embd * (width + 2 * kv) + width * c.n_embd
    attention += int(c.qkv_bias) * (width + 2 * kv) + bias * c.n_embd
    norm = c.n_embd * (1 + (bias if c.norm == "layernorm" else 0))
    block = attention + matrices_in_mlp * c.n_embd * c.mlp_hidden + bias * mlp_biases + 2 * norm
    total = c.n_layer * block + norm + 32 * c.n_embd * (1 if c.tie_weights else 2)
    total += c.block_size * c.n_embd if c.position == "learned" else 0
    assert model.num_parameters() == total


@pytest.mark.parametrize(
    "preset, millions",
    [("tiny", 10), ("small", 25), ("medium", 80), ("large", 350)],
)
def test_preset_sizes(preset, millions):
    with torch.device("meta"):
        count = GPT.from_preset(preset).num_parameters()
    assert abs(count / 1e6 - millions) <= 0.05 * millions


@pytest.mark.parametrize(
    "preset, count",
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_gpt2_presets_have_gpt2s_exact_size(preset, count):
    with torch.device("meta"):
        assert GPT.from_preset(preset).num_parameters() == count


def test_logits_equal_transformers_gpt2():
    transformers = pytest.importorskip("transformers", reason="needs the extra `test`")
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=31, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    ).eval()
    ours = make(norm="layernorm", feedforward="gelu_tanh", position="learned", bias=True)
    state = {}
    for name, value in theirs.state_dict().items():
        name = name.removeprefix("transformer.")
        value = value.t() if value.dim() == 2 and "wte" not in name and "wpe" not in name else value
        for their_part, our_part in (
            ("wte.weight", "token_embedding.weight"),
            ("wpe.weight", "position.weight"),
            ("h.", "blocks."),
            ("ln_1.", "attention_norm."),
            ("ln_2.", "feedforward_norm."),
            ("ln_f.", "norm."),
            ("attn.c_attn", "attention.qkv"),
            ("attn.c_proj", "attention.out"),
            ("mlp.c_fc", "feedforward.up"),
            ("mlp.c_proj", "feedforward.down"),
        ):
            name = name.replace(their_part, our_part)
        state[name] = value
    del state["lm_head.weight"]
    state["token_embedding.weight"] = torch.nn.functional.pad(
        state["token_embedding.weight"], (0, 0, 0, 1)
    )
    ours.load_state_dict(state)
    ids = random_ids(2, 16)
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids, all_logits=True)[0], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(ids)[0], expected[:, -1:], rtol=1e-4, atol=1e-5)
        _, loss = ours(ids, ids.roll(-1, 1))
    flat = torch.nn.functional.cross_entropy(expected.flatten(0, 1), ids.roll(-1, 1).flatten())
    torch.testing.assert_close(loss, flat)


def test_logits_equal_transformers_llama():
    """RoPE, GQA, SwiGLU, RMSNorm and an untied head, with head_dim ≠ n_embd / n_head."""
    transformers = pytest.importorskip("transformers", reason="needs the extra `test`")
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=31,
            hidden_size=32,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=16,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ).eval()
    ours = make(n_kv_head=2, head_dim=16, mlp_hidden=96, tie_weights=False, vocab_multiple=1)
    theirs_state = theirs.state_dict()
    state = {
        "token_embedding.weight": theirs_state["model.embed_tokens.weight"],
        "norm.weight": theirs_state["model.norm.weight"],
        "head.weight": theirs_state["lm_head.weight"],
    }
    for layer in range(2):
        there, here = f"model.layers.{layer}.", f"blocks.{layer}."
        get = lambda name, there=there: theirs_state[f"{there}{name}.weight"]  # noqa: E731
        state |= {
            f"{here}attention_norm.weight": get("input_layernorm"),
            f"{here}attention.qkv.weight": torch.cat([get(f"self_attn.{x}_proj") for x in "qkv"]),
            f"{here}attention.out.weight": get("self_attn.o_proj"),
            f"{here}feedforward_norm.weight": get("post_attention_layernorm"),
            f"{here}feedforward.gate_up.weight": torch.cat(
                [get("mlp.gate_proj"), get("mlp.up_proj")]
            ),
            f"{here}feedforward.down.weight": get("mlp.down_proj"),
        }
    ours.load_state_dict(state)
    ids = random_ids(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(ids, all_logits=True)[0], theirs(ids).logits, rtol=1e-4, atol=1e-5
        )


def test_sinusoidal_table_is_the_papers():
    model = make(position="sinusoidal")
    for position, i in ((0, 0), (3, 0), (7, 5), (15, 15)):
        angle = position / 10000 ** (2 * i / 32)
        assert math.isclose(model.position.table[position, 2 * i], math.sin(angle), abs_tol=1e-6)
        assert math.isclose(
            model.position.table[position, 2 * i + 1], math.cos(angle), abs_tol=1e-6
        )


def test_rope_scores_depend_on_the_distance_alone():
    position = make(position="rope").position
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(at_q: int, at_k: int) -> float:
        q_there, k_there = (
            position.rotate(x, slice(at, at + 1)) for x, at in ((q, at_q), (k, at_k))
        )
        return float((q_there * k_there).sum())

    assert score(9, 4) == pytest.approx(score(15, 10), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 8), abs=1e-3)


def test_initialisation_follows_gpt2():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=512, n_layer=8, n_embd=256, n_head=4, bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith(("attention.out.weight", "feedforward.down.weight")):
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
        elif parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
        else:
            assert parameter.unique().item() == (0.0 if name.endswith("bias") else 1.0)
    ids = torch.randint(512, (4, 64))
    _, loss = model(ids, ids.roll(-1, 1))
    assert loss.item() == pytest.approx(math.log(512), rel=0.02)  # it knows nothing yet


def test_loss_ignores_minus_one_and_the_padding_rows():
    model = make()
    ids, targets = random_ids(2, 8), random_ids(2, 8, seed=1)
    targets[0, :5] = -1
    logits = model(ids, all_logits=True)[0]
    assert logits.shape == (2, 8, 31)  # 32 rows in the embedding
    picked = logits.log_softmax(-1).gather(2, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = -picked[targets != -1].mean()
    torch.testing.assert_close(model(ids, targets)[1], expected)
    model(ids, targets)[1].backward()
    assert model.token_embedding.weight.grad[31].abs().max() == 0


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_and_its_gradients_are_those_of_the_logits(tied):
    model = make(tie_weights=tied)
    ids, targets = random_ids(3, 16), random_ids(3, 16, seed=1)
    targets[0, :5] = -1
    logits = model(ids, all_logits=True)[0].flatten(0, 1)
    plain = torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-1)
    expected = torch.autograd.grad(plain, tuple(model.parameters()))
    loss = model(ids, targets)[1]
    torch.testing.assert_close(loss, plain)
    for ours, theirs in zip(
        torch.autograd.grad(loss, tuple(model.parameters())), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_a_gradient():
    for norm, feedforward, position, attention in COMBINATIONS:
        model = make(
            norm=norm, feedforward=feedforward, position=position, attention=attention, bias=True
        )
        ids = random_ids(2, 16)
        model(ids, ids)[1].backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_gradient_checkpointing_changes_nothing():
    ids = random_ids(2, 16)
    gradients = []
    for checkpointing in ("none", "selective", "full"):
        model = make(gradient_checkpointing=checkpointing, dropout=0.2).train()
        torch.manual_seed(7)
        model(ids, ids)[1].backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, *recomputed in zip(*gradients, strict=True):
        assert all(torch.equal(plain, gradient) for gradient in recomputed)


def test_dropout_acts_in_training_only():
    model = make(dropout=0.5)
    ids = random_ids(1, 8)
    with torch.no_grad():
        assert torch.equal(model(ids)[0], model(ids)[0])
        model.train()
        assert not torch.equal(model(ids)[0], model(ids)[0])


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"norm": "layernrm"}, "did you mean layernorm"),
        ({"position": "alibi", "attention": "sparse"}, "attention is 'sparse'"),
        ({"n_embd": 30}, "not a multiple"),
        ({"n_kv_head": 3}, "n_kv_head"),
        ({"vocab_size": None}, "vocab_size is not set"),
    ],
)
def test_models_that_cannot_be_built(options, expected):
    with pytest.raises(UserError, match=expected):
        GPT(small_config(**options))


def test_bad_calls_are_named():
    model = make()
    with pytest.raises(UserError, match="block_size of 16"):
        model(random_ids(1, 17))
    with pytest.raises(UserError, match="after 10 cached"):
        cache = KVCache.full(model.config, batch=1)
        with torch.no_grad():
            model(random_ids(1, 10), cache=cache)
            model(random_ids(1, 7), cache=cache)
    with pytest.raises(UserError, match="targets have the shape"):
        model(random_ids(1, 8), random_ids(1, 7))
    with pytest.raises(UserError, match="batch, at least 1 token"):
        model(random_ids(8))
    with pytest.raises(UserError, match="did you mean gpt2-xl"):
        GPT.from_preset("gpt2xl")


def _gradients_compiled(backend: str) -> None:
    torch._dynamo.reset()
    ids, targets = random_ids(2, 16), random_ids(2, 16, seed=1)
    model = make(n_kv_head=2)
    model(ids, targets)[1].backward()
    eager = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    _, loss = torch.compile(model, fullgraph=True, backend=backend)(ids, targets)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, eager[name], rtol=1e-3, atol=1e-5, msg=name)


def test_compiled_training_has_no_graph_break():
    """fullgraph=True fails at a break. aot_eager traces as Inductor does, without its C++ compiler."""
    _gradients_compiled("aot_eager")


@pytest.mark.slow
def test_compiled_training_by_inductor():
    _gradients_compiled("inductor")

"""RMSNorm and SwiGLU of transformers' models by our kernels: the same results, and nothing else moved."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers_models import FAMILIES, ids, logits_and_gradients, make

from almostgpt import kernels
from almostgpt.integrations import transformers as integration
from almostgpt.kernels import triton_ops

T = 9


def run(model):
    return logits_and_gradients(model, ids(2, T), use_cache=False)


@pytest.fixture
def calls(monkeypatch):
    """How often each op was called."""
    counts = {"rms_norm": 0, "swiglu": 0}
    for name in counts:
        op = getattr(kernels, name)

        def counted(*args, name=name, op=op):
            counts[name] += 1
            return op(*args)

        monkeypatch.setattr(kernels, name, counted)
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients(family, calls):
    model = make(family)
    expected = run(model)
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    patched = integration.patch(model)
    norms = 9 if family == "qwen3" else 5  # two a layer and the last; Qwen3's of q and k
    assert (len(patched.rms_norm), len(patched.swiglu), patched.left) == (norms, 2, {})
    torch.testing.assert_close(run(model), expected, atol=2e-4, rtol=1e-4)
    assert calls == {"rms_norm": norms, "swiglu": 2}

    again = integration.patch(model)
    assert (again.rms_norm, again.swiglu) == (patched.rms_norm, patched.swiglu)
    assert integration.unpatch(model) == norms + 2
    assert integration.unpatch(model) == 0
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4
    torch.testing.assert_close(run(model), expected, atol=0, rtol=0)
    assert calls == {"rms_norm": norms, "swiglu": 2}


def test_bfloat16_is_as_near_to_float32_as_theirs():
    model = make("llama").bfloat16()
    exact = make("llama")
    exact.load_state_dict(model.state_dict())
    truth, plain = run(exact)[0], run(model)[0]
    integration.patch(model)
    assert (run(model)[0] - truth).norm() <= 1.2 * (plain - truth).norm()


def test_weights_and_biases_are_not_copied():
    model = make("llama", mlp_bias=True)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    expected = run(model)
    integration.patch(model)
    torch.testing.assert_close(run(model), expected, atol=2e-4, rtol=1e-4)
    mlp = model.model.layers[0].mlp
    for name in ("weight", "bias"):
        gate, up = getattr(mlp.gate_proj, name), getattr(mlp.up_proj, name)
        assert up.data_ptr() == gate.data_ptr() + 4 * gate.numel()


def test_an_optimizer_goes_on():
    """Steps of a patched model are those of the other, and change the weights it multiplies by."""
    plain, patched = make("mistral"), make("mistral")
    integration.patch(patched)
    for model in (plain, patched):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(3):
            run(model)
            optimizer.step()
    torch.testing.assert_close(run(patched)[0], run(plain)[0], atol=1e-3, rtol=1e-3)
    changed = make("mistral").model.layers[0].mlp.gate_proj.weight
    assert (patched.model.layers[0].mlp.gate_proj.weight - changed).abs().max() > 1e-3


def test_a_weight_changed_before_backward_is_noticed():
    model = make("llama")
    integration.patch(model)
    loss = model(ids(2, T)).logits.sum()
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_saves_loads_and_copies(tmp_path):
    model = make("qwen2")
    integration.patch(model)
    expected = run(model)[0]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(run(loaded)[0], expected, atol=1e-4, rtol=1e-4)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    torch.testing.assert_close(run(model)[0], expected, atol=0, rtol=0)
    assert run(other)[0].abs().max() == 0
    model.load_state_dict(make("qwen2", initializer_range=0.1).state_dict())
    torch.testing.assert_close(
        run(model)[0], run(make("qwen2", initializer_range=0.1))[0], atol=1e-4, rtol=1e-4
    )


def test_its_own_forward_where_the_halves_are_apart(calls):
    """Moved to another dtype after, hooked, or adapted: as transformers computes."""
    model = make("llama")
    expected = run(model)[0]
    integration.patch(model)
    model.double()
    torch.testing.assert_close(run(model)[0].float(), expected, atol=1e-4, rtol=1e-4)
    assert calls == {"rms_norm": 5, "swiglu": 0}
    integration.patch(model)
    run(model)
    assert calls == {"rms_norm": 10, "swiglu": 2}
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: seen.append(1))
    run(model)
    assert calls == {"rms_norm": 15, "swiglu": 3} and seen == [1]


def test_what_is_left_alone():
    model = make("llama", num_hidden_layers=4)
    layers = model.model.layers
    layers[0].mlp.act_fn = nn.GELU()
    layers[1].mlp.gate_proj.register_forward_pre_hook(lambda *args: None)
    layers[2].mlp.up_proj = nn.Sequential(layers[2].mlp.up_proj)
    layers[3].input_layernorm.forward = layers[3].input_layernorm.forward
    expected = run(model)[0]
    patched = integration.patch(model)
    assert patched.left == {
        "model.layers.0.mlp": "its activation is GELU, not SiLU",
        "model.layers.1.mlp": "its projections have hooks",
        "model.layers.2.mlp": "its projections are not plain nn.Linear",
        "model.layers.3.input_layernorm": "its forward is replaced already",
    }
    assert patched.swiglu == ["model.layers.3.mlp"]
    assert str(patched).startswith("kernels.rms_norm: 8, kernels.swiglu: 1\n  not model.layers.0")
    torch.testing.assert_close(run(model)[0], expected, atol=1e-4, rtol=1e-4)
    integration.unpatch(model)
    assert "forward" in vars(layers[3].input_layernorm)


def test_gemma_is_not_touched():
    """Its RMSNorm multiplies by 1 + weight, its MLP's activation is GELU."""
    model = make("Gemma2", head_dim=8, query_pre_attn_scalar=8)
    patched = integration.patch(model)
    assert (patched.rms_norm, patched.swiglu, patched.left) == ([], [], {})


def test_a_norm_in_another_dtype_gives_theirs():
    """A float32 weight on bfloat16 x, as adapters train it: their result is float32."""
    norm = make("llama").model.norm
    x = torch.randn(2, 32, dtype=torch.bfloat16)
    expected = norm(x)
    integration.patch(norm)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(norm(x), expected, atol=0, rtol=0)


def test_autocast():
    model = make("llama")

    def cast(model):
        with torch.autocast("cpu", torch.bfloat16):
            return run(model)

    (expected, gradients), _ = cast(model), integration.patch(model)
    found, ours = cast(model)
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.02)
    for name, gradient in gradients.items():
        assert ours[name].dtype == gradient.dtype
        assert (ours[name] - gradient).norm() <= 0.05 * gradient.norm(), name


@pytest.mark.skipif(triton_ops.MISSING is not None, reason=f"no Triton: {triton_ops.MISSING}")
def test_on_the_triton_kernel():
    model = make("llama", num_hidden_layers=1)
    expected = run(model)
    integration.patch(model)
    with kernels.use_backend("triton", ops=["swiglu"]):
        torch.testing.assert_close(run(model), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.slow
def test_compiles_without_a_break():
    model = make("llama")
    expected = run(model)
    integration.patch(model)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(model), expected, atol=2e-4, rtol=1e-4)

"""The norms and QK-norm against their formulas in float64, gradients too."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from almostgpt import GPT, GPTConfig
from almostgpt.model.norm import NORMS, HeadNorm


def definition(name: str, x, weight, bias, eps):
    if name == "layernorm":
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
        return y * weight if bias is None else y * weight + bias
    if name == "scalenorm":  # g x / ‖x‖, with g = √n · weight, and n · eps beside the squares
        n = x.shape[-1]
        return n**0.5 * weight * x / (x.square().sum(-1, keepdim=True) + n * eps).sqrt()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(NORMS)),
    st.integers(1, 33),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1e-5, 0.5]),
)
def test_a_norm_is_its_definition_with_what_was_added(name, width, bias, added, eps):
    torch.manual_seed(width)
    norm = NORMS[name](GPTConfig(n_embd=width, bias=bias, norm_eps=eps)).double()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    assert sum(p.numel() for p in norm.parameters()) == (
        1 if name == "scalenorm" else width * (1 + (bias and name == "layernorm"))
    )
    x, residual = (torch.randn(2, 3, width, dtype=torch.float64, requires_grad=True) for _ in "ab")
    y, stream = norm(x, residual if added else None)
    whole = x + residual if added else x
    torch.testing.assert_close(stream, whole)
    wanted = definition(name, whole, norm.weight, getattr(norm, "bias", None), eps)
    torch.testing.assert_close(y, wanted)
    inputs = [x, *norm.parameters(), *([residual] if added else [])]
    upstream = torch.randn_like(y)
    for got, expected in zip(
        torch.autograd.grad(y, inputs, upstream),
        torch.autograd.grad(wanted, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_qk_norm_is_rmsnorm_of_each_head():
    norm = HeadNorm(GPTConfig(n_embd=24, n_head=3, head_dim=8, norm_eps=1e-5)).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    for head in range(3):
        wanted = definition("rmsnorm", x[:, :, head], norm.weight, None, 1e-5)
        torch.testing.assert_close(norm(x)[:, :, head], wanted)


@pytest.mark.parametrize("position", ["rope", "none"])
def test_with_qk_norm_no_score_is_beyond_the_root_of_the_width(position, monkeypatch):
    """However large the projection is; without it the scores are."""
    from almostgpt.model.attention import softmax

    seen = []
    attention = softmax.kernels.flash_attention
    monkeypatch.setattr(
        softmax.kernels,
        "flash_attention",
        lambda q, k, v, **options: (seen.append((q, k)), attention(q, k, v, **options))[1],
    )
    for qk_norm in (True, False):
        torch.manual_seed(0)
        sizes = dict(block_size=16, vocab_size=31, n_layer=1, n_head=2, n_embd=32)
        model = GPT(GPTConfig(**sizes, position=position, qk_norm=qk_norm))
        torch.nn.init.normal_(model.blocks[0].attention.qkv.weight, std=5.0)
        with torch.no_grad():
            model(torch.arange(16)[None])
        q, k = seen.pop()
        largest = (q @ k.mT / 16**0.5).abs().max()
        assert (largest <= 16**0.5 * (1 + 1e-5)) == qk_norm, largest

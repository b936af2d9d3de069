"""Attention against the softmax of the definition, in float64."""

import pytest
import torch

from almostgpt import kernels
from almostgpt.errors import UserError


def plain(q, k, v, causal=False, scale=None):
    """softmax(q kᵀ · scale) v with repeated heads and an explicit bottom-right mask."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    Tq, Tk = q.shape[2], k.shape[2]
    scores = q @ k.transpose(-1, -2) * (q.shape[3] ** -0.5 if scale is None else scale)
    sees = torch.ones(Tq, Tk, dtype=torch.bool)
    if causal:
        sees = torch.arange(Tk) <= torch.arange(Tq)[:, None] + Tk - Tq
    scores = scores.masked_fill(~sees, -torch.inf)
    return torch.softmax(scores, dim=-1).nan_to_num(0.0) @ v


def draw(Tq, Tk, heads=4, key_heads=4, width=8, batch=2):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, Tq, width, dtype=torch.float64)
    k, v = torch.randn(2, batch, key_heads, Tk, width, dtype=torch.float64)
    return q, k, v


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("Tq, Tk", [(1, 1), (5, 5), (1, 7), (3, 7), (7, 3), (2, 1), (4, 0), (0, 4)])
def test_against_the_definition(Tq, Tk, key_heads, causal):
    tensors = [t.requires_grad_() for t in draw(Tq, Tk, key_heads=key_heads)]
    got = kernels.flash_attention(*tensors, causal=causal, scale=0.3)
    expected = plain(*tensors, causal=causal, scale=0.3)
    torch.testing.assert_close(got, expected)
    if Tq and Tk:
        upstream = torch.randn_like(got)
        for a, b in zip(
            torch.autograd.grad(got, tensors, upstream),
            torch.autograd.grad(expected, tensors, upstream),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("Tq, Tk", [(6, 6), (3, 6), (6, 3)])
def test_causal_by_perturbation(Tq, Tk):
    q, k, v = draw(Tq, Tk)
    before = kernels.flash_attention(q, k, v, causal=True)
    for key in range(Tk):
        changed = [t.clone() for t in (k, v)]
        for tensor in changed:
            tensor[:, :, key] += 1.0
        moved = (kernels.flash_attention(q, *changed, causal=True) != before).any(dim=3)
        sees = torch.arange(Tq) + Tk - Tq >= key
        assert (moved == sees).all()


def test_one_cached_query_sees_every_key():
    q, k, v = draw(1, 9)
    one = kernels.flash_attention(q, k, v, causal=True)
    torch.testing.assert_close(one, kernels.flash_attention(q, k, v))


def test_a_fused_projection_is_read_in_place():
    B, T, H, D = 2, 5, 4, 8
    qkv = torch.randn(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
    assert not qkv[0].is_contiguous()
    got = kernels.flash_attention(*qkv, causal=True)
    torch.testing.assert_close(
        got, kernels.flash_attention(*(t.contiguous() for t in qkv), causal=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_in_16_bits(dtype):
    q, k, v = (t.to(dtype) for t in draw(33, 47, key_heads=2, width=64))
    exact = plain(q.double(), k.double(), v.double(), causal=True)
    peer = plain(q, k, v, causal=True).double()
    got = kernels.flash_attention(q, k, v, causal=True).double()
    slack = 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert (got - exact).abs().max() <= 2 * (peer - exact).abs().max() + slack


def test_bad_inputs_are_named():
    q, k, v = (t.float() for t in draw(3, 3))
    with pytest.raises(UserError, match=r"\(B, H, T, D\)"):
        kernels.flash_attention(q[0], k, v)
    with pytest.raises(UserError, match="one shape"):
        kernels.flash_attention(q, k, v[:, :, :2])
    with pytest.raises(UserError, match="4 query heads are no multiple of 3"):
        kernels.flash_attention(q, k[:, :3], v[:, :3])
    with pytest.raises(UserError, match="one floating dtype"):
        kernels.flash_attention(q, k.double(), v)
    with pytest.raises(UserError, match="on cpu, meta and cpu"):
        kernels.flash_attention(q, k.to("meta"), v)


def test_compiles_whole_with_dynamic_shapes_forward_and_backward():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(kernels.flash_attention, fullgraph=True, dynamic=True, backend=count)
    for T in (5, 7, 9):  # no two sizes are equal at first: the compiler would take them for one
        tensors = [t.requires_grad_() for t in draw(T, T, heads=4, key_heads=2, batch=3)]
        got = compiled(*tensors, causal=True)
        torch.testing.assert_close(got, plain(*tensors, causal=True))
        got.sum().backward()
    assert len(graphs) == 1

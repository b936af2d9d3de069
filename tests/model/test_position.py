"""ALiBi and the scalings of rope against what their sources say, and that order is told at all."""

import math

import pytest
import torch
from model_parts import make, random_ids
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from almostgpt.config import GPTConfig, resolve_model
from almostgpt.model.position import RotaryPosition, alibi_slopes


def test_slopes_are_those_of_the_paper():
    """Section 3: 1/2 … 1/256 of 8 heads; of 16 each square root between; others interleaved."""
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(16) == [2.0 ** -(i / 2) for i in range(1, 17)]
    assert alibi_slopes(1) == [2.0**-8]
    assert alibi_slopes(3) == [2.0**-4, 2.0**-8, 2.0**-2]  # those of 2, and the first of 4
    for heads in range(1, 40):
        slopes = alibi_slopes(heads)
        assert len(slopes) == len(set(slopes)) == heads and max(slopes) < 1


@pytest.mark.parametrize("heads, n_kv_head", [(4, 4), (4, 2), (3, 1)])
def test_alibi_is_a_bias_on_the_scores(heads, n_kv_head):
    model = make(position="alibi", n_layer=1, n_head=heads, head_dim=8, n_kv_head=n_kv_head)
    ids = random_ids(2, 16)
    given = {}
    attention = model.blocks[0].attention
    attention.register_forward_hook(lambda m, args, out: given.update(x=args[0], out=out))
    with torch.no_grad():
        model(ids)
        x, W = given["x"].double(), attention.qkv.weight.double()
        B, T, _ = x.shape
        q, k, v = (x @ W.T).view(B, T, -1, 8).split([heads, n_kv_head, n_kv_head], dim=2)
        distance = torch.arange(T)[:, None] - torch.arange(T)
        found = []
        for head, slope in enumerate(alibi_slopes(heads)):
            key = head // (heads // n_kv_head)
            scores = q[:, :, head] @ k[:, :, key].mT / math.sqrt(8) - slope * distance
            weights = scores.masked_fill(distance < 0, -math.inf).softmax(-1)
            found.append(weights @ v[:, :, key])
        wanted = torch.cat(found, dim=-1) @ attention.out.weight.double().T
    torch.testing.assert_close(given["out"].double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "llama3"])
def test_scaled_frequencies_are_those_of_transformers(name):
    parameters = {"rope_type": name, "rope_theta": 5000.0, "factor": 8.0}
    if name == "llama3":
        parameters |= {"original_max_position_embeddings": 512}
        parameters |= {"low_freq_factor": 1.5, "high_freq_factor": 6.0}
    theirs = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=4096,
        rope_parameters=parameters,
    )
    options = (
        {"rope_low_freq_factor": 1.5, "rope_high_freq_factor": 6.0} if name == "llama3" else {}
    )
    ours = GPTConfig(
        block_size=4096,
        n_head=2,
        n_embd=256,
        rope_base=5000.0,
        rope_scaling=name,
        rope_factor=8.0,
        **options,
    )
    wanted, scale = ROPE_INIT_FUNCTIONS[name](theirs, "cpu")
    assert scale == 1
    found = RotaryPosition.frequencies(resolve_model(ours))
    torch.testing.assert_close(found.float(), wanted, rtol=1e-6, atol=0)


def test_ntk_slows_the_slowest_pair_by_the_factor_and_the_fastest_not_at_all():
    sizes = {"block_size": 64, "n_head": 2, "n_embd": 96}
    plain, scaled = (
        RotaryPosition.frequencies(resolve_model(GPTConfig(**sizes, **options)))
        for options in ({}, {"rope_scaling": "ntk", "rope_factor": 4.0})
    )
    ratio = plain / scaled
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(4)
    step = ratio[1:] / ratio[:-1]  # and in between by equal steps
    torch.testing.assert_close(step, torch.full_like(step, 4 ** (1 / 23)))


def test_a_part_of_a_head_is_not_rotated():
    position = make(position="rope", rope_fraction=0.5, head_dim=8).position
    x = torch.randn(1, 16, 2, 8)
    y = position.rotate(x, slice(0, 16))
    assert torch.equal(y[..., 4:], x[..., 4:])
    turned = torch.view_as_complex(torch.stack([x[..., :2], x[..., 2:4]], -1).double().contiguous())
    angle = torch.arange(16)[:, None] * 10000.0 ** -torch.tensor([0.0, 0.5], dtype=torch.float64)
    turned = torch.view_as_real(turned * torch.polar(torch.ones_like(angle), angle)[:, None])
    torch.testing.assert_close(y[..., :4].double(), turned.mT.flatten(-2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rope", "alibi", "none"])
def test_order_is_told(position):
    """Exchanging two earlier tokens changes what comes after; without positions through the mask alone."""
    model = make(position=position)
    ids = torch.tensor([[5, 9, 2, 7, 1, 3], [9, 5, 2, 7, 1, 3]])
    with torch.no_grad():
        logits, _ = model(ids)
    assert (logits[0] - logits[1]).abs().max() > 1e-3

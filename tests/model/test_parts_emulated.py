"""The parts through the CUDA kernels, in the emulator: training passes, and caches of several kinds."""

import copy

import pytest
import torch
from model_parts import make, random_ids

from almostgpt import kernels
from almostgpt.inference.cache import KVCache
from almostgpt.kernels import emulator

PARTS = {
    "window, ALiBi, ScaleNorm": {
        "attention": "sliding_window",
        "attention_window": 7,
        "position": "alibi",
        "norm": "scalenorm",
        "n_kv_head": 2,
    },
    "some local layers, QK-norm": {
        "attention": "sliding_window",
        "attention_window": 5,
        "window_pattern": "LG",
        "qk_norm": True,
    },
    "a part of a head rotated, scaled": {
        "rope_fraction": 0.5,
        "rope_scaling": "llama3",
        "rope_factor": 4.0,
    },
    "block-sparse, over the kernel's cache": {"attention": "block_sparse", "sparse_block": 2},
}
each = pytest.mark.parametrize("options", PARTS.values(), ids=PARTS.keys())
CARDS = pytest.mark.parametrize("card", [(8, 0), (9, 0)], ids=str)


def launched() -> set[str]:
    return {name.partition("<")[0] for name in emulator.statistics()["kernels"]}


def models(**options):
    """The same weights in bfloat16 and, of those rounded values, in float64."""
    half = make(block_size=40, **options).bfloat16()
    return half, copy.deepcopy(half).double()


@each
@CARDS
def test_gradients_are_as_near_to_exact_ones_as_the_references(options, card):
    half, exact = models(**options)
    ids = random_ids(2, 34)

    def gradient(model) -> torch.Tensor:
        loss = model(ids[:, :-1], ids[:, 1:])[1]
        found = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([g.flatten().double() for g in found])

    truth, plain = gradient(exact), gradient(half)
    emulator.reset_statistics()
    with kernels.use_backend("emulator", capability=card):
        ours = gradient(half)
    forward = "attention_forward_sm90_kernel" if card == (9, 0) else "attention_forward_kernel"
    assert forward in launched() or options.get("attention") == "block_sparse"
    assert (ours - truth).norm() <= 2 * (plain - truth).norm() + 1e-3 * truth.norm()


@each
def test_a_cache_gives_what_no_cache_gives(options):
    """Prompts longer than a ring, cut anywhere, through append, decode and prefill kernels."""
    half, exact = models(**options)
    ids = random_ids(2, 40)
    with torch.no_grad():
        truth = exact(ids, all_logits=True)[0]
        plain = half(ids, all_logits=True)[0].double()
        cache = KVCache.full(half.config, batch=2, dtype=torch.bfloat16)
        emulator.reset_statistics()
        with kernels.use_backend("emulator"):
            pieces = ids.split([29, 1, 10], dim=1)
            cut = torch.cat([half(p, all_logits=True, cache=cache)[0] for p in pieces], dim=1)
    assert "append_kernel" in launched()
    error, reference = (cut.double() - truth).abs(), (plain - truth).abs()
    assert error.max() <= 2 * reference.max() + 1e-2 * truth.abs().max()

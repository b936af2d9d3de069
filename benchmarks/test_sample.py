"""Drawing the next tokens from logits, for each way to filter.

``sample`` on our best backend against what is usually written with PyTorch: a sort for top-p, softmax,
and ``multinomial`` (on a GPU with exponential noise and argmax, which does not make the host wait), as
it is and compiled. The floor is every logit read once.

What we aim at on an H200; nothing is asserted:

    temperature, one row of 50257 in bf16    10 us
    top-k or top-p, the same                 40 us, and 5 times as fast as a sort
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from almostgpt import kernels

from . import harness

ON_CUDA = harness.DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
SHAPES = [(1, 50257), (64, 50257), (64, 128_256)] if ON_CUDA else [(1, 50257), (8, 50257)]
WAYS: dict[str, dict] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.8},
    "top-k": {"temperature": 0.8, "top_k": 50},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "top-k and top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "min-p": {"temperature": 0.8, "min_p": 0.05},
}
CALLS = 8 if ON_CUDA else 4
SECONDS = 1.0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("B, V", SHAPES, ids=[f"{B}x{V}" for B, V in SHAPES])
def test_sample(B, V, way, race, report, benchmark, copy_bandwidth):
    options = WAYS[way]
    moved = B * V * DTYPE.itemsize
    inputs = harness.input_sets(lambda: (like_a_model(B, V),), moved)
    rows = [torch.arange(B, device=harness.DEVICE) for _ in range(3)]
    backend = kernels.explain("sample", *next(inputs), *rows, **options).backend
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        f"almostgpt ({backend})": lambda logits: kernels.sample(logits, *rows, **options)[0],
        "PyTorch's own": lambda logits: by_pytorch(logits, **options),
    }
    notes = []
    if not ON_CUDA:
        notes.append("not compiled: that is for a GPU, and takes long here")
    elif trouble := harness.compile_trouble():
        notes.append(f"not compiled: {trouble}")
    else:
        torch.compiler.reset()
        functions["the same, compiled"] = torch.compile(functions["PyTorch's own"], dynamic=False)

    def peer(function: Callable[[Tensor], Tensor]) -> harness.Peer:
        def get_ready() -> harness.Work:
            (logits,) = next(inputs)
            return torch.no_grad()(lambda: function(logits))

        return get_ready

    # Draws differ, since the random numbers do: what must be equal is how they fall, which tests
    # see to. Greedy ones are equal.
    if way == "greedy":
        example = like_a_model(B, V)
        harness.check_equal({name: (f(example),) for name, f in functions.items()})
    contestants = {name: peer(function) for name, function in functions.items()}
    result = race(contestants, harness.device_timer(CALLS), seconds=SECONDS)
    title = f"{way}, {B} x {V}, {DTYPE}"
    report(harness.bandwidth_table(title, result, moved, copy_bandwidth, notes))
    benchmark.extra_info["bytes_per_second"] = moved / result.median(next(iter(functions)))
    benchmark.extra_info["copy_bytes_per_second"] = copy_bandwidth


def like_a_model(B: int, V: int) -> Tensor:
    """Logits of which few hold most of the mass, as those of a trained model: Zipf's law, shuffled."""
    ranks = torch.rand(B, V).argsort(1) + 1.0
    return (-1.5 * ranks.log()).to(harness.DEVICE, DTYPE)


def by_pytorch(logits: Tensor, temperature=1.0, top_k=None, top_p=None, min_p=None) -> Tensor:
    """As it is usually written."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        logits = logits.scatter(-1, order, ordered.masked_fill(before >= top_p, -torch.inf))
    probabilities = logits.softmax(-1)
    if min_p is not None:
        least = min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    if ON_CUDA:
        return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)
    return probabilities.multinomial(1)[:, 0]

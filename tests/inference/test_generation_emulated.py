"""Generation through the CUDA kernels, in the emulator: draws, and matrices in 8 bits."""

import copy

import pytest
import torch

from almostgpt import GPT, GPTConfig, kernels
from almostgpt.kernels import emulator
from almostgpt.model.quantized import quantize

CACHE = ["kv_append", "decode_attention"]


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(block_size=48, vocab_size=61, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.bfloat16().eval()


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(61, (length,), generator=generator) for length in (9, 4, 1)]


def launches() -> dict[str, int]:
    counts = {}
    for name, kernel in emulator.statistics()["kernels"].items():
        name = name.partition("<")[0]
        counts[name] = counts.get(name, 0) + kernel["launches"]
    return counts


@pytest.mark.parametrize("card", [(8, 0), (9, 0)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1.1},
        {"top_k": 20, "temperature": 0.8},
        {"top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_the_kernel_draws_what_the_reference_draws(model, options, card):
    """Of the same logits, the same tokens: seeds mean the same on a GPU."""
    options = {"seed": 5, "logprobs": True, **options}
    expected, scores = model.generate(prompts(), 12, **options)
    emulator.reset_statistics()
    with kernels.use_backend("emulator", ops=["sample"], capability=card):
        ids, logprobs = model.generate(prompts(), 12, **options)
    assert sum(launches().values()) == 12  # one launch a step
    for ours, theirs in zip(ids, expected, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(logprobs, scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("card", [(8, 0), (9, 0)], ids=str)
def test_a_step_through_all_kernels_of_a_quantised_model(model, card):
    small = quantize(copy.deepcopy(model))
    ops = [*CACHE, "int8_linear", "sample"]
    emulator.reset_statistics()
    with kernels.use_backend("emulator", ops=ops, capability=card):
        (ids,) = small.generate(prompts()[:1], 16, temperature=0)
    counts = launches()
    assert counts["int8_linear_kernel"] == 16 * (2 * 4 + 1)  # a prompt of 9 fits into 16 rows
    assert counts["append_kernel"] == counts["decode_kernel"] == 16 * 2
    # Each token is among those that exact logits leave in doubt.
    exact = copy.deepcopy(small).double()
    with torch.no_grad():
        logits = exact(ids[None, :-1], all_logits=True)[0][0, 8:]
    chosen = logits.gather(-1, ids[9:, None])[:, 0]
    assert (logits.amax(-1) - chosen).max() < 0.05 * logits.abs().max()

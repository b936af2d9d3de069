"""What only a GPU can show of ``sample``: its approximate logarithms, real vocabularies, a CUDA graph."""

import pytest
import torch
from sample_truth import ODD, WAYS, check_rows, sampler, streams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BY_CUDA = sampler("cuda")


@pytest.mark.conformance
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 3, 257, 5003, 50257, 128_256])
@pytest.mark.parametrize(
    "options",
    [
        *WAYS,
        {"top_k": 50, "top_p": 0.9},
        {"top_k": 300, "top_p": 0.8, "min_p": 0.001, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_what_is_drawn_is_what_may_be(options, V, dtype):
    """50257 stays in an H200's shared memory, 128256 does not; rows begin at every alignment."""
    torch.manual_seed(V)
    logits = (3 * torch.randn(3, V + 5, device="cuda")).to(dtype)[:, 3 : 3 + V]
    seen = torch.rand(3, V, device="cuda") < 0.3 if "repetition_penalty" in options else None
    check_rows(BY_CUDA, logits, streams(3, V, device="cuda"), seen, **options)


@pytest.mark.parametrize("row, wanted", ODD, ids=str)
def test_of_odd_rows_something_sensible_is_drawn(row, wanted):
    logits = torch.tensor(row, device="cuda").expand(40, len(row))
    for options in WAYS:
        ids, logprobs = BY_CUDA(logits, *streams(40, device="cuda"), logprobs=True, **options)
        expected = {min(wanted)} if options.get("temperature") == 0 else wanted
        assert set(ids.tolist()) == expected, options
        own = logits.log_softmax(1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(logprobs, own, equal_nan=True)


def test_frequencies_are_softmax():
    B = 200_000
    logits = torch.linspace(-2, 2, 11, device="cuda")
    rows = [torch.full((B,), 3, device="cuda"), torch.arange(B, device="cuda")]
    ids, _ = BY_CUDA(logits.expand(B, 11), rows[1], rows[0], rows[0], temperature=1.3)
    expected = (logits.double() / 1.3).softmax(0) * B
    statistic = ((ids.bincount(minlength=11) - expected) ** 2 / expected).sum().item()
    assert statistic < 29.59  # 10 degrees of freedom, 0.1 %


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_graph_replays_it_at_new_positions(options, no_host_sync):
    logits = torch.randn(4, 50257, device="cuda").bfloat16()
    positions, seeds, sequences = streams(4, device="cuda")
    seen = torch.zeros(4, 50257, dtype=torch.bool, device="cuda")
    given = {**options, "repetition_penalty": 1.3, "logprobs": True}

    def draw(marks):
        return BY_CUDA(logits, positions, seeds, sequences, seen=marks, **given)

    draw(seen.clone())
    no_host_sync()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids, logprobs = draw(seen)
    torch.cuda.set_sync_debug_mode("default")
    for position in (5, 6):
        positions.fill_(position)
        marks = seen.clone()
        expected = draw(marks)
        graph.replay()
        assert torch.equal(ids, expected[0]) and torch.equal(logprobs, expected[1])
        assert torch.equal(seen, marks)


def test_a_draw_does_not_depend_on_the_batch():
    logits = torch.randn(1000, 50257, device="cuda").bfloat16()
    rows = streams(1000, device="cuda")
    for options in ({}, {"top_k": 40, "top_p": 0.9}):
        ids, _ = BY_CUDA(logits, *rows, **options)
        for i in (0, 1, 7, 999):
            one = BY_CUDA(logits[i : i + 1].clone(), *(r[i : i + 1] for r in rows), **options)[0]
            assert one.item() == ids[i].item()

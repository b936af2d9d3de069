"""What only a GPU can show of the attention kernels; their tests against float64 are in tests/kernels."""

import pytest
import torch
from attention_kernels import attend_on
from attention_truth import make, sinks, with_gradients
from torch.profiler import ProfilerActivity, profile

from almostgpt import kernels
from almostgpt.kernels.attention_ladder import attention_ladder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("D", [64, 128, 256])
def test_a_thousand_runs_give_the_same_bits(D):
    """Forward and ordered backward, with other work on the card at the same time."""
    inputs = make(500, 500, B=2, H=8, Hkv=2, D=D, dtype=torch.bfloat16, device="cuda")
    options = {"causal": True, "sink_logits": sinks(8, device="cuda")}
    first = with_gradients(attend_on("cuda", deterministic=True), inputs, **options)
    noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    different = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(1000):
        with torch.cuda.stream(other):
            noise @ noise
        got = with_gradients(attend_on("cuda", deterministic=True), inputs, **options)
        for name, tensor in first.items():
            different += (got[name] != tensor).sum()
    assert different.item() == 0


@pytest.mark.parametrize("D", [64, 128, 256])
def test_a_thousand_fast_backwards_differ_by_rounding_alone(D):
    inputs = make(700, 700, B=2, H=4, Hkv=2, D=D, dtype=torch.bfloat16, device="cuda")
    first = with_gradients(attend_on("cuda"), inputs, causal=True)
    worst = {name: torch.zeros((), device="cuda") for name in first}
    for _ in range(1000):
        for name, tensor in with_gradients(attend_on("cuda"), inputs, causal=True).items():
            worst[name] = torch.maximum(worst[name], (tensor - first[name]).abs().max().float())
    assert all(worst[name] == 0 for name in ("out", "lse", "dk", "dv")), worst
    # Two sums in another order, and then rounded: neighbours at most.
    assert worst["dq"] <= 2 * torch.finfo(torch.bfloat16).eps * first["dq"].abs().max(), worst


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [64, 128])
def test_hoppers_own_kernel_agrees_with_that_of_every_card(D, causal):
    """Over more tiles of queries than multiprocessors, so that blocks go on from one to the next."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    q, k, v = make(2500, 2500, B=2, H=16, D=D, dtype=torch.bfloat16, device="cuda")[:3]
    answer = kernels.explain("flash_attention", q, k, v, causal=causal)
    assert (answer.backend, answer.kernel) == ("cuda", "flash_attention_sm90")
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        ours = kernels.flash_attention(q, k, v, causal=causal)
    # The driver has made maps for TMA of all tensors: else the kernel of every card would have run.
    assert any("attention_forward_sm90_kernel" in event.name for event in profiled.events())
    every = attention_ladder("mma", q, k, v, causal=causal)
    # Both round P to 16 bits, relative to bases of their own: neighbours, of values below 1.
    torch.testing.assert_close(ours, every, atol=8e-3, rtol=8e-3)


@pytest.mark.parametrize("layout", ["dense", "fused", "one head", "one batch entry", "one token"])
def test_the_driver_makes_maps_of_every_layout(layout):
    """The rules in its documentation are stricter than what others rely on (strides that do not ascend)."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    B, H, T = {"one head": (2, 1, 70), "one batch entry": (1, 4, 70), "one token": (2, 4, 1)}.get(
        layout, (2, 4, 70)
    )
    for D in (8, 40, 64, 128, 256):
        if layout == "fused":
            qkv = torch.randn(B, T, 3, H, D, device="cuda", dtype=torch.bfloat16)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
        else:
            q, k, v = torch.randn(3, B, H, T, D, device="cuda", dtype=torch.bfloat16)
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            kernels.flash_attention(q, k, v)
        assert any("attention_forward_sm90_kernel" in event.name for event in profiled.events()), D


def test_a_long_sequence():
    """T = 131,072 with a window: each part of it as alone, and the same bits for its ordered gradients."""
    T, window, part = 131_072, (300, 0), 2048
    inputs = make(T, T, H=2, Hkv=1, dtype=torch.bfloat16, device="cuda")
    whole = with_gradients(attend_on("cuda", True), inputs, causal=True, window=window)
    again = with_gradients(attend_on("cuda", True), inputs, causal=True, window=window)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    q, k, v = inputs[:3]
    for start in (0, T // 2, T - part):
        lead = min(start, 300)
        rows, seen = slice(start, start + part), slice(start - lead, start + part)
        alone = kernels.flash_attention(
            q[:, :, rows], k[:, :, seen], v[:, :, seen], causal=True, window=window
        )
        torch.testing.assert_close(alone, whole["out"][:, :, rows], atol=2e-2, rtol=2e-2)


def test_full_attention_over_a_long_sequence():
    T = 131_072
    q, k, v = (torch.randn(1, 1, T, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out, lse = attend_on("cuda")(q, k, v, causal=True)
    for row in (0, 1, 127, 128, 65_535, T - 1):
        scores = (k[0, 0, : row + 1].double() @ q[0, 0, row].double()) / 8
        exact = torch.softmax(scores, 0) @ v[0, 0, : row + 1].double()
        torch.testing.assert_close(out[0, 0, row].double(), exact, atol=1e-2, rtol=2e-2)
        torch.testing.assert_close(
            lse[0, 0, row].double(), scores.logsumexp(0), atol=1e-4, rtol=1e-4
        )


def test_more_than_2_to_the_31_elements():
    """Views into a tensor so large that offsets need 64 bits; the last head must be the right one."""
    B, T, H, D = 70, 2048, 16, 64
    elements = B * T * 3 * H * D
    if torch.cuda.mem_get_info()[0] < 3 * elements * 2:
        pytest.skip(f"needs {3 * elements * 2 / 2**30:.0f} GiB of free GPU memory")
    # Rows apart by so much that the last batch entry begins beyond 2^31 elements.
    wide = torch.empty(B, T, 3 * H * D * 5 + 8, device="cuda", dtype=torch.bfloat16)
    assert wide[-1].storage_offset() > 2**31
    qkv = wide[..., : 3 * H * D].unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
    qkv.normal_()
    for batch, head in ((0, 0), (B - 1, H - 1)):
        whole = kernels.flash_attention(*qkv, causal=True)[batch, head]
        alone = (t[batch : batch + 1, head : head + 1].contiguous() for t in qkv)
        assert torch.equal(whole, kernels.flash_attention(*alone, causal=True)[0, 0])


def test_it_runs_on_the_current_stream_and_in_a_graph():
    inputs = make(300, 300, H=4, Hkv=2, dtype=torch.bfloat16, device="cuda")
    attend = attend_on("cuda", deterministic=True)
    expected = with_gradients(attend, inputs, causal=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = with_gradients(attend, inputs, causal=True)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = with_gradients(attend, inputs, causal=True)
    for _ in range(3):  # the turns begin anew in each
        graph.replay()
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


def test_autocast_and_compile():
    q, k, v = (torch.randn(2, 4, 130, 64, device="cuda", requires_grad=True) for _ in range(3))

    def attend(q, k, v):
        with torch.autocast("cuda", torch.bfloat16):
            return kernels.flash_attention(q, k, v, causal=True)

    for function in (attend, torch.compile(attend, fullgraph=True)):
        out = function(q, k, v)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
        assert q.grad.dtype == torch.float32 and torch.isfinite(q.grad).all()
    with torch.autocast("cuda", torch.bfloat16):
        low = (t.detach().bfloat16() for t in (q, k, v))
        assert kernels.explain("flash_attention", *low, causal=True).backend == "cuda"


def test_no_host_sync(no_host_sync):
    inputs = make(200, 200, H=4, dtype=torch.bfloat16, device="cuda")
    borders = torch.tensor([0, 50, 200, 200], dtype=torch.int32, device="cuda")
    with_gradients(attend_on("cuda"), inputs, causal=True, cu_seqlens=borders)
    no_host_sync()
    for deterministic in (False, True):
        attend = attend_on("cuda", deterministic)
        with_gradients(attend, inputs, causal=True, cu_seqlens=borders)

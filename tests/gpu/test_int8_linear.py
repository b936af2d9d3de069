"""The CUDA kernel of int8_linear on a GPU: against float64, the same bits, without the host."""

import pytest
import torch
from int8_linear_truth import assert_close_to_float64, exact, make

from almostgpt import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DTYPES = [torch.bfloat16, torch.float16]
# Layers of GPT-2 from the smallest to the largest, and what fits nothing.
SIZES = [(768, 768), (768, 3072), (50257, 768), (4800, 1600), (1600, 6400), (1, 16), (1013, 2064)]


def by_cuda(x, weight, scales, bias=None):
    with kernels.use_backend("cuda"):
        return kernels.int8_linear(x, weight, scales, bias)


@pytest.mark.conformance
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, K", SIZES)
def test_against_float64(N, K, dtype):
    for rows in (1, 2, 7, 8, 9, 16):
        for bias in (None, dtype, torch.float32):
            assert_close_to_float64(by_cuda, make((rows,), K, N, dtype, bias, device="cuda"))


def test_every_code_times_one_is_that_code():
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(16, 16).cuda()
    for dtype in DTYPES:
        y = by_cuda(torch.eye(16, dtype=dtype).cuda(), codes, torch.ones(16).cuda())
        assert torch.equal(y.t(), codes.to(dtype))


def test_strides_and_a_weight_that_begins_anywhere():
    inputs = make((5,), 768, 300, torch.bfloat16, torch.bfloat16, device="cuda")
    expected = by_cuda(*inputs)
    wide = torch.nn.functional.pad(inputs.x, (1, 2), value=torch.nan)
    weight = torch.empty(300 * 768 + 1, dtype=torch.int8, device="cuda")[1:].view(300, 768)
    weight.copy_(inputs.weight)
    for x in (wide[:, 1:-2], inputs.x.t().contiguous().t()):
        assert torch.equal(by_cuda(x, weight, *inputs[2:]), expected)


def test_more_than_2_to_the_31_codes():
    K, N = 16384, 2**31 // 16384 + 100
    if torch.cuda.mem_get_info()[0] < 3 * K * N:
        pytest.skip("needs 7 GB of free GPU memory")
    weight = torch.zeros(N, K, dtype=torch.int8, device="cuda")
    weight[-50:].random_(-127, 128)
    scales, x = torch.rand(N, device="cuda"), torch.randn(3, K, device="cuda").bfloat16()
    y = by_cuda(x, weight, scales)
    assert not y[:, :-50].any()
    truth = exact((x, weight[-50:], scales[-50:], None))
    assert (y[:, -50:] - truth).abs().max() <= 2**-7 * truth.abs().max()


def test_a_thousand_runs_give_the_same_bits():
    inputs = make((8,), 1600, 4800, torch.bfloat16, torch.float32, device="cuda")
    first = by_cuda(*inputs)
    noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    different = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(1000):
        with torch.cuda.stream(other):
            noise @ noise
        different += (by_cuda(*inputs) != first).sum()
    assert different.item() == 0


def test_in_a_graph_on_the_current_stream_and_without_the_host(no_host_sync):
    inputs = make((4,), 768, 2304, torch.bfloat16, torch.bfloat16, device="cuda")
    by_cuda(*inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = by_cuda(*inputs)
    inputs.x.normal_()
    inputs.weight.random_(-127, 128)
    no_host_sync()
    graph.replay()
    expected = by_cuda(*inputs)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(captured, expected)


def test_it_is_chosen_and_compiles_whole():
    inputs = make((2, 4), 768, 2304, torch.bfloat16, torch.bfloat16, device="cuda")
    assert kernels.explain("int8_linear", *inputs).backend == "cuda"
    compiled = torch.compile(kernels.int8_linear, fullgraph=True)
    assert torch.equal(compiled(*inputs), by_cuda(*inputs))
    many = inputs._replace(x=inputs.x.repeat(3, 1, 1))  # 24 rows
    assert kernels.explain("int8_linear", *many).backend == "reference"
    assert_close_to_float64(kernels.int8_linear, many)

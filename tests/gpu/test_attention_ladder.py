"""The ladder of attention kernels against float64, on a GPU."""

import pytest
import torch
from attention_truth import plain

from almostgpt import kernels
from almostgpt.kernels.attention_ladder import STEPS, attention_ladder

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.conformance,
]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "shape",
    [(2, 1, 1, 8), (3, 5, 113, 40), (1, 2, 1023, 64), (1, 70000, 3, 16), (2, 4, 799, 128)],
    ids=str,
)
def test_against_float64(shape, dtype, causal, step):
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3))
    with kernels.use_backend("cuda"):
        got = attention_ladder(step, q, k, v, causal=causal)
    exact = plain(q.double(), k.double(), v.double(), causal=causal)[0]
    size = plain(q.double(), k.double(), v.double().abs(), causal=causal)[0]
    peer = plain(q, k, v, causal=causal)[0]
    bound = 2 * (peer - exact).abs().max() + 4 * torch.finfo(dtype).eps * size.max()
    assert (got - exact).abs().max() <= bound

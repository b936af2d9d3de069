"""What only a GPU can show of the cache's kernels; their tests against float64 are in tests/kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from almostgpt import kernels
from almostgpt.kernels import KVLayer
from almostgpt.kernels.check_kv_cache import held
from almostgpt.kernels.rope import turns_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

BF16 = torch.bfloat16
OPS = ("kv_append", "decode_attention")
KEYS, SHARING = 32_768, 8
RING = {"window": 4096, "sink_tokens": 4}


def turns(D: int) -> Tensor:
    half = D // 2
    return turns_of(10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)).cuda()


def draw(B: int, kv_heads: int, T: int, D: int, sharing: int = SHARING) -> tuple[Tensor, ...]:
    """q (B, H, T, D), k and v (B, Hkv, T, D) as a fused projection leaves them."""
    heads = [kv_heads * sharing, kv_heads, kv_heads]
    fused = torch.randn(B, T, sum(heads), D, device="cuda", dtype=BF16)
    return fused.transpose(1, 2).split(heads, dim=1)


def empty(B: int, kv_heads: int, capacity: int, D: int, int8: bool = False, **options) -> KVLayer:
    dtype = torch.int8 if int8 else BF16
    return KVLayer.empty(B, kv_heads, capacity, D, dtype=dtype, device="cuda", **options)


def filled(layer: KVLayer, lengths: Tensor) -> KVLayer:
    """Something in every slot that is taken, and NaN (of int8: as scale) in those that are not."""
    layer.lengths.copy_(lengths)
    slot = torch.arange(layer.capacity, device="cuda")
    free = (slot >= layer.lengths[:, None])[:, None]  # (B, 1, C); none where the ring is full
    for slots, scales in ((layer.keys, layer.key_scales), (layer.values, layer.value_scales)):
        if scales is None:
            slots.normal_().masked_fill_(free[..., None], torch.nan)
        else:
            slots.random_(-127, 128)
            scales.uniform_(0.01, 0.02).masked_fill_(free, torch.nan)
    return layer


def copy_of(layer: KVLayer, function: Callable[[Tensor], Tensor] = Tensor.clone) -> KVLayer:
    tensors = {k: function(v) for k, v in vars(layer).items() if isinstance(v, Tensor)}
    return replace(layer, **tensors)


def in_float64(layer: KVLayer) -> KVLayer:
    layer = copy_of(layer, lambda t: t.double() if t.is_floating_point() else t)
    keys, values = held(layer)
    return replace(layer, keys=keys, values=values, key_scales=None, value_scales=None)


def step(q, k, v, layer: KVLayer, **options) -> Tensor:
    """Appends and attends by the kernels, as a model does."""
    with kernels.use_backend("cuda", ops=OPS):
        q, q_sink = kernels.kv_append(q, k, v, layer, turns=turns(q.shape[3]))
        return kernels.decode_attention(q, layer, q_sink=q_sink, **options)


# --- right ---------------------------------------------------------------------------------------


@pytest.mark.conformance
@pytest.mark.parametrize("ring", [False, True], ids=["all keys", "ring with sinks"])
@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("D", [64, 128, 256])
def test_long_caches_of_sequences_of_any_length(D, int8, ring):
    """What is appended follows the reference, and attention of it the reference in float64."""
    torch.manual_seed(0)
    B, kv_heads = 8, 2
    lengths = torch.tensor([KEYS - 16, 0, 1, 15, 1000, 4097, 16_384, 30_001], dtype=torch.int32)
    capacity, options = KEYS, {}
    if ring:
        lengths, capacity, options = lengths + 10**6, RING["window"] + 15, RING
    for T in (1, 4, 16):
        q, k, v = draw(B, kv_heads, T, D)
        ours = filled(empty(B, kv_heads, capacity, D, int8, **options), lengths)
        plain = copy_of(ours)
        with kernels.use_backend("cuda", ops=OPS):
            got = kernels.kv_append(q, k, v, ours, turns=turns(D))
        with kernels.use_backend("reference", ops=OPS):
            wanted = kernels.kv_append(q, k, v, plain, turns=turns(D))
        for a, b in zip((*got, *held(ours)), (*wanted, *held(plain)), strict=True):
            # A neighbour in the dtype, and one code of int8: a row's largest is 127 of them.
            ulps = torch.finfo(BF16).eps + (1 / 127 if a.dtype == torch.float32 else 0)
            largest = b.nan_to_num().abs().amax(-1, keepdim=True)
            assert torch.equal(a.isnan(), b.isnan())
            assert ((a - b).nan_to_num().abs() <= 1.01 * ulps * largest).all()
        bent = {"softcap": 20.0, "sink_logits": torch.linspace(-1, 1, kv_heads * SHARING).cuda()}
        for given in ({}, bent):
            with kernels.use_backend("cuda", ops=OPS):
                out = kernels.decode_attention(got[0], ours, q_sink=got[1], **given)
            with kernels.use_backend("reference", ops=OPS):
                exact = kernels.decode_attention(
                    got[0].double(), in_float64(ours), q_sink=got[1].double(), **given
                )
            bound = 4 * torch.finfo(BF16).eps * exact.abs().amax((1, 2, 3))
            assert ((out - exact).abs().amax((1, 2, 3)) <= bound).all(), (T, given)
        assert not ours.tickets.any()


def test_more_than_2_to_the_31_elements():
    """A cache so large that offsets need 64 bits: the last head must be the right one."""
    heads, capacity, D = 8, 2**21 + 1000, 128
    elements = heads * capacity * D
    if torch.cuda.mem_get_info()[0] < 3 * 2 * elements * 2:
        pytest.skip(f"needs {3 * 2 * elements * 2 / 2**30:.0f} GiB of free GPU memory")
    layer = filled(empty(1, heads, capacity, D), torch.tensor([capacity - 4], dtype=torch.int32))
    q, k, v = draw(1, heads, 4, D, sharing=2)
    out = step(q, k, v, layer)
    last = slice(heads - 1, heads)
    alone = replace(
        empty(1, 1, 16, D),
        keys=layer.keys[:, last].contiguous(),
        values=layer.values[:, last].contiguous(),
        lengths=layer.lengths,
    )
    assert torch.equal(alone.values[:, :, -4:], v[:, last])
    wanted = step(q[:, 2 * heads - 2 :], k[:, last], v[:, last], alone)
    torch.testing.assert_close(out[:, 2 * heads - 2 :], wanted, atol=1e-3, rtol=2e-2)


@pytest.mark.parametrize("D", [64, 128, 256])
def test_a_thousand_runs_give_the_same_bits(D):
    """Keys split among blocks, in whatever order these end, with other work on the card."""
    layer = filled(empty(2, 2, 8192, D), torch.tensor([8188, 3000], dtype=torch.int32))
    q, k, v = draw(2, 2, 4, D)
    first = step(q, k, v, layer)
    noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    different = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(1000):
        with torch.cuda.stream(other):
            noise @ noise
        different += (step(q, k, v, layer) != first).sum()
    assert different.item() == 0 and not layer.tickets.any()


# --- without the host ----------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("options", [{}, {"window": 100, "sink_tokens": 4}], ids=["all", "ring"])
def test_a_graph_captured_once_is_right_at_every_length(options, int8):
    """Lengths are on the device: the graph counts on, and gives the bits of eager calls."""
    torch.manual_seed(0)
    B, kv_heads, D, tokens = 3, 2, 64, 300
    capacity = 104 if options else tokens
    ours, eager = (empty(B, kv_heads, capacity, D, int8, **options) for _ in range(2))
    static = [t.clone() for t in draw(B, kv_heads, 1, D)]
    added = torch.tensor([1, 1, 0], dtype=torch.int32, device="cuda")
    rotation = turns(D)

    def one(q, k, v, layer):
        q, q_sink = kernels.kv_append(q, k, v, layer, new_lengths=added, turns=rotation)
        out = kernels.decode_attention(q, layer, q_sink=q_sink, new_lengths=added)
        layer.lengths.add_(added)
        return out

    with kernels.use_backend("cuda", ops=OPS):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            one(*static, copy_of(ours))
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = one(*static, ours)
        for step_number in range(tokens):
            tokens_now = draw(B, kv_heads, 1, D)
            added[1] = step_number % 2
            for buffer, tensor in zip(static, tokens_now, strict=True):
                buffer.copy_(tensor)
            graph.replay()
            assert torch.equal(captured, one(*tokens_now, eager))
    assert ours.lengths.tolist() == eager.lengths.tolist() == [tokens, tokens // 2, 0]
    for name, part in vars(eager).items():
        if isinstance(part, Tensor):
            assert torch.equal(getattr(ours, name), part), name


def test_no_call_waits_for_the_gpu(no_host_sync):
    layer = filled(empty(2, 2, 4096, 64), torch.tensor([4000, 3], dtype=torch.int32))
    rotation, (q, k, v) = turns(64), draw(2, 2, 4, 64)
    added = torch.tensor([4, 2], dtype=torch.int32, device="cuda")
    no_host_sync()
    with kernels.use_backend("cuda", ops=OPS):
        got, q_sink = kernels.kv_append(q, k, v, layer, new_lengths=added, turns=rotation)
        kernels.decode_attention(got, layer, q_sink=q_sink, new_lengths=added)


def test_it_runs_on_the_current_stream():
    layer = filled(empty(1, 2, 8192, 128), torch.tensor([8000], dtype=torch.int32))
    tokens = draw(1, 2, 4, 128)
    expected = step(*tokens, copy_of(layer))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = [t.mul(2.0).div(2.0) for t in tokens]
        got = step(*late, copy_of(layer))
    stream.synchronize()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
def test_compiled_is_one_graph_and_gives_the_same(int8):
    torch._dynamo.reset()
    rotation = turns(64)

    def layer_step(q, k, v, layer):
        q, q_sink = kernels.kv_append(q, k, v, layer, turns=rotation)
        return kernels.decode_attention(q, layer, q_sink=q_sink)

    compiled = torch.compile(layer_step, fullgraph=True, dynamic=False)
    eager = filled(
        empty(2, 2, 144, 64, int8, window=128, sink_tokens=4),
        torch.tensor([500, 700], dtype=torch.int32),
    )
    ours = copy_of(eager)
    with torch.no_grad():
        for _ in range(5):
            tokens = draw(2, 2, 4, 64)
            assert kernels.explain("decode_attention", tokens[0], ours).backend == "cuda"
            got, wanted = compiled(*tokens, ours), layer_step(*tokens, eager)
            torch.testing.assert_close(got, wanted, atol=1e-3, rtol=2e-2)
            for layer in (ours, eager):
                layer.lengths.add_(4)
    for a, b in zip(held(ours), held(eager), strict=True):
        assert torch.equal(a, b)

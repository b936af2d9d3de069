"""What only the C++ kernels of the cache have: instruction sets, threads, refusals."""

import dataclasses

import pytest
import torch
from cpu_kernels import available, needs_library, on_every_set, threads  # noqa: F401

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.kernels import KVLayer, cpu
from almostgpt.kernels.rope import turns_of

pytestmark = needs_library
ops = torch.ops.almostgpt
TURNS = turns_of(10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64))


def filled(int8=False, tokens=300, **options) -> KVLayer:
    """Of 2 sequences and 2 key heads of 64, with tokens before."""
    dtype = torch.int8 if int8 else torch.float32
    layer = KVLayer.empty(2, 2, 400, 64, dtype=dtype, **options)
    k = torch.randn(2, 2, tokens, 64)
    kernels.kv_append(k, k, torch.randn(2, 2, tokens, 64), layer, turns=TURNS)
    layer.lengths.fill_(tokens)
    return layer


def decoded(q, layer, number, **given):
    options = {
        "q_sink": None,
        "new_lengths": None,
        "alibi_slopes": None,
        "sink_logits": None,
        **given,
    }
    return ops.cpu_decode_attention(
        *(q, options["q_sink"], layer.keys, layer.values, layer.key_scales, layer.value_scales),
        *(layer.lengths, options["new_lengths"], options["alibi_slopes"], options["sink_logits"]),
        *(layer.reach, layer.sink_tokens, 0.125, 0.0, number),
    )


@on_every_set
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
def test_every_instruction_set_is_as_close_to_float64(number, int8, sinks):
    options = {"window": 150, "sink_tokens": 3} if sinks else {}
    layer = filled(int8, **options)
    q = torch.randn(2, 6, 5, 64)
    k = torch.randn(2, 2, 5, 64)
    kernels.kv_append(q, k, k, layer)
    wide = dataclasses.replace(
        layer,
        key_scales=None,
        value_scales=None,
        **{
            name: getattr(layer, name).double()
            * (getattr(layer, scales).double()[..., None] if int8 else 1)
            for name, scales in (("keys", "key_scales"), ("values", "value_scales"))
        },
    )
    with kernels.use_backend("reference"):
        exact = kernels.decode_attention(q.double(), wide)
    # Each product and each weight is off by a few units; |v| is up to 4.
    assert (decoded(q, layer, number).double() - exact).abs().max() < 4e-6


@on_every_set
def test_threads_do_not_change_a_bit(number, threads):  # noqa: F811
    q = torch.randn(2, 6, 3, 64)
    results = []
    for count in (1, 2):
        threads(count)
        torch.manual_seed(3)
        layer = filled()
        results.append((layer.keys, layer.values, decoded(q, layer, number)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_exponentials_from_the_largest_to_the_smallest():
    """Scores 0 … −89 below the largest, all of them and their differences exact in float32."""
    layer = KVLayer.empty(1, 1, 112, 16)
    q = torch.zeros(1, 1, 1, 16)
    q[..., 0] = 1
    steps = torch.arange(111) * 0.8125
    layer.keys[0, 0, :111, 0] = -steps
    layer.lengths.fill_(110)
    for offset in range(0, 111, 16):
        layer.values.zero_()
        rows = range(offset, min(offset + 16, 111))
        for i in rows:
            layer.values[0, 0, i, i - offset] = 1
        weights = (-steps.double()).softmax(0)[list(rows)]
        for number in available:
            got = ops.cpu_decode_attention(
                *(q, None, layer.keys, layer.values, None, None, layer.lengths, None, None, None),
                *(112, 0, 1.0, 0.0, number),
            )[0, 0, 0, : len(rows)].double()
            # In float32 nothing below e^−87 is normal: those weights are 0.
            assert ((got - weights).abs() <= 1e-6 * weights + 1e-37).all()


def test_opcheck():
    for int8 in (False, True):
        layer = filled(int8, tokens=20, window=30, sink_tokens=2)
        q, k = torch.randn(2, 4, 3, 64), torch.randn(2, 2, 3, 64)
        parts = (layer.keys, layer.values, layer.key_scales, layer.value_scales, layer.lengths)
        for turns, two in ((TURNS, True), (TURNS, False), (None, False)):
            arguments = (q, k, k, *parts, None, turns, 2, 30, two, cpu.BEST)
            torch.library.opcheck(ops.cpu_kv_append.default, arguments)
        arguments = (q, q, *parts, None, None, None, 30, 2, 0.1, 0.0, cpu.BEST)
        torch.library.opcheck(ops.cpu_decode_attention.default, arguments)


def test_which_one_runs():
    layer, q, k = filled(), torch.randn(2, 4, 1, 64), torch.randn(2, 2, 1, 64)
    for op, arguments in (("kv_append", (q, k, k, layer)), ("decode_attention", (q, layer))):
        assert kernels.explain(op, *arguments).backend == "cpu"
        answer = kernels.explain(op, *arguments, capability=(9, 0))
        assert answer.backend == "reference" and "not for a GPU" in answer.reasons["cpu"]
    apart = dataclasses.replace(layer, keys=layer.keys.mT.contiguous().mT)
    answer = kernels.explain("decode_attention", q, apart)
    assert answer.backend == "reference" and "contiguous slots" in answer.reasons["cpu"]
    half = KVLayer.empty(2, 2, 10, 64, dtype=torch.bfloat16)
    with kernels.use_backend("cpu"), pytest.raises(UserError, match="float32, not torch.bfloat16"):
        kernels.decode_attention(q.bfloat16(), half)
    with kernels.use_backend("cpu"), pytest.raises(UserError, match="scales above 1e30"):
        kernels.decode_attention(q, layer, scale=1e31)


def test_what_the_ops_themselves_refuse():
    layer, q, k = filled(), torch.randn(2, 4, 1, 64), torch.randn(2, 2, 1, 64)
    with pytest.raises(RuntimeError, match="as wide as the slots"):
        decoded(q[..., :48], layer, cpu.BEST)
    with pytest.raises(RuntimeError, match="float32"):
        decoded(q.double(), layer, cpu.BEST)
    with pytest.raises(RuntimeError, match="no instruction set 9"):
        decoded(q, layer, 9)
    with pytest.raises(RuntimeError, match=r"alibi_slopes must be \(4,\)"):
        decoded(q, layer, cpu.BEST, alibi_slopes=torch.ones(3))
    parts = (layer.keys, layer.values, None, None, layer.lengths)
    with pytest.raises(RuntimeError, match="k and v must be"):
        ops.cpu_kv_append(q, k[:, :1], k[:, :1], *parts, None, None, 0, 400, False, cpu.BEST)
    with pytest.raises(RuntimeError, match="and no others, have scales"):
        ops.cpu_kv_append(
            *(q, k, k, layer.keys, layer.values, torch.ones(2, 2, 400), None, layer.lengths),
            *(None, None, 0, 400, False, cpu.BEST),
        )

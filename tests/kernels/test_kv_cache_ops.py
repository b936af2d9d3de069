"""The ops of the cache as torch ops: opcheck, compilation, what they refuse, and which kernel runs."""

import dataclasses
import math

import pytest
import torch
from attention_kernels import CARDS
from attention_truth import sinks
from kv_cache_backends import (
    device_of,
    dtype_of,
    param,
)
from kv_cache_truth import (
    OPS,
    Case,
    on,
    parts_of,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.kernels import KVLayer, emulator
from almostgpt.kernels.kv_cache import MAX_QUERIES
from almostgpt.kernels.kv_layer import MAX_POSITION
from almostgpt.kernels.rope import turns_of

# --- torch ops and compilation -----------------------------------------------------------------------


def of_the_ops(case: Case, T: int, *, new=None):
    """Arguments of torch.ops.almostgpt.kv_append and of decode_attention, after some tokens."""
    layer, generator = case.empty(zeros=True), torch.Generator().manual_seed(1)
    kernels.kv_append(*case.draw(7, generator), layer, turns=case.turns())
    layer.lengths.add_(7)
    q, k, v = case.draw(T, generator)
    parts = (layer.keys, layer.values, layer.key_scales, layer.value_scales)
    new = None if new is None else torch.tensor(new, dtype=torch.int32)
    window = layer.reach
    two = case.rotated > 0 and case.sinks > 0
    appended = (
        *(q, k, v, *parts, layer.lengths, new),
        *(case.turns(), case.sinks, window - 1 if two else -1),
    )
    options = case.options()
    decoded = (
        *(q, -q if case.sinks else None, *parts, layer.lengths, new),
        *(options.get("alibi_slopes"), options.get("sink_logits"), layer.tickets),
        *(window, case.sinks, 0.3, case.softcap),
    )
    return appended, decoded


@pytest.mark.parametrize(
    "case, new",
    [
        (Case(B=2, D=16, group=2), None),
        (Case(B=2, D=16, group=2, rotated=6, int8=True, dtype=torch.bfloat16), [0, 3]),
        (Case(D=32, rotated=32, window=20, sinks=3, alibi=True, sink_logits=True), None),
        (Case(D=16, window=20, sinks=3, int8=True, softcap=5.0, dtype=torch.float16), [2]),
    ],
    ids=["plain", "int8", "sinks", "int8 with sinks"],
)
def test_opcheck(case, new):
    appended, decoded = of_the_ops(case, 3, new=new)
    opcheck(torch.ops.almostgpt.kv_append.default, appended)
    opcheck(torch.ops.almostgpt.decode_attention.default, decoded)


def test_the_ops_say_what_they_write():
    for side in (torch.ops.almostgpt, torch.ops.almostgpt_emulator):
        for op, written in (
            (side.kv_append.default, {"keys", "values", "key_scales", "value_scales"}),
            (side.decode_attention.default, {"tickets"}),
        ):
            arguments = op._schema.arguments
            assert {a.name for a in arguments if a.is_write} == written


COMPILED = [param(backend) for backend in ("reference", *CARDS[:1], "cuda")]


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("int8", [False, True])
def test_compiled_whole_once_for_all_lengths(backend, int8):
    """Equal to eager, the same slots written, and nothing is compiled again as lengths grow.

    int8 without new_lengths, the other with them.
    """
    device = device_of(backend)
    case = Case(
        B=2, Hkv=2, group=2, D=20, dtype=dtype_of(backend), capacity=24, window=20, sinks=3,
        rotated=10, int8=int8,
    )  # fmt: skip
    turns, logits = case.turns(device), sinks(4, device=device)

    def step(q, k, v, layer, new_lengths):
        q, q_sink = kernels.kv_append(q, k, v, layer, new_lengths=new_lengths, turns=turns)
        return kernels.decode_attention(
            q, layer, q_sink=q_sink, new_lengths=new_lengths, sink_logits=logits
        )

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend=counter)
    generator = torch.Generator().manual_seed(1)
    ours, eager = case.empty(device), case.empty(device)
    with on(backend), torch.no_grad():
        for new in ([5, 5], [0, 3], [5, 2], [5, 5], [1, 5], [5, 5], [5, 4]):
            tokens = [x.to(device) for x in case.draw(5, generator)]
            lengths = torch.tensor([5, 5] if int8 else new, dtype=torch.int32, device=device)
            rest = None if int8 else lengths
            got, wanted = (
                f(*tokens, layer, rest) for f, layer in ((compiled, ours), (step, eager))
            )
            torch.testing.assert_close(got, wanted)
            for name, part in parts_of(eager).items():
                off_by = {"atol": 1, "rtol": 0} if part.dtype == torch.int8 else {}
                torch.testing.assert_close(parts_of(ours)[name], part, equal_nan=True, **off_by)
            ours.lengths.add_(lengths)
            eager.lengths.add_(lengths)
    assert counter.frame_count == 1
    torch._dynamo.reset()


# --- what cannot be ----------------------------------------------------------------------------------


def layer_of(**options) -> KVLayer:
    return KVLayer.empty(2, 2, 10, 8, **options)


Q, K = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 3, 8)
LAYER, WINDOWED = layer_of(), layer_of(window=8, sink_tokens=2)
INT8 = layer_of(dtype=torch.int8)
INTS = torch.zeros(2, dtype=torch.int32)


def altered(layer: KVLayer = LAYER, **parts) -> KVLayer:
    return dataclasses.replace(layer, **parts)


# Of both ops: q, the layer, options, what is said.
BAD_FOR_BOTH = [
    (Q, LAYER.keys, {}, "layer must be a KVLayer, not Tensor"),
    (Q, altered(values=LAYER.values[:, :1]), {}, r"one dtype, not \(2, 2, 10, 16\) torch.float32 and"),
    (Q, altered(values=LAYER.values.double()), {}, r"torch.float32 and \(2, 2, 10, 16\) torch.float64"),
    (Q, altered(keys=LAYER.keys[0], values=LAYER.values[0]), {}, r"two \(B, Hkv, C, D'\)"),
    (Q[0], LAYER, {}, r"q must be \(B, H, T, D\) .*, not \(4, 3, 8\) torch.float32"),
    (Q.int(), LAYER, {}, "16 bits or more, not .* torch.int32"),
    (Q[:1], LAYER, {}, r"\(1, 4, 3, 8\) does not fit a cache of \(2, 2, 10, 16\): one batch size"),
    (Q[:, :3], LAYER, {}, "query heads in a whole ratio to key heads"),
    (Q, altered(keys=LAYER.keys[:, :0], values=LAYER.values[:, :0]), {}, "does not fit a cache"),
    (torch.zeros(2, 4, 3, 17), LAYER, {}, "heads 17 wide take slots of 32, not of 16"),
    (Q, altered(INT8, key_scales=None), {}, r"int8 cache needs scales of \(2, 2, 10\) float32"),
    (Q, altered(INT8, value_scales=torch.zeros(2, 2, 9)), {}, "needs scales"),
    (Q, altered(INT8, value_scales=torch.zeros(2, 2, 10).double()), {}, "needs scales"),
    (Q.bfloat16(), LAYER, {}, "q is torch.bfloat16, but the cache stores torch.float32"),
    (Q, altered(sink_tokens=1), {}, "sink_tokens are for a window, and there is none"),
    (Q, altered(window=11), {}, "a window of 11 tokens, 0 of them sinks, does not fit into 10 slots"),
    (Q, altered(window=3, sink_tokens=3), {}, "0 ≤ sink_tokens < window ≤ slots"),
    (Q, altered(window=3, sink_tokens=-1), {}, "0 ≤ sink_tokens < window ≤ slots"),
    (Q, altered(window=2.5), {}, "a window of 2.5 tokens"),
    (Q, altered(lengths=INTS[:1]), {}, r"lengths must be int32 and \(2,\), not torch.int32 and \(1,\)"),
    (Q, altered(lengths=INTS.long()), {}, r"lengths must be int32 and \(2,\), not torch.int64"),
    (Q, LAYER, {"new_lengths": INTS.long()}, "new_lengths must be int32"),
    (Q, LAYER, {"new_lengths": INTS[:1]}, "new_lengths must be int32"),
    (Q, LAYER, {"new_lengths": INTS + 4}, r"new_lengths must be within 0 … 3, not \[4, 4\]"),
    (Q, LAYER, {"new_lengths": INTS - 1}, r"within 0 … 3, not \[-1, -1\]"),
    (Q, LAYER, {"new_lengths": INTS.to("meta")}, "q is on cpu, and new_lengths on meta"),
    (Q, altered(lengths=INTS.to("meta")), {}, "q is on cpu, and lengths on meta"),
    (Q, altered(values=LAYER.values.to("meta")), {}, "q is on cpu, and its values on meta"),
    (Q, altered(keys=LAYER.keys.to("meta")), {}, "q is on cpu, and the cache on meta"),
    (Q, altered(INT8, key_scales=INT8.key_scales.to("meta")), {}, "and its keys' scales on meta"),
    (Q, altered(INT8, value_scales=INT8.value_scales.to("meta")), {}, "its values' scales on meta"),
    (Q, altered(lengths=INTS + 8), {}, "3 more tokens after 8 are not within the 10 that the cache has"),
    (Q, altered(lengths=INTS - 1), {}, "3 more tokens after -1 are not"),
    (
        Q,
        altered(WINDOWED, lengths=torch.tensor([0, MAX_POSITION - 2], dtype=torch.int32)),
        {},
        f"after {MAX_POSITION - 2} are not within the {MAX_POSITION} that the cache can count",
    ),
    (Q.clone().requires_grad_(), LAYER, {}, r"a cache is for inference.* torch.no_grad\(\)"),
]  # fmt: skip


@pytest.mark.parametrize("q, layer, options, says", BAD_FOR_BOTH)
def test_bad_inputs_of_both_ops_are_named(q, layer, options, says):
    k = torch.zeros(*q.shape[:1], 2, *q.shape[2:], dtype=q.dtype)
    with pytest.raises(UserError, match="kv_append: .*" + says):
        kernels.kv_append(q, k, k, layer, **options)
    with pytest.raises(UserError, match="decode_attention: .*" + says):
        kernels.decode_attention(q, layer, **options)


TURNS = turns_of(torch.ones(4).double())


@pytest.mark.parametrize(
    "q, k, v, layer, options, says",
    [
        (Q, K[0], K[0], LAYER, {}, r"k and v must be \(B, Hkv, T, D\) like q, not \(2, 3, 8\)"),
        (Q, K, K[:, :1], LAYER, {}, r"not \(2, 2, 3, 8\) and \(2, 1, 3, 8\)"),
        (Q, K[:, :, :2], K[:, :, :2], LAYER, {}, r"\(2, 2, 2, 8\) for q of \(2, 4, 3, 8\)"),
        (Q, K[..., :7], K[..., :7], LAYER, {}, "like q"),
        (Q, K[:1], K[:1], LAYER, {}, "like q"),
        (Q, K[:, :1], K[:, :1], LAYER, {}, "1 key heads for a cache of 2"),
        (Q, K.double(), K, LAYER, {}, "one dtype and device, not torch.float32 on cpu, torch.float64"),
        (Q, K, K.to("meta"), LAYER, {}, "torch.float32 on meta"),
        (torch.zeros(2, 4, 11, 8), *[torch.zeros(2, 2, 11, 8)] * 2, LAYER, {}, "11 tokens .* into 10"),
        (torch.zeros(2, 4, 9, 8), *[torch.zeros(2, 2, 9, 8)] * 2, WINDOWED, {}, "9 tokens .* into 8"),
        (Q, K, K, LAYER, {"turns": TURNS.int()}, r"turns must be int64 .* R at most 8, not torch.int32"),
        (Q, K, K, LAYER, {"turns": TURNS[None]}, r"and \(1, 4\)"),
        (Q, K, K, LAYER, {"turns": torch.cat([TURNS, TURNS])}, r"R at most 8, not torch.int64 and \(8,\)"),
        (Q, K, K, LAYER, {"turns": TURNS.to("meta")}, "q is on cpu, and turns on meta"),
        (Q, K.clone().requires_grad_(), K, LAYER, {}, "here a gradient is asked for"),
        (Q, K, K.clone().requires_grad_(), LAYER, {}, "here a gradient is asked for"),
    ],
)  # fmt: skip
def test_bad_inputs_of_append_are_named(q, k, v, layer, options, says):
    with pytest.raises(UserError, match="kv_append: .*" + says):
        kernels.kv_append(q, k, v, layer, **options)


@pytest.mark.parametrize(
    "q, layer, options, says",
    [
        (Q[:, :, :0], LAYER, {}, f"1 to {MAX_QUERIES} tokens at once, not 0; more go through flash_att"),
        (torch.zeros(2, 4, 17, 8), KVLayer.empty(2, 2, 20, 8), {}, "not 17"),
        (Q, LAYER, {"q_sink": Q[:, :, :2]}, r"q_sink must be like q, not \(2, 4, 2, 8\) torch.float32"),
        (Q, LAYER, {"q_sink": Q.double()}, r"q_sink must be like q, not .* torch.float64"),
        (Q, LAYER, {"q_sink": Q.to("meta")}, "q_sink must be like q"),
        (Q, altered(window=9), {}, "3 tokens at once with a window of 9 need 11 slots, .* has 10"),
        (Q, LAYER, {"scale": 0.0}, "scale must be a number above 0, not 0.0"),
        (Q, LAYER, {"scale": math.inf}, "scale must be a number above 0, not inf"),
        (Q, LAYER, {"scale": torch.tensor(1.0)}, "scale must be a number above 0"),
        (Q, LAYER, {"softcap": -1.0}, "softcap must be 0 .none. or above, not -1.0"),
        (Q, LAYER, {"softcap": math.nan}, "softcap must be 0 .none. or above, not nan"),
        (Q, LAYER, {"softcap": None}, "softcap must be 0 .none. or above, not None"),
        (Q, LAYER, {"alibi_slopes": torch.ones(2)}, r"alibi_slopes must be \(4,\) floats.*, not \(2,\)"),
        (Q, LAYER, {"alibi_slopes": torch.ones(4).int()}, "alibi_slopes must be .* of torch.int32"),
        (Q, LAYER, {"sink_logits": torch.ones(4, 1)}, r"sink_logits must be \(4,\)"),
        (Q, LAYER, {"sink_logits": torch.ones(4, device="meta")}, "q is on cpu and sink_logits on meta"),
        (Q, LAYER, {"q_sink": Q.clone().requires_grad_()}, "here a gradient is asked for"),
        (Q, LAYER, {"alibi_slopes": torch.ones(4, requires_grad=True)}, "a gradient is asked for"),
        (Q, LAYER, {"sink_logits": torch.ones(4, requires_grad=True)}, "a gradient is asked for"),
    ],
)  # fmt: skip
def test_bad_inputs_of_decode_are_named(q, layer, options, says):
    with pytest.raises(UserError, match="decode_attention: .*" + says):
        kernels.decode_attention(q, layer, **options)


def test_under_no_grad_parameters_are_fine():
    layer, q, k = layer_of(), Q.clone().requires_grad_(), K.clone().requires_grad_()
    with torch.no_grad():
        got, _ = kernels.kv_append(q, k, k, layer, turns=TURNS)
        out = kernels.decode_attention(got, layer, sink_logits=torch.ones(4, requires_grad=True))
    assert not out.requires_grad and not layer.keys.requires_grad


def test_nothing_is_written_where_something_is_wrong():
    layer = layer_of()
    with pytest.raises(UserError):
        kernels.kv_append(Q + 1, K + 1, K + 1, layer, new_lengths=INTS + 4)
    assert not layer.keys.any() and not layer.values.any()


# --- which kernel runs -------------------------------------------------------------------------------


def test_explain():
    def found(op, *, dtype=torch.bfloat16, D=64, device="meta", cached=None, **options):
        q, k = (torch.empty(2, H, 3, D, dtype=dtype, device=device) for H in (4, 2))
        layer = KVLayer.empty(2, 2, 10, D, dtype=cached or dtype, device=device)
        rest = (k, k, layer) if op == "kv_append" else (layer,)
        return kernels.explain(op, q, *rest, capability=(9, 0), **options)

    for op in OPS:
        for serves in ({}, {"dtype": torch.float16, "D": 20}, {"D": 256, "cached": torch.int8}):
            answer = found(op, **serves)
            assert answer.backend == "cuda", str(answer)
            assert answer.reasons["triton"] == "no triton kernel for this op"
            assert "cuda comes first" in answer.reasons["reference"]
        for wrong, why in (
            ({"dtype": torch.float32}, "bfloat16 and float16, not torch.float32"),
            ({"dtype": torch.float64, "cached": torch.int8}, "not torch.float64"),
            ({"D": 257}, "heads up to 256 wide, not 257"),
        ):
            answer = found(op, **wrong)
            assert answer.backend == "reference" and why in answer.reasons["cuda"]
    for wrong, why in (
        ({"softcap": 1001.0}, "softcaps up to 1000"),
        ({"softcap": 1e-31}, "softcaps below 1e-30"),
        ({"scale": 2e30}, "scales above 1e30"),
    ):
        answer = found("decode_attention", **wrong)
        assert answer.backend == "reference" and why in answer.reasons["cuda"]


def test_explain_on_this_machine():
    layer = KVLayer.empty(2, 2, 10, 8, dtype=torch.bfloat16)
    for op, rest in (("kv_append", (K.bfloat16(), K.bfloat16())), ("decode_attention", ())):
        answer = kernels.explain(op, Q.bfloat16(), *rest, layer)
        assert answer.backend == "reference"
        assert answer.reasons["cuda"] == "the tensors are on cpu"


@pytest.mark.skipif(emulator.refuse() is not None, reason="no emulator")
def test_a_forced_backend_says_why_it_cannot():
    says = "the CUDA kernels compute in bfloat16 and float16, not torch.float32"
    with on(CARDS[0]):
        with pytest.raises(
            UserError, match=f"'emulator' is forced but cannot run kv_append: {says}"
        ):
            kernels.kv_append(Q, K, K, LAYER)
        with pytest.raises(UserError, match=f"cannot run decode_attention: {says}"):
            kernels.decode_attention(Q, LAYER)
    with on("triton"), pytest.raises(UserError, match="no triton kernel for this op"):
        kernels.decode_attention(Q, LAYER)

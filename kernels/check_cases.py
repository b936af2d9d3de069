"""The ways to call each op that ``info --check`` goes through: inputs, definition, and work."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from almostgpt.kernels import check_linear, check_parts
from almostgpt.kernels.check_case import Case, Shape, Work
from almostgpt.kernels.check_kv_cache import (
    kv_heads,
    layer_for,
    plain_decode_attention,
    plain_kv_append,
)
from almostgpt.kernels.kv_layer import KVLayer
from almostgpt.kernels.rope import turns_of

# ---------------------------------------------------------------- the cases


def _plain_rms_norm(x, weight, eps, residual=None):
    total = x if residual is None else x + residual
    y = total * torch.rsqrt((total * total).mean(-1, keepdim=True) + eps) * weight
    return y if residual is None else (y, total)


def _plain_attention(q, k, v, *, causal, window=None, softcap=0.0):
    def one_head(q, k, v):
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if causal:
            sees = torch.ones_like(scores, dtype=torch.bool).tril()
            if window is not None:
                sees = sees.triu(-window[0])
            scores = scores.masked_fill(~sees, -math.inf)
        return scores.softmax(-1) @ v

    # Of one head at a time, so that (T, T) matrices in float64 fit for long sequences too.
    heads = zip(*(t.flatten(0, 1) for t in (q, k, v)), strict=True)
    return torch.stack(
        [checkpoint(one_head, *head, use_reentrant=False) for head in heads]
    ).view_as(q)


def _plain_swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def _plain_gelu(x, approximate="none"):
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def _plain_relu_squared(x):
    return x.clamp(min=0).square()


def _plain_rope(x, cos, sin, positions):
    half = cos.shape[1]
    cos, sin = (table[positions].unsqueeze(-2).to(x.dtype) for table in (cos, sin))
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def _plain_cross_entropy(logits, targets, **options):
    """Of every row; in the arithmetic of the logits, as all of these are."""
    return torch.logsumexp(logits, -1) - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _plain_linear_cross_entropy(hidden, weight, targets, **options):
    return _plain_cross_entropy(hidden @ weight.t(), targets)


_RMS_NORM = Case(
    "rms_norm",
    dimensions="ROWSxWIDTH",
    inputs=lambda shape, normal: {"x": normal(shape), "weight": normal(shape[-1:]), "eps": 1e-5},
    plain=_plain_rms_norm,
    outputs=("y",),
    work=lambda shape: {
        "forward": Work(2 * math.prod(shape)),  # x, y
        "backward": Work(3 * math.prod(shape)),  # dy, x, dx
    },
    shapes={"cuda": (8192, 4096), "cpu": (512, 768), "emulator": (6, 1000)},
)

_ADD_RMS_NORM = Case(
    "rms_norm",
    dimensions="ROWSxWIDTH",
    inputs=lambda shape, normal: {
        **_RMS_NORM.inputs(shape, normal),
        "residual": normal(shape),
    },
    plain=_plain_rms_norm,
    outputs=("y", "sum"),
    work=lambda shape: {
        "forward": Work(4 * math.prod(shape)),  # x, residual, sum, y
        "backward": Work(4 * math.prod(shape)),  # dy, dsum, sum, dx
    },
    shapes=_RMS_NORM.shapes,
)


def _attention(causal: bool, **options) -> Case:
    def work(shape: Shape) -> dict[str, Work]:
        B, H, T, D = shape
        seen = T * T / 2 if causal else T * T  # pairs of a query and a key
        if "window" in options:
            seen = min(seen, T * (options["window"][0] + 1))
        elements, flops = B * H * T * D, 4 * B * H * seen * D
        return {
            "forward": Work(4 * elements, flops),  # q, k, v, out
            "backward": Work(8 * elements, 2.5 * flops),  # these, and their gradients
        }

    return Case(
        "flash_attention",
        dimensions="BxHxTxD",
        inputs=lambda shape, normal: {name: normal(shape) for name in "qkv"},
        plain=_plain_attention,
        outputs=("out",),
        work=work,
        shapes={"cuda": (4, 16, 2048, 128), "cpu": (2, 4, 160, 64), "emulator": (1, 2, 80, 64)},
        options={"causal": causal, **options},
    )


def _activation(op: str, plain, **options) -> Case:
    gated = op == "swiglu"

    def work(shape: Shape) -> dict[str, Work]:
        elements, read = math.prod(shape), 2 if gated else 1
        return {"forward": Work((read + 1) * elements), "backward": Work((2 * read + 1) * elements)}

    def inputs(shape: Shape, normal) -> dict[str, Tensor | float]:
        if gated:
            return {"gate_up": normal((*shape[:-1], 2 * shape[-1]))}
        return {"x": normal(shape)}

    return Case(
        op,
        dimensions="ROWSxHIDDEN",
        inputs=inputs,
        plain=plain,
        outputs=("y",),
        work=work,
        shapes={"cuda": (8192, 4096), "cpu": (512, 768), "emulator": (6, 1000)},
        options=options,
    )


def _rope(rotated: float = 1.0, documents: int = 1) -> Case:
    """Of a share of the dimensions; each row holds that many documents end to end."""

    def constants(shape: Shape) -> dict[str, Tensor]:
        B, T, _, D = shape
        half = int(rotated * D) // 2
        turns = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / max(half, 1))
        angles = torch.outer(torch.arange(T, dtype=torch.float64), turns)
        positions = torch.arange(T).expand(B, T) % -(-T // documents)
        return {"cos": angles.cos().float(), "sin": angles.sin().float(), "positions": positions}

    return Case(
        "rope",
        dimensions="BxTxHEADSxD",
        inputs=lambda shape, normal: {"x": normal(shape)},
        plain=_plain_rope,
        outputs=("y",),
        work=lambda shape: dict.fromkeys(("forward", "backward"), Work(2 * math.prod(shape))),
        shapes={"cuda": (8, 4096, 40, 128), "cpu": (2, 64, 12, 64), "emulator": (1, 8, 2, 16)},
        constants=constants,
    )


def _targets(rows: int, vocab_size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"targets": torch.randint(vocab_size, (rows,), generator=generator)}


_CROSS_ENTROPY = Case(
    "cross_entropy",
    dimensions="ROWSxVOCABULARY",
    inputs=lambda shape, normal: {"logits": normal(shape)},
    plain=_plain_cross_entropy,
    outputs=("losses",),
    work=lambda shape: {
        "forward": Work(math.prod(shape)),
        "backward": Work(2 * math.prod(shape)),  # logits, dlogits
    },
    shapes={"cuda": (8192, 50304), "cpu": (64, 5000), "emulator": (6, 1000)},
    options={"reduction": "none"},
    constants=lambda shape: _targets(*shape),
    output=lambda shape: shape[:1],
)


def _linear_cross_entropy_work(shape: Shape) -> dict[str, Work]:
    tokens, width, vocab_size = shape
    product = 2 * math.prod(shape)
    elements = tokens * width + vocab_size * width
    # Each with a gradient of its own, so backward computes the logits again.
    return {"forward": Work(elements, product), "backward": Work(2 * elements, 3 * product)}


_LINEAR_CROSS_ENTROPY = Case(
    "linear_cross_entropy",
    dimensions="TOKENSxWIDTHxVOCABULARY",
    inputs=lambda shape, normal: {
        "hidden": normal(shape[:2]),
        "weight": normal((shape[2], shape[1])),
    },
    plain=_plain_linear_cross_entropy,
    outputs=("losses",),
    work=_linear_cross_entropy_work,
    shapes={"cuda": (8192, 768, 50304), "cpu": (64, 64, 5000), "emulator": (6, 16, 1000)},
    options={"reduction": "none"},
    constants=lambda shape: _targets(shape[0], shape[2]),
    output=lambda shape: shape[:1],
)


_LINEAR = Case(
    "linear",
    dimensions="ROWSxINPUTSxOUTPUTS",
    inputs=check_linear.linear_inputs,
    plain=check_linear.plain_linear,
    outputs=("y",),
    work=lambda shape: {"forward": Work(*check_linear.linear_work(shape))},
    shapes={"cuda": (1, 4096, 4096), "cpu": (1, 768, 2304), "emulator": (1, 64, 48)},
    gradients=False,  # where one is asked for, PyTorch's own op runs
)

_INT8_LINEAR = Case(
    "int8_linear",
    dimensions="ROWSxINPUTSxOUTPUTS",
    inputs=check_linear.int8_linear_inputs,
    plain=check_linear.plain_int8_linear,
    outputs=("y",),
    work=lambda shape: {"forward": Work(*check_linear.int8_linear_work(shape))},
    shapes={"cuda": (8, 8192, 28672), "cpu": (4, 768, 3072), "emulator": (3, 80, 50)},
    gradients=False,
    slack=check_linear.int8_linear_slack,
)


def _kv_append(int8: bool = False, sinks: bool = False) -> Case:
    def inputs(shape: Shape, normal) -> dict[str, Tensor | KVLayer]:
        B, H, T, D = shape
        heads = {"q": H, "k": kv_heads(H), "v": kv_heads(H)}
        tokens = {name: normal((B, T, n, D)).transpose(1, 2) for name, n in heads.items()}
        return tokens | {"layer": layer_for((B, H, T + 4, D), normal, T, int8, sinks)}

    def work(shape: Shape) -> dict[str, Work]:
        B, H, T, D = shape
        rows, queries = 2 * B * kv_heads(H) * T, B * H * T * D
        elements = rows * D + queries * (3 if sinks else 2)
        if int8:
            return {"forward": Work(elements, bytes=rows * (D + 4))}
        return {"forward": Work(elements + rows * D)}

    def turns(shape: Shape) -> dict[str, Tensor]:
        half = shape[3] // 2
        return {"turns": turns_of(10000.0 ** -(torch.arange(half).double() / max(half, 1)))}

    return Case(
        "kv_append",
        dimensions="BxHxTxD",
        inputs=inputs,
        plain=plain_kv_append,
        outputs=("q", "q_sink", "keys", "values"),
        work=work,
        shapes={"cuda": (8, 32, 4096, 128), "cpu": (2, 8, 16, 64), "emulator": (2, 4, 5, 64)},
        constants=turns,
        gradients=False,
        writes=True,
    )


def _decode_attention(int8: bool = False, sinks: bool = False) -> Case:
    """Of the newest four tokens; with sinks over a ring, and with sink logits."""

    def inputs(shape: Shape, normal) -> dict[str, Tensor | KVLayer]:
        B, H, keys, D = shape
        T = min(4, keys)
        return {"q": normal((B, H, T, D)), "layer": layer_for(shape, normal, T, int8, sinks)}

    def work(shape: Shape) -> dict[str, Work]:
        B, H, keys, D = shape
        T = min(4, keys)
        rows, queries = 2 * B * kv_heads(H) * keys, 2 * B * H * T * D
        flops = 4 * B * H * T * keys * D
        if int8:
            return {"forward": Work(queries, flops, bytes=rows * (D + 4))}
        return {"forward": Work(queries + rows * D, flops)}

    return Case(
        "decode_attention",
        dimensions="BxHxKEYSxD",
        inputs=inputs,
        plain=plain_decode_attention,
        outputs=("out",),
        work=work,
        shapes={"cuda": (8, 32, 32768, 128), "cpu": (2, 8, 160, 64), "emulator": (1, 4, 80, 64)},
        constants=lambda shape: {"sink_logits": torch.linspace(-1, 1, shape[1])} if sinks else {},
        gradients=False,
    )


def _plain_sample(logits, positions, seeds, sequences, **options):
    """The largest logit, which needs no random number that two programs would have to share."""
    ids = logits.argmax(-1)
    return ids, torch.log_softmax(logits, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


# What is drawn is a token or is not, without an error to hold to a bound: the tests do that. Here the
# largest must be found, and its probability be right.
_SAMPLE = Case(
    "sample",
    dimensions="ROWSxVOCABULARY",
    inputs=lambda shape, normal: {
        "logits": normal(shape),
        **dict.fromkeys(("positions", "seeds", "sequences"), normal(shape[:1]).long()),
    },
    plain=_plain_sample,
    outputs=("ids", "log-probabilities"),
    work=lambda shape: {"forward": Work(math.prod(shape))},
    shapes={"cuda": (256, 50257), "cpu": (64, 5000), "emulator": (3, 1000)},
    options={"temperature": 0, "logprobs": True},
    output=lambda shape: shape[:1],
    gradients=False,
)


CASES: dict[str, Case] = {
    "rms_norm": _RMS_NORM,
    "rms_norm with a residual": _ADD_RMS_NORM,
    "rope": _rope(),
    "rope, packed documents": _rope(documents=3),
    "rope, a quarter of the dimensions": _rope(rotated=0.25),
    "flash_attention": _attention(causal=False),
    "flash_attention, causal": _attention(causal=True),
    "flash_attention, window": _attention(causal=True, window=(50, 0)),
    "flash_attention, softcap": _attention(causal=True, softcap=20.0),
    "cross_entropy": _CROSS_ENTROPY,
    "linear_cross_entropy": _LINEAR_CROSS_ENTROPY,
    "swiglu": _activation("swiglu", _plain_swiglu),
    "gelu": _activation("gelu", _plain_gelu),
    "gelu, tanh": _activation("gelu", _plain_gelu, approximate="tanh"),
    "relu_squared": _activation("relu_squared", _plain_relu_squared),
    "kv_append": _kv_append(),
    "kv_append, int8": _kv_append(int8=True),
    "kv_append, ring with sinks": _kv_append(sinks=True),
    "decode_attention": _decode_attention(),
    "decode_attention, int8": _decode_attention(int8=True),
    "decode_attention, ring with sinks": _decode_attention(sinks=True),
    "sample, greedy": _SAMPLE,
    "linear": _LINEAR,
    "int8_linear": _INT8_LINEAR,
    **check_parts.CASES,
}

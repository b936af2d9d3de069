"""Whether an op's kernel is right, and how fast it is, on shapes of one's own: ``info --check``.

Outputs and gradients are compared with the plain definition in float64. The bound is the rule of
the house: at most twice the error that the same definition makes in the op's own dtype, plus
four ulps of the largest value. On a GPU the kernel is also timed, against the reference and against
what the card can do at best: a large copy and a large matrix product, measured in the same run.

A ``Case`` says of one way to call an op what its inputs are, its definition, and its work.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.kernels.emulator import EmulatorError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """The least that must be done: elements read or written, each once, and operations."""

    elements: int
    flops: float = 0.0


@dataclass(frozen=True)
class Case:
    """One way to call an op.

    Attributes:
        op: its name in ``kernels.OPS``.
        dimensions: what a shape of it means, for messages.
        inputs: the op's positional arguments, by name, from a shape and a source of tensors.
        plain: the definition, in the dtype of its inputs; it takes what the op takes.
        outputs: names of what it returns.
        work: from a shape, of ``"forward"`` and ``"backward"``.
        shapes: what is checked where no shape is given: on ``"cuda"``, another device (``"cpu"``),
            or in the ``"emulator"``.
        options: keyword arguments of the op.
    """

    op: str
    dimensions: str
    inputs: Callable[[Shape, Callable[..., Tensor]], dict[str, Tensor | float]]
    plain: Callable[..., Tensor | tuple[Tensor, ...]]
    outputs: tuple[str, ...]
    work: Callable[[Shape], dict[str, Work]]
    shapes: dict[str, Shape]
    options: dict[str, object] = field(default_factory=dict)


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


CASES: dict[str, Case] = {
    "rms_norm": _RMS_NORM,
    "rms_norm with a residual": _ADD_RMS_NORM,
    "flash_attention": _attention(causal=False),
    "flash_attention, causal": _attention(causal=True),
    "flash_attention, window": _attention(causal=True, window=(50, 0)),
    "flash_attention, softcap": _attention(causal=True, softcap=20.0),
}


# ---------------------------------------------------------------- a check


@dataclass(frozen=True)
class Accuracy:
    """The largest error of one output or gradient, and what it may be."""

    tensor: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # False of NaN


@dataclass(frozen=True)
class Speed:
    """How fast one direction is on a GPU."""

    direction: str
    seconds: float
    speedup: float  # over the reference
    rate: float  # of what takes the card longer, moving the bytes or computing
    unit: str  # "GB/s" or "TFLOP/s"
    share: float  # of the card's own best: of a large copy, or of a large matrix product


@dataclass(frozen=True)
class Result:
    """What a check found."""

    case: str
    shape: Shape
    dtype: str
    backend: str
    kernel: str
    accuracies: tuple[Accuracy, ...] = ()
    speeds: tuple[Speed, ...] = ()
    problem: str | None = None  # what the emulator found wrong

    @property
    def ok(self) -> bool:
        return self.problem is None and all(accuracy.ok for accuracy in self.accuracies)

    def as_dict(self) -> dict:
        found = asdict(self) | {"ok": self.ok}
        found["accuracies"] = [asdict(a) | {"ok": a.ok} for a in self.accuracies]
        return found


def check(name: str, shape: Shape, dtype: str, device: torch.device) -> Result:
    """Run a case of ``CASES`` on the backend that is chosen (or forced, by ``use_backend``).

    Raises:
        UserError: no such case or dtype, a shape that is not the op's, or a forced backend that
            cannot serve.
    """
    if name not in CASES:
        raise UserError(f"no case named {name!r}; the cases are {', '.join(CASES)}")
    case = CASES[name]
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, not one of {', '.join(DTYPES)}")
    if len(shape) != case.dimensions.count("x") + 1 or min(shape) < 1:
        raise UserError(
            f"a shape of {case.op} is {case.dimensions}, not {'x'.join(map(str, shape))}"
        )
    op = kernels.OPS[case.op]
    # Drawn on the CPU: the same numbers everywhere.
    generator = torch.Generator().manual_seed(0)

    def normal(shape: Shape) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, DTYPES[dtype])

    inputs = case.inputs(shape, normal)
    upstream = [normal(shape) for _ in case.outputs]
    ours = functools.partial(op, **case.options)
    plain = functools.partial(case.plain, **case.options)
    explanation = kernels.explain(case.op, *inputs.values(), **case.options)
    result = functools.partial(Result, name, shape, dtype, explanation.backend, explanation.kernel)
    try:
        got = _outputs_and_gradients(ours, inputs, upstream)
    except EmulatorError as error:
        return result(problem=str(error))
    same = _outputs_and_gradients(plain, inputs, upstream)
    exact = _outputs_and_gradients(
        plain, {k: _exact(v) for k, v in inputs.items()}, [_exact(t) for t in upstream]
    )
    tensors = [*case.outputs, *(f"d{k}" for k, v in inputs.items() if isinstance(v, Tensor))]
    accuracies = _accuracies(tensors, got, same, exact)
    speeds = _speeds(case, ours, inputs, upstream) if device.type == "cuda" else ()
    return result(tuple(accuracies), tuple(speeds))


def _accuracies(names, got, same, exact) -> list[Accuracy]:
    accuracies = []
    # What a sum leaves where its terms cancel is rounding of the terms, in float32: of the size of
    # the largest value anywhere, so far as that is known.
    residue = 4 * torch.finfo(torch.float32).eps * max(_largest(tensor) for tensor in exact)
    for name, ours, plain, truth in zip(names, got, same, exact, strict=True):
        plain_error = _largest(_exact(plain) - truth)
        if not math.isfinite(plain_error):  # it overflows in float16, which excuses nothing
            plain_error = 0.0
        ulps = 4 * torch.finfo(ours.dtype).eps * _largest(truth)
        error = _largest(_exact(ours) - truth)
        accuracies.append(Accuracy(name, error, 2 * plain_error + ulps + residue))
    return accuracies


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def _outputs_and_gradients(function, inputs: dict, upstream: list[Tensor]) -> tuple[Tensor, ...]:
    leaves, outputs = _forward(function, inputs)
    return (*outputs, *torch.autograd.grad(outputs, leaves, upstream))


def _forward(function, inputs: dict) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The tensors among the inputs, as leaves of a graph, and the outputs."""
    arguments = [
        v.detach().requires_grad_() if isinstance(v, Tensor) else v for v in inputs.values()
    ]
    return [v for v in arguments if isinstance(v, Tensor)], _tuple(function(*arguments))


def _exact(value):
    """A tensor in float64, which mps does not have; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return (value.cpu() if value.device.type == "mps" else value).double()


def _tuple(outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


# ---------------------------------------------------------------- speed, on a GPU


def _speeds(case: Case, ours, inputs: dict, upstream: list[Tensor]) -> list[Speed]:
    x = next(iter(inputs.values()))
    times = _times(ours, inputs, upstream)
    with kernels.use_backend("reference", ops=(case.op,)):
        reference_times = _times(ours, inputs, upstream)
    speeds = []
    for direction, work in case.work(tuple(x.shape)).items():
        moved = work.elements * x.itemsize
        limits = [(moved, "GB/s", moved / _copy_rate(x.device))]
        if work.flops:
            limits.append((work.flops, "TFLOP/s", work.flops / _matmul_rate(x.device, x.dtype)))
        amount, unit, least = max(limits, key=lambda limit: limit[-1])
        seconds = times[direction]
        speedup = reference_times[direction] / seconds
        rate = amount / seconds / (1e9 if unit == "GB/s" else 1e12)
        speeds.append(Speed(direction, seconds, speedup, rate, unit, least / seconds))
    return speeds


def _times(function, inputs: dict, upstream: list[Tensor]) -> dict[str, float]:
    leaves, outputs = _forward(function, inputs)

    def backward():
        return torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)

    with torch.cuda.device(upstream[0].device):
        with torch.no_grad():
            forward_seconds = _seconds(lambda: function(*inputs.values()))
        return {"forward": forward_seconds, "backward": _seconds(backward)}


def _seconds(work: Callable[[], object], calls: int = 30) -> float:
    """Median seconds of a call on the current GPU, its inputs not in the cache."""
    for _ in range(3):
        work()
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, stop in events:
        # Takes the place of the inputs in the L2 cache; meanwhile the host puts the work into the
        # queue, so that no launch is waited for.
        flush.zero_()
        start.record()
        work()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events) / 1e3


@functools.cache
def _copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    with torch.cuda.device(device):
        # Random, since a device may move zeros faster than data.
        source = torch.randint(256, (1 << 30,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return 2 * source.numel() / _seconds(lambda: target.copy_(source))


@functools.cache
def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product of 8192 × 8192 matrices."""
    with torch.cuda.device(device):
        a, b = (torch.randn(8192, 8192, device=device).to(dtype) for _ in range(2))
        return 2 * 8192**3 / _seconds(lambda: a @ b)

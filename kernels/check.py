"""Whether an op's kernel is right, and how fast it is, on shapes of one's own: ``info --check``.

Outputs and gradients are compared with the plain definition in float64. The bound is the rule of
the house: at most twice the error that the same definition makes in the op's own dtype, plus
four ulps of the largest value. On a GPU the kernel is also timed, against the reference and against
what the card can do at best: a large copy and a large matrix product, measured in the same run.

The ways to call each op are in check_cases.py.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.kernels.check_cases import CASES, Case, Shape
from almostgpt.kernels.check_kv_cache import held
from almostgpt.kernels.emulator import EmulatorError
from almostgpt.kernels.kv_layer import KVLayer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

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
    upstream = [normal(case.output(shape)) for _ in case.outputs] if case.gradients else []
    constants = {k: v.to(device) for k, v in case.constants(shape).items()}
    ours = functools.partial(op, **constants, **case.options)
    plain = functools.partial(case.plain, **constants, **case.options)
    explanation = kernels.explain(case.op, *inputs.values(), **constants, **case.options)
    result = functools.partial(Result, name, shape, dtype, explanation.backend, explanation.kernel)
    outcome = _outputs_and_gradients if case.gradients else _outputs
    try:
        got = outcome(case, ours, inputs, upstream)
    except EmulatorError as error:
        return result(problem=str(error))
    same = outcome(case, plain, inputs, upstream)
    exact = outcome(
        case,
        functools.partial(plain, **{k: _exact(v) for k, v in constants.items()}),
        {k: _exact(v) for k, v in inputs.items()},
        [_exact(t) for t in upstream],
    )
    tensors = list(case.outputs)
    if case.gradients:
        tensors += [f"d{k}" for k, v in inputs.items() if isinstance(v, Tensor)]
    slack = case.slack(inputs) if explanation.backend == "cpu" else 0.0
    accuracies = _accuracies(tensors, got, same, exact, slack)
    speeds = _speeds(case, shape, ours, inputs, upstream) if device.type == "cuda" else ()
    return result(tuple(accuracies), tuple(speeds))


def _accuracies(names, got, same, exact, slack: float) -> list[Accuracy]:
    accuracies = []
    # What a sum leaves where its terms cancel is rounding of the terms, in float32: of the size of
    # the largest value anywhere, so far as that is known.
    residue = (
        4
        * torch.finfo(torch.float32).eps
        * max(_largest(t) for t in exact if t.is_floating_point())
    )
    for name, ours, plain, truth in zip(names, got, same, exact, strict=True):
        plain_error = _largest(_exact(plain) - truth)
        if not math.isfinite(plain_error):  # it overflows in float16, which excuses nothing
            plain_error = 0.0
        # Whole numbers are right or wrong.
        eps = torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0.0
        ulps = 4 * eps * _largest(truth)
        error = _largest(_exact(ours) - truth)
        accuracies.append(Accuracy(name, error, 2 * plain_error + ulps + residue + slack))
    return accuracies


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def _outputs(case: Case, function, inputs: dict, upstream: list[Tensor]) -> tuple[Tensor, ...]:
    """Those of an op without gradients, and what it wrote: into a layer that nobody else has."""
    arguments = {k: _copy(v) if isinstance(v, KVLayer) else v for k, v in inputs.items()}
    with torch.no_grad():
        outputs = _tuple(function(*arguments.values()))
    return (*outputs, *held(arguments["layer"])) if case.writes else outputs


def _copy(layer: KVLayer) -> KVLayer:
    return _with_tensors(layer, Tensor.clone)


def _exact_layer(layer: KVLayer) -> KVLayer:
    """Its slots in float64; of int8 what the codes stand for, and so without scales."""
    layer = _with_tensors(layer, _exact)
    keys, values = held(layer)
    return replace(layer, keys=keys, values=values, key_scales=None, value_scales=None)


def _with_tensors(layer: KVLayer, function: Callable[[Tensor], Tensor]) -> KVLayer:
    return replace(
        layer, **{k: function(v) for k, v in vars(layer).items() if isinstance(v, Tensor)}
    )


def _outputs_and_gradients(
    case: Case, function, inputs: dict, upstream: list[Tensor]
) -> tuple[Tensor, ...]:
    leaves, outputs = _forward(function, inputs)
    return (*outputs, *torch.autograd.grad(outputs, leaves, upstream))


def _forward(function, inputs: dict) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The tensors among the inputs, as leaves of a graph, and the outputs."""
    arguments = [
        v.detach().requires_grad_() if isinstance(v, Tensor) else v for v in inputs.values()
    ]
    return [v for v in arguments if isinstance(v, Tensor)], _tuple(function(*arguments))


def _exact(value):
    """A floating tensor in float64, which mps does not have; anything else as it is."""
    if isinstance(value, KVLayer):
        return _exact_layer(value)
    if not isinstance(value, Tensor):
        return value
    value = value.cpu() if value.device.type == "mps" else value
    return value.double() if value.is_floating_point() else value


def _tuple(outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


# ---------------------------------------------------------------- speed, on a GPU


def _speeds(case: Case, shape: Shape, ours, inputs: dict, upstream: list[Tensor]) -> list[Speed]:
    x = next(iter(inputs.values()))
    times = _times(ours, inputs, upstream)
    with kernels.use_backend("reference", ops=(case.op,)):
        reference_times = _times(ours, inputs, upstream)
    speeds = []
    for direction, work in case.work(shape).items():
        moved = work.elements * x.itemsize + work.bytes
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
    """Of both directions; without upstream gradients of forward alone."""
    with torch.cuda.device(next(iter(inputs.values())).device):
        with torch.no_grad():
            times = {"forward": cold_seconds(lambda: function(*inputs.values()))}
        if upstream:
            leaves, outputs = _forward(function, inputs)
            times["backward"] = cold_seconds(
                lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
            )
    return times


def cold_seconds(work: Callable[[], object], calls: int = 30) -> float:
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
        return 2 * source.numel() / cold_seconds(lambda: target.copy_(source))


@functools.cache
def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product of 8192 × 8192 matrices."""
    with torch.cuda.device(device):
        a, b = (torch.randn(8192, 8192, device=device).to(dtype) for _ in range(2))
        return 2 * 8192**3 / cold_seconds(lambda: a @ b)

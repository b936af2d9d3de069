"""``almostgpt info``: what is here, which kernel would run each op on it, and whether it is right."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import almostgpt
from almostgpt import kernels
from almostgpt.cli.arguments import capability, parse
from almostgpt.cli.info_model import is_about_model, run_model
from almostgpt.cli.plan import run_plan
from almostgpt.config import not_one_of
from almostgpt.device import pick_device
from almostgpt.errors import UserError
from almostgpt.kernels.check import DTYPES, Result, check
from almostgpt.kernels.check_cases import CASES, Case

DESCRIPTION = """Shows versions, devices, which kernels are built for which architectures, and which backend
each op would use on this machine, with the reason why the others would not.

With --check it runs the ops instead, and compares outputs and gradients with float64: an error may
be at most twice that of the plain definition in the same dtype, plus a few ulps. On a GPU it also
measures speed. The exit code is 1 when an error is larger.

With --config, or a setting of a model, it shows which backend each part of that model would use, and
why; almostgpt info --config quickstart --help says more.

With --plan it predicts memory and time of a training run; almostgpt info --plan --help says more.

examples:
  almostgpt info
  almostgpt info --json
  ALMOSTGPT_BACKEND=reference almostgpt info
  almostgpt info --check                                          every op, at modest shapes
  almostgpt info --check --op rms_norm --shape 4096x4096 --dtype bf16
  almostgpt info --check --op flash_attention --shape 2x12x1024x64    B x H x T x D
  almostgpt info --check --backend emulator --capability 9.0      the CUDA kernels, on a CPU
  almostgpt info --config gpt2-124m --capability 9.0              that model's parts, on an H100
  almostgpt info --plan --config gpt2-124m                        what a training run would take"""


@dataclass(frozen=True)
class InfoArguments:
    json: bool = False  # one JSON object on stdout instead of the tables
    device: str = "auto"  # the device to ask about: auto | cpu | cuda | cuda:N | mps
    check: bool = False  # run the ops, and compare them with float64; what follows is for it
    op: str | None = None  # the op to check; default: all
    shape: str | None = None  # such as 4096x4096, of --op
    dtype: str | None = None  # bf16 | fp16 | fp32; default: bf16, on a CPU fp32
    backend: str | None = None  # the backend to check; default: the best
    capability: str | None = None  # of the card that the emulator plays, such as 9.0


def run(arguments: list[str]) -> int:
    if "--plan" in arguments:  # it takes the settings of a training run, and not what follows here
        return run_plan([argument for argument in arguments if argument != "--plan"])
    if is_about_model(arguments):
        return run_model(arguments)
    given = parse(InfoArguments, arguments, prog="almostgpt info", description=DESCRIPTION)
    if given.check:
        return run_checks(given)
    for option in ("op", "shape", "dtype", "backend", "capability"):
        if getattr(given, option) is not None:
            raise UserError(f"--{option} says what to check: it needs --check")
    report = collect(pick_device(given.device))
    if given.json:
        print(json.dumps(report))
    else:
        _show(report)
    return 0


def collect(device: torch.device) -> dict[str, Any]:
    """Everything that the command prints, as JSON values."""
    return {
        "versions": {
            "almostgpt": almostgpt.__version__,
            "python": platform.python_version(),
            **_packages(),
        },
        "devices": {
            "chosen": str(device),
            "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads",
            **_gpus(),
        },
        "native": kernels.build_info()
        | {
            "cpu": ", ".join(kernels.cpu.available()) or "none",
            "emulator": kernels.emulator.refuse() or "built",
            "BPE trainer": "built" if importlib.util.find_spec("almostgpt._bpe") else "not built",
        },
        "ops": {
            name: _explain(name, args, kwargs) for name, args, kwargs in _example_calls(device)
        },
    }


def _packages() -> dict[str, str]:
    names = ("torch", "triton", "numpy", "tiktoken", "safetensors")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"cuda of torch": torch.version.cuda or "none"}


def _gpus() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {}
    described = {}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        described[f"cuda:{index}"] = (
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB, "
            f"{gpu.multi_processor_count} SMs"
        )
    return described


def _example_calls(device: torch.device) -> list[tuple[str, tuple, dict]]:
    """One ordinary call of every op, as a model makes it on this device."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x = torch.zeros(2, 64, 768, device=device, dtype=dtype)
    q = torch.zeros(1, 12, 64, 64, device=device, dtype=dtype)
    ids = torch.zeros(64, device=device, dtype=torch.int64)
    layer = kernels.KVLayer.empty(1, 12, 64, 64, dtype=dtype, device=device)
    token, turns = q[:, :, :1], ids[:32]
    codes = torch.zeros(768, 768, device=device, dtype=torch.int8)
    blocks = kernels.BlockPattern(16, 2, 1, kernels.random_blocks(0, 12, 4, 2, 1, 1).to(device))
    return [
        ("rms_norm", (x, torch.ones(768, device=device, dtype=dtype)), {}),
        ("rope", (q.transpose(1, 2), *(q.new_zeros(64, 32, dtype=torch.float32),) * 2), {}),
        ("flash_attention", (q, q, q), {"causal": True}),
        ("cross_entropy", (x[0], ids), {}),
        ("linear_cross_entropy", (x[0], x[1], ids), {}),
        ("swiglu", (x,), {}),
        ("gelu", (x,), {"approximate": "tanh"}),
        ("relu_squared", (x,), {}),
        ("kv_append", (token, token, token, layer), {"turns": turns}),
        ("decode_attention", (token, layer), {}),
        ("sample", (x[0], ids, ids, ids), {"top_k": 50}),
        ("linear", (x[0, :1], x[0]), {}),
        ("int8_linear", (x[:, 0], codes, torch.ones(768, device=device)), {}),
        ("linear_attention", (q, q, q), {}),
        ("block_sparse_attention", (q, q, q, blocks), {}),
        ("expert_linear", (x[0], x.new_zeros(4, 768, 768), ids[:4].int() + 64), {}),
    ]


def _explain(name: str, args: tuple, kwargs: dict) -> dict[str, Any]:
    try:
        explanation = kernels.explain(name, *args, **kwargs)
    except UserError as error:  # a forced backend cannot run it: this is where one comes to see why
        return {"backend": "none", "kernel": str(error), "reasons": {}}
    return {
        "backend": explanation.backend,
        "kernel": explanation.kernel,
        "reasons": explanation.reasons,
    }


def _show(report: dict[str, Any]) -> None:
    console = Console(file=sys.stdout, highlight=False)
    for section in ("versions", "devices", "native"):
        table = Table(
            title=section, title_justify="left", show_header=False, box=None, title_style="bold"
        )
        for key, value in report[section].items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            table.add_row(key, text or "none", style=None)
        console.print(table)
    console.print("ops", style="bold")
    for name, op in report["ops"].items():
        console.print(f"  {name}: [bold]{op['backend']}[/bold] ({op['kernel']})")
        for backend, reason in op["reasons"].items():
            console.print(f"    not {backend}: {reason}", markup=False)


# ---------------------------------------------------------------- --check


def run_checks(given: InfoArguments) -> int:
    """Checks what is asked for, prints the outcome and returns the exit code."""
    emulated = _emulated(given)
    device = pick_device("cpu" if emulated and given.device == "auto" else given.device)
    place = "cuda" if device.type == "cuda" else "cpu"
    if emulated or (place == "cpu" and "triton" in _forced(given)):  # Triton's interpreter
        place = "emulator"
    dtype = given.dtype or ("fp32" if place == "cpu" else "bf16")
    if dtype not in DTYPES:
        raise UserError(f"--dtype is {not_one_of(dtype, DTYPES)}")
    results, left_out = [], {}
    for name, case in _asked(given).items():
        shape = case.shapes[place] if given.shape is None else _shape(given.shape)
        forced = _forced_backend(given, case.op)
        try:
            with forced:
                results.append(check(name, shape, dtype, device))
        except UserError as error:
            if given.op is not None:
                raise
            left_out[name] = str(error)  # not every op has every backend
        except torch.OutOfMemoryError:
            sizes = "x".join(map(str, shape))
            raise UserError(f"{name} of {sizes} and its copy in float64 do not fit") from None
    if not results:
        raise UserError("nothing to check: " + "; ".join(dict.fromkeys(left_out.values())))
    if given.json:
        report = {"device": str(device), "ok": all(result.ok for result in results)}
        report["checks"] = [result.as_dict() for result in results]
        print(json.dumps(report | {"left_out": left_out}))
    else:
        for result in results:
            _show_check(result)
        for name, why in left_out.items():
            print(f"{name}: left out: {why}")
    return 0 if all(result.ok for result in results) else 1


def _asked(given: InfoArguments) -> dict[str, Case]:
    """The cases of the op, or all of them."""
    if given.op is None:
        if given.shape is not None:
            raise UserError("--shape is of one op: say which with --op")
        return CASES
    if given.op not in kernels.OPS:
        raise UserError(f"--op is {not_one_of(given.op, kernels.OPS)}")
    return {name: case for name, case in CASES.items() if case.op == given.op}


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split("x"))
    except ValueError:
        raise UserError(f"--shape is {text!r}, not whole numbers such as 4096x4096") from None


def _forced_backend(given: InfoArguments, op: str) -> AbstractContextManager:
    if given.capability is not None and not _emulated(given):
        raise UserError("--capability is of the card that the emulator plays: --backend emulator")
    if given.capability is not None:
        card = capability(given.capability)
        return kernels.use_backend("emulator", ops=[op], capability=card)
    return nullcontext() if given.backend is None else kernels.use_backend(given.backend, ops=[op])


def _forced(given: InfoArguments) -> list[str]:
    """The backends that are asked for, here or for the whole process."""
    return (given.backend or os.environ.get("ALMOSTGPT_BACKEND", "")).split(",")


def _emulated(given: InfoArguments) -> bool:
    return "emulator" in _forced(given)


def _show_check(result: Result) -> None:
    console = Console(file=sys.stdout, highlight=False)
    shape = " x ".join(map(str, result.shape))
    title = f"{result.case}: {result.backend} ({result.kernel}), {shape}, {result.dtype}"
    console.print(title, style="bold", markup=False, soft_wrap=True)
    if result.problem is not None:
        console.print(f"  FAILED: {result.problem}", markup=False, soft_wrap=True)
        return
    table = Table(box=None, padding=(0, 2))
    for column in ("", "largest error", "bound", ""):
        table.add_column(column, justify="left" if column == "" else "right")
    for a in result.accuracies:
        table.add_row(a.tensor, f"{a.error:.3g}", f"{a.bound:.3g}", "ok" if a.ok else "FAILED")
    console.print(table)
    for speed in result.speeds:
        best = "a copy" if speed.unit == "GB/s" else "a matrix product"
        print(
            f"  {speed.direction}: {1e6 * speed.seconds:.1f} us, {speed.speedup:.2f} times as fast as "
            f"the reference, {speed.rate:.0f} {speed.unit}, {100 * speed.share:.0f} % of {best}"
        )

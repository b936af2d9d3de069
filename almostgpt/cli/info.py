"""``almostgpt info``: what is here, and which kernel would run each op on it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import almostgpt
from almostgpt import kernels
from almostgpt.cli.arguments import parse
from almostgpt.device import pick_device

DESCRIPTION = """Shows versions, devices, which kernels are built for which architectures, and which backend
each op would use on this machine, with the reason why the others would not.

examples:
  almostgpt info
  almostgpt info --json
  ALMOSTGPT_BACKEND=reference almostgpt info"""


@dataclass(frozen=True)
class InfoArguments:
    json: bool = False  # one JSON object on stdout instead of the tables
    device: str = "auto"  # the device to ask about: auto | cpu | cuda | cuda:N | mps


def run(arguments: list[str]) -> int:
    given = parse(InfoArguments, arguments, prog="almostgpt info", description=DESCRIPTION)
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
        "native": kernels.build_info(),
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
    return [
        ("rms_norm", (x, torch.ones(768, device=device, dtype=dtype)), {}),
        ("flash_attention", (q, q, q), {"causal": True}),
    ]


def _explain(name: str, args: tuple, kwargs: dict) -> dict[str, Any]:
    explanation = kernels.explain(name, *args, **kwargs)
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

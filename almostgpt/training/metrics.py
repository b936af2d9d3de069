"""What a run measures: FLOPs, MFU, metrics.jsonl and the loss curve."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from almostgpt.files import write_text
from almostgpt.model import GPT

# Dense peak of the matrix units in TFLOP/s by (device name part, precision), from NVIDIA's data sheets
# without sparsity. The first name that occurs in the device's wins.
PEAK_TFLOPS = {
    "GB200": {"bf16": 2500, "fp16": 2500},
    "B200": {"bf16": 2250, "fp16": 2250},
    "H200": {"bf16": 989, "fp16": 989},
    "H100 PCIe": {"bf16": 756, "fp16": 756},
    "H100 NVL": {"bf16": 835, "fp16": 835},
    "H100": {"bf16": 989, "fp16": 989},
    "A100": {"bf16": 312, "fp16": 312, "fp32": 19.5},
    "A10G": {"bf16": 70, "fp16": 70, "fp32": 35},
    "L40S": {"bf16": 362, "fp16": 362, "fp32": 91.6},
    "L4": {"bf16": 121, "fp16": 121, "fp32": 30.3},
    "RTX 5090": {"bf16": 209.5, "fp16": 209.5, "fp32": 104.8},
    "RTX 4090": {"bf16": 165.2, "fp16": 165.2, "fp32": 82.6},
    "RTX 3090": {"bf16": 71, "fp16": 71, "fp32": 35.6},
    "V100": {"fp16": 125, "fp32": 15.7},
    "T4": {"fp16": 65, "fp32": 8.1},
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of the device's matrix units, or ``None`` where the table does not know it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, peaks in PEAK_TFLOPS.items():
        if part in name:
            return peaks[precision] * 1e12 if precision in peaks else None
    return None


def flops_per_token(model: GPT, tokens: int) -> float:
    """FLOPs of forward and backward for one token of a sequence of ``tokens``.

    Each weight that a token is multiplied with costs 2 FLOPs forward and 4 backward; of a mixture of
    experts those of the token's own count. Attention adds what its kind says: of a softmax QKᵀ and PV over
    the keys a query sees, the masked ones left out (Chowdhery et al. 2022, appendix B, with the causal
    half). Embedding look-ups cost nothing; the output projection is counted without the vocabulary's padding.
    """
    config = model.config
    forward = 2 * config.vocab_size * config.n_embd
    for block in model.blocks:
        matrices = sum(p.numel() for p in block.parameters() if p.dim() >= 2)
        unused = getattr(block.feedforward, "unused_weights", 0)
        forward += 2 * (matrices - unused) + block.attention.flops(tokens)
    return 3 * forward


class Stopwatch:
    """Wall time of the steps alone: evaluations, samples and checkpoints are paused out of it."""

    def __init__(self, device: torch.device):
        self.device = device
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, all work on the device done."""
        start, self._start = self._start, self._now()
        return self._start - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        elapsed = self._now() - self._start
        yield
        self._start = time.perf_counter() - elapsed

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: the device allocator's, or the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if (
        status.exists()
    ):  # Linux, whose ru_maxrss begins with that of the process that started this one
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


class StepLog:
    """A JSON-lines file of what happened at which step, on the disk as soon as it is written.

    Opening it for step ``n`` drops the lines of later steps, which a killed process may have written
    after its last checkpoint, and a last line that it left unfinished. With no line to keep and none
    written there is no file.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= step]
            write_text(path, "".join(_to_line(line) for line in kept))
        self._file: TextIO | None = None

    def write(self, values: dict[str, Any]) -> None:
        try:
            self._file = self._file or open(self.path, "a", encoding="utf-8")
            self._file.write(_to_line(values))
            self._file.flush()
        except OSError as error:  # the file's own errors do not name it
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # what a full disk left in the buffer was reported by write
                self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of such a file; one that a killed process left unfinished is passed over."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: they become None."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def _to_line(values: dict[str, Any]) -> str:
    return json.dumps(finite(values), allow_nan=False) + "\n"


def plot_loss(metrics: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws training and validation loss over the steps as a PNG."""
    from matplotlib.figure import Figure  # half a second to import, needed once, at the end

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(m["step"], m[key]) for m in metrics if m.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_name(f".{path.name}.writing")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)

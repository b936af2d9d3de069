"""What every benchmark here shares: how peers are timed against each other, and what is kept.

A *peer* is a function that gets ready, which is not timed, and returns the work, which is. Peers
run in turns, each round in another order, so that a machine that warms up, throttles or serves
somebody else slows all of them alike; a ratio is taken within a round and its median reported.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import itertools
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from almostgpt import kernels

Work = Callable[[], object]
Peer = Callable[[], Work]
Timer = Callable[[Peer], float]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------- timing


def wall_timer(calls: int) -> Timer:
    """Seconds of a call as the user waits for it, host work included: the mean of ``calls``."""

    def measure(peer: Peer) -> float:
        works = [peer() for _ in range(calls)]
        wait()
        start = time.perf_counter()
        for work in works:
            work()
        wait()
        return (time.perf_counter() - start) / calls

    return measure


def device_timer(calls: int) -> Timer:
    """Seconds of a call on the GPU, by CUDA events around ``calls`` of them; wall time on a CPU."""
    if DEVICE.type != "cuda":
        return wall_timer(calls)

    def measure(peer: Peer) -> float:
        works = [peer() for _ in range(calls)]
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        wait()
        # The GPU idles for a few milliseconds while the host puts all the work into the queue:
        # so no gap between two launches is timed.
        torch.cuda._sleep(10_000_000)
        start.record()
        for work in works:
            work()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / calls

    return measure


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class Race:
    """Times peers in turns; the first is ours."""

    def __init__(self, peers: dict[str, Peer], timer: Timer):
        self.peers, self.timer = peers, timer
        self.seconds: dict[str, list[float]] = {name: [] for name in peers}
        self._orders = itertools.cycle(_rotations(list(peers)))

    def round(self) -> None:
        """Every peer once."""
        for name in next(self._orders):
            self.seconds[name].append(self.timer(self.peers[name]))

    def restart(self) -> None:
        """Forgets the rounds so far: they were the warm-up."""
        for seconds in self.seconds.values():
            seconds.clear()

    def median(self, name: str) -> float:
        """Median seconds of a call."""
        return statistics.median(self.seconds[name])

    def spread(self, name: str) -> float:
        """Half the distance of the quartiles over the median: what is noise on this machine."""
        if len(self.seconds[name]) < 2:
            return 0.0
        low, middle, high = statistics.quantiles(self.seconds[name], n=4, method="inclusive")
        return (high - low) / 2 / middle

    def speedup(self, name: str, over: str) -> float:
        """How many times as fast as ``over``: the median of the ratios within each round."""
        pairs = zip(self.seconds[over], self.seconds[name], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def _rotations(names: list[str]) -> list[list[str]]:
    return [names[i:] + names[:i] for i in range(len(names))]


# ---------------------------------------------------------------- inputs, and the roofs


def input_sets(make: Callable[[], tuple], bytes_each: int) -> itertools.cycle:
    """Endless rotation over enough sets of inputs that no call finds its own in the cache."""
    # On a CPU the small sizes stay in the cache in real use too.
    l2 = torch.cuda.get_device_properties(DEVICE).L2_cache_size if DEVICE.type == "cuda" else 0
    return itertools.cycle([make() for _ in range(max(2, -(-4 * l2 // bytes_each)))])


def copy_bandwidth() -> float:
    """Bytes a second of a large copy on the device, read plus written: the roof of this machine."""
    size = 1 << (30 if DEVICE.type == "cuda" else 27)
    # Random, since a device may move zeros faster than data.
    source = torch.randint(256, (size,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    timer = device_timer(5)
    seconds = [timer(lambda: lambda: target.copy_(source)) for _ in range(7)][2:]
    return 2 * size / statistics.median(seconds)


class Reading:
    """The roof of what reads and hardly writes: how long the device takes to read ``bytes`` of them.

    A copy also writes, for which a processor first reads the lines that are written over, so it
    understates. The faster of two ways: our linear layer of one row, whose weight is far larger than
    the caches, and PyTorch's sum of that weight.
    """

    def __init__(self):
        dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
        rows = 1 << (18 if DEVICE.type == "cuda" else 16)  # 1 GiB, 512 MiB
        weight = torch.randn(rows, 2048, device=DEVICE, dtype=dtype)
        x = torch.randn(1, 2048, device=DEVICE, dtype=dtype)
        self.bytes = weight.nbytes
        self._works = [torch.no_grad()(lambda: kernels.linear(x, weight)), weight.sum]
        self._timer = device_timer(5)

    def seconds(self) -> float:
        return min(self._timer(lambda work=work: work) for work in self._works)


def read_bandwidth() -> float:
    """Bytes a second that the device reads at the most."""
    reading = Reading()
    return reading.bytes / statistics.median([reading.seconds() for _ in range(7)][2:])


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOPs a second of a large matrix product on the device: the roof of what computes."""
    size = 8192 if DEVICE.type == "cuda" else 1024
    # Random, since zeros cost less power, and a device at its limit of power runs faster with them.
    left, right = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    timer = device_timer(5)
    seconds = [timer(lambda: lambda: left @ right) for _ in range(7)][2:]
    return 2 * size**3 / statistics.median(seconds)


def peak_bytes(work: Work) -> int:
    """The most memory that a call takes at a time beyond what is in use before it.

    On a CPU by the kernel's own peak of the resident set, which Linux lets a process reset; 0 where
    it does not.
    """
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return 0
    gc.collect()
    reset.write_text("5")
    before = _resident(status, "VmRSS")
    work()
    return _resident(status, "VmHWM") - before


def _resident(status: Path, field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", status.read_text())[1])


# ---------------------------------------------------------------- peers


def check_equal(results: dict[str, Sequence[torch.Tensor]], float32: float = 1e-5) -> None:
    """Asserts that every peer computed the same as the first, but for rounding.

    ``float32``: by how much of its norm a float32 result may differ.
    """
    (ours, expected), *others = results.items()
    for name, tensors in others:
        for index, (tensor, wanted) in enumerate(zip(tensors, expected, strict=True)):
            assert tensor.dtype == wanted.dtype and tensor.shape == wanted.shape
            difference = (tensor - wanted).float().norm() / wanted.float().norm()
            # Peers round in other places, and add in another order.
            allowed = float32 if wanted.dtype == torch.float32 else 2e-2
            assert difference <= allowed, (
                f"result {index} of {name} differs from that of {ours} by {difference:.2e}"
            )


@functools.cache
def liger_trouble() -> str | None:
    """Why Liger's kernels do not run here, or None."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "not installed (pip install -e '.[bench]')"
    return None if DEVICE.type == "cuda" else "its Triton kernels need a GPU"


@functools.cache
def compile_trouble() -> str | None:
    """Why ``torch.compile`` does not work here, or None."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=DEVICE))
    except Exception as error:  # no C++ compiler, no Triton, an unsupported Python …
        return f"torch.compile fails here: {first_line(error)}"
    return None


def first_line(error: Exception) -> str:
    """What an error says, in a line for a table's notes."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:100]


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class Table:
    """What a benchmark found, for the terminal and for the results file."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str | int | float]]
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        cells = [self.columns, *([_cell(value) for value in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [self.title]
        for name, *values in cells:
            right = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
            lines.append("  " + "  ".join([name.ljust(widths[0]), *right]))
        return "\n".join([*lines, *(f"  ({note})" for note in self.notes)])

    def as_dict(self) -> dict:
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {"title": self.title, "rows": rows, "notes": list(self.notes)}


def bandwidth_table(
    title: str, race: Race, moved: int, copy_bandwidth: float, notes: Sequence[str] = ()
) -> Table:
    """Of a race of what moves bytes and hardly computes, ours first.

    moved: bytes that must be read or written at the least, each once.
    """
    ours = next(iter(race.peers))
    return Table(
        f"{title}; a copy moves {copy_bandwidth / 1e9:.0f} GB/s",
        ("", "us", "± %", "GB/s", "% of copy", "ours is faster by"),
        [
            [
                name,
                1e6 * race.median(name),
                100 * race.spread(name),
                moved / race.median(name) / 1e9,
                100 * moved / race.median(name) / copy_bandwidth,
                race.speedup(ours, over=name),
            ]
            for name in race.peers
        ],
        notes,
    )


def _cell(value: str | int | float) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def machine() -> dict[str, str | int | None]:
    """The hardware and the versions that a figure belongs to."""
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": date.today().isoformat(),
    }


def device_name() -> str:
    """The GPU's name, or the CPU's as the system knows it."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name(DEVICE)
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return named[1].strip() if named else platform.processor() or platform.machine()


def file_name(device: str) -> str:
    """``nvidia-h200.json`` of ``NVIDIA H200``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"

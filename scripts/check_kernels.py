#!/usr/bin/env python3
"""Compile every CUDA kernel for every architecture and check what the compiler says of it.

No GPU is needed. Fails on a register spill, and on any warning of nvcc or ptxas (C75xx among them:
matrix instructions that the compiler had to serialise). Prints registers, static shared memory and
spills of each kernel.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHS = ("80", "90a", "100", "120")


@dataclass(frozen=True)
class Kernel:
    name: str
    arch: str
    registers: int
    shared: int
    spills: int  # bytes stored and loaded


@dataclass(frozen=True)
class Report:
    """What one file, compiled for one architecture, came to."""

    source: Path
    arch: str
    kernels: tuple[Kernel, ...]
    problems: tuple[str, ...]


def archs_of(source: Path, archs: list[str]) -> list[str]:
    """Those that a file is for: ``*_sm90.cu`` holds instructions of 90a alone."""
    return [arch for arch in archs if arch == "90a" or not source.stem.endswith("_sm90")]


def compile_one(nvcc: str, source: Path, arch: str) -> Report:
    """Compile to machine code, which is thrown away, and read the compiler's messages."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-O3", "-std=c++17", "-I", CSRC, f"-arch=sm_{arch}", "-Xptxas", "-v"]
        command += ["-cubin", "-o", Path(folder) / "kernel.cubin", source]
        run = subprocess.run(command, capture_output=True, text=True)
    text = run.stdout + run.stderr
    kernels = parse(text, arch)
    warning = re.compile(r"\bwarning\b|C75\d\d", re.I)
    problems = [line.strip() for line in text.splitlines() if warning.search(line)]
    problems += [f"{k.name} spills {k.spills} bytes" for k in kernels if k.spills]
    if run.returncode != 0:
        problems.append(f"nvcc failed:\n{text.strip()}")
    return Report(source, arch, kernels, tuple(problems))


def parse(text: str, arch: str) -> tuple[Kernel, ...]:
    """The kernels in the messages of ``ptxas -v``."""
    entry = re.compile(
        r"Compiling entry function '(\w+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers([^\n]*)",
        re.S,
    )
    kernels = []
    for name, stores, loads, registers, rest in entry.findall(text):
        shared = re.search(r"(\d+) bytes smem", rest)
        spills = int(stores) + int(loads)
        kernels.append(Kernel(name, arch, int(registers), int(shared[1]) if shared else 0, spills))
    return tuple(kernels)


def readable(names: list[str]) -> dict[str, str]:
    """Mangled name -> name with its template arguments, where c++filt is there."""
    if not shutil.which("c++filt"):
        return {name: name for name in names}
    run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    short = []
    for line in run.stdout.splitlines():
        line = re.sub(r"almostgpt::|\(anonymous namespace\)::|^void ", "", line)
        short.append(re.sub(r"\(.*\)$", "", line))
    return dict(zip(names, short, strict=True))


def print_table(kernels: list[Kernel]) -> None:
    names = readable([kernel.name for kernel in kernels])
    width = max(len(name) for name in names.values())
    print(f"{'kernel':{width}}  arch  registers  shared  spills")
    for k in sorted(kernels, key=lambda k: (names[k.name], int(k.arch.rstrip("a")))):
        print(f"{names[k.name]:{width}}  {k.arch:>4}  {k.registers:9}  {k.shared:6}  {k.spills:6}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python scripts/check_kernels.py --archs 80 90a --jobs 2",
    )
    parser.add_argument("--archs", nargs="+", default=list(ARCHS), help="default: %(default)s")
    parser.add_argument("--nvcc", default="nvcc", help="the compiler (default: the one on PATH)")
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=jobs, help="default: MAX_JOBS, or all cores")
    options = parser.parse_args()
    nvcc = shutil.which(options.nvcc)
    if nvcc is None:
        print(f"check_kernels: no {options.nvcc}; install a CUDA toolkit", file=sys.stderr)
        return 1

    sources = sorted(CSRC.rglob("*.cu"))
    work = [(source, arch) for source in sources for arch in archs_of(source, options.archs)]
    with ThreadPoolExecutor(options.jobs) as pool:
        reports = list(pool.map(lambda item: compile_one(nvcc, *item), work))
    kernels = [kernel for report in reports for kernel in report.kernels]
    if kernels:
        print_table(kernels)
    problems = [(report, problem) for report in reports for problem in report.problems]
    for report, problem in problems:
        print(f"{report.source.relative_to(CSRC)} (sm_{report.arch}): {problem}", file=sys.stderr)
    print(f"{len(work)} compilations, {len(kernels)} kernels, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Compile every CUDA kernel for every architecture, and check what came out, without a GPU.

Fails on
  - any warning of nvcc or ptxas (C75xx among them: matrix instructions that had to be serialised);
  - a register spill, and any other use of local memory (the instructions LDL and STL);
  - machine code that is not as EXPECTED says, such as a copy that is not made in 16-byte pieces;
  - an entry of EXPECTED that matches no kernel.

Prints for each kernel its registers, static shared memory, bytes spilled, and how often its code
has each instruction that moves data in bulk or multiplies matrices. Needs nvcc, c++filt (it comes
with g++) and nvdisasm, which is in the CUDA toolkit and in the triton wheel.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHS = ("80", "90a", "100", "120")


@dataclass(frozen=True)
class Expectation:
    """What the machine code of some kernels holds, and what it must not hold."""

    kernels: str  # a regular expression for the whole of their names, as the table prints them
    has: str = ""  # instructions, separated by blanks, as the table prints them
    lacks: str = ""
    archs: tuple[str, ...] = ARCHS


EXPECTED = (
    Expectation(r".*", lacks="LDL STL"),
    # RMSNorm: of a row nothing moves in less than 16 bytes; only rstd is a single float.
    Expectation(
        r"forward_kernel<\w+, \w+, \d>", has="LDG.128 STG.128", lacks="LDG.16 LDG.32 STG.16"
    ),
    Expectation(
        r"backward_kernel<\w+, \w+, \d, \w+>",
        has="LDGSTS LDG.128 STG.128",
        lacks="LDG.16 STG.16 STG.32",
    ),
    # Attention: tiles come by cp.async and go in 16 bytes; nothing but the tensor cores multiplies.
    Expectation(
        r"attention_forward_kernel<.*>",
        has="LDGSTS LDSM HMMA STG.128",
        lacks="LDG.16 LDG.128 STG.16",
    ),
    # … and on Hopper by TMA, and wgmma reads them there.
    Expectation(
        r"attention_forward_sm90_kernel<.*>",
        has="UTMALDG HGMMA UTMASTG USETMAXREG",
        lacks="HMMA LDSM LDG.16 STG.16",
        archs=("90a",),
    ),
    Expectation(
        r"attention_backward_kernel<.*>",
        has="LDGSTS LDSM HMMA STG.128 LDG.128",
        lacks="LDG.16 STG.16",
    ),
    Expectation(r"prepare_kernel<\w+>", has="LDG.128 STG.128", lacks="LDG.16 STG.16"),
    Expectation(r"finish_kernel<\w+>", has="LDG.128 STG.128", lacks="LDG.16 LDG.32 STG.16 STG.32"),
    # The ladder of attention, step 2: 16 bytes at once, and no tensor cores yet.
    Expectation(
        r"tiled_kernel<\w+, \d+>", has="LDG.128 STG.128", lacks="LDG.16 LDG.32 STG.16 HMMA"
    ),
    # The cache: rows come and go in 16 bytes, as int8 in 8; keys and values by cp.async, and nothing
    # but the tensor cores multiplies. Where pairs do not fill vectors append goes element by element.
    Expectation(
        r"append_kernel<(\w+), \1, 8, 1>",
        has="LDG.128 STG.128",
        lacks="LDG.16 STG.16 STG.32 STG.64",
    ),
    Expectation(
        r"append_kernel<\w+, signed char, 8, 1>",
        has="LDG.128 STG.128 STG.64",
        lacks="LDG.16 STG.16 STG.8",
    ),
    Expectation(
        r"decode_kernel<.*>",
        has="LDGSTS LDSM HMMA STG.64 STG.128",
        lacks="LDG.16 STG.16",
    ),
    # Sampling: a row comes in 16 bytes, but for its ends.
    Expectation(
        r"sample_(filtered_)?kernel<.*>", has="LDG.128 STG.64 STG.32 STG.8", lacks="STG.128"
    ),
    # The weight of 8 bits comes in 16 bytes; scales are 32 bits, a bias may be 16.
    Expectation(r"int8_linear_kernel<.*>", has="LDG.128 HMMA", lacks="LDG.8 LDG.64 STG.32"),
    # The example matrix products: the ways of sm_80 and of sm_90 to the tensor cores.
    Expectation(r"gemm_sm80_kernel<\w+>", has="LDGSTS LDSM HMMA", lacks="LDG.16 LDG.32"),
    Expectation(
        r"gemm_sm90_kernel<\w+>",
        has="UTMALDG HGMMA UTMASTG",
        lacks="LDG.16 LDG.32 HMMA STG.16",
        archs=("90a",),
    ),
)

# LDGSTS: cp.async. LDSM: ldmatrix. HMMA: mma.sync. HGMMA: wgmma. UTMA…: TMA, to and from shared memory.
# USETMAXREG: setmaxnreg.
COUNTED = (
    *("LDG", "STG", "LDGSTS", "LDSM", "HMMA", "HGMMA"),
    *("UTMALDG", "UTMASTG", "UTMAREDG", "USETMAXREG", "LDL", "STL"),
)


# The example kernels are templates in headers, which no .cu file uses: file name -> what to compile.
INSTANTIATED = {
    "gemm_sm80.cu": """
        #include "tests/gemm_sm80.cuh"
        using almostgpt::device::bf16;
        template int almostgpt::examples::gemm_sm80(const bf16*, const bf16*, bf16*, int, int, int, void*);
    """,
    "gemm_sm90.cu": """
        #include "tests/gemm_sm90.cuh"
        using almostgpt::device::bf16;
        template int almostgpt::examples::gemm_sm90(const bf16*, const bf16*, bf16*, int, int, int, void*);
    """,
}


@dataclass(frozen=True)
class Kernel:
    name: str
    arch: str
    registers: int
    shared: int
    spills: int  # bytes stored and loaded
    instructions: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Tools:
    nvcc: str
    nvdisasm: str
    filt: str


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


def machine_code(tools: Tools, source: Path, arch: str) -> tuple[str, str | None]:
    """What nvcc says, and the code that nvdisasm prints; None where there is none to print."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        command = [tools.nvcc, "-O3", "-std=c++17", "-I", CSRC, f"-arch=sm_{arch}"]
        command += ["-Xptxas", "-v", "-cubin", "-o", cubin, source]
        run = subprocess.run(command, capture_output=True, text=True)
        text = run.stdout + run.stderr
        if run.returncode != 0:
            return f"nvcc failed:\n{text.strip()}", None
        code = subprocess.run([tools.nvdisasm, "-c", cubin], capture_output=True, text=True)
    if code.returncode != 0:
        return f"nvdisasm failed:\n{code.stderr.strip()}", None
    return text, code.stdout


def compile_one(tools: Tools, source: Path, arch: str) -> Report:
    """Compile to machine code; read the compiler's messages and the code, and throw it away."""
    text, code = machine_code(tools, source, arch)
    if code is None:
        return Report(source, arch, (), (text,))
    problems = [
        line.strip() for line in text.splitlines() if re.search(r"\bwarning\b|C75\d\d", line, re.I)
    ]
    kernels = parse(text, arch, count_instructions(code), lambda names: demangle(tools, names))
    problems += [f"{k.name} spills {k.spills} bytes" for k in kernels if k.spills]
    return Report(source, arch, kernels, tuple(problems))


def parse(text: str, arch: str, instructions: dict[str, Counter], readable) -> tuple[Kernel, ...]:
    """The kernels in the messages of ``ptxas -v``."""
    entry = re.compile(
        r"Compiling entry function '(\w+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers([^\n]*)",
        re.S,
    )
    found = entry.findall(text)
    names = readable([mangled for mangled, *_ in found])
    kernels = []
    for (mangled, stores, loads, registers, rest), name in zip(found, names, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels.append(
            Kernel(
                name,
                arch,
                int(registers),
                int(shared[1]) if shared else 0,
                int(stores) + int(loads),
                dict(instructions.get(mangled, {})),
            )
        )
    return tuple(kernels)


def count_instructions(code: str) -> dict[str, Counter]:
    """Mangled name -> how often each counted instruction stands in the code that nvdisasm prints."""
    counts: dict[str, Counter] = {}
    # A line is a section's head, or an address, perhaps a predicate, and an instruction:
    #     //--------------------- .text._Z4copyPf  ----------------
    #             /*0080*/              @!P0 LDG.E.128.CONSTANT R8, [R2.64] ;
    line = re.compile(
        r"^//-+ (?P<section>\S+) |^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(?P<opcode>[A-Z][\w.]+)",
        re.M,
    )
    current: Counter = Counter()
    for match in line.finditer(code):
        if match["section"]:
            current = Counter()
            if match["section"].startswith(".text."):
                counts[match["section"].removeprefix(".text.")] = current
        elif kind := kind_of(match["opcode"]):
            current[kind] += 1
    return counts


def kind_of(opcode: str) -> str | None:
    """``LDG.128`` of ``LDG.E.NA.128.CONSTANT``; None where the instruction is not counted."""
    name, *modifiers = opcode.split(".")
    if name not in COUNTED:
        return None
    if name not in ("LDG", "STG"):
        return name
    widths = (re.fullmatch(r"[US]?(8|16|64|128|256)", modifier) for modifier in modifiers)
    return f"{name}.{next((width[1] for width in widths if width), '32')}"


def demangle(tools: Tools, names: list[str]) -> list[str]:
    run = subprocess.run([tools.filt], input="\n".join(names), capture_output=True, text=True)
    return [short_name(line) for line in run.stdout.splitlines()]


def short_name(name: str) -> str:
    """A kernel's name with its template arguments, without namespaces, ``void`` and parameters."""
    name = re.sub(r"(\w+|\(anonymous namespace\))::|^void ", "", name)
    return re.sub(r"(?<=[\w>])\(.*\)$", "", name)


def unmet(kernels: list[Kernel], archs: list[str], expected: tuple[Expectation, ...]) -> list[str]:
    """What is not as expected, of those architectures that were compiled."""
    problems = []
    for expectation in expected:
        for arch in expectation.archs:
            if arch not in archs:
                continue
            matching = [
                k for k in kernels if k.arch == arch and re.fullmatch(expectation.kernels, k.name)
            ]
            if not matching:
                problems.append(f"no kernel for sm_{arch} matches {expectation.kernels!r}")
            for kernel in matching:
                missing = [i for i in expectation.has.split() if i not in kernel.instructions]
                unwanted = [i for i in expectation.lacks.split() if i in kernel.instructions]
                where = f"{kernel.name} (sm_{arch})"
                problems += [f"{where} has no {instruction}" for instruction in missing]
                problems += [f"{where} has {instruction}" for instruction in unwanted]
    return problems


def print_table(kernels: list[Kernel]) -> None:
    width = max(len(kernel.name) for kernel in kernels)
    print(f"{'kernel':{width}}  arch  registers  shared  spills  instructions")
    for k in sorted(kernels, key=lambda k: (k.name, int(k.arch.rstrip("a")))):
        order = sorted(k.instructions, key=lambda i: (COUNTED.index(i.split(".")[0]), -len(i), i))
        counts = " ".join(f"{instruction}:{k.instructions[instruction]}" for instruction in order)
        print(
            f"{k.name:{width}}  {k.arch:>4}  {k.registers:9}  {k.shared:6}  {k.spills:6}  {counts}"
        )


def find_tools(nvcc: str) -> Tools | str:
    """The programs, or what is missing and where it comes from."""
    compiler = shutil.which(nvcc)
    if compiler is None:
        return f"no {nvcc}; install a CUDA toolkit"
    filt = shutil.which("c++filt") or shutil.which("cu++filt")
    if filt is None:
        return "no c++filt; install g++ (binutils)"
    folders = [str(Path(compiler).resolve().parent)]
    if triton := importlib.util.find_spec("triton"):
        folders += [f"{path}/backends/nvidia/bin" for path in triton.submodule_search_locations]
    disassembler = shutil.which("nvdisasm") or shutil.which(
        "nvdisasm", path=os.pathsep.join(folders)
    )
    if disassembler is None:
        return (
            "no nvdisasm to count instructions with; it is in the CUDA toolkit and the triton wheel"
        )
    return Tools(compiler, disassembler, filt)


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
    tools = find_tools(options.nvcc)
    if isinstance(tools, str):
        print(f"check_kernels: {tools}", file=sys.stderr)
        return 1

    with tempfile.TemporaryDirectory() as folder:
        # The tests' own kernels too: there each instruction stands by itself.
        sources = sorted(CSRC.rglob("*.cu"))
        for name, text in INSTANTIATED.items():
            sources.append(Path(folder) / name)
            sources[-1].write_text(text)
        work = [(source, arch) for source in sources for arch in archs_of(source, options.archs)]
        with ThreadPoolExecutor(options.jobs) as pool:
            reports = list(pool.map(lambda item: compile_one(tools, *item), work))
    kernels = [kernel for report in reports for kernel in report.kernels]
    if kernels:
        print_table(kernels)
    problems = [
        f"{report.source.name} (sm_{report.arch}): {problem}"
        for report in reports
        for problem in report.problems
    ]
    problems += unmet(kernels, options.archs, EXPECTED)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(work)} compilations, {len(kernels)} kernels, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

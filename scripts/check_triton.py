#!/usr/bin/env python3
"""Compile every Triton kernel for every kind of card, and check what came out, without a GPU.

Fails on
  - a kernel that does not compile, or one that no call of an op launches;
  - a register spill, and any other use of local memory (the instructions LDL and STL);
  - machine code that is not as EXPECTED says, such as loads of less than 16 bytes.

What is compiled is what the ops launch: every call in ``scripts/backend_matrix.py`` is made on
tensors without data, forward and backward, with the launches recorded, and each is then compiled as
Triton would for aligned tensors, with the settings of that card. Prints for each kernel the most
registers and shared memory that a variant takes, and the instructions of its ordinary variant, the
one that is launched first. Needs nothing but Triton, which brings ptxas and nvdisasm; TRITON_INTERPRET
is ignored.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from check_kernels import COUNTED, Expectation, Kernel, count_instructions, parse, unmet

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
CARDS = {"80": (8, 0), "90": (9, 0), "100": (10, 0)}
DTYPES = ("bf16", "fp16", "fp32")
CONSTANT = ("cos", "sin")  # tensors that no op has a gradient of

EXPECTED = (
    Expectation(r".*", lacks="LDL STL", archs=tuple(CARDS)),
    Expectation(
        r"(rope|activations)\..*",
        has="LDG.128 STG.128",
        lacks="LDG.16 LDG.32 LDG.64 STG.16 STG.32 STG.64",
        archs=tuple(CARDS),
    ),
    # Beside the logits there are the numbers of each row: target, loss, logsumexp.
    Expectation(r"cross_entropy\..*", has="LDG.128", archs=tuple(CARDS)),
    Expectation(
        r"cross_entropy\._(backward|loss_and_gradient)_kernel .*",
        has="STG.128",
        lacks="STG.16 STG.64",
        archs=tuple(CARDS),
    ),
)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, its tensors by their dtypes alone."""

    kernel: Any
    dtype: str
    args: tuple
    options: dict[str, Any]

    @property
    def name(self) -> str:
        file = self.kernel.__module__.rpartition(".")[2].removesuffix("_triton")
        return f"{file}.{self.kernel.__name__} {self.dtype}"


@dataclass(frozen=True)
class Report:
    """What the launches of a kernel came to, for one dtype and one kind of card."""

    variants: tuple[Kernel, ...]  # compiled code; the ordinary one first, alone with instructions
    problems: tuple[str, ...]


# ---------------------------------------------------------------- what is launched


def record(card: tuple[int, int]) -> list[Launch]:
    """What all calls of all ops launch on a card, forward and backward, in order."""
    import backend_matrix
    import torch
    from torch._subclasses import FakeTensorMode

    from almostgpt import kernels
    from almostgpt.errors import UserError

    launches = []
    for op, calls in backend_matrix.CALLS.items():
        if "triton" not in kernels.OPS[op].backends:
            continue
        for call in calls.values():
            for dtype in DTYPES:

                def empty(*shape: int, dtype: torch.dtype = backend_matrix.DTYPES[dtype]):
                    return torch.empty(shape, dtype=dtype)

                with (
                    FakeTensorMode(),
                    recorded(card, dtype, launches),
                    kernels.use_backend("triton", ops=(op,)),
                    contextlib.suppress(UserError),  # not a call that Triton serves
                ):
                    _forward_and_backward(kernels.OPS[op], *call(empty))
    return launches


def _forward_and_backward(op, args: tuple, options: dict[str, Any]) -> None:
    """As training calls it, then as inference does."""
    import torch

    if not options.get("inplace"):
        bound = inspect.signature(op.check).bind(*args, **options).arguments
        leaves = [
            argument.requires_grad_()
            for name, argument in bound.items()
            if isinstance(argument, torch.Tensor)
            and argument.is_floating_point()
            and name not in CONSTANT
        ]
        outputs = op(*args, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, leaves, [torch.empty_like(y) for y in outputs])
    with torch.no_grad():
        op(*args, **options)


@contextlib.contextmanager
def recorded(card: tuple[int, int], dtype: str, launches: list[Launch]) -> Iterator[None]:
    """Launches are appended to the list instead of made, with the settings of that card.

    The ops are made to believe in the interpreter, which takes tensors of any device, and an
    interpreted kernel to be one that only notes what it is given.
    """
    import torch
    from triton.runtime.jit import MockTensor

    from almostgpt.kernels import triton_ops

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **options):
                args = [MockTensor(a.dtype) if isinstance(a, torch.Tensor) else a for a in args]
                launches.append(Launch(self.kernel, dtype, tuple(args), options))

            return launch

    settings_of = triton_ops.settings_of
    with mock.patch.multiple(
        triton_ops,
        INTERPRETED=True,
        _Interpreted=Recorder,
        settings_of=lambda kernel, _: settings_of(kernel, card),
    ):
        yield


def uncovered(launched: Iterable[Any]) -> list[str]:
    """Names of kernels in kernels/*_triton.py that are neither launched nor called by one that is."""
    import triton

    defined, calls = {}, {}
    for path in sorted(KERNELS.glob("*_triton.py")):
        module = importlib.import_module(f"almostgpt.kernels.{path.stem}")
        for name, kernel in vars(module).items():
            if isinstance(kernel, triton.JITFunction):
                defined[kernel] = f"{path.name}: {name}"
                calls[kernel] = set(re.findall(r"\w+", kernel.src)) - {name}
    reached, found = set(), set(launched)
    while found:
        reached |= found
        names = set().union(*(calls.get(kernel, set()) for kernel in found))
        found = {kernel for kernel in defined if kernel.__name__ in names} - reached
    return [where for kernel, where in defined.items() if kernel not in reached]


# ---------------------------------------------------------------- what comes of it


def compile_all(launches: list[Launch], arch: str) -> list[Report]:
    """Compile for one kind of card: a report for each kernel and dtype."""
    import triton
    from triton.backends.compiler import GPUTarget

    # All that Triton asks a driver for before it compiles.
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: int(arch),
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", int(arch), 32),
        )
    )
    names = dict.fromkeys(launch.name for launch in launches)
    return [
        compile_one(name, arch, [launch for launch in launches if launch.name == name])
        for name in names
    ]


def compile_one(name: str, arch: str, launches: list[Launch]) -> Report:
    variants: dict[str, Kernel] = {}  # by the hash of what was compiled
    problems = []
    for launch in launches:
        try:
            compiled = launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
        except Exception as error:  # whatever Triton or ptxas finds wrong
            problems.append(f"{name} (sm_{arch}) does not compile: {error}")
            continue
        if compiled.hash not in variants:
            # Disassembling takes longer than all the rest: of the ordinary variant only.
            variants[compiled.hash] = examine(name, arch, compiled, disassemble=not variants)
    problems += [
        f"{name} (sm_{arch}) spills {k.spills} bytes" for k in variants.values() if k.spills
    ]
    return Report(tuple(variants.values()), tuple(dict.fromkeys(problems)))


def examine(name: str, arch: str, compiled, disassemble: bool) -> Kernel:
    """Registers, spills and perhaps instructions of what Triton has compiled."""
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        gpu = sm_arch_from_capability(int(arch))
        ptxas = [get_ptxas(int(arch)).path, "-v", f"--gpu-name={gpu}", ptx, "-o", os.devnull]
        messages = subprocess.run(ptxas, capture_output=True, text=True, check=True).stderr
        code = ""
        if disassemble:
            nvdisasm = [knobs.nvidia.nvdisasm.path, "-c", cubin]
            code = subprocess.run(nvdisasm, capture_output=True, text=True, check=True).stdout
    (found,) = parse(messages, arch, count_instructions(code), list)
    shared = compiled.metadata.shared  # given at launch, so ptxas does not know it
    return replace(found, name=name, shared=shared)


def print_table(reports: list[Report]) -> None:
    compiled = [report.variants for report in reports if report.variants]
    width = max((len(variants[0].name) for variants in compiled), default=0)
    print(f"{'kernel':{width}}  arch  variants  registers  shared  spills  instructions")
    for variants in sorted(compiled, key=lambda v: (v[0].name, int(v[0].arch))):
        k = variants[0]
        order = sorted(k.instructions, key=lambda i: (COUNTED.index(i.split(".")[0]), -len(i), i))
        print(
            f"{k.name:{width}}  {k.arch:>4}  {len(variants):8}"
            f"  {max(v.registers for v in variants):9}  {max(v.shared for v in variants):6}"
            f"  {sum(v.spills for v in variants):6}"
            f"  {' '.join(f'{i}:{k.instructions[i]}' for i in order)}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--archs", nargs="+", choices=CARDS, default=list(CARDS), help="default: %(default)s"
    )
    options = parser.parse_args()
    # It is read when a kernel is decorated, and an interpreted kernel cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)

    reports, problems = [], []
    for arch in options.archs:
        launches = record(CARDS[arch])
        reports += compile_all(launches, arch)
        problems += [
            f"no call in scripts/backend_matrix.py launches {kernel}"
            for kernel in uncovered(launch.kernel for launch in launches)
        ]
    print_table(reports)
    ordinary = [report.variants[0] for report in reports if report.variants]
    problems += [problem for report in reports for problem in report.problems]
    problems += unmet(ordinary, options.archs, EXPECTED)
    for problem in dict.fromkeys(problems):
        print(problem, file=sys.stderr)
    variants = sum(len(report.variants) for report in reports)
    print(f"{variants} variants of {len(ordinary)} kernels, {len(set(problems))} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""scripts/check_triton.py: no kernel is left out, and what is wrong with one is said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(folder: Path, program: str) -> dict:
    """What a program prints that may import the scripts, its kernels not interpreted."""
    (folder / "program.py").write_text(program)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(SCRIPTS), "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, folder / "program.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_every_kernel_is_launched_and_one_that_is_not_is_named(tmp_path):
    found = run(
        tmp_path,
        """if True:
        import check_triton, json
        launches = check_triton.record((9, 0))
        kernels = [launch.kernel for launch in launches]
        print(json.dumps({
            "launched": [launch.name for launch in launches],
            "left out": check_triton.uncovered(kernels),
            "without rope": check_triton.uncovered(k for k in kernels if "rope" not in k.__module__),
        }))
        """,
    )
    assert found["left out"] == []
    assert found["without rope"] == ["rope_triton.py: _rope_kernel"]
    for dtype in ("bf16", "fp16", "fp32"):
        # Forward and backward, each also of inference.
        assert found["launched"].count(f"rope._rope_kernel {dtype}") > 5


# A copy, one that needs more registers than it may have, and one that is no program.
KERNELS = """
import triton
import triton.language as tl

@triton.jit
def copies(x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + BLOCK + i, tl.load(x + i))

@triton.jit
def spills(x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    y = tl.load(x + i)
    tl.store(x + i, y / tl.sum(y, 0))

@triton.jit
def fails(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK - 1), 0.0)
"""


@pytest.mark.slow
def test_a_spill_a_failure_and_the_width_of_instructions(tmp_path):
    (tmp_path / "bad_triton.py").write_text(KERNELS)
    found = run(
        tmp_path,
        """if True:
        import bad_triton, check_triton, json, torch
        from triton.runtime.jit import MockTensor
        x, launches = MockTensor(torch.float32), []
        for kernel, options in (
            (bad_triton.copies, {"BLOCK": 1024}),
            (bad_triton.spills, {"BLOCK": 8192, "maxnreg": 32}),
            (bad_triton.fails, {"BLOCK": 64}),
        ):
            launches.append(check_triton.Launch(kernel, "fp32", (x,), options))
        reports = check_triton.compile_all(launches, "90")
        print(json.dumps({
            "problems": [report.problems for report in reports],
            "instructions": list(reports[0].variants[0].instructions),
        }))
        """,
    )
    copies, spills, fails = found["problems"]
    assert copies == [] and set(found["instructions"]) == {"LDG.128", "STG.128"}
    assert len(spills) == 1 and spills[0].startswith("bad.spills fp32 (sm_90) spills ")
    assert len(fails) == 1 and fails[0].startswith("bad.fails fp32 (sm_90) does not compile: ")

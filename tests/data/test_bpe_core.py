"""The trainer's C++ under the sanitizers, on texts drawn at random (csrc/bpe/tests/fuzz.cpp)."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "csrc" / "bpe"
COMPILER = shutil.which(os.environ.get("CXX") or "g++")


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(("sanitizers", "rounds"), [("address,undefined", 1000), ("thread", 200)])
def test_sanitizers_find_nothing(sanitizers, rounds, tmp_path):
    program = tmp_path / "fuzz"
    sources = [CORE / "count.cpp", CORE / "merge.cpp", CORE / "tests" / "fuzz.cpp"]
    flags = ["-std=c++20", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    subprocess.run([COMPILER, *flags, *sources, "-o", program], check=True)
    run = subprocess.run([program, str(rounds)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == f"{rounds} rounds\n"

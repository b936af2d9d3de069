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
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizers, tmp_path):
    program = tmp_path / "fuzz"
    sources = [CORE / "count.cpp", CORE / "merge.cpp", CORE / "tests" / "fuzz.cpp"]
    flags = ["-std=c++20", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    subprocess.run([COMPILER, *flags, *sources, "-o", program], check=True)
    run = subprocess.run([program, "1000"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == "1000 rounds\n"

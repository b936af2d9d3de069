"""Every device primitive does what it says, in the emulator: csrc/tests/conformance*.cu."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
GOLDEN = CSRC / "tests" / "golden"
MODES = [("late", 0), ("early", 1), ("random", 2)]


def build(*options):
    """The folder of the programs; they are compiled when a source has changed."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("there is no g++")
    run = subprocess.run(
        [ROOT / "scripts" / "conformance.sh", *options], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return Path(run.stdout.strip())


@pytest.fixture(scope="session")
def programs():
    return build()


@pytest.fixture(scope="session")
def sanitized():
    return build("--sanitize")


def run(program, *arguments, asynchrony="late", seed=0):
    environment = {
        **os.environ,
        "ALMOSTGPT_EMULATOR_ASYNC": asynchrony,
        "ALMOSTGPT_EMULATOR_SEED": str(seed),
    }
    # Seconds alone; a kernel that never ends must not take the suite with it.
    return subprocess.run(
        [program, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


def passes(done):
    """Every case that ran is ok; returns their lines."""
    failures = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert done.returncode == 0 and not failures, "\n".join(failures) + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("asynchrony, seed", MODES)
def test_every_case_passes(programs, asynchrony, seed):
    lines = passes(run(programs / "conformance", asynchrony=asynchrony, seed=seed))
    names = run(programs / "conformance", "--list").stdout.split()
    assert [line.split()[:2] for line in lines] == [["ok", name] for name in names]


def test_on_an_older_card_the_cases_of_hopper_are_skipped(programs):
    lines = passes(run(programs / "conformance", "--card", "8.0"))
    outcomes = {line.split()[1].rstrip(":"): line.split()[0] for line in lines}
    assert outcomes["mma_bf16"] == "ok" and outcomes["tma_load_2d"] == "skipped"


def listed_primitives():
    """The names in the list at the top of device.cuh, and the parts of those like unpack_bf16_lo/hi."""
    head = (CSRC / "device" / "device.cuh").read_text().split("#pragma once")[0]
    names = set()
    # A row is a label of up to 12 columns, or blanks where it goes on, then names.
    for row in re.findall(r"^//   (.{12})(\S.*)$", head, re.M):
        label, text = row
        if label.startswith(("KERNEL", "DEVICE", "UNROLL")):
            continue  # macros, of which every kernel has some
        text = re.sub(r"\(.*?\)|<.*?>", " ", text)
        for name in text.split():
            stem, *others = name.split("/")
            names.update([stem, *(stem[: -len(other)] + other for other in others)])
    return names


def test_every_primitive_is_covered(programs):
    covered = {}
    for line in run(programs / "conformance", "--primitives").stdout.splitlines():
        primitive, *names = line.split()
        covered[primitive] = names
    listed = listed_primitives()
    assert {"cta_sync", "unpack_bf16_hi", "setmaxnreg_inc", "launch", "TensorMap"} <= listed
    assert not listed - set(covered), f"without a case: {sorted(listed - set(covered))}"
    # Nor is one claimed that the sources of the cases do not call.
    sources = "".join(path.read_text() for path in (CSRC / "tests").glob("conformance*"))
    sources = re.sub(r'"[^"\n]*"', "", sources)
    unused = [name for name in covered if not re.search(rf"\b{name}\b", sources)]
    assert not unused, f"claimed, but in no case: {unused}"


def kernel_sources():
    """Of the families and the examples; not the suite, which also looks behind the primitives."""
    families = [
        path for path in CSRC.glob("*/*.cu*") if path.parent.name not in ("device", "tests")
    ]
    return [*families, *(CSRC / "tests").glob("gemm_*.cuh")]


def test_kernels_are_written_in_primitives_alone():
    assert len(kernel_sources()) >= 5
    for path in kernel_sources():
        code = re.sub(r"//.*", "", path.read_text())
        found = re.findall(r"\b(?:detail::|asm\b|threadIdx|blockIdx|__\w+|<cuda)", code)
        assert not found, f"{path.name}: {found}"
        # What a kernel takes is checked at every access: no pointer that it could dereference.
        for name, parameters in re.findall(r"KERNEL[^;{]*?(\w+_kernel)\(([^{;]*)\)\s*\{", code):
            assert "*" not in parameters, f"{path.name}: {name}({parameters})"


def test_the_table_in_the_docs_is_current(programs):
    command = [sys.executable, ROOT / "scripts" / "primitives_table.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wgmma_instructions_are_what_their_generator_writes():
    folder = CSRC / "device" / "cuda"
    command = [sys.executable, folder / "generate_wgmma.py"]
    written = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert written == (folder / "wgmma.inc").read_text()


def test_every_width_of_wgmma_has_its_cases(programs):
    text = (CSRC / "device" / "cuda" / "wgmma.inc").read_text()
    instructions = set(re.findall(r"wgmma_(ss|rs)\((bf16|fp16), Width<(\d+)>", text))
    names = run(programs / "conformance", "--list").stdout.split()
    expected = {f"wgmma_{kind}_{dtype}_n{width}" for kind, dtype, width in instructions}
    assert instructions and expected <= set(names)


def test_a_wrong_result_is_seen(programs, tmp_path):
    """What one run dumped is what another returns, and a changed bit fails."""
    conformance = programs / "conformance"
    passes(run(conformance, "--only", "mma_bf16", "--dump", tmp_path))
    case = ("--only", "mma_bf16", "--golden", tmp_path)
    assert passes(run(conformance, *case)) == ["ok mma_bf16"]
    file = tmp_path / "mma_bf16.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    done = run(conformance, *case)
    assert done.returncode == 1 and "FAIL mma_bf16: record 0, byte 100" in done.stdout
    file.unlink()
    assert passes(run(conformance, *case)) == ["ok mma_bf16 (no golden file)"]


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no results of a GPU in csrc/tests/golden")
def test_the_emulator_returns_what_a_gpu_returned(programs):
    passes(run(programs / "conformance", "--golden", GOLDEN))


def test_every_check_of_the_emulator_fires(programs):
    done = run(programs / "detectors")
    assert done.returncode == 0, done.stdout + done.stderr


# What the kernel of csrc/README.md is called by: its sums against plain ones, then with no barrier.
README_MAIN = r"""
#include <cstdio>
#include <vector>
#include "device/emulator/emulator.h"
using namespace almostgpt;
int main() {
  const int rows = 5, columns = 4096;
  std::vector<uint16_t> x(rows * columns);
  std::vector<float> out(rows), expected(rows);
  for (int i = 0; i < rows * columns; ++i) {
    x[i] = i % 3 ? 0x3f80 : 0xc000;  // 1, or -2
    expected[i / columns] += i % 3 ? 1.0f : -2.0f;
  }
  emulator::Session session(8, 0);
  session.buffer("x", x.data(), 2 * x.size(), emulator::Use::input);
  session.buffer("out", out.data(), 4 * out.size(), emulator::Use::output);
  if (row_sums(x.data(), out.data(), rows, columns, nullptr) || out != expected) return 1;
  emulator::inject("readme.cu:SYNC cta_sync", "drop");
  try {
    row_sums(x.data(), out.data(), rows, columns, nullptr);
  } catch (const emulator::Error& error) {
    std::puts(error.what());
    return 0;
  }
  return 2;
}
"""


def readme_kernel():
    return re.search(r"```cuda\n(.*?)```", (CSRC / "README.md").read_text(), re.S)[1]


def test_the_kernel_of_the_readme_runs_and_needs_its_barrier(programs, tmp_path):
    kernel = readme_kernel()
    line = 1 + kernel[: kernel.index("cta_sync();")].count("\n")
    (tmp_path / "readme.cu").write_text(kernel)
    main = tmp_path / "main.cpp"
    main.write_text('#include "readme.cu"\n' + README_MAIN.replace("SYNC", str(line)))
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O0", "-DALMOSTGPT_EMULATOR"]
    command += ["-I", CSRC, main, programs / "emulator.a", "-o", tmp_path / "readme"]
    subprocess.run(command, check=True)
    done = run(tmp_path / "readme")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "race" in done.stdout
    # Thread 0 reads what the first lane of another warp wrote: both lines are named.
    assert done.stdout.count("readme.cu:") >= 2


@pytest.mark.slow
@pytest.mark.parametrize("program", ["conformance", "detectors", "examples"])
def test_with_sanitizers(sanitized, program):
    done = run(sanitized / program, asynchrony="random", seed=3)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


# For a GPU; every architecture is in scripts/check_kernels.py.
@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, pattern", [("80", "conformance.cu"), ("90a", "conformance*.cu")], ids=["80", "90a"]
)
def test_compiles_for_a_gpu_without_warnings(tmp_path, arch, pattern):
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    command = ["nvcc", "-std=c++17", "-O3", "-I", CSRC, "-Xcompiler", "-Wall"]
    command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-t", "2"]
    command += [*sorted((CSRC / "tests").glob(pattern)), "-o", tmp_path / "conformance"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stdout + done.stderr
    names = subprocess.run([tmp_path / "conformance", "--list"], capture_output=True, text=True)
    assert ("tma_load_2d" in names.stdout.split()) == (arch == "90a")


@pytest.mark.slow
def test_kernels_compile_alone_as_the_readme_says(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    (tmp_path / "readme.cu").write_text(readme_kernel())
    shown = re.search(r"^    (nvcc .*) -c (csrc/\S+\.cu)$", (CSRC / "README.md").read_text(), re.M)
    sources = [path for path in kernel_sources() if re.fullmatch(r"(?!.*_sm90).*\.cu", path.name)]
    assert ROOT / shown[2] in sources
    for source in [tmp_path / "readme.cu", *sources]:
        command = [*shown[1].split(), "-c", source, "-o", tmp_path / "kernel.o"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stdout + done.stderr, done.stdout + done.stderr

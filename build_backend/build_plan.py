"""Decide what the install builds, before anything is built: small functions over plain values.

``make_plan`` is the whole decision; the functions below it gather what it decides on.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from find_torch import Torch

# Where no GPU is visible: A100, H100 and H200, B200, RTX 50, and whatever comes after by PTX.
DEFAULT_ARCHS = ("80-real", "90a-real", "100-real", "120")
FIRST_BLACKWELL_NVCC = (12, 8)


class BuildError(SystemExit):
    """The install cannot go on; the message says what to do, and is shown without a traceback."""

    def __init__(self, message: str):
        super().__init__(f"almostgpt: {message}")


@dataclass(frozen=True)
class Nvcc:
    path: Path
    version: tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """What to build, and one line that says so."""

    native: bool
    cuda: bool
    archs: tuple[str, ...]
    message: str


def make_plan(
    env: Mapping[str, str],
    platform: str,
    compiler: str | None,
    torch: Torch | None,
    nvcc: Nvcc | None,
    capabilities: tuple[str, ...] = (),
) -> Plan:
    """Decide what to build.

    Args:
        env: the environment; ALMOSTGPT_CUDA and ALMOSTGPT_CUDA_ARCHS are read.
        platform: ``sys.platform``.
        compiler: path of the C++ compiler, or None.
        torch: the torch found, or None.
        nvcc: the CUDA compiler found, or None.
        capabilities: compute capabilities of the GPUs that are visible, such as ``("9.0",)``.

    Raises:
        BuildError: a bad setting, no torch, or no nvcc that fits where CUDA kernels are due.
    """
    mode = cuda_mode(env)
    if reason := no_native_reason(env, platform, compiler):
        if mode == "ON":
            raise BuildError(f"ALMOSTGPT_CUDA=ON, but {reason}")
        return Plan(
            False, False, (), f"no native library ({reason}); everything runs on the reference"
        )
    if torch is None:
        raise BuildError(
            "no torch >= 2.10 found to build against; install one first, or set "
            "ALMOSTGPT_TORCH_DIR to its folder"
        )
    if mode == "OFF":
        why = "ALMOSTGPT_CUDA=OFF"
    elif mode == "AUTO" and torch.cuda is None:
        why = f"torch {torch.version} is a CPU build; ALMOSTGPT_CUDA=ON builds them all the same"
    elif (mismatch := nvcc_mismatch(mode, torch, nvcc)) is not None:
        # Where a GPU is present its kernels must not be missing in silence. A laptop without one
        # gets a CUDA build of torch from PyPI by default, and needs no kernels.
        if mode == "ON" or capabilities:
            raise BuildError(mismatch)
        why = f"no GPU is visible; {mismatch}"
    else:
        archs = choose_archs(env.get("ALMOSTGPT_CUDA_ARCHS", ""), capabilities, nvcc.version)
        return Plan(
            True,
            True,
            archs,
            f"native library with CUDA kernels for {';'.join(archs)} "
            f"(nvcc {dotted(nvcc.version)}, torch {torch.version})",
        )
    return Plan(True, False, (), f"native library without CUDA kernels ({why})")


def cuda_mode(env: Mapping[str, str]) -> str:
    """ALMOSTGPT_CUDA: AUTO (the default), ON or OFF."""
    mode = env.get("ALMOSTGPT_CUDA", "").upper() or "AUTO"
    if mode not in ("AUTO", "ON", "OFF"):
        raise BuildError(f"ALMOSTGPT_CUDA must be AUTO, ON or OFF, not {env['ALMOSTGPT_CUDA']!r}")
    return mode


def no_native_reason(env: Mapping[str, str], platform: str, compiler: str | None) -> str | None:
    """Why no native library can be built here, or None."""
    if platform != "linux":
        return f"it is built on Linux only, and this is {platform}"
    if compiler is None:
        name = f" {env['CXX']} (from CXX)" if env.get("CXX") else ""
        return f"no C++ compiler{name}; install g++ and reinstall to have it"
    return None


def nvcc_mismatch(mode: str, torch: Torch, nvcc: Nvcc | None) -> str | None:
    """Why this nvcc cannot build the CUDA kernels, and what to do; None where it can."""
    if mode == "ON":  # with any torch: its CUDA version, if it has one, does not matter
        if nvcc is not None:
            return None
        return (
            "ALMOSTGPT_CUDA=ON, but there is no nvcc: install a CUDA toolkit, or set CUDA_HOME to "
            "the folder of one"
        )
    major = torch.cuda.split(".")[0]
    if nvcc is None:
        found = "there is no nvcc"
    elif str(nvcc.version[0]) != major:
        found = f"{nvcc.path} is of CUDA {dotted(nvcc.version)}"
    else:
        return None
    return (
        f"torch {torch.version} is built for CUDA {torch.cuda}, but {found}. Do one of: install "
        f"the CUDA {major} toolkit; set CUDA_HOME to the folder of one; or set ALMOSTGPT_CUDA=OFF "
        "to install without CUDA kernels"
    )


def choose_archs(
    wanted: str, capabilities: tuple[str, ...], nvcc_version: tuple[int, int]
) -> tuple[str, ...]:
    """GPU architectures as CMake writes them.

    Args:
        wanted: ALMOSTGPT_CUDA_ARCHS, such as ``"80;90"`` or ``"8.0, 9.0a"``; empty: choose.
        capabilities: of the GPUs present; none visible: the default list.
        nvcc_version: an older nvcc does not know the newer of the default list.
    """
    entries = [entry.strip() for entry in re.split(r"[;,]", wanted) if entry.strip()]
    if not entries and capabilities:
        entries = [capability.replace(".", "") + "-real" for capability in capabilities]
    if not entries:
        new = nvcc_version >= FIRST_BLACKWELL_NVCC
        entries = list(DEFAULT_ARCHS if new else ("80-real", "90a-real", "90-virtual"))
    return tuple(dict.fromkeys(_arch(entry) for entry in entries))


def _arch(entry: str) -> str:
    match = re.fullmatch(r"(\d{1,2})\.?(\d)([af]?)(-real|-virtual)?", entry)
    if match is None:
        raise BuildError(
            f"ALMOSTGPT_CUDA_ARCHS has {entry!r}; write architectures as in '80;90a;100;120', "
            "each with '-real' (machine code) or '-virtual' (PTX) after it where only one is wanted"
        )
    number, kind = match[1] + match[2], match[4] or ""
    # Hopper's own instructions exist in 90a alone, whose PTX runs nowhere else.
    if number == "90" and kind != "-virtual":
        return "90a-real"
    return number + match[3] + kind


def dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


# --- what there is on this machine ---------------------------------------------------------------


def find_compiler(env: Mapping[str, str] = os.environ) -> str | None:
    """The C++ compiler that CMake would take: CXX, or the first usual name on PATH."""
    names = [env["CXX"].split()[0]] if env.get("CXX", "").strip() else ["c++", "g++", "clang++"]
    found = (shutil.which(name, path=env.get("PATH", "")) for name in names)
    return next((path for path in found if path), None)


def find_nvcc(env: Mapping[str, str] = os.environ) -> Nvcc | None:
    """CUDACXX, then CUDA_HOME, then PATH, then /usr/local/cuda; None where none answers."""
    places = [env.get("CUDACXX"), shutil.which("nvcc", path=env.get("PATH", ""))]
    places += ["/usr/local/cuda/bin/nvcc"]
    for home in ("CUDA_PATH", "CUDA_HOME"):
        if env.get(home):
            places.insert(1, str(Path(env[home]) / "bin" / "nvcc"))
    for path in filter(None, places):
        text = _output([path, "--version"])
        if match := re.search(r"release (\d+)\.(\d+)", text):
            return Nvcc(Path(path), (int(match[1]), int(match[2])))
    return None


def gpu_capabilities() -> tuple[str, ...]:
    """Compute capabilities of the visible GPUs, each once, such as ``("8.0", "9.0")``."""
    text = _output(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    return tuple(sorted(set(re.findall(r"^\d+\.\d$", text, re.M)), key=float))


def cmake_version() -> tuple[int, int]:
    """Of the cmake on PATH; (0, 0) where there is none."""
    match = re.search(r"cmake version (\d+)\.(\d+)", _output(["cmake", "--version"]))
    return (int(match[1]), int(match[2])) if match else (0, 0)


def plan_here(torch: Torch | None) -> Plan:
    """``make_plan`` for this machine and environment."""
    return make_plan(
        os.environ, sys.platform, find_compiler(), torch, find_nvcc(), gpu_capabilities()
    )


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""

"""Drives CMake for the native libraries; everything else is in pyproject.toml.

Settings: ALMOSTGPT_CUDA (AUTO, ON, OFF), ALMOSTGPT_CUDA_ARCHS, MAX_JOBS, ALMOSTGPT_TORCH_DIR, and of the
emulator ALMOSTGPT_DEBUG (ON, OFF) and ALMOSTGPT_SANITIZE: see CMakeLists.txt.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Of each extension the file in almostgpt/. Torch ops hold no Python: one file for every version.
FILES = {
    "_C": "_C.so",  # the CUDA kernels
    "_emulator": "_emulator.so",  # the same on the CPU emulator
    "_bpe": "_bpe" + sysconfig.get_config_var("EXT_SUFFIX"),  # trains tokenizers
}
sys.path.insert(0, str(ROOT / "build_backend"))

from build_plan import BuildError, Plan, find_nvcc, plan_here  # noqa: E402
from find_torch import Torch, find_torch  # noqa: E402


class BuildNative(build_ext):
    """Builds the libraries in ``almostgpt/``, or says in one line why not."""

    def run(self):
        torch = find_torch()
        plan = plan_here(torch)
        print(f"almostgpt: {plan.message}", file=sys.stderr, flush=True)
        package = Path(ROOT if self.inplace else self.build_lib) / "almostgpt"
        built = cmake(plan, torch) if plan.native else None
        made = {name for name, file in FILES.items() if built and (built / file).exists()}
        for name, file in FILES.items():
            if name in made:
                replace(package / file, built / file)
            else:
                (package / file).unlink(missing_ok=True)  # one of an earlier install
        self.extensions = [e for e in self.extensions if e.name.split(".")[-1] in made]

    def get_ext_filename(self, fullname):
        *packages, name = fullname.split(".")
        return "/".join([*packages, FILES[name]])


def cmake(plan: Plan, torch: Torch) -> Path:
    """Configure and build; the folder of the finished libraries."""
    tools = {name: shutil.which(name) for name in ("cmake", "ninja")}
    for name, path in tools.items():
        if path is None:
            raise BuildError(f"{name} is missing: pip install {name}")
    # A fixed place, so that the next install compiles only what changed.
    folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": tools["ninja"],
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11_folder(folder) or "NOTFOUND",
        "ALMOSTGPT_TORCH_DIR": torch.path,
        "ALMOSTGPT_CUDA": "ON" if plan.cuda else "OFF",
        "ALMOSTGPT_PLAN": plan.message.replace(";", ","),
        "ALMOSTGPT_DEBUG": os.environ.get("ALMOSTGPT_DEBUG") or "OFF",
        "ALMOSTGPT_SANITIZE": os.environ.get("ALMOSTGPT_SANITIZE", ""),
    }
    if plan.cuda:
        settings["CMAKE_CUDA_COMPILER"] = find_nvcc().path
        settings["CMAKE_CUDA_ARCHITECTURES"] = ";".join(plan.archs)
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    subprocess.run([tools["cmake"], "-S", ROOT, "-B", folder, "-G", "Ninja", *defines], check=True)
    subprocess.run([tools["cmake"], "--build", folder, "-j", jobs], check=True)
    return folder / "lib"


def pybind11_folder(build: Path) -> Path | None:
    """CMake's files of pybind11, from a copy in the build folder; None where it is not installed.

    The original lies in the environment of an isolated build, whose path is another each time: it would
    be compiled anew each time.
    """
    try:
        import pybind11
    except ImportError:
        print("almostgpt: no tokenizer trainer (no pybind11)", file=sys.stderr, flush=True)
        (build / "lib" / FILES["_bpe"]).unlink(missing_ok=True)  # one of an earlier install
        return None
    copy = build / f"pybind11-{pybind11.__version__}"
    if not copy.exists():
        partial = copy.with_name(copy.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(Path(pybind11.__file__).parent, partial)
        partial.rename(copy)
    return copy / "share" / "cmake" / "pybind11"


def replace(target: Path, source: Path) -> None:
    """Copy in one step: a running process may have the old file mapped."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    shutil.copy2(source, partial)
    os.replace(partial, target)


setup(
    packages=[*find_packages(include=["almostgpt", "almostgpt.*"]), "almostgpt.kernels"],
    ext_modules=[Extension(f"almostgpt.{name}", sources=[], optional=True) for name in FILES],
    cmdclass={"build_ext": BuildNative},
)

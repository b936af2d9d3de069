"""The decision what an install builds: no torch, compiler or GPU takes part."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import almost_backend
import build_plan
import pytest
from build_plan import BuildError, Nvcc, choose_archs, find_compiler, find_nvcc, make_plan
from find_torch import Torch, find_torch, read_torch

CPU = Torch(Path("/t"), "2.13.0+cpu", None)
CUDA = Torch(Path("/t"), "2.13.0+cu130", "13.0")
NVCC = Nvcc(Path("/cuda/bin/nvcc"), (13, 0))


def plan(torch=CPU, nvcc=NVCC, compiler="/usr/bin/c++", platform="linux", gpus=(), **env):
    return make_plan(env, platform, compiler, torch, nvcc, gpus)


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def fake_torch(folder: Path, version="2.13.0+cu130", cuda="'13.0'") -> Path:
    header = folder / "include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    text = f"__version__ = '{version}'\ncuda: Optional[str] = {cuda}\nhip: Optional[str] = None\n"
    (folder / "version.py").write_text(text)
    return folder


def test_auto_builds_cuda_kernels_with_a_cuda_torch_alone():
    assert plan(CPU).native and not plan(CPU).cuda
    assert "2.13.0+cpu is a CPU build" in plan(CPU).message
    built = plan(CUDA)
    assert built.cuda and built.archs == ("80-real", "90a-real", "100-real", "120")
    assert built.message.count("\n") == 0 and "nvcc 13.0" in built.message


def test_on_builds_with_any_torch_and_off_with_none():
    assert plan(CPU, ALMOSTGPT_CUDA="ON").cuda
    assert plan(CUDA, nvcc=Nvcc(NVCC.path, (12, 8)), ALMOSTGPT_CUDA="on").cuda
    assert not plan(CUDA, nvcc=None, ALMOSTGPT_CUDA="OFF").cuda
    with pytest.raises(BuildError, match="there is no nvcc"):
        plan(CPU, nvcc=None, ALMOSTGPT_CUDA="ON")
    with pytest.raises(BuildError, match="AUTO, ON or OFF, not 'yes'"):
        plan(ALMOSTGPT_CUDA="yes")


@pytest.mark.parametrize(
    "nvcc, found", [(None, "no nvcc"), (Nvcc(NVCC.path, (12, 8)), "is of CUDA 12.8")]
)
def test_auto_says_what_to_do_where_nvcc_does_not_fit_torch(nvcc, found):
    with pytest.raises(BuildError) as error:
        plan(CUDA, nvcc=nvcc, gpus=("9.0",))
    without_gpu = plan(
        CUDA, nvcc=nvcc
    )  # a laptop with PyPI's torch: it installs, and says the same
    assert without_gpu.native and not without_gpu.cuda
    for part in ("CUDA 13.0", found, "CUDA 13 toolkit", "CUDA_HOME", "ALMOSTGPT_CUDA=OFF"):
        assert part in str(error.value) and part in without_gpu.message


def test_without_compiler_or_off_linux_the_install_goes_through():
    for built in (plan(compiler=None, torch=None), plan(platform="darwin", torch=None)):
        assert not built.native and "everything runs on the reference" in built.message
    assert "darwin" in plan(platform="darwin").message
    assert "C++ compiler" in plan(compiler=None).message
    with pytest.raises(BuildError, match="C\\+\\+ compiler"):
        plan(compiler=None, ALMOSTGPT_CUDA="ON")


def test_a_native_build_needs_torch():
    with pytest.raises(BuildError, match="no torch"):
        plan(torch=None)


def test_architectures():
    assert choose_archs("80;90", (), (13, 0)) == ("80", "90a-real")
    assert choose_archs("8.0, 9.0a,120-virtual", (), (13, 0)) == ("80", "90a-real", "120-virtual")
    assert choose_archs("", ("8.6", "9.0"), (13, 0)) == ("86-real", "90a-real")
    assert choose_archs("80", ("9.0",), (13, 0)) == ("80",)
    assert choose_archs("", (), (12, 4)) == ("80-real", "90a-real", "90-virtual")
    with pytest.raises(BuildError, match="'hopper'"):
        choose_archs("hopper", (), (13, 0))


def test_torch_is_read_as_text(tmp_path):
    torch = read_torch(fake_torch(tmp_path / "torch"))
    assert (torch.version, torch.cuda) == ("2.13.0+cu130", "13.0")
    assert read_torch(fake_torch(tmp_path / "cpu", "2.10.0+cpu", "None")).cuda is None
    assert read_torch(fake_torch(tmp_path / "old", "2.9.1")) is None
    assert read_torch(tmp_path / "missing") is None


def test_torch_dir_names_it_outright(tmp_path, monkeypatch):
    monkeypatch.setenv("ALMOSTGPT_TORCH_DIR", str(fake_torch(tmp_path / "torch")))
    assert find_torch().path == tmp_path / "torch"


def test_compiler_and_nvcc_are_found_by_the_environment(tmp_path):
    executable(tmp_path / "bin/g++", "")
    assert find_compiler({"PATH": str(tmp_path / "bin")}) == str(tmp_path / "bin/g++")
    assert find_compiler({"PATH": str(tmp_path / "bin"), "CXX": "missing++"}) is None
    assert find_compiler({"PATH": str(tmp_path)}) is None
    release = "echo Cuda compilation tools, release 12.8, V12.8.1"
    nvcc = executable(tmp_path / "cuda/bin/nvcc", release)
    found = find_nvcc({"PATH": "", "CUDA_HOME": str(tmp_path / "cuda")})
    assert found == Nvcc(nvcc, (12, 8))


def test_build_tools_are_asked_for_only_where_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(almost_backend, "find_torch", lambda: None)
    monkeypatch.setattr(almost_backend.importlib.util, "find_spec", lambda name: None)
    if build_plan.sys.platform == "linux":
        assert almost_backend.native_requirements() == []  # no compiler: nothing to build
        executable(tmp_path / "g++", "")
        all_of_them = ["torch==2.13.0", "cmake>=3.25", "ninja", "pybind11>=2.13"]
        assert almost_backend.native_requirements() == all_of_them
        executable(tmp_path / "cmake", "echo cmake version 3.25.1")
        executable(tmp_path / "ninja", "")
        monkeypatch.setattr(almost_backend, "find_torch", lambda: CPU)
        monkeypatch.setattr(almost_backend.importlib.util, "find_spec", lambda name: "found")
        assert almost_backend.native_requirements() == []


def test_an_install_without_native_libraries_removes_those_of_an_earlier_one(tmp_path):
    root = Path(__file__).parents[2]
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    shutil.copytree(root / "build_backend", tmp_path / "build_backend")
    for package in ("almostgpt", "kernels"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    module = "_bpe" + sysconfig.get_config_var("EXT_SUFFIX")
    libraries = [tmp_path / "almostgpt" / name for name in ("_C.so", "_emulator.so", module)]
    for library in libraries:
        library.touch()
    env = {**os.environ, "CXX": "missing++", "ALMOSTGPT_CUDA": "AUTO"}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    run = subprocess.run(build, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "no native library" in run.stderr
    assert not any(library.exists() for library in libraries)

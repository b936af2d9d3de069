"""Loads ``almostgpt/_C.so``, the library of CUDA kernels, where the install built it.

The library holds no Python and no ATen (LibTorch stable ABI), so one build serves every Python
and every torch from 2.10 on. Loading it registers the CUDA kernels of the ops in
``torch.ops.almostgpt``; it needs no GPU. Without it everything runs on the reference.
"""

from __future__ import annotations

import functools
import json
import re
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import almostgpt


@dataclass(frozen=True)
class Native:
    """The native library as this process has it."""

    path: str
    error: str | None  # why it is not loaded
    cuda: str | None = None  # toolkit version, "13.0"
    archs: tuple[str, ...] = ()  # as given to CMake: "80-real", "90a-real", "120"
    torch: str | None = None  # whose headers it was compiled with
    compiler: str | None = None
    plan: str | None = None  # what the install decided to build, and why

    def as_dict(self) -> dict:
        return {**asdict(self), "archs": list(self.archs)}

    def refuse(self) -> str | None:
        """Why there is no CUDA kernel at all in this process, or None."""
        if self.error is not None:
            return self.error
        return None if self.cuda else self.plan


def load(path: Path) -> Native:
    """Load the library; one that is there and does not load is a warning, never a crash."""
    if not path.exists():
        return Native(
            str(path), error="the native library was not built (pip install -v -e . says why)"
        )
    try:
        torch.ops.load_library(str(path))
        info = json.loads(torch.ops.almostgpt.build_info())
    except (OSError, RuntimeError, AttributeError) as error:
        reason = f"the native library does not load: {error}"
        warnings.warn(
            f"almostgpt: {path} is there but does not load, so no CUDA kernel will run "
            f"(reinstall with `pip install -e .` to rebuild it): {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return Native(str(path), error=reason)
    archs = tuple(info.pop("archs"))
    return Native(str(path), error=None, archs=archs, **info)


@functools.cache  # asked at every call of an op
def serves(archs: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code compiled for ``archs`` runs on a GPU of this compute capability.

    Machine code ("80-real") runs on later minors of its major; with a suffix "a" only on exactly
    its own capability, with "f" within its major; PTX ("80-virtual", or plain "80" for both) is
    compiled by the driver for anything later.
    """
    major, minor = capability
    for arch in archs:
        match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", arch)
        if match is None:
            continue
        built = (int(match[1]), int(match[2]))
        specific, kind = match[3], match[4]
        if built == capability:
            return True
        if specific != "a" and kind != "-virtual" and built[0] == major and built[1] <= minor:
            return True
        if not specific and kind != "-real" and built <= capability:
            return True
    return False


# The capability of a device never changes within a process, so torch.compile may take the answer
# for a constant (it cannot trace the driver's query).
@torch.compiler.assume_constant_result
@functools.cache
def capability_of(index: int) -> tuple[int, int]:
    """The compute capability of CUDA device ``index``."""
    return torch.cuda.get_device_capability(index)


@torch.compiler.assume_constant_result
def refuse(capability: tuple[int, int]) -> str | None:
    """Why no kernel of the library runs on a GPU of this compute capability, or None."""
    if why := NATIVE.refuse():
        return why
    if serves(NATIVE.archs, capability):
        return None
    return (
        f"the native library was built for {';'.join(NATIVE.archs)}, not for this GPU of compute "
        f"capability {capability[0]}.{capability[1]} (set ALMOSTGPT_CUDA_ARCHS and reinstall)"
    )


@torch.compiler.assume_constant_result
def refuse_own_code(capability: tuple[int, int]) -> str | None:
    """Why the library has no code in a card's own instructions (``90a`` for Hopper), or None."""
    return _refuse_own_code(NATIVE.archs, capability)


@functools.cache  # asked at every call of an op, as ``serves``
def _refuse_own_code(archs: tuple[str, ...], capability: tuple[int, int]) -> str | None:
    own = f"{capability[0]}{capability[1]}a"
    if any(arch.startswith(own) for arch in archs):
        return None
    return f"the native library was built for {';'.join(archs)}, without {own}"


NATIVE = load(Path(almostgpt.__path__[0]) / "_C.so")

"""Find the torch to build against, by path: nothing here imports torch."""

from __future__ import annotations

import importlib.util
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MINIMUM = (2, 10)  # the first with the whole of the stable ABI in use


@dataclass(frozen=True)
class Torch:
    """An installed torch: its folder, its version text, and its CUDA version (None: CPU build)."""

    path: Path
    version: str
    cuda: str | None


def read_torch(folder: Path) -> Torch | None:
    """The torch in ``folder``, or None where there is none that can be built against."""
    try:
        text = (folder / "version.py").read_text()
    except OSError:
        return None
    version = re.search(r"^__version__ = '((\d+)\.(\d+)[^']*)'", text, re.M)
    if version is None or (int(version[2]), int(version[3])) < MINIMUM:
        return None
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        return None
    cuda = re.search(r"^cuda\b[^=]*= '([^']+)'", text, re.M)
    return Torch(folder, version[1], cuda[1] if cuda else None)


def find_torch() -> Torch | None:
    """The torch of the environment that is installed into; ALMOSTGPT_TORCH_DIR names it outright.

    A build isolated by pip has a path of its own, but keeps the prefix of the real environment.
    """
    if folder := os.environ.get("ALMOSTGPT_TORCH_DIR"):
        return read_torch(Path(folder))
    for folder in _candidates():
        if torch := read_torch(folder):
            return torch
    return None


def _candidates() -> Iterator[Path]:
    try:
        spec = importlib.util.find_spec("torch")  # locates it without running it
    except (ImportError, ValueError):
        spec = None
    if spec is not None and spec.origin:
        yield Path(spec.origin).parent
    for key in ("purelib", "platlib"):
        yield Path(sysconfig.get_path(key)) / "torch"
    try:
        isolated = (
            "include-system-site-packages = true"
            not in (Path(sys.prefix) / "pyvenv.cfg").read_text()
        )
    except OSError:
        isolated = False  # no virtual environment
    if not isolated:
        for folder in [*site.getsitepackages([sys.base_prefix]), site.getusersitepackages()]:
            yield Path(folder) / "torch"
    # uv builds in an environment with a prefix of its own: look where the real one may be.
    roots = [os.environ.get("VIRTUAL_ENV"), Path(__file__).resolve().parents[1] / ".venv"]
    roots += [Path(p).parent for p in os.environ.get("PATH", "").split(os.pathsep) if p]
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for root in roots:
        if root and (Path(root) / "pyvenv.cfg").exists():
            yield Path(root) / "lib" / python / "site-packages" / "torch"

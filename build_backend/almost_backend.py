"""The build backend: that of setuptools, which asks for build tools only where there are none.

A fixed ``torch`` in ``build-system.requires`` would make every isolated build download one more,
several GB on Linux. The native library uses torch's stable ABI, so it may be built against one
version and run under another: any torch that is there will do. So will any cmake and ninja. pybind11,
headers of 2 MB, is always asked for: an isolated build does not see the one that is there.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from build_plan import cmake_version, find_compiler, no_native_reason  # noqa: E402
from find_torch import find_torch  # noqa: E402
from setuptools import build_meta  # noqa: E402
from setuptools.build_meta import *  # noqa: E402, F403

TORCH = "torch==2.13.0"
PYBIND11 = "pybind11>=2.13"
CMAKE_MINIMUM = (3, 25)  # as in CMakeLists.txt


def native_requirements() -> list[str]:
    """What the native library's build needs and this machine lacks."""
    if no_native_reason(os.environ, sys.platform, find_compiler()):
        return []
    needs = []
    if find_torch() is None:
        needs.append(TORCH)
    if cmake_version() < CMAKE_MINIMUM:
        needs.append("cmake>=3.25")
    if shutil.which("ninja") is None:
        needs.append("ninja")
    if importlib.util.find_spec("pybind11") is None:
        needs.append(PYBIND11)
    return needs


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + native_requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + native_requirements()

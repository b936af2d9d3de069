"""The CUDA kernels on a CPU: ``almostgpt/_emulator.so`` runs them thread by thread and checks them.

Any op whose CUDA kernels are in ``csrc/`` runs there, on CPU tensors, when it is forced to. A race,
a deadlock, an access out of bounds, a read of what nobody wrote raise ``EmulatorError``::

    from almostgpt import kernels
    from almostgpt.kernels import emulator

    with kernels.use_backend("emulator", capability=(9, 0)):
        with emulator.settings(seed=1, asynchrony="random"):  # another order of threads
            y = kernels.rms_norm(x, weight)
    print(emulator.statistics()["kernels"])  # launches, bytes read and written, bank conflicts, …

Settings, statistics and the fault belong to the process, not to a thread. The library is loaded at
the first use of anything here, never at import. The environment gives the settings that a process
begins with: ``ALMOSTGPT_EMULATOR_SEED``, ``_ASYNC``, ``_CHECK``, ``_MULTIPROCESSORS``, and
``_ABORT=1``, which ends the process at a finding, for a debugger.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import almostgpt
from almostgpt.errors import UserError

PATH = Path(almostgpt.__path__[0]) / "_emulator.so"


class EmulatorError(RuntimeError):
    """Something is wrong with a kernel; the message says what, where, and what to do.

    Attributes:
        kind: ``"race"``, ``"deadlock"``, ``"out-of-bounds"``, …: docs/emulator.md lists them.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(kind, message)
        self.kind = kind

    def __str__(self) -> str:
        return self.args[1]


@contextmanager
def settings(
    *,
    seed: int | None = None,
    asynchrony: str | None = None,
    check: bool | None = None,
    multiprocessors: int | None = None,
) -> Iterator[None]:
    """Run what follows with other settings; what is not given stays as it is.

    Args:
        seed: 0 runs warps and lanes in order; another number a random schedule of its own.
        asynchrony: when cp.async, TMA and wgmma touch memory: ``"late"``, as late as a wait allows;
            ``"early"``, at once; or ``"random"``.
        check: look for races, uninitialised and too early reads. Bounds are always checked.
        multiprocessors: of the card that is played; 0: as many as it has.
    """
    _check_settings(seed, asynchrony, check, multiprocessors)
    before = options()
    given = {
        "seed": seed,
        "asynchrony": asynchrony,
        "check": check,
        "multiprocessors": multiprocessors,
    }
    changed = {name: value for name, value in given.items() if value is not None}
    _native("configure", *{**before, **changed}.values())
    try:
        yield
    finally:
        _native("configure", *before.values())


def options() -> dict:
    """The settings in force: ``seed asynchrony check multiprocessors``."""
    return json.loads(_native("options"))


def statistics() -> dict:
    """What the kernels did since the last reset, by kernel: launches, blocks, bytes, conflicts."""
    return json.loads(_native("statistics"))


def reset_statistics() -> None:
    """Begin to count anew: ``statistics`` and ``sites``."""
    _native("reset_statistics")


def sites() -> list[dict]:
    """Every call of a synchronising primitive that ran since the last reset, in order.

    Each is ``{"site": "rms_norm.cuh:65 cta_sync", "mutations": ["drop"]}``: what ``fault``
    takes.
    """
    return json.loads(_native("sites"))


@contextmanager
def fault(site: str, mutation: str) -> Iterator[None]:
    """Drop or weaken one call of a synchronising primitive: does anything notice?

    Raises:
        UserError: no such mutation; another fault is planted already; or the block ended, and the
            call at that site never ran.
    """
    if not site:
        raise UserError("emulator.fault: name a site, such as those of emulator.sites()")
    _native("inject", site, mutation)
    try:
        yield
        if not _native("injected_ran"):
            ran = [entry["site"] for entry in sites()]
            nearest = difflib.get_close_matches(site, ran, n=1, cutoff=0.0)
            hint = f"; the nearest that did is {nearest[0]!r}" if nearest else ""
            raise UserError(f"emulator.fault: no call at {site!r} ran{hint}")
    finally:
        _native("inject", "", "")


def _check_settings(seed, asynchrony, check, multiprocessors) -> None:
    for name, value, most in (
        ("seed", seed, 2**63 - 1),
        ("multiprocessors", multiprocessors, 100000),
    ):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (whole and 0 <= value <= most):
            raise UserError(
                f"emulator: {name} must be a whole number from 0 to {most}, not {value!r}"
            )
    if asynchrony is not None and asynchrony not in ("late", "early", "random"):
        raise UserError(f"emulator: asynchrony must be late, early or random, not {asynchrony!r}")
    if check is not None and not isinstance(check, bool):
        raise UserError(f"emulator: check must be True or False, not {check!r}")


# --- the library ---------------------------------------------------------------------------------


@torch.compiler.assume_constant_result  # so that torch.compile calls it, and does not trace it
def refuse(path: Path = PATH) -> str | None:
    """Why there is no emulator in this installation, or None; loads nothing."""
    if path.exists():
        return None
    return "the emulator library was not built (pip install -v -e . says why)"


@functools.cache
def load(path: Path = PATH) -> None:
    """Load the library, once.

    Raises:
        UserError: it is not there, or does not load.
    """
    if why := refuse(path):
        raise UserError(why)
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the emulator library {path} does not load (reinstall with `pip install -e .` to "
            f"rebuild it): {error}"
        ) from error


def _native(name: str, *args):
    load()
    try:
        return getattr(torch.ops.almostgpt_emulator, name)(*args)
    except ValueError as error:  # std::invalid_argument
        raise UserError(f"emulator: {error}") from None


@torch.compiler.assume_constant_result  # as refuse
def _load_once() -> None:
    load()


@dataclass(frozen=True)
class EmulatedOps:
    """The ops of ``csrc/`` as functions that run in the emulator, on the card given.

    ``EmulatedOps((8, 0)).rms_norm_forward(x, weight, eps)`` stands where
    ``torch.ops.almostgpt.rms_norm_forward(x, weight, eps)`` would.
    """

    card: tuple[int, int]

    def __getattr__(self, name: str):
        op = getattr(torch.ops.almostgpt_emulator, name)
        return functools.partial(_run, op, 10 * self.card[0] + self.card[1])


def _run(op, capability: int, *args):
    _load_once()
    try:
        return op(*args, capability)
    except ValueError as error:  # std::invalid_argument: a bad value in the environment
        raise UserError(f"emulator: {error}") from None
    except RuntimeError as error:
        # Written so by csrc/torch/context_emulator.h, the one form in which torch lets it through.
        finding = re.match(r"EmulatorError ([\w-]+)\n(.*)", str(error), re.DOTALL)
        if finding is None:
            raise
        raise EmulatorError(finding[1], finding[2]) from None

"""The choice of a backend, made anew at every call of an op.

An op lists its kernels, best first; a kernel says why it cannot serve given arguments, or None.
The first that can serve runs, and the reference, which is plain PyTorch, always can. One backend
may be forced instead, by ``use_backend`` or for the whole process by ``ALMOSTGPT_BACKEND``: then
its kernel runs or the call fails with the reason, and nothing falls back.

A kernel that is chosen in forward carries its own backward, so the choice holds for both:
autograd runs backward on threads of its own, where the caller's context variables do not reach.

Checking arguments and choosing costs about 3 µs a call in eager mode, against 20 µs and more that
the reference of a tiny rms_norm takes (2-core x86, torch 2.13); in compiled code, nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from almostgpt.errors import UserError

# Every backend, and the options that forcing it takes.
BACKENDS: dict[str, tuple[str, ...]] = {
    "cuda": (),
    "triton": (),
    "emulator": ("capability",),
    "reference": (),
}

# (backend, its options as sorted pairs) or None; the environment gives the process's default.
_FORCED: ContextVar[tuple[str, tuple] | None] = ContextVar(
    "almostgpt_backend",
    default=(os.environ["ALMOSTGPT_BACKEND"], ()) if os.environ.get("ALMOSTGPT_BACKEND") else None,
)


def __getattr__(name: str):
    # Dynamo cannot trace ContextVar.get, but it guards what it reads from a module, and a guard
    # reads the attribute again at every call. So compiled code that was traced under one forced
    # backend is compiled again, not reused, under another.
    if name == "traced_forced":
        return _FORCED.get()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_THIS_MODULE = sys.modules[__name__]


def forced() -> tuple[str, tuple] | None:
    """The forced backend and its options, or None where the choice is free."""
    if torch.compiler.is_compiling():
        return _THIS_MODULE.traced_forced
    return _FORCED.get()


@contextmanager
def use_backend(backend: str, **options) -> Iterator[None]:
    """Force one backend within a ``with`` block, in this thread or task only.

    An op that the backend cannot serve raises ``UserError`` with the reason; a forced backend
    never falls back. Enter the block outside of code given to ``torch.compile``, which then
    compiles anew for it.

    Args:
        backend: ``"cuda"``, ``"triton"``, ``"emulator"`` or ``"reference"``.
        **options: what the backend takes; only the emulator takes any: ``capability=(8, 0)``, the
            compute capability of the card that it plays.

    Raises:
        UserError: no such backend, or no such option of it.
    """
    _check_name(backend)
    for option in options:
        if option not in BACKENDS[backend]:
            raise UserError(f"backend {backend!r} takes no option {option!r}")
    token = _FORCED.set((backend, tuple(sorted(options.items()))))
    try:
        yield
    finally:
        _FORCED.reset(token)


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise UserError(
            f"no backend named {backend!r} (from use_backend or ALMOSTGPT_BACKEND); "
            f"the backends are {', '.join(BACKENDS)}"
        )


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op; ``refuse`` and ``run`` take the op's own arguments."""

    backend: str
    name: str
    refuse: Callable[..., str | None]
    run: Callable


@dataclass(frozen=True)
class Explanation:
    """Which kernel would run, and for every other backend why it would not."""

    op: str
    backend: str
    kernel: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend} ({self.kernel})"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.reasons.items()])


@dataclass(frozen=True)
class Op:
    """A public op: its argument check (it raises ``UserError``) and its kernels, best first."""

    name: str
    check: Callable[..., None]
    kernels: tuple[Kernel, ...]

    def __call__(self, *args, **kwargs):
        """Check the arguments, choose a kernel and run it."""
        self.check(*args, **kwargs)
        return self.choose(*args, **kwargs).run(*args, **kwargs)

    def choose(self, *args, **kwargs) -> Kernel:
        """The kernel that serves these (checked) arguments."""
        wanted = forced()
        if wanted is None:
            for kernel in self.kernels:
                # The emulator takes seconds where a GPU takes microseconds: only when forced.
                if kernel.backend != "emulator" and kernel.refuse(*args, **kwargs) is None:
                    return kernel
        else:
            _check_name(wanted[0])
            for kernel in self.kernels:
                if kernel.backend == wanted[0] and kernel.refuse(*args, **kwargs) is None:
                    return kernel
            why = self.reasons(*args, **kwargs)[wanted[0]]
            raise UserError(f"backend {wanted[0]!r} is forced but cannot run {self.name}: {why}")
        raise AssertionError(f"{self.name} has no reference that serves everything")

    def reasons(self, *args, **kwargs) -> dict[str, str]:
        """For every backend that has no kernel for these arguments, why."""
        reasons = {}
        for backend in BACKENDS:
            kernels = [kernel for kernel in self.kernels if kernel.backend == backend]
            refusals = [kernel.refuse(*args, **kwargs) for kernel in kernels]
            if None not in refusals:
                reasons[backend] = "; ".join(refusals) or f"no {backend} kernel for this op"
        return reasons

    def explain(self, *args, **kwargs) -> Explanation:
        """See ``almostgpt.kernels.explain``."""
        self.check(*args, **kwargs)
        chosen = self.choose(*args, **kwargs)
        reasons = self.reasons(*args, **kwargs)
        for backend in BACKENDS:
            if backend not in reasons and backend != chosen.backend:
                if forced() is not None:
                    reasons[backend] = f"it could serve, but {chosen.backend} is forced"
                elif backend == "emulator":
                    reasons[backend] = "it runs only when forced"
                else:
                    reasons[backend] = f"it could serve, but {chosen.backend} comes first"
        ordered = {name: reasons[name] for name in BACKENDS if name in reasons}
        return Explanation(self.name, chosen.backend, chosen.name, ordered)

"""The choice of a backend, made anew at every call of an op.

An op lists its kernels, best first; a kernel says why it cannot serve given arguments, or None.
The first that can serve runs, and the reference, which is plain PyTorch, always can. One backend
may be forced instead, by ``use_backend`` for all ops or some, or for the whole process by
``ALMOSTGPT_BACKEND``: every op that has a kernel of it runs that or fails with the reason, and
nothing falls back. An op that has none at all is left alone (``cuda`` and ``triton`` share the
ops between them, and ``cpu``, C++ for the processor, has those of decoding), unless it was named.

A kernel that is chosen in forward carries its own backward, so the choice holds for both:
autograd runs backward on threads of its own, where the caller's context variables do not reach.

Checking arguments and choosing costs 2.9 µs a call in eager mode (`timeit` of an rms_norm whose
kernel does nothing), against 15 µs and more that the reference of a tiny rms_norm takes (Python
3.11, torch 2.13, 2 shared cores of an AMD EPYC); in compiled code, nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from almostgpt.errors import UserError

BACKENDS = ("cuda", "triton", "cpu", "emulator", "reference")

# A card is known by its compute capability. A100; RTX 30; RTX 40 and L4; H100; B200; RTX 50.
Card = tuple[int, int]
CARDS: tuple[Card, ...] = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
DEFAULT_CARD: Card = (8, 0)


class Forced(NamedTuple):
    """One ``use_backend``: the backend, the card that the emulator plays, and the ops it is for."""

    backend: str
    card: Card = DEFAULT_CARD
    ops: tuple[str, ...] | None = None  # None: all


# Innermost first; the environment gives the process's default, such as "emulator,triton".
_FORCED: ContextVar[tuple[Forced, ...]] = ContextVar(
    "almostgpt_backend",
    default=tuple(
        Forced(name.strip())
        for name in os.environ.get("ALMOSTGPT_BACKEND", "").split(",")
        if name.strip()
    ),
)


# Who is told of every op that runs.
Observer = Callable[["Op", tuple, dict[str, Any]], None]
_OBSERVER: ContextVar[Observer | None] = ContextVar("almostgpt_observer", default=None)


def __getattr__(name: str):
    # Dynamo cannot trace ContextVar.get, but it guards what it reads from a module, and a guard
    # reads the attribute again at every call. So compiled code that was traced under one forced
    # backend is compiled again, not reused, under another.
    if name == "traced_forced":
        return _FORCED.get()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_THIS_MODULE = sys.modules[__name__]


def forced(op: Op) -> Forced | None:
    """What is forced for this op, or None where the choice is free."""
    stack = _THIS_MODULE.traced_forced if torch.compiler.is_compiling() else _FORCED.get()
    for entry in stack:
        if entry.ops is None:
            if entry.backend in op.backends:
                return entry
            _check_backend(entry.backend)
        elif op.name in entry.ops:
            return entry
    return None


@contextmanager
def use_backend(backend: str, *, ops: Iterable[str] | None = None, **options) -> Iterator[None]:
    """Force one backend within a ``with`` block, in this thread or task only.

    A call that the backend cannot serve raises ``UserError`` with the reason; a forced backend
    never falls back. Ops that have no kernel of it are left alone, unless ``ops`` names them. Of
    nested blocks the innermost that is for an op holds for it. Enter the block outside of code
    given to ``torch.compile``, which then compiles anew for it::

        with kernels.use_backend("emulator", ops=["rms_norm"], capability=(9, 0)):
            model(tokens)  # rms_norm in the emulator of an H100, everything else as ever

    Args:
        backend: ``"cuda"``, ``"triton"``, ``"cpu"``, ``"emulator"`` or ``"reference"``.
        ops: names of the ops that it is forced for; all of them when None.
        **options: what the backend takes; only the emulator takes any: ``capability``, the compute
            capability of the card that it plays, (8, 0) unless given.

    Raises:
        UserError: no such backend or op, no such option of it, or a capability that is not known.
    """
    _check_backend(backend)
    for option in options:
        if backend != "emulator" or option != "capability":
            raise UserError(f"backend {backend!r} takes no option {option!r}")
    entry = Forced(
        backend,
        check_card(options.get("capability", DEFAULT_CARD)),
        None if ops is None else _check_ops(ops),
    )
    token = _FORCED.set((entry, *_FORCED.get()))
    try:
        yield
    finally:
        _FORCED.reset(token)


@contextmanager
def observing(tell: Observer) -> Iterator[None]:
    """Within the ``with`` block, in this thread or task, ``tell(op, args, kwargs)`` before an op runs.

    The arguments are checked already. Ops in compiled code are not seen, nor is a backward pass: it
    belongs to the kernel that forward chose. ``tell`` may ask ``op.explain(*args, **kwargs)``. To ask
    whether there is one costs a call 0.2 µs (`timeit`, on the machine named above).
    """
    token = _OBSERVER.set(tell)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise UserError(
            f"no backend named {backend!r} (from use_backend or ALMOSTGPT_BACKEND); "
            f"the backends are {', '.join(BACKENDS)}"
        )


def check_card(capability: Card) -> Card:
    """The capability as a tuple; ``UserError`` for one of no card that is known."""
    card = tuple(capability) if isinstance(capability, (tuple, list)) else capability
    if card not in CARDS:
        raise UserError(
            f"capability must be one of {', '.join(map(str, CARDS))}, not {capability!r}"
        )
    return card


def _check_ops(ops: Iterable[str]) -> tuple[str, ...]:
    from almostgpt.kernels import OPS  # it is made of this module's Op

    names = (ops,) if isinstance(ops, str) else tuple(ops)
    if not names:
        raise UserError("use_backend: ops is empty; leave it out to force all of them")
    for name in names:
        if name not in OPS:
            raise UserError(f"no op named {name!r}; the ops are {', '.join(OPS)}")
    return names


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op; ``refuse`` and ``run`` take the op's own arguments.

    Attributes:
        backend: one of ``BACKENDS``.
        name: what explanations call it.
        refuse: why it cannot serve, or None. Its first argument is a card: the one that is asked
            about, which need not be here (that of the emulator, or of ``explain``), or None for
            the device that the tensors are on.
        run: of an emulator kernel the card comes first here too: no device could tell it.
        only_forced: it runs in seconds what others do in microseconds (the emulator, Triton's
            interpreter), so nobody gets it who did not ask.
        elsewhere: as what it refuses on cards that it is not for, which is no news to anybody who
            has another; None where it is for all.
    """

    backend: str
    name: str
    refuse: Callable[..., str | None]
    run: Callable
    only_forced: bool = False
    elsewhere: str | None = None


@dataclass(frozen=True)
class Explanation:
    """Which kernel would run, and why no other.

    Attributes:
        reasons: of every other backend why it would not; and, by their names, of kernels of the
            chosen backend that would be better.
    """

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
    backends: frozenset[str] = field(init=False)  # of which it has a kernel

    def __post_init__(self) -> None:
        backends = frozenset(kernel.backend for kernel in self.kernels)
        object.__setattr__(self, "backends", backends)

    def __call__(self, *args, **kwargs):
        """Check the arguments, choose a kernel and run it."""
        self.check(*args, **kwargs)
        if not torch.compiler.is_compiling() and (tell := _OBSERVER.get()) is not None:
            tell(self, args, kwargs)
        wanted = forced(self)
        kernel = self.choose(wanted, None, *args, **kwargs)
        if kernel.backend == "emulator":
            return kernel.run(wanted.card, *args, **kwargs)
        return kernel.run(*args, **kwargs)

    def choose(self, wanted: Forced | None, card: Card | None, *args, **kwargs) -> Kernel:
        """The kernel that serves these (checked) arguments, of the backend that is forced.

        ``card``: see ``Kernel.refuse``; the emulator is asked about its own.
        """
        if wanted is None:
            for kernel in self.kernels:
                if not kernel.only_forced and kernel.refuse(card, *args, **kwargs) is None:
                    return kernel
            raise AssertionError(f"{self.name} has no reference that serves everything")
        if wanted.backend == "emulator":
            card = wanted.card
        for kernel in self.kernels:
            if kernel.backend == wanted.backend and kernel.refuse(card, *args, **kwargs) is None:
                return kernel
        why = self.refusal(wanted.backend, card, *args, **kwargs)
        raise UserError(f"backend {wanted.backend!r} is forced but cannot run {self.name}: {why}")

    def refusal(self, backend: str, card: Card | None, *args, **kwargs) -> str | None:
        """Why a backend has no kernel for these arguments, or None where it has one."""
        refusals = {}  # each once
        for kernel in self.kernels:
            if kernel.backend == backend:
                if (why := kernel.refuse(card, *args, **kwargs)) is None:
                    return None
                refusals[why] = why != kernel.elsewhere
        told = [why for why, news in refusals.items() if news] or refusals
        return "; ".join(told) or f"no {backend} kernel for this op"

    def _serves_only_when_forced(self, backend: str, card: Card | None, *args, **kwargs) -> bool:
        return all(
            kernel.only_forced or kernel.refuse(card, *args, **kwargs)
            for kernel in self.kernels
            if kernel.backend == backend
        )

    def explain(self, *args, capability: Card | None = None, **kwargs) -> Explanation:
        """See ``almostgpt.kernels.explain``."""
        card = None if capability is None else check_card(capability)
        self.check(*args, **kwargs)
        wanted = forced(self)
        chosen = self.choose(wanted, card, *args, **kwargs)
        reasons = {}
        for kernel in self.kernels[: self.kernels.index(chosen)]:
            if kernel.backend == chosen.backend:
                asked = wanted.card if chosen.backend == "emulator" else card
                why = kernel.refuse(asked, *args, **kwargs)
                if why != kernel.elsewhere:
                    reasons[kernel.name] = why
        for backend in BACKENDS:
            if backend == chosen.backend:
                continue
            asked = card or DEFAULT_CARD if backend == "emulator" else card
            reasons[backend] = self.refusal(backend, asked, *args, **kwargs)
            if reasons[backend] is None:
                if wanted is not None:
                    reasons[backend] = f"it could serve, but {chosen.backend} is forced"
                elif self._serves_only_when_forced(backend, asked, *args, **kwargs):
                    reasons[backend] = "it runs only when forced"
                else:
                    reasons[backend] = f"it could serve, but {chosen.backend} comes first"
        return Explanation(self.name, chosen.backend, chosen.name, reasons)

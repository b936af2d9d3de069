"""Trainers in processes of their own, which take steps on demand.

A trainer changes its process (ours tells the C library to keep freed memory), so two of them in one
would not be what users have. Only one works at a time; the other waits at its pipe.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from almostgpt.training.metrics import memory_bytes

from . import harness

Step = Callable[[], object]


class Stepper:
    """One trainer in a process: ``seconds(calls)`` of a step, and its peak of memory."""

    def __init__(self, make: Callable[..., tuple[Step, Any]], *arguments: object):
        """
        make: gives a step and what ``made`` is to be; it runs in the new process.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        threads = torch.get_num_threads()
        self._process = context.Process(
            target=_serve, args=(theirs, threads, make, arguments), daemon=True
        )
        # The new process takes over our path, on which pytest does not put this folder's parent.
        with patch.object(sys, "path", [*sys.path, str(Path(__file__).parents[1])]):
            self._process.start()
        theirs.close()
        self.made = self._answer()

    def seconds(self, calls: int) -> float:
        """The mean of that many steps."""
        self._pipe.send(calls)
        return self._answer()

    def peak_bytes(self) -> int:
        """The device allocator's peak, or that of the process's resident set."""
        self._pipe.send(0)
        return self._answer()

    def _answer(self) -> Any:
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.terminate()


@contextmanager
def steppers(makers: dict[str, tuple]) -> Iterator[dict[str, Stepper]]:
    """A stepper for each name, from the arguments of ``Stepper``."""
    with ExitStack() as stack:
        made = {}
        for name, arguments in makers.items():
            made[name] = Stepper(*arguments)
            stack.callback(made[name].close)
        yield made


def _serve(pipe: Connection, threads: int, make: Callable, arguments: tuple) -> None:
    torch.set_num_threads(threads)
    try:
        step, made = make(*arguments)
        pipe.send(made)
        while True:
            try:
                calls = pipe.recv()
            except EOFError:
                return
            pipe.send(_seconds(step, calls) if calls else memory_bytes(harness.DEVICE))
    except Exception as error:
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _seconds(step: Step, calls: int) -> float:
    harness.wait()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    harness.wait()
    return (time.perf_counter() - start) / calls

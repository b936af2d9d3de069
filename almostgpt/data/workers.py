"""Batches to pieces in several processes, in the order of the batches.

One of the workers is this process, which so begins while the others start; each of the others is a
Python of its own, fed through its standard input, and ends when that closes: with this process,
however that ends. So a script needs no ``if __name__ == "__main__"``, and no thread is forked.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from almostgpt.data.pieces import (
    Batch,
    Piece,
    Task,
    make_piece,
    receive,
    received_blocks,
    received_piece,
    send,
    send_blocks,
    send_piece,
)
from almostgpt.data.tokenizer import Tokenizer, load_tokenizer
from almostgpt.errors import UserError

BATCHES_A_WORKER = 3  # read ahead, so that none has to wait
WAITING_BYTES = 1 << 27  # of batches under way: no more of them where documents are huge
WORTH_A_PROCESS = 1 << 24  # bytes of source: below, it starts for nothing

# The package without its __init__, which loads torch: half a gigabyte and seconds a worker has no use for.
_START = """
import json, sys, types
path, package = json.loads(sys.argv[1])
sys.path[:] = path
sys.modules["almostgpt"] = bare = types.ModuleType("almostgpt")
bare.__path__ = [package]
from almostgpt.data.workers import serve
serve()
"""


def workers_for(size: int | None) -> int:
    """As many as there are cores, or fewer where the source, of ``size`` bytes, is small."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, cores if size is None else size // WORTH_A_PROCESS))


def pieces_of(
    batches: Iterable[Batch],
    task: Task,
    tokenizer: Tokenizer | None,
    workers: int,
    tokenizer_folder: Path | None,
) -> Iterator[tuple[Batch, Piece]]:
    """Each batch with its piece, in order.

    Args:
        workers: processes, this one among them.
        tokenizer_folder: where ``tokenizer`` is saved, for the other ones.

    Raises:
        UserError: of the first batch that cannot be read or encoded, after those before it.
    """
    here = lambda batch: make_piece(task, tokenizer, batch.blocks)  # noqa: E731
    if workers == 1:
        yield from ((batch, here(batch)) for batch in batches)
        return
    others = [_Process(task, tokenizer_folder) for _ in range(workers - 1)]
    idle: queue.SimpleQueue[Callable[[Batch], Piece]] = queue.SimpleQueue()
    for work in (here, *others):
        idle.put(work)

    def run(batch: Batch) -> Piece:
        work = idle.get()  # there are as many threads as workers, so one is idle
        try:
            return work(batch)
        finally:
            idle.put(work)

    pool = ThreadPoolExecutor(workers)
    try:
        yield from _in_order(batches, lambda batch: pool.submit(run, batch), workers)
    finally:
        for process in others:
            process.end()
        pool.shutdown(cancel_futures=True)


def _in_order(
    batches: Iterable[Batch], submit: Callable[[Batch], Future[Piece]], workers: int
) -> Iterator[tuple[Batch, Piece]]:
    waiting: deque[tuple[Batch, Future[Piece]]] = deque()
    weight, failure = 0, None
    batches = iter(batches)
    while True:
        try:
            batch = next(batches, None)
        except UserError as error:  # what was read before it still counts
            batch, failure = None, error
        if batch is not None:
            waiting.append((batch, submit(batch)))
            weight += batch.weight
        while waiting and (
            batch is None or len(waiting) > BATCHES_A_WORKER * workers or weight > WAITING_BYTES
        ):
            first, future = waiting.popleft()
            yield first, future.result()
            weight -= first.weight
        if batch is None:
            break
    if failure is not None:
        raise failure


class _Process:
    """A worker beside this process, called with a batch by one thread at a time."""

    def __init__(self, task: Task, tokenizer_folder: Path | None):
        package = str(Path(__file__).parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps([sys.path, package])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for this process, which ends that one
        )
        self._tokenizer_folder = (
            None if tokenizer_folder is None else str(tokenizer_folder.absolute())
        )
        self._task: Task | None = task  # sent with the first batch

    def __call__(self, batch: Batch) -> Piece:
        try:
            if self._task is not None:
                header = {"task": asdict(self._task), "tokenizer": self._tokenizer_folder}
                send(self._process.stdin, header)
                self._task = None
            send_blocks(self._process.stdin, batch.blocks)
            answer = receive(self._process.stdout)
        except (BrokenPipeError, ValueError):
            answer = None
        if answer is None:
            raise UserError(
                f"a worker process ended unexpectedly (code {self._process.wait()}); if memory ran out, "
                "take fewer with --workers"
            )
        header, buffers = answer
        if "error" in header:
            raise UserError(header["error"])
        return received_piece(header, buffers)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def serve() -> None:
    """The other end: pieces for blocks, until the input closes."""
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the messages
    if (first := receive(source)) is None:
        return
    task, folder = Task(**first[0]["task"]), first[0]["tokenizer"]
    tokenizer = None if folder is None else load_tokenizer(folder)
    with suppress(BrokenPipeError):  # nobody is there to take it: the process that asked was killed
        while (message := receive(source)) is not None:
            try:
                piece = make_piece(task, tokenizer, received_blocks(*message))
            except UserError as error:
                send(sink, {"error": str(error)})
            else:
                send_piece(sink, piece)

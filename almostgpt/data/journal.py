"""How far a preparation has come: written down as it goes, read again after a kill.

A preparation works in a folder of its own beside the one it makes, ``.NAME.unfinished``. In it lie the
shards so far and ``journal.json``, which is replaced as a whole each time. What lies on the disk beyond
the journal is cut off, so the work goes on as if it had never been further.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from almostgpt.data.dataset import FILE_NAME
from almostgpt.data.filters import KEY_BYTES, KEYS
from almostgpt.data.progress import say
from almostgpt.data.survey import Survey
from almostgpt.errors import UserError
from almostgpt.files import replacing

FORMAT = 1
JOURNAL = "journal.json"
SEEN = "seen.bin"  # keys of the documents so far, 16 bytes each; only where duplicates are dropped


@dataclass
class Journal:
    """What is done, and what it was made from."""

    settings: dict[str, Any]  # all that shapes the result; another's work is not continued
    batches: int = 0  # taken in, whole
    source: str = ""  # hash of those batches: the source must not have changed
    keys: int = 0  # how many of SEEN count
    val_limit: float | None = None  # split by document: places below validate
    survey: Survey = field(default_factory=Survey)
    runs: dict[str, Any] = field(default_factory=dict)  # RunWriter.state by name
    encoded: bool = False  # the source is at its end, and all runs are finished

    def write(self, folder: Path) -> None:
        """Replaces the journal of ``folder``; on the disk when it returns."""
        with replacing(folder / JOURNAL) as file:
            file.write(json.dumps({"format": FORMAT, **asdict(self)}).encode())

    @classmethod
    def read(cls, folder: Path) -> Journal | None:
        """The journal of ``folder``, or None if there is none that can be continued."""
        try:
            stored = json.loads((folder / JOURNAL).read_bytes())
            if stored.pop("format") != FORMAT:
                return None
            return cls(**{**stored, "survey": Survey(**stored["survey"])})
        except (OSError, ValueError, KeyError, TypeError):
            return None


def read_keys(folder: Path, count: int) -> np.ndarray:
    """The first ``count`` keys, ``S16``; what is behind them is cut off."""
    file = folder / SEEN
    if not file.is_file():
        file.touch()
    if file.stat().st_size < count * KEY_BYTES:
        raise UserError(f"{file}: damaged")
    os.truncate(file, count * KEY_BYTES)
    return np.fromfile(file, KEYS)


def working_folder_of(out: Path) -> Path:
    """Where ``out`` is being made."""
    return out.with_name(f".{out.name}.unfinished")


@contextmanager
def occupied(out: Path, *, wait: bool, progress: bool) -> Iterator[Path | None]:
    """The working folder of ``out``, for this process alone; None if ``out`` was finished meanwhile.

    Where another process has it, this one waits, or raises ``UserError``. The lock is the operating
    system's and ends with its process, however that ends.
    """
    folder, file = working_folder_of(out), out.with_name(f".{out.name}.lock")
    while not (out / FILE_NAME).is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise UserError(f"{out}: another process is preparing it") from None
                say(f"{out}: another process is preparing it; waiting", progress)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_still_there(lock, file):  # the one before is done, and took its lock away
                continue
            try:
                if not (out / FILE_NAME).is_file():
                    folder.mkdir(exist_ok=True)
                    yield folder
                    return
            finally:
                file.unlink(missing_ok=True)
    yield None


def _is_still_there(lock: Any, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(file))
    except FileNotFoundError:
        return False

"""The running interpreter's own sources and texts, without tests: no network, about 10 MB."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from almostgpt.data.corpora.base import Block, BuiltIn
from almostgpt.errors import UserError

SUFFIXES = (".py", ".txt", ".rst")
LEFT_OUT = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages"}


class StandardLibrary(BuiltIn):
    """Only pure ASCII files, so that a character vocabulary stays below 100: the few others would
    bring hundreds of characters that occur once.
    """

    def blocks(self, cache: Path) -> Iterator[Block]:
        root = Path(sysconfig.get_path("stdlib"))
        found = False
        for name, file in sorted(
            (file.relative_to(root).as_posix(), file) for file in _files(root)
        ):
            content = file.read_bytes() if file.is_file() else b""
            if content and content.isascii():
                found = True
                yield Block(str(file), name, content, size=len(content))
        if not found:
            raise UserError(
                f"data.corpus=stdlib: this Python has no library sources in {root} (a zipped or "
                "frozen one?); name a text with --data.path"
            )


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]  # prunes the walk
        for name in names:
            # _sysconfigdata*.py is written when Python is built: paths of that one machine.
            if name.endswith(SUFFIXES) and not name.startswith("_sysconfigdata"):
                yield Path(folder, name)

"""What the scripts share that write the tables of docs/attention.md from csrc/attention/tiles.h; a module."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
PAGE = ROOT / "docs" / "attention.md"


def run_with_tiles(program: str) -> str:
    """What a C++ program prints that includes tiles.h."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("no g++ to read csrc/attention/tiles.h with")
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "tiles.cpp", Path(folder) / "tiles"
        source.write_text(program)
        subprocess.run([compiler, "-std=c++17", "-I", CSRC, source, "-o", binary], check=True)
        return subprocess.run([binary], check=True, capture_output=True, text=True).stdout


def table(head: str, rows: list[tuple]) -> str:
    columns = len(re.findall(r"(?<!\\)\|", head)) + 1  # a bar that is escaped is text
    lines = [f"| {head} |", "|---" * columns + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def with_tables(text: str, makers: dict, script: str) -> str:
    """The page with the tables between ``<!-- NAME -->`` and ``<!-- end of NAME -->`` made anew."""
    for name, make in makers.items():
        begin, end = f"<!-- {name}: scripts/{script} -->\n", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"the page has no place for the table {name!r}")
        text = f"{before}{begin}{make()}\n{end}{after}"
    return text


def page_main(
    arguments: list[str] | None, doc: str, page: Path, fast: dict, slow: dict, script: str
) -> int:
    """The command line of ``script``: makes the tables anew, those that need nvcc when asked to.

    Returns the exit status: with ``--check`` 1 where the page is stale.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it is stale")
    parser.add_argument("--compile", action="store_true", help="the table of nvcc's code too")
    options = parser.parse_args(arguments)
    old = page.read_text(encoding="utf-8")
    new = with_tables(old, {**fast, **(slow if options.compile else {})}, script)
    if not options.check:
        page.write_text(new, encoding="utf-8")
        return 0
    if new == old:
        return 0
    print(f"{page} is stale: run python scripts/{script}", file=sys.stderr)
    return 1

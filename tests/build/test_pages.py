"""Pages of docs/ whose snippets run, one after the other, and print what the page says."""

import re
from pathlib import Path

import pytest

from almostgpt.kernels import cpu

DOCS = Path(__file__).resolve().parents[2] / "docs"


NEEDS_CPP = pytest.mark.skipif(cpu.missing() is not None, reason=f"{cpu.missing()}")


@pytest.mark.parametrize(
    "page",
    [
        "int8_linear.md",
        "integrations.md",
        "kv_cache.md",
        "sampling.md",
        pytest.param("cpu.md", marks=NEEDS_CPP),
    ],
)
def test_snippets_run(page, capsys):
    text = (DOCS / page).read_text()
    snippets = re.findall(r"```python\n(.*?)```(?:\n\n```\n(.*?)```)?", text, re.S)
    assert snippets
    names: dict = {"__name__": "snippet"}
    for code, prints in snippets:
        exec(compile(code, f"docs/{page}", "exec"), names)
        assert capsys.readouterr().out == prints

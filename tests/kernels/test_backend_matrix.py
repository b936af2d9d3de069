"""docs/backends.md says what the code does."""

import importlib.util
from pathlib import Path

import pytest

from almostgpt import kernels

_FILE = Path(__file__).parents[2] / "scripts" / "backend_matrix.py"
_SPEC = importlib.util.spec_from_file_location("backend_matrix", _FILE)
backend_matrix = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(backend_matrix)


def test_the_page_is_current():
    assert backend_matrix.main(["--check"]) == 0, "run python scripts/backend_matrix.py"


def test_a_stale_page_is_noticed_and_written_anew(tmp_path, monkeypatch, capsys):
    page = tmp_path / "backends.md"
    monkeypatch.setattr(backend_matrix, "PAGE", page)
    assert backend_matrix.main(["--check"]) == 1
    page.write_text("# Which kernel ran where\n", encoding="utf-8")
    assert backend_matrix.main(["--check"]) == 1
    assert "is stale" in capsys.readouterr().err
    assert backend_matrix.main([]) == 0
    assert backend_matrix.main(["--check"]) == 0


def test_every_op_has_a_section():
    assert set(backend_matrix.CALLS) == set(kernels.OPS)
    text = backend_matrix.page()
    assert all(f"\n## {op}\n" in text for op in kernels.OPS)


@pytest.fixture
def matrix(monkeypatch):
    """The section of an op whose kernels are given."""

    def section(*listed: kernels.dispatch.Kernel) -> list[str]:
        op = kernels.dispatch.Op("rms_norm", lambda *args, **kwargs: None, listed)
        monkeypatch.setitem(kernels.OPS, "rms_norm", op)
        return backend_matrix.section("rms_norm").splitlines()

    return section


def test_equal_columns_and_rows_are_one_and_others_stay_apart(matrix):
    def refuse(card, x, weight, residual=None):
        if card is None:
            return "no card"
        if card < (9, 0) and residual is not None:
            return "too old for a residual"
        return None

    lines = matrix(
        kernels.dispatch.Kernel("cuda", "fast", refuse, None),
        kernels.dispatch.Kernel("reference", "plain", lambda *args, **kwargs: None, None),
    )
    dtypes, others = "bf16, fp16, fp32, fp64", "alone; weight in fp32; rows of odd length"
    assert lines[2:] == [
        "| call | dtype | 8.0 to 8.9 | 9.0 to 12.0 | CPU |",
        "|---|---|---|---|---|",
        f"| {others} | {dtypes} | cuda: `fast` | cuda: `fast` | reference |",
        f"| with a residual | {dtypes} | reference | cuda: `fast` | reference |",
        "",
        f"- {dtypes}: not cuda: too old for a residual",
    ]

"""scripts/tune_triton.py, as far as it goes without a GPU."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from almostgpt.kernels import triton_ops

_FILE = Path(__file__).parents[2] / "scripts" / "tune_triton.py"
_SPEC = importlib.util.spec_from_file_location("tune_triton", _FILE)
tune_triton = importlib.util.module_from_spec(_SPEC)
sys.modules["tune_triton"] = tune_triton  # where dataclasses looks up annotations
_SPEC.loader.exec_module(tune_triton)

TABLE = json.loads(tune_triton.TABLE.read_text(encoding="utf-8"))


def test_every_kernel_of_the_table_has_a_workload():
    assert set(tune_triton.WORKLOADS) == set(TABLE)


@pytest.mark.parametrize("kernel", tune_triton.WORKLOADS)
def test_candidates_are_valid_and_hold_the_default(kernel):
    candidates = tune_triton.WORKLOADS[kernel].candidates
    assert TABLE[kernel]["default"] in candidates
    for candidate in candidates:
        assert candidate.keys() == TABLE[kernel]["default"].keys()
        for name, value in candidate.items():
            if name != "num_stages":
                assert value & (value - 1) == 0, "Triton's sizes are powers of two"
        assert 1 <= candidate["num_warps"] <= 32


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table in a file with one kernel, whose work returns the settings that it runs with."""
    path = tmp_path / "triton_settings.json"
    content = {
        "activation": {
            "default": {"BLOCK": 1024, "num_warps": 4},
            "8.0": {"BLOCK": 64, "num_warps": 1},
        },
        "other": {"default": {"BLOCK": 8, "num_warps": 1}},
    }
    tune_triton.write(content, path)
    assert json.loads(path.read_text()) == content
    monkeypatch.setattr(triton_ops, "_table", lambda: content)

    def works():
        for label in ("small", "large"):
            yield label, lambda label=label: (label, triton_ops.settings_of("activation", (9, 0)))

    candidates = [{"BLOCK": block, "num_warps": 4} for block in (512, 1024, 2048)]
    workload = tune_triton.Workload(candidates, works)
    monkeypatch.setitem(tune_triton.WORKLOADS, "activation", workload)
    return path


# The best of "small" is 512, of "large" 2048; in the mean 1024 is.
SECONDS = {"small": {512: 1e-6, 1024: 1.1e-6, 2048: 4e-6}, "large": {512: 4e-5, 1024: 1.2e-5}}


def timer(work):
    label, settings = work()
    return SECONDS[label].get(settings["BLOCK"], 1e-5)


def test_the_best_in_the_mean_is_written_and_the_rest_kept(table, capsys):
    before = json.loads(table.read_text())
    best = tune_triton.tune(["activation"], "9.0", table, dry_run=False, timer=timer)
    assert best == {"activation": {"BLOCK": 1024, "num_warps": 4}}
    before["activation"]["9.0"] = {"BLOCK": 1024, "num_warps": 4}
    assert json.loads(table.read_text()) == before
    first = capsys.readouterr().out.splitlines()[1]
    assert first.split()[:2] == ["BLOCK=1024", "num_warps=4"] and "1.1" in first and "12.0" in first
    # No candidate stays in force.
    assert triton_ops.settings_of("activation", (8, 0)) == {"BLOCK": 64, "num_warps": 1}


def test_a_dry_run_writes_nothing(table):
    before = table.read_text()
    tune_triton.tune(["activation"], "9.0", table, dry_run=True, timer=timer)
    assert table.read_text() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_line(capsys):
    assert tune_triton.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("nothing to tune on: ") and err.count("\n") == 1


def test_help_has_examples_and_an_unknown_kernel_is_named(capsys):
    with pytest.raises(SystemExit, match="0"):
        tune_triton.main(["--help"])
    assert "--kernel activation --dry-run" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        tune_triton.main(["--kernel", "activatoin"])
    assert "activation" in capsys.readouterr().err

"""scripts/generation_speed.py with a model of a few weights: does it run, and say what is wrong?"""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from almostgpt.model.presets import MODEL_PRESETS

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "generation_speed.py"
SIZES = {"block_size": 32, "vocab_size": 101, "n_layer": 2, "n_head": 2, "n_embd": 32}
OURS = {"almostgpt, fp32", "almostgpt, int8", "almostgpt, no cache"}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("generation_speed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def small(script, monkeypatch):
    """Presets of this size, on a processor; and a roof whose measurement needs no half a gigabyte."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    harness = script.benchmarks("harness")
    monkeypatch.setattr(harness, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(harness, "read_bandwidth", lambda: 1e10)
    for preset in ("gpt2", "tiny"):
        monkeypatch.setitem(MODEL_PRESETS, preset, {**MODEL_PRESETS[preset], **SIZES})


def test_it_measures_checks_and_draws(script, tmp_path, capsys):
    pytest.importorskip("transformers", reason="needs the extra `test`")
    chart = tmp_path / "charts" / "chart.svg"
    options = ["--lengths", "32", "8", "--new", "3", "--rounds", "1", "--batch", "2"]
    threads = torch.get_num_threads()
    assert script.main([*options, "--threads", "1", "--out", str(chart)]) == 0
    assert torch.get_num_threads() == threads
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads(chart.with_suffix(".json").read_text())
    assert found["lengths"] == [8, 32] and found["threads"] == 1 and found["notes"] == []
    assert set(found["peers"]) == OURS | {"transformers"}
    for peer in found["peers"].values():
        assert len(peer["ms_a_token"]) == len(peer["first_token_ms"]) == 2
        for ms, rate in zip(peer["ms_a_token"], peer["tokens_per_second"], strict=True):
            assert rate == pytest.approx(2e3 / ms, rel=0.05)  # of 2 texts; both are rounded
    text = chart.read_text()
    assert all(name in text for name in (*OURS, "transformers", "tokens a second"))


def test_a_model_that_transformers_gpt2_is_not_is_measured_without_it(script, capsys):
    assert script.main(["--preset", "tiny", "--lengths", "8", "--new", "2", "--rounds", "1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["peers"]) == OURS
    assert len(found["notes"]) == 1 and "its GPT-2 has no norm rmsnorm" in found["notes"][0]


def test_without_transformers_it_is_named(script, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert script.main(["--lengths", "8", "--new", "2", "--rounds", "1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["peers"]) == OURS
    assert found["notes"] == ["no transformers: not installed (pip install -e '.[test]')"]


def test_a_peer_that_computes_something_else_is_named(script, capsys, monkeypatch):
    generators = script.benchmarks("generators")
    monkeypatch.setattr(generators, "ours", of_another_prompt(generators.ours))
    assert script.main(["--lengths", "16", "--new", "8"]) == 2
    error = capsys.readouterr().err
    assert "computes something else" in error and error.count("\n") == 1


def of_another_prompt(ours):
    def make(*arguments, **options):
        generator = ours(*arguments, **options)

        def run(prompts, new, tick):
            return generator.run(prompts.flip(1), new, tick)

        return dataclasses.replace(generator, run=run)

    return make


@pytest.mark.parametrize(
    "options, message",
    [
        (["--preset", "gpt3"], "--preset is 'gpt3'"),
        (["--lengths", "64"], "at most 32, the model's block_size"),
        (["--lengths", "16"], "above --new, 16"),
        (["--new", "1"], "--new is 1, but must be at least 2"),
        (["--threads", "0"], "--threads is 0"),
        (["--new", "2", "--out", "chart.jpeg"], "must end in .svg"),
    ],
)
def test_what_cannot_be_is_one_line(script, capsys, options, message):
    assert script.main(options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1

"""scripts/streaming_loss.py, on a text made here and for a few steps: does it run, and say what is wrong?"""

import importlib.util
import json
import random
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "streaming_loss.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("streaming_loss", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_trains_reads_and_draws(script, tmp_path, capsys):
    words = random.Random(0).choices("to be or not that is the question".split(), k=20_000)
    text, chart = tmp_path / "text.txt", tmp_path / "charts" / "chart.svg"
    text.write_text(" ".join(words))
    options = ["--steps", "3", "--texts", "2", "--out", str(chart)]
    assert script.main(["--text", str(text), *options]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["tokens"] == 20 * 64 and set(found["loss_by_eighths"]) == {
        "4 sinks",
        "no sinks",
        "full",
    }
    # All caches are the same up to the first context, in the first eighth of 2.5 of them.
    first = [losses[0] for losses in found["loss_by_eighths"].values()]
    assert max(first) - min(first) < 0.2
    assert "4 sinks" in chart.read_text()


@pytest.mark.parametrize("content, message", [(None, "No such file"), ("too short", "fewer than")])
def test_what_cannot_be_read_is_one_line(script, tmp_path, capsys, content, message):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_text(content)
    assert script.main(["--text", str(text)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1

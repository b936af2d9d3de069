"""Runs of a few steps, for the commands that take one."""

import shutil
from pathlib import Path

import pytest

from almostgpt.cli.main import main
from almostgpt.model import GPT


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("ALMOSTGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def text(tmp_path) -> Path:
    return write_text(tmp_path)


def write_text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("to be or not to be, that is the question: ä é ü 日本\n" * 60, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Models of a few steps, by their positions; on bytes, so that characters are cut between tokens."""
    folder = tmp_path_factory.mktemp("runs")
    arguments = [f"--data.path={write_text(folder)}", "--data.tokenizer=byte", "--device=cpu"]
    sizes = {"block-size": 16, "n-layer": 1, "n-head": 2, "n-embd": 16}
    arguments += [f"--model.{key}={value}" for key, value in sizes.items()]
    arguments += ["--training.steps=3", "--training.batch-size=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALMOSTGPT_CACHE", str(folder / "cache"))
        for position in ("rope", "learned"):
            own = [f"--out={folder / position}", f"--model.position={position}"]
            assert main(["train", *arguments, *own]) == 0
    return {position: folder / position for position in ("rope", "learned")}


@pytest.fixture
def trained(runs, capsys) -> Path:
    return copied(runs["rope"], capsys)


@pytest.fixture
def trained_learned(runs, capsys) -> Path:
    """Its positions end, at 16."""
    return copied(runs["learned"], capsys)


def copied(run: Path, capsys) -> Path:
    shutil.copytree(run, "run")
    capsys.readouterr()  # what training printed
    return Path("run")


@pytest.fixture
def fed(monkeypatch) -> list[int]:
    """How many tokens each forward was fed."""
    seen = []
    forward = GPT.forward

    def counting(self, ids, *args, **kwargs):
        seen.append(ids.shape[1])
        return forward(self, ids, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", counting)
    return seen

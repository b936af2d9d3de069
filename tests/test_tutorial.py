"""docs/tutorial.md: its commands, as they stand there, one after the other in an empty folder.

Blocks of ``bash`` and ``python`` are run as they are. A ``yaml`` block is the file that its first line
names. Blocks without a language are what is printed, of another text: they are not compared.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from almostgpt import GPT, GPTConfig, checkpoint
from almostgpt.cli.main import COMMANDS, main
from almostgpt.config import Config, overlay
from almostgpt.data.tokenizer import ByteTokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
LINES = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]
OURS = [shlex.split(line)[1:] for line in LINES if line.startswith("almostgpt ")]
FILES = {
    block.splitlines()[0].removeprefix("# "): block
    for language, block in BLOCKS
    if language == "yaml"
}
READ = ("--config", "--data.path", "--init", "--checkpoint", "--perplexity", "--from")
MADE = ("--out", "--to-hf", ">")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the reader works: what the page asks for, a text in ``book.txt``, is there."""
    monkeypatch.setenv("ALMOSTGPT_CACHE", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    pages = sorted((ROOT / "docs").glob("*.md"))
    # Characters that are rare would be missing from a part of it, or from a model trained on it.
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    (work / "book.txt").write_text(text.encode("ascii", "ignore").decode(), encoding="utf-8")
    return work


def test_the_blocks_are_of_known_kinds_and_every_file_has_its_name():
    assert {language for language, _ in BLOCKS} == {"bash", "python", "yaml"}
    assert set(FILES) == {"mine.yaml", "windows.yaml"}
    assert {words[0] for words in OURS} <= set(COMMANDS) and len(OURS) > 10


def test_what_a_command_reads_was_made_before_it():
    there = {"book.txt"}
    for language, block in BLOCKS:
        if language == "yaml":
            there.add(block.splitlines()[0].removeprefix("# "))
        for line in block.splitlines() if language == "bash" else ():
            words = shlex.split(line)
            options = dict(zip(words, words[1:], strict=False))
            for option in READ:
                assert options.get(option, "book.txt") in there, line
            if words[0] in ("wc", "head", "tail"):
                assert words[3 if words[1] == "-n" else 2] in there, line
            if "--resume" in words:
                assert options["--out"] in there, line
            there |= {options[option] for option in MADE if option in options}


def test_the_pages_and_files_it_speaks_of_exist():
    text = PAGE.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (PAGE.parent / link).is_file(), link
    assert (ROOT / "tests" / "test_tutorial.py").is_file() and "tests/test_tutorial.py" in text


class Parsed(Exception):
    """The command line has been read, and nothing has been done yet."""


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_every_command_line_is_one(words, folder, monkeypatch):
    for name, block in FILES.items():
        Path(name).write_text(block, encoding="utf-8")
    if "--init" in words or "--resume" in words:  # whose settings are read before the command line
        model = GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=8))
        config = overlay(Config(), {"model": model.config, "data.tokenizer": "byte"})
        checkpoint.export(Path("runs/mine"), model, ByteTokenizer(), config)
    command, *arguments = words
    module = {"info --plan": "plan", "info --config": "info_model"}.get(
        " ".join(words[:2]), command
    )
    module = import_module(f"almostgpt.cli.{module}")
    parse = module.parse

    def parse_alone(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(module, "parse", parse_alone)
    with pytest.raises(Parsed):
        main([command, *arguments])


@pytest.mark.slow  # all of it: some minutes
def test_it_runs_as_it_stands(folder):
    binaries = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    env |= {"HF_HUB_OFFLINE": "1"}
    for language, block in BLOCKS:
        if language == "yaml":
            Path(block.splitlines()[0].removeprefix("# ")).write_text(block, encoding="utf-8")
            continue
        program = (
            ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
        )
        done = subprocess.run([*program, block], env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    for named in re.findall(r"`(runs/[\w./]+)`", PAGE.read_text(encoding="utf-8")):
        assert Path(named).exists() or named == "runs/theirs", named
    lines = [json.loads(line) for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0] < lines[0]["loss"]
    assert lines[-1]["step"] == 400

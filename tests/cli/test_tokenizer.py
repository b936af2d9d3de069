"""``almostgpt tokenizer``: a vocabulary trained, looked at, measured, and a model trained with it."""

import json
import os
import signal
import threading

import pytest

from almostgpt.cli.main import main
from almostgpt.data.tokenizer import BPETokenizer, load_tokenizer

pytest.importorskip("almostgpt._bpe", reason="the trainer was not built")


@pytest.fixture
def trained(text, capsys):
    """(the folder, what the command printed last)"""
    arguments = ["tokenizer", "train", "--input", str(text), "--vocab-size", "300", "--out", "mine"]
    assert main(arguments) == 0
    return "mine", last_line(capsys)


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_train(trained, text):
    folder, result = trained
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, BPETokenizer) and tokenizer.pattern == "gpt4"
    # Fewer than 300: the text is one line again and again.
    assert result["vocab_size"] == tokenizer.vocab_size < 300
    assert result["special_tokens"] == {"<|endoftext|>": tokenizer.vocab_size - 1}
    assert " question" in [tokenizer.decode([id]) for id in tokenizer.encode(text.read_text())]
    assert sorted(os.listdir(folder)) == [
        "almostgpt_tokenizer.json",
        "tokenizer.json",
        "tokenizer.tiktoken",
    ]


def test_train_with_options(text, capsys):
    (text.parent / "folder").mkdir()
    (text.parent / "folder" / "b.txt").write_text("zzyzx " * 500)
    (text.parent / "folder" / "c.md").write_text("qqqq" * 5000)  # no .txt: not read
    arguments = ["--input", str(text), "folder", "--pattern", r"\w+|\W", "--vocab-size", "280"]
    specials = ["--special-tokens", "<a>", "<b>", "--threads", "1"]
    assert main(["tokenizer", "train", *arguments, *specials, "--out", "mine"]) == 0
    tokenizer = load_tokenizer("mine")
    assert last_line(capsys)["special_tokens"] == {"<a>": 278, "<b>": 279}
    assert (tokenizer.pattern, tokenizer.end_of_text) == (r"\w+|\W", None)
    assert b"zzyzx" in tokenizer.tokens and b"qq" not in tokenizer.tokens


def test_encode(trained, text, capsys):
    folder, _ = trained
    tokenizer = load_tokenizer(folder)
    assert (
        main(["tokenizer", "encode", "--tokenizer", folder, "--text", "to be é", "--pieces"]) == 0
    )
    result = last_line(capsys)
    assert result["ids"] == tokenizer.encode("to be é") and result["bytes"] == 8
    assert "".join(result["pieces"]) == "to be é" and len(result["pieces"]) == result["tokens"]
    assert main(["tokenizer", "encode", "--tokenizer", "byte", "--input", str(text)]) == 0
    assert last_line(capsys)["ids"] == list(text.read_bytes())


def test_stats(trained, text, capsys, tiktoken_cache):
    folder, _ = trained
    arguments = ["--tokenizer", folder, "--input", str(text)]
    assert main(["tokenizer", "stats", *arguments]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out.splitlines()[-1])
    size = len(text.read_bytes())
    figures = result["files"][str(text)]
    assert figures["bytes"] == size and set(figures["bytes_per_token"]) == {folder, "gpt2"}
    lines = text.read_text().count("\n")
    by_lines = len(load_tokenizer(folder).encode(text.read_text()))
    assert figures["bytes_per_token"][folder] == pytest.approx(size / by_lines)
    assert result["scripts"] == {"Latin": figures} and lines == 60
    assert "left out: cl100k" in shown.err and "Latin" in shown.err


def test_a_model_is_trained_with_it(trained, text, capsys):
    folder, result = trained
    sizes = {"block-size": 16, "n-layer": 1, "n-head": 2, "n-embd": 16}
    arguments = [f"--model.{key}={value}" for key, value in sizes.items()]
    arguments += [f"--data.path={text}", f"--data.tokenizer={folder}", "--data.documents=packed"]
    arguments += ["--training.steps=2", "--training.batch-size=2", "--device=cpu", "--out=run"]
    assert main(["train", *arguments]) == 0
    capsys.readouterr()
    assert main(["eval", "--checkpoint", "run", "--perplexity", str(text)]) == 0
    scored = len(load_tokenizer(folder).encode(text.read_text())) - 1  # all but the first
    assert last_line(capsys)["tokens"] == scored
    assert main(["prepare", f"--data.path={text}", f"--data.tokenizer={folder}", "--out=set"]) == 0
    assert last_line(capsys)["vocab_size"] == result["vocab_size"]


def test_help(capsys):
    for arguments in ([], ["--help"], ["train", "--help"], ["encode", "--help"], ["stats", "-h"]):
        with pytest.raises(SystemExit) as end:
            main(["tokenizer", *arguments])
        assert end.value.code == 0
        assert "examples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "did you mean train"),
        (["train", "--input", "nowhere", "--out", "x"], "nowhere: no such file or folder"),
        (["train", "--input", "empty", "--out", "x"], "empty: no .txt file"),
        (["train", "--input", "text.txt", "--out", "text.txt"], "already exists"),
        (["train", "--input", "text.txt", "--out", "x", "--vocab-size", "9"], "at least 257"),
        (
            ["train", "--input", "text.txt", "--out", "x", "--pattern", "gpt5("],
            "regular expression",
        ),
        (["train", "--input", "text.txt", "--out", "x", "--threads", "0"], "at least 1"),
        (["encode", "--tokenizer", "byte"], "either --text or --input"),
        (["encode", "--tokenizer", "gpt-2", "--text", "a"], "did you mean gpt2"),
        (["encode", "--tokenizer", "byte", "--input", "nowhere"], "nowhere: No such file"),
        (["encode", "--tokenizer", "byte", "--input", "bad.txt"], "bad.txt: not UTF-8"),
        (["stats", "--tokenizer", "byte", "--input", "bad.txt"], "bad.txt: not UTF-8"),
    ],
)
def test_mistakes(arguments, message, text, capsys):
    (text.parent / "empty").mkdir()
    (text.parent / "bad.txt").write_bytes(b"a\xffb")
    assert main(["tokenizer", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (text.parent / "x").exists()


def test_ctrl_c_leaves_nothing_behind(tmp_path, capsys):
    """While a file is read: a pipe that its writer keeps open."""
    os.mkfifo(tmp_path / "pipe")
    held = threading.Event()

    def write():
        with open(tmp_path / "pipe", "wb") as out:
            out.write(b"some text")
            out.flush()
            held.wait(20)

    writer = threading.Thread(target=write)
    writer.start()
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        assert main(["tokenizer", "train", "--input", "pipe", "--out", "mine"]) == 130
    finally:
        held.set()
        writer.join()
        signal.signal(signal.SIGALRM, before)
    assert "interrupted" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["pipe"]

"""The command line as a user meets it: help, errors with code 2, JSON on the last line."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

import almostgpt
from almostgpt.cli.main import COMMANDS, main, train_main
from almostgpt.config import Config, flatten, resolve
from almostgpt.config_file import load_config


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {command} " in out for command in COMMANDS) and "examples" in out
    for command in COMMANDS:
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        out = capsys.readouterr().out
        assert "examples" in out and f"almostgpt {command}" in out


def test_every_setting_is_an_option_and_print_config_prints_what_was_given(capsys):
    """All settings at once, each with another value than its default; read back from the YAML."""
    changed = {}
    for key, value in flatten(resolve(Config())).items():
        if isinstance(value, bool):
            changed[key] = not value
        elif isinstance(value, int):
            changed[key] = value * 2
        elif isinstance(value, float):
            changed[key] = value / 2 + 0.01
    changed |= {"model.norm": "layernorm", "model.feedforward": "gelu", "model.rope_fraction": 0.5}
    changed |= {"data.split": "document", "data.sampling": "sequential", "data.tokenizer": "byte"}
    changed |= {"data.documents": "packed"}
    changed |= {"schedule.name": "constant", "training.precision": "bf16", "device": "cpu"}
    arguments = []
    for key, value in changed.items():
        word = str(value).lower() if isinstance(value, bool) else str(value)
        arguments += [f"--{key}", word]
    arguments += ["--optimizer.betas", "0.8", "0.9", "--model.vocab-size", "300"]
    assert main(["train", "--print-config", *arguments]) == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    printed = flatten(load_config("printed.yaml"))
    assert changed.items() <= printed.items()
    assert printed["optimizer.betas"] == (0.8, 0.9) and printed["model.vocab_size"] == 300


def test_the_command_line_wins_over_the_file(capsys):
    Path("mine.yaml").write_text("base: quickstart\nmodel: {n_layer: 3}\ntraining: {steps: 5}")
    assert main(["train", "--config", "mine.yaml", "--training.steps", "7", "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["n_layer"] == 3 and printed["training"]["steps"] == 7


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["trian"], "did you mean train"),
        (["train", "--config", "quikstart"], "did you mean quickstart"),
        (["train", "--config", "nowhere.yaml"], "no configuration named"),
        (["train", "--data.path", "nowhere.txt"], "nowhere.txt"),
        (["train", "--model.norm", "layernrm"], "did you mean layernorm"),
        (["train", "--model.n-head", "5"], "n_head"),
        (["train", "--data.corpus", "shakespear"], "did you mean shakespeare"),
        (["train", "--data.tokenizer", "bite"], "did you mean byte"),
        (["train", "--device", "tpu"], "device is 'tpu'"),
        (["train", "--resume", "--out", "nowhere"], "there is no run"),
        (["prepare", "--out", "x", "--data.path", "nowhere"], "nowhere"),
        (["generate", "--checkpoint", "nowhere"], "nowhere: no such folder"),
        (["generate", "--checkpoint", "."], "no checkpoint in it"),
        (["generate", "--checkpoint", ".", "--temperature", "-1"], "temperature"),
        (["generate", "--checkpoint", ".", "--seed", str(2**64)], "seed"),
        (["generate", "--checkpoint", ".", "--cache", "rollin"], "did you mean rolling"),
        (["generate", "--checkpoint", ".", "--cache", "full", "--window", "9"], "window is for"),
        (
            ["generate", "--checkpoint", ".", "--cache", "none", "--sink-tokens", "9"],
            "sink_tokens is",
        ),
        (["train", "--seed", str(2**64)], "seed"),
        (["train", "--model.n-embd", str(10**30)], "n_embd"),
        (["train", "--data.path", "~nobody-of-this-name/book.txt"], "book.txt"),
        (["info", "--device", "cuda:77"], "cuda:77"),
    ],
)
def test_mistakes_end_in_one_message_and_code_2(arguments, expected, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert expected in err and err.startswith("error: ") and "Traceback" not in err
    assert out == ""
    assert not Path("runs").exists()  # nothing was begun


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["train", "--modle.n-layer", "3"], "--model.n-layer"),
        (["train", "--training.steps", "many"], "expected a whole number"),
        (["train", "--training.compile", "perhaps"], "expected true or false"),
        (["generate"], "--checkpoint"),
        (["generate", "--checkpoint", "x", "--max-token", "3"], "--max-tokens"),
    ],
)
def test_wrong_options_name_the_nearest(arguments, expected, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert expected in err and "Traceback" not in err


def test_out_of_memory_on_the_host_is_one_message(text, capsys):
    sizes = ["--model.n-layer=1", "--model.n-head=2", "--model.n-embd=500000000", "--device=cpu"]
    assert main(["train", f"--data.path={text}", "--out=run", *sizes]) == 2
    err = capsys.readouterr().err
    assert "out of memory" in err and "Traceback" not in err
    assert not Path("run").exists()


def test_large_whole_numbers_keep_their_digits(capsys):
    assert main(["train", "--seed", "1234567890123456789", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 1234567890123456789


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == almostgpt.__version__


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="nowhere"):
        main(["generate", "--checkpoint", "nowhere", "--debug"])


def test_train_main_is_train(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["almostgpt-train", "--print-config"])
    assert train_main() == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["corpus"] == "stdlib"


def test_prepare_then_train_on_it(text, capsys):
    arguments = ["prepare", "--data.path", str(text), "--data.tokenizer", "byte", "--out", "tokens"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["vocab_size"] == 257
    assert result["train_tokens"] + result["val_tokens"] == text.stat().st_size
    sizes = ["--model.n-layer=1", "--model.n-head=2", "--model.n-embd=16", "--model.block-size=16"]
    steps = ["--training.steps=2", "--training.batch-size=2", "--device=cpu"]
    assert main(["train", "--data.path=tokens", "--out=run", *sizes, *steps]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 2
    assert main(arguments) == 2
    assert "already exists" in capsys.readouterr().err


def test_info_names_versions_kernels_and_reasons(capsys, monkeypatch):
    assert main(["info", "--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert report["ops"]["rms_norm"]["backend"] == "reference"
    assert "cpu" in report["ops"]["rms_norm"]["reasons"]["cuda"]
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "rms_norm: reference" in out and "not cuda:" in out


def test_a_closed_pipe_is_no_error(monkeypatch, tmp_path):
    class Closed(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

        def fileno(self):
            return self.file.fileno()

    closed = Closed()
    closed.file = open(tmp_path / "descriptor", "w")
    monkeypatch.setattr(sys, "stdout", closed)
    assert main(["train", "--print-config"]) == 0

"""The command line as a user meets it: help, errors with code 2, JSON on the last line."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

import almostgpt
from almostgpt.cli.generate import decode_stream
from almostgpt.cli.main import COMMANDS, main, train_main
from almostgpt.config import Config, flatten, resolve
from almostgpt.config_file import load_config
from almostgpt.data.tokenizer import ByteTokenizer
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
    changed |= {"model.norm": "layernorm", "model.feedforward": "gelu", "model.position": "learned"}
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
    sizes = ["--model.n-layer=1", "--model.n-head=2", "--model.n-embd=2000000000", "--device=cpu"]
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


def generate(*arguments: str) -> int:
    return main(["generate", "--checkpoint", "run", "--device", "cpu", *arguments])


def test_generate_repeats_with_a_seed(trained, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert generate("--prompt", "to be", "--max-tokens", "30", "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("to be") for text in texts)


def test_generate_greedy_equals_the_library(trained, capsys):
    from almostgpt import load

    assert generate("--prompt", "to be", "--max-tokens", "30", "--temperature", "0") == 0
    out = capsys.readouterr().out
    model, tokenizer = load("run")
    ids = torch.tensor([tokenizer.encode("to be")])
    expected = tokenizer.decode(model.generate(ids, 30, temperature=0)[0].tolist())
    assert out == expected + "\n"


def test_an_empty_prompt_starts_at_random(trained, capsys):
    starts = set()
    for seed in range(5):
        assert generate("--max-tokens", "0", "--seed", str(seed)) == 0
        starts.add(capsys.readouterr().out)
    assert len(starts) > 1


def test_samples_differ_and_options_reach_the_sampler(trained, capsys):
    assert generate("--prompt=to", "--num-samples=3", "--max-tokens=20", "--seed=0") == 0
    out, err = capsys.readouterr()
    assert err.count("--- sample") == 3
    assert generate("--prompt=to", "--top-k=1", "--max-tokens=20", "--seed=0") == 0
    one = capsys.readouterr().out
    assert generate("--prompt=to", "--temperature=0", "--max-tokens=20") == 0
    assert capsys.readouterr().out == one  # the most likely token alone is greedy
    assert (
        generate("--prompt=to", "--top-k=none", "--top-p=null", "--max-tokens=20", "--seed=0") == 0
    )
    assert capsys.readouterr().out != one


def test_interactive_mode_keeps_the_conversation_until_cleared(trained, capsys, monkeypatch):
    lines = iter(["to be", "or not", "clear", "to be", "quit", "never read"])
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    assert generate("--interactive", "--max-tokens=4", "--temperature=0") == 0
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) >= 3
    assert next(lines) == "never read"
    monkeypatch.setattr("builtins.input", lambda: (_ for _ in ()).throw(EOFError))
    assert generate("--interactive") == 0


def test_the_same_text_whatever_the_cache(trained, capsys, fed):
    """Within the block, which is 16; past it with a window that is, and with an int8 cache, another."""

    def text(*options: str, tokens: int = 10) -> str:
        assert generate("--prompt=to be", f"--max-tokens={tokens}", "--seed=3", *options) == 0
        return capsys.readouterr().out

    expected = text()
    assert fed == [5] + [1] * 9
    for options in ("full", "rolling", "none", "rolling --window 16 --sink-tokens 0"):
        assert text(*f"--cache {options}".split()) == expected
    assert text("--cache=auto", tokens=40) == text("--cache=rolling", "--sink-tokens=4", tokens=40)
    assert text("--cache=int8", tokens=40).startswith("to be")
    assert text("--cache=none", tokens=40).startswith("to be")
    assert text("--window=4", "--sink-tokens=1", tokens=40).startswith("to be")


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--cache=full", "--max-tokens=12"], "17 tokens, .*block_size of 16.*cache=rolling"),
        (["--cache=rolling", "--window=17"], "window is 17, but must be in 1 … 16"),
        (["--window=2", "--sink-tokens=2"], "sink_tokens is 2, but must be in 0 … 1"),
    ],
)
def test_caches_that_cannot_be_end_in_one_message(trained, capsys, options, expected):
    assert generate("--prompt=to be", *options) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and re.search(expected, err) and err.count("\n") == 1
    assert out == ""


def test_where_positions_end_the_message_names_the_way_out(trained_learned, capsys):
    assert generate("--prompt=to be", "--max-tokens=12", "--num-samples=2") == 2
    out, err = capsys.readouterr()
    assert "17 tokens" in err and "learned positions end at 16" in err and "cache=none" in err
    assert out == ""
    assert generate("--prompt=to be", "--max-tokens=12", "--cache=none") == 0
    assert generate("--prompt=to be", "--max-tokens=11") == 0


@pytest.mark.parametrize("cache", ["auto", "full", "rolling", "int8", "none"])
def test_samples_share_one_prefill(trained, capsys, fed, cache):
    options = ("--prompt=to be", "--max-tokens=4", "--temperature=2", f"--cache={cache}")
    assert generate(*options, "--seed=7", "--num-samples=3") == 0
    together = capsys.readouterr().out
    if cache == "none":
        assert fed == [5, 6, 7, 8] * 3
    else:
        assert fed == [4] + [1] * 12
    for seed in (7, 8, 9):
        assert generate(*options, f"--seed={seed}") == 0
    assert capsys.readouterr().out == together


@pytest.mark.parametrize(
    "options", [["--prompt="], ["--prompt=t"], ["--prompt=to be", "--max-tokens=0"]]
)
def test_samples_with_nothing_to_share(trained, capsys, options):
    assert generate("--max-tokens=3", *options, "--num-samples=2", "--seed=1") == 0
    assert capsys.readouterr().err.count("--- sample") == 2


def converse(monkeypatch, lines: list[str], *options: str) -> int:
    answers = iter([*lines, "quit"])
    monkeypatch.setattr("builtins.input", lambda: next(answers))
    return generate("--interactive", *options)


@pytest.mark.parametrize("cache", ["auto", "full", "rolling", "int8", "none"])
def test_a_conversation_feeds_only_what_is_new(trained, capsys, monkeypatch, fed, cache):
    options = ("--max-tokens=3", "--temperature=0", f"--cache={cache}")
    assert converse(monkeypatch, ["to be", "or", "clear", "not", ""], *options) == 0
    kept = capsys.readouterr().out
    if cache == "none":
        assert fed == [5, 6, 7, 10, 11, 12, 3, 4, 5, 6, 7, 8]
        return
    # The last token of an answer is fed with the next prompt.
    assert fed == [5, 1, 1, 1 + 2, 1, 1, 3, 1, 1, 1, 1, 1]
    if cache != "int8":
        assert (
            converse(monkeypatch, ["to be", "or", "clear", "not", ""], *options[:2], "--cache=none")
            == 0
        )
        assert capsys.readouterr().out == kept


def test_a_conversation_goes_on_past_the_block(trained, capsys, monkeypatch):
    assert converse(monkeypatch, ["to be or not to be"] * 4, "--max-tokens=20") == 0
    out, err = capsys.readouterr()
    assert "error" not in err and err.count("20 tokens,") == 4


@pytest.mark.parametrize("cache", ["auto", "full", "int8"])
def test_where_positions_end_a_conversation_says_how_to_go_on(
    trained_learned, capsys, monkeypatch, cache
):
    lines = ["to be", "or not", "t", "clear", "to be", "to be or not to be"]
    assert converse(monkeypatch, lines, "--max-tokens=6", f"--cache={cache}") == 0
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if "error: " in line]
    assert len(errors) == 3
    assert "23 tokens, prompt and new ones together, do not fit: the cache ends at 16" in errors[0]
    assert "18 tokens" in errors[1]  # the prompt that was refused is forgotten
    assert all("`clear` starts anew" in line for line in errors)
    assert err.count("[6 tokens,") == 2


def test_a_character_split_over_tokens_is_never_cut_in_the_stream():
    text = "aä日🙂z"
    tokenizer = ByteTokenizer()
    pieces = list(decode_stream(tokenizer, iter(tokenizer.encode(text))))
    assert "".join(pieces) == text and all("\ufffd" not in piece for piece in pieces)
    cut = list(decode_stream(tokenizer, iter(tokenizer.encode(text)[:-2])))
    assert "".join(cut).startswith("aä日")


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

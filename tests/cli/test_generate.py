"""``almostgpt generate``: the text on stdout, JSON, batches, conversations, and what cannot be."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from almostgpt import GPT, GPTConfig, checkpoint, load
from almostgpt.cli import interactive
from almostgpt.cli.main import main
from almostgpt.config import Config, resolve
from almostgpt.data.tokenizer import CharTokenizer


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
    assert generate("--prompt", "to be", "--max-tokens", "30", "--temperature", "0") == 0
    out = capsys.readouterr().out
    model, tokenizer = load("run")
    ids = torch.tensor([tokenizer.encode("to be")])
    expected = tokenizer.decode(model.generate(ids, 30, temperature=0)[0].tolist())
    assert out == expected + "\n"


def test_an_empty_prompt_begins_a_new_text(trained, capsys):
    """After the token that ends texts; tests of the library have a tokenizer that has none."""
    assert generate("--max-tokens=10", "--temperature=0", "--past-the-end") == 0
    model, tokenizer = load("run")
    ids = model.generate(torch.tensor([[256]]), 10, temperature=0)[0, 1:]
    assert capsys.readouterr().out == tokenizer.decode(ids.tolist()) + "\n"


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
    for sequence in (0, 1, 2):
        assert generate(*options, "--seed=7", f"--sequence={sequence}") == 0
    assert capsys.readouterr().out == together
    assert generate(*options, "--seed=7", "--num-samples=3", "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "".join(f"{each['prompt']}{each['text']}\n" for each in records) == together


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


# ---------------------------------------------------------------- JSON and batches


def records(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]


def test_json_holds_what_was_drawn_and_why_it_ended(trained, capsys):
    options = ("--prompt=to be", "--max-tokens=10", "--seed=3", "--temperature=2", "--json")
    assert generate(*options, "--logprobs", "--past-the-end") == 0
    (record,) = records(capsys)
    model, tokenizer = load("run")
    ids, logprobs = model.generate(
        [tokenizer.encode("to be")], 10, seed=3, temperature=2.0, top_k=200, top_p=0.9,
        logprobs=True,
    )  # fmt: skip
    assert record == {
        "prompt": "to be",
        "text": tokenizer.decode(ids[0][5:].tolist()),
        "ids": ids[0][5:].tolist(),
        "logprobs": logprobs[0].tolist(),
        "finish": "length",
        "stopped_by": None,
        "seed": 3,
        "sequence": 0,
    }
    stop = record["text"][3]
    assert generate(*options, f"--stop={stop}", "--past-the-end") == 0
    (stopped,) = records(capsys)
    assert stopped["finish"] == "stop" and stopped["stopped_by"] == stop
    assert stopped["text"] == record["text"][: record["text"].index(stop)]
    assert "logprobs" not in stopped
    assert generate(*options, f"--stop-ids={record['ids'][4]}", "--past-the-end") == 0
    (stopped,) = records(capsys)
    assert stopped["ids"] == record["ids"][: record["ids"].index(record["ids"][4]) + 1]


def test_a_text_ends_at_the_end_of_text(trained, capsys):
    model, _ = load("run")
    options = (
        "--prompt=to",
        "--max-tokens=200",
        "--temperature=100",
        "--top-k=none",
        "--top-p=none",
    )
    assert generate(*options, "--seed=1", "--json") == 0
    (ended,) = records(capsys)
    assert generate(*options, "--seed=1", "--json", "--past-the-end") == 0
    (whole,) = records(capsys)
    at = whole["ids"].index(256)
    assert ended["ids"] == whole["ids"][: at + 1] and ended["stopped_by"] == 256
    assert len(whole["ids"]) == 200


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_prompts_in_batches_come_out_as_alone(trained, capsys, cache):
    Path("prompts.txt").write_text("to be\n\nor not to be\n日本\n", encoding="utf-8")
    options = ("--max-tokens=8", "--seed=2", "--temperature=1.5", f"--cache={cache}")
    texts = {}
    for size in (1, 2, 8):
        batch = ("--prompt-file=prompts.txt", f"--batch-size={size}")
        assert generate(*options, *batch, "--json", "--num-samples=2") == 0
        texts[size] = records(capsys)
    assert texts[1] == texts[2] == texts[8]
    prompts = ["to be", "or not to be", "日本"]
    assert [each["prompt"] for each in texts[8]] == [p for p in prompts for _ in range(2)]
    assert [each["sequence"] for each in texts[8]] == list(range(6))
    for number, prompt in enumerate(prompts):
        alone = ("--prompt", prompt, "--sequence", str(2 * number))
        assert generate(*options, *alone) == 0
        assert capsys.readouterr().out == f"{prompt}{texts[8][2 * number]['text']}\n"
    assert generate(*options, "--prompt", "to be", "or not to be") == 0
    out, err = capsys.readouterr()
    assert out.startswith("to be" + texts[8][0]["text"] + "\nor not to be")
    assert "--- text 2" in err and "2 of 2 texts" in err


def test_lines_of_a_prompt_file_end_where_lines_end(trained, capsys):
    """Not at a form feed or U+2028, which text may hold; a byte order mark is none of it."""
    Path("prompts.txt").write_bytes("\ufeffa\x0cb\r\nc\u2028d\n".encode())
    assert generate("--prompt-file=prompts.txt", "--json", "--max-tokens=0") == 0
    assert [each["prompt"] for each in records(capsys)] == ["a\x0cb", "c\u2028d"]


def test_json_is_escaped_where_stdout_cannot_show_it(trained, capsys, monkeypatch):
    class Ascii(io.StringIO):
        encoding = "ascii"

    monkeypatch.setattr(sys, "stdout", Ascii())
    assert generate("--prompt=日本", "--json", "--max-tokens=0") == 0
    out = sys.stdout.getvalue()
    assert out.isascii() and json.loads(out)["prompt"] == "日本"


def test_a_prompt_that_cannot_be_is_named_before_any_is_continued(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = GPT(GPTConfig(block_size=16, vocab_size=3, n_layer=1, n_head=1, n_embd=16))
    config = resolve(Config(model=model.config))
    checkpoint.export(tmp_path / "run", model, CharTokenizer("abc"), config)
    assert generate("--prompt", "ab", "c", "az", "--batch-size=1", "--json") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: prompt 3: the character 'z'")


@pytest.mark.parametrize("closed", ["stdin", "stdout"])
def test_closed_streams_are_no_traceback(trained, closed):
    code = "import sys; from almostgpt.cli.main import main; sys.exit(main(sys.argv[1:]))"
    arguments = "generate --checkpoint run --max-tokens 3 --device cpu"
    close = "--interactive <&-" if closed == "stdin" else ">&-"
    command = f"{sys.executable} -c '{code}' {arguments} {close}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_prompt_without_a_value_is_the_empty_one(trained, capsys):
    assert generate("--max-tokens=5", "--seed=1", "--prompt") == 0
    bare = capsys.readouterr().out
    assert generate("--max-tokens=5", "--seed=1") == 0
    assert capsys.readouterr().out == bare


def test_min_p_and_the_penalty_reach_the_sampler(trained, capsys):
    def text(*options: str) -> str:
        options = ("--max-tokens=20", "--seed=4", "--top-k=none", "--top-p=none", *options)
        assert generate("--prompt=to be", "--past-the-end", *options) == 0
        return capsys.readouterr().out

    greedy = text("--temperature=0")
    assert text("--temperature=1", "--min-p=1") == greedy
    assert text("--temperature=5") != text("--temperature=5", "--min-p=0.999")
    assert text("--temperature=0", "--repetition-penalty=5") != greedy


def test_quantize_at_once_or_before(trained, capsys):
    options = ("--prompt=to be", "--max-tokens=20", "--temperature=0", "--json")
    assert generate(*options, "--quantize=int8") == 0
    (at_once,) = records(capsys)
    assert main(["quantize", "--checkpoint=run", "--out=small/int8"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["out"] == "small/int8" and result["bytes"] < 0.5 * result["bytes_before"]
    assert main(["generate", "--checkpoint=small/int8", "--device=cpu", *options]) == 0
    (stored,) = records(capsys)
    assert stored["text"] == at_once["text"]
    assert main(["quantize", "--checkpoint=run", "--out=small/int8"]) == 2
    assert "small/int8: already exists" in capsys.readouterr().err


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_weights_in_16_bits(trained, capsys, quantize):
    options = ("--prompt=to be", "--max-tokens=8", "--temperature=0", f"--quantize={quantize}")
    assert generate(*options, "--precision=bf16", "--json", "--logprobs") == 0
    (ours,) = records(capsys)
    model, _ = load("run", quantize=quantize)
    ids = torch.tensor([[*b"to be", *ours["ids"]]])
    logits = model(ids[:, :-1], all_logits=True)[0][0, 4:].log_softmax(-1)
    expected = logits.gather(-1, ids[0, 5:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(ours["logprobs"]), expected, atol=0.1, rtol=0)
    assert not torch.equal(torch.tensor(ours["logprobs"]), expected)


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--logprobs"], "--logprobs is for --json"),
        (["--interactive", "--json"], "--interactive goes with neither --json"),
        (["--interactive", "--prompt", "a", "b"], "takes one --prompt"),
        (["--batch-size=0"], "--batch-size must be at least 1"),
        (["--prompt-file=nowhere.txt"], "nowhere.txt: No such file"),
        (["--prompt-file=empty.txt"], "empty.txt: no line with a prompt"),
        (["--prompt-file=latin.txt"], "latin.txt: not a text in UTF-8"),
        (["--stop="], "a stop string has at least one character"),
        (["--stop-ids=999"], "stop_ids has 999"),
        (["--min-p=2"], "min_p is 2.0"),
        (["--repetition-penalty=0"], "repetition_penalty is 0.0"),
        (["--sequence=-1"], "--sequence is -1"),
        (["--precision=bf15"], "precision is 'bf15', .*did you mean bf16"),
        (["--quantize=int9"], "quantize is 'int9', .*did you mean int8"),
    ],
)
def test_options_that_cannot_be_end_in_one_message(trained, capsys, options, expected):
    Path("empty.txt").write_text("\n\n")
    Path("latin.txt").write_bytes(b"\xe4\n")
    assert generate(*options) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and re.search(expected, err) and err.count("\n") == 1
    assert out == ""


# ---------------------------------------------------------------- at the terminal


def test_commands_set_what_they_name(trained, capsys, monkeypatch):
    def out(*lines: str) -> str:
        options = ("--max-tokens=8", "--seed=1", "--temperature=1.5", "--past-the-end")
        assert converse(monkeypatch, [*lines], *options) == 0
        return capsys.readouterr().out

    once, greedy = out("to be"), out("temp 0", "to be")
    assert out("to be", "clear", "to be") == 2 * once
    assert out("seed 9", "to be") != once and out("seed 9", "seed 1", "to be") == once
    assert greedy != once and out("temp 0", "to be", "clear", "seed 5", "to be") == 2 * greedy
    # What only looks like a command is a prompt.
    for prompt in ("seed corn", "temp", "quit it", "clear sky", "seed 1 2"):
        assert out(prompt).startswith(prompt)


@pytest.mark.parametrize(
    "line, expected", [("temp -1", "temperature is -1.0"), ("seed -1", "seed is -1")]
)
def test_commands_that_cannot_be_change_nothing(trained, capsys, monkeypatch, line, expected):
    assert converse(monkeypatch, [line, "to be"], "--max-tokens=4", "--seed=1") == 0
    out, err = capsys.readouterr()
    assert f"error: {expected}" in err and "seed 1]" in err and out.startswith("to be")


def test_ctrl_c_stops_the_answer_and_not_the_program(trained, capsys, monkeypatch):
    written = []

    def write(text):
        written.append(text)
        if len(written) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("almostgpt.cli.generate._write", write)
    options = ("--max-tokens=10", "--temperature=0", "--past-the-end")
    assert converse(monkeypatch, ["to be", "or not"], *options) == 0
    err = capsys.readouterr().err
    stopped, whole = re.findall(r"\[(stopped, )?(\d+) tokens", err)
    assert stopped[0] and int(stopped[1]) < 10 and not whole[0] and whole[1] == "10"


def test_ctrl_c_at_the_prompt_drops_the_line(trained, capsys, monkeypatch):
    lines = iter([KeyboardInterrupt, "to be", "quit"])

    def read():
        line = next(lines)
        if line is KeyboardInterrupt:
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    assert generate("--interactive", "--max-tokens=3") == 0
    out, err = capsys.readouterr()
    assert out.startswith("to be") and "(`quit` ends)" in err


def test_the_history_of_lines_outlives_the_program(monkeypatch, tmp_path):
    readline = pytest.importorskip("readline", reason="Python without readline keeps no history")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    readline.clear_history()
    with interactive._line_editing():
        readline.add_history("to be")
    assert "to be" in (tmp_path / "state" / "almostgpt" / "history").read_text()
    readline.clear_history()
    with interactive._line_editing():
        assert readline.get_history_item(1) == "to be"
    readline.clear_history()
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nowhere")  # cannot be written: no error
    with interactive._line_editing():
        pass

"""``almostgpt eval`` as a user meets it: JSON on the last line, one message for each mistake."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from almostgpt import load
from almostgpt.cli.main import main
from almostgpt.data.shards import write_shard

TEXT = "to be or not to be, that is the question: ä é ü 日本\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of three steps on bytes, whose windows are of 16 tokens."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text.txt"
    text.write_text(TEXT * 60, encoding="utf-8")
    sizes = {"block-size": 16, "n-layer": 1, "n-head": 2, "n-embd": 16}
    arguments = [f"--model.{key}={value}" for key, value in sizes.items()]
    arguments += ["--data.tokenizer=byte", "--training.steps=3", "--training.batch-size=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALMOSTGPT_CACHE", str(folder / "cache"))
        command = ["train", f"--data.path={text}", f"--out={folder / 'run'}", "--device=cpu"]
        assert main([*command, *arguments]) == 0
    return folder / "run"


@pytest.fixture(autouse=True)
def here(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ALMOSTGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "run")
    Path("text.txt").write_text(TEXT * 3, encoding="utf-8")
    capsys.readouterr()  # what training printed


def evaluate(file: str, *options: str) -> int:
    return main(["eval", "--checkpoint=run", "--device=cpu", f"--perplexity={file}", *options])


def result_of(capsys, file: str, *options: str) -> dict:
    assert evaluate(file, *options) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_json_line_is_what_a_window_written_out_says(capsys):
    assert evaluate("text.txt", "--stride=16") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)  # nothing else is on stdout
    model, tokenizer = load("run")
    ids = torch.tensor(tokenizer.encode(TEXT * 3))
    nats, scored = 0.0, []
    with torch.no_grad():
        for window in ids.split(16):
            if len(window) > 1:
                logits, _ = model(window[None], all_logits=True)
                nats += cross_entropy(logits[0, :-1].double(), window[1:], reduction="sum").item()
                scored += window[1:].tolist()
    size = len(tokenizer.decode_bytes(scored))
    assert result["tokens"] == len(scored) and result["bytes"] == size
    assert result["nll"] == pytest.approx(nats / len(scored), rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(nats / len(scored)), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert (result["window"], result["stride"]) == (16, 16)
    assert (result["checkpoint"], result["file"]) == ("run", "text.txt")
    assert (result["device"], result["precision"]) == ("cpu", "fp32")
    assert result["tokens_per_second"] > 0 and result["seconds"] > 0
    assert f"{len(ids)} tokens" in err and f"perplexity {result['perplexity']:.4f}" in err


def test_options_reach_the_window(capsys):
    n = len((TEXT * 3).encode())
    default = result_of(capsys, "text.txt")
    assert (default["window"], default["stride"], default["tokens"]) == (16, 8, n - 1)
    assert default["windows"] == 1 + math.ceil((n - 16) / 8)
    given = result_of(capsys, "text.txt", "--window=10", "--stride=3", "--max-tokens=50")
    assert (given["window"], given["stride"], given["tokens"]) == (10, 3, 49)
    assert given["windows"] == 1 + math.ceil((50 - 10) / 3)
    assert result_of(capsys, "text.txt", "--max-tokens=null")["tokens"] == n - 1
    one = result_of(capsys, "text.txt", "--batch-size=1")
    assert one["nll"] == pytest.approx(default["nll"], rel=1e-6)


def test_text_shard_and_prepared_folder_are_one(capsys):
    expected = result_of(capsys, "text.txt")["nll"]
    write_shard("text.bin", np.frombuffer((TEXT * 3).encode(), np.uint8).astype(np.uint16))
    assert result_of(capsys, "text.bin")["nll"] == pytest.approx(expected, rel=1e-12)
    plain = "to be or not to be\n" * 20
    Path("plain.txt").write_text(plain)
    Path("val.txt").write_text(plain[int(len(plain) * 0.6) :])
    prepare = ["prepare", "--data.path=plain.txt", "--data.tokenizer=byte", "--out=tokens"]
    assert main([*prepare, "--data.val-fraction=0.4"]) == 0
    capsys.readouterr()
    folder, text = (result_of(capsys, file) for file in ("tokens", "val.txt"))
    assert folder["nll"] == pytest.approx(text["nll"], rel=1e-12)
    assert folder["bytes"] == text["bytes"]


def test_bf16_is_nearly_fp32_and_says_so(capsys):
    exact, rounded = (
        result_of(capsys, "text.txt", f"--precision={precision}") for precision in ("fp32", "bf16")
    )
    assert rounded["precision"] == "bf16" and rounded["nll"] != exact["nll"]
    assert rounded["nll"] == pytest.approx(exact["nll"], rel=1e-2)


def test_a_perplexity_beyond_all_numbers_is_null_in_json(capsys, monkeypatch):
    from almostgpt.cli import eval as command
    from almostgpt.evaluation.perplexity import Perplexity

    monkeypatch.setattr(command, "perplexity", lambda *_, **__: Perplexity(1e6, 10, 1, 1.0, None))
    result = result_of(capsys, "text.txt")
    assert result["perplexity"] is None and result["nll"] == 1e5


@pytest.mark.parametrize(
    ("file", "options", "expected"),
    [
        ("nowhere.txt", [], "nowhere.txt: no such file"),
        ("empty.txt", [], "empty.txt: perplexity needs 2 tokens or more, not 0"),
        ("one.txt", [], "one.txt: perplexity needs 2 tokens or more, not 1"),
        ("latin.txt", [], "latin.txt: not UTF-8 text: byte 0xe9"),
        (".", [], "not a prepared one"),
        ("large.bin", [], "token id 300 is not in the model's vocabulary of 257"),
        ("short.bin", [], "short.bin: not a token shard"),
        ("text.txt", ["--window=17"], "window is 17, but must be in 2 … 16"),
        ("text.txt", ["--window=1"], "window is 1"),
        ("text.txt", ["--stride=0"], "stride is 0"),
        ("text.txt", ["--window=8", "--stride=9"], "stride is 9, but must be in 1 … 8"),
        ("text.txt", ["--batch-size=0"], "batch_size is 0"),
        ("text.txt", ["--max-tokens=1"], "--max-tokens is 1"),
        ("text.txt", ["--precision=bf61"], "did you mean bf16"),
        ("text.txt", ["--device=tpu"], "device is 'tpu'"),
        ("text.txt", ["--checkpoint=nowhere"], "nowhere: no such folder"),
    ],
)
def test_mistakes_end_in_one_message_and_code_2(file, options, expected, capsys):
    Path("empty.txt").touch()
    Path("one.txt").write_text("a")
    Path("latin.txt").write_bytes(b"caf\xe9 ole")
    write_shard("large.bin", np.array([1, 300, 2], np.uint16))
    Path("short.bin").write_bytes(b"none")
    assert evaluate(file, *options) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and expected in last and out == ""
    assert err.count("error") == 1 and "Traceback" not in err


def test_the_file_and_the_checkpoint_must_be_named(capsys):
    with pytest.raises(SystemExit) as end:
        main(["eval", "--checkpoint", "run"])
    assert end.value.code == 2 and "--perplexity" in capsys.readouterr().err

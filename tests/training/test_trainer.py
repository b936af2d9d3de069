"""Whole runs of a tiny model: what is written, what is exact, what bad numbers and full disks do."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from almostgpt import checkpoint, kernels, load
from almostgpt.cli.main import main
from almostgpt.errors import UserError
from almostgpt.training import trainer as trainer_module
from almostgpt.training.run import occupy

TINY = {
    "model.block_size": 16,
    "model.n_layer": 2,
    "model.n_head": 2,
    "model.n_embd": 32,
    "model.dropout": 0.1,  # so that the random state matters
    "training.steps": 40,
    "training.batch_size": 4,
    "training.accumulate": 2,
    "training.log_every": 1,
    "training.eval_every": 10,
    "training.eval_batches": 2,
    "training.sample_tokens": 12,
    "checkpoint.every": 7,
    "schedule.warmup_steps": 5,
    "device": "cpu",
}


@pytest.fixture
def text(tmp_path, monkeypatch) -> Path:
    """A made text of 20,000 characters, a cache of its own, and the working folder there."""
    monkeypatch.setenv("ALMOSTGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return write_made_text(tmp_path)


def write_made_text(folder: Path) -> Path:
    words = "the quick brown fox jumps over a lazy dog and then sleeps under the old tree\n".split(
        " "
    )
    path = folder / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(words, k=4000)))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run, made once; tests read it or copy it."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALMOSTGPT_CACHE", str(folder / "cache"))
        assert train(*options(write_made_text(folder), str(folder / "run"))) == 0
    return folder / "run"


@pytest.fixture
def finished_run(whole, text) -> Path:
    """A copy of the uninterrupted run; its text is where it was."""
    run = text.parent / "run"
    shutil.copytree(whole, run)
    return run


def options(text: Path, out: str, **changes) -> list[str]:
    settings = {**TINY, "data.path": str(text), **changes}
    return ["--out", out, *(f"--{key}={value}" for key, value in settings.items())]


def losses(run: str | Path) -> list[tuple]:
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line.get("val_loss")) for line in lines]


def train(*arguments: str) -> int:
    return main(["train", *arguments])


def test_a_run_writes_what_it_promises(text, capsys):
    assert (
        train(*options(text, "run", **{"training.log_every": 10, "training.sample_every": 20})) == 0
    )
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["run"] == "run" and result["steps"] == 40
    assert {"loss", "val_loss", "tokens_per_second", "seconds"} <= set(result)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 10, 20, 30, 40]
    for line in lines:
        expected = {"step", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"}
        assert set(line) == expected | (
            {"val_loss"} if line["step"] > 1 else set()
        )  # no MFU on a CPU
    assert result["val_loss"] == lines[-1]["val_loss"] < lines[1]["val_loss"] < 4
    assert Path("run/loss.png").read_bytes().startswith(b"\x89PNG")
    samples = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [20, 40]
    assert all(len(sample["text"]) == 13 for sample in samples)  # a random start and 12 characters
    kept = sorted(path.name for path in Path("run/checkpoints").iterdir())
    assert kept == ["step-00000035", "step-00000040"]
    assert "step 40/40" in err
    model, tokenizer = load("run")
    assert not model.training and tokenizer.decode(tokenizer.encode("the fox")) == "the fox"


def test_validation_loss_is_the_mean_over_the_same_batches(text):
    """Recomputed from the checkpoint, batch by batch, without the trainer's loop."""
    from almostgpt.config_file import load_config
    from almostgpt.data.loader import TokenLoader
    from almostgpt.data.prepare import cached_dataset

    assert train(*options(text, "run", **{"training.steps": 10})) == 0
    model, _ = load("run")
    config = load_config("run/config.yaml")
    loader = TokenLoader(
        cached_dataset(config.data).val,
        block_size=16,
        batch_size=4,
        seed=config.seed,
        vocab_size=config.model.vocab_size,
    )
    with torch.no_grad():
        values = [model(*loader.next_batch())[1].item() for _ in range(2)]
    assert losses("run")[-1][3] == pytest.approx(sum(values) / 2, rel=1e-6)


def test_accumulation_equals_one_large_batch(text):
    """Four micro-batches of 2 take the step of one batch of 8: the same windows, the mean gradient."""
    exact = {"model.dropout": 0.0, "training.steps": 5, "data.sampling": "sequential"}
    for out, batch, accumulate in (("one", 8, 1), ("four", 2, 4)):
        changes = {**exact, "training.batch_size": batch, "training.accumulate": accumulate}
        assert train(*options(text, out, **changes)) == 0
    for one, four in zip(losses("one"), losses("four"), strict=True):
        assert one[:3] == pytest.approx(four[:3], rel=1e-4)


def test_interrupted_at_a_checkpoint_and_resumed_is_uninterrupted(text, whole):
    assert train(*options(text, "half", **{"training.steps": 21, "schedule.decay_steps": 40})) == 0
    assert train("--out", "half", "--resume", "--training.steps=40") == 0
    expected, half = losses(whole), losses("half")
    assert [line[:3] for line in expected] == [line[:3] for line in half]  # bit for bit
    assert expected[-1] == half[-1]


def test_resume_of_a_finished_run_and_of_nothing(text, capsys):
    assert train(*options(text, "run", **{"training.steps": 3})) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert train("--out", "run", "--resume") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == first
    assert len(losses("run")) == 3
    Path("empty").mkdir()
    assert train("--out", "empty", "--resume") == 2
    assert "there is no run in empty" in capsys.readouterr().err
    assert train("--resume") == 2
    assert "--resume needs --out" in capsys.readouterr().err


def test_resume_refuses_another_setting_with_both_values(text, capsys):
    assert train(*options(text, "run", **{"training.steps": 3})) == 0
    assert train("--out", "run", "--resume", "--optimizer.lr=0.5", "--model.n-layer=3") == 2
    err = capsys.readouterr().err
    assert "optimizer.lr: the run has 0.003, now 0.5" in err
    assert "model.n_layer: the run has 2, now 3" in err
    Path("other.yaml").write_text("model: {n_embd: 64}")
    assert train("--out", "run", "--resume", "--config", "other.yaml") == 2
    assert "model.n_embd: the run has 32, now 64" in capsys.readouterr().err
    assert train("--out", "run") == 2
    assert "--resume" in capsys.readouterr().err


def test_resume_refuses_other_data(text, capsys):
    assert train(*options(text, "run", **{"training.steps": 3})) == 0
    text.write_text(text.read_text() + "the dog")
    assert train("--out", "run", "--resume", "--training.steps=5") == 2
    assert "the data is not what" in capsys.readouterr().err


def test_an_extended_run_that_was_killed_keeps_its_new_length(text):
    """The accepted change is stored at once, so the next --resume needs no repeating of it."""
    assert train(*options(text, "run", **{"training.steps": 3})) == 0
    process = start(["--out", "run", "--resume", "--training.steps=100000"])
    wait_for_lines(process, "run", 6)
    process.kill()
    process.communicate()
    from almostgpt.config_file import load_config

    assert load_config("run/config.yaml").training.steps == 100_000


def test_an_edited_config_file_is_refused_where_it_matters(finished_run, capsys):
    path = finished_run / "config.yaml"
    original = path.read_text()
    path.write_text(original.replace("dropout: 0.1", "dropout: 0.5"))
    assert train("--out", str(finished_run), "--resume", "--training.steps=50") == 2
    assert "model.dropout: the run has 0.1, now 0.5" in capsys.readouterr().err
    path.write_text("")
    assert train("--out", str(finished_run), "--resume", "--training.steps=50") == 2
    assert "model.n_embd: the run has 32" in capsys.readouterr().err
    path.write_text(original.replace("log_every: 1", "log_every: 5"))  # this may be edited
    assert train("--out", str(finished_run), "--resume", "--training.steps=45") == 0
    assert losses(finished_run)[-1][0] == 45


def test_a_run_whose_checkpoints_are_gone_is_not_started_anew(finished_run, capsys):
    before = losses(finished_run)
    shutil.rmtree(finished_run / "checkpoints")
    assert train("--out", str(finished_run), "--resume") == 2
    assert "metrics.jsonl goes to step 40" in capsys.readouterr().err
    assert losses(finished_run) == before


def test_killed_before_the_first_checkpoint_and_resumed_with_more_of_them(text, whole):
    """The steps that it logged are no sign of lost checkpoints: it was to have none so early."""
    process = start(options(text, "run", **{"checkpoint.every": 1000, "training.steps": 100_000}))
    wait_for_lines(process, "run", 9)
    process.kill()
    process.communicate()
    assert train("--out=run", "--resume", "--checkpoint.every=7", "--training.steps=12") == 0
    assert [line[0] for line in losses("run")] == list(range(1, 13))


def test_resuming_keeps_one_sample_a_step(text):
    sampling = {"training.sample_every": 5, "training.steps": 18, "schedule.decay_steps": 40}
    assert train(*options(text, "run", **sampling)) == 0
    for folder in sorted(Path("run/checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)  # back to step 14
    assert train("--out", "run", "--resume") == 0
    lines = Path("run/samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 15]


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rope"])
def test_a_sample_longer_than_the_block_ends_no_run(text, position):
    sampling = {"training.sample_every": 2, "training.sample_tokens": 60, "training.steps": 2}
    assert train(*options(text, "run", **sampling, **{"model.position": position})) == 0
    (line,) = Path("run/samples.jsonl").read_text().splitlines()
    assert len(json.loads(line)["text"]) == 61


def test_a_sample_that_cannot_be_ends_no_run(text, capsys):
    changes = {"training.sample_every": 2, "training.steps": 2}
    with kernels.use_backend("cuda", ops=["decode_attention"]):
        assert train(*options(text, "run", **changes)) == 0
    assert "no sample after step 2: " in "".join(capsys.readouterr())


def test_a_forced_backend_that_cannot_serve_begins_no_run(text, capsys):
    with kernels.use_backend("cuda"):
        assert train(*options(text, "run")) == 2
    assert "forced" in capsys.readouterr().err
    assert not Path("run").exists()


def test_a_second_process_is_kept_out(finished_run, capsys):
    with occupy(finished_run):
        assert train("--out", str(finished_run), "--resume") == 2
    assert "another process is training" in capsys.readouterr().err
    assert train("--out", str(finished_run), "--resume") == 0


# ---------------------------------------------------------------- killed


def start(arguments: list[str], prelude: str = "") -> subprocess.Popen:
    code = (
        f"{prelude}\nimport sys\nfrom almostgpt.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lines(process: subprocess.Popen, run: str, count: int) -> None:
    """Until the run has logged ``count`` steps."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        path = Path(run, "metrics.jsonl")
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.002)
    raise AssertionError(f"the run ended or hung before step {count}: {process.communicate()}")


def killed_then_resumed_equals_whole(text: Path, whole: Path, kill) -> None:
    """``kill(arguments)`` runs a training that dies by SIGKILL; the resumed one must not show it."""
    kill(options(text, "killed"))
    assert train("--out", "killed", "--resume") == 0
    assert losses("killed") == losses(whole)
    for path in sorted(whole.glob("checkpoints/*/model.safetensors")):
        assert (Path("killed") / path.relative_to(whole)).read_bytes() == path.read_bytes()


def kill_after(lines: int, delay: float = 0.0):
    def kill(arguments: list[str]) -> None:
        process = start([*arguments, "--training.steps=40"])
        wait_for_lines(process, "killed", lines)
        time.sleep(delay)
        process.kill()
        assert process.wait() == -signal.SIGKILL

    return kill


def kill_at_call(function: str, number: int):
    """Dies inside the ``number``-th call of ``function`` that the run itself makes, its data prepared."""
    prelude = (
        f"import os, signal, {function.partition('.')[0]}\n"
        f"original, calls = {function}, []\n"
        "def dying(*args, **kwargs):\n"
        "    calls.extend([args] * os.path.exists('killed/config.yaml'))\n"
        f"    if len(calls) == {number}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(*args, **kwargs)\n"
        f"{function} = dying"
    )

    def kill(arguments: list[str]) -> None:
        process = start(arguments, prelude)
        process.communicate()
        assert process.returncode == -signal.SIGKILL

    return kill


def test_killed_in_training_and_resumed_is_bit_equal(text, whole):
    killed_then_resumed_equals_whole(text, whole, kill_after(lines=18))


@pytest.mark.slow
@pytest.mark.parametrize(
    "lines, delay", [(1, 0.0), (5, 0.001), (13, 0.003), (29, 0.0), (36, 0.002)]
)
def test_killed_at_any_moment(text, whole, lines, delay):
    """Line 1: before the first checkpoint, so the run starts again at step 0."""
    killed_then_resumed_equals_whole(text, whole, kill_after(lines, delay))


@pytest.mark.slow
@pytest.mark.parametrize(
    "function, number",
    [("os.fsync", n) for n in (1, 4, 7, 15, 21)]
    + [("os.rename", n) for n in (1, 2)]
    + [("os.replace", 6)],
)
def test_killed_while_writing(text, whole, function, number):
    killed_then_resumed_equals_whole(text, whole, kill_at_call(function, number))


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_exits_cleanly(text, number):
    steps = {"training.steps": 100_000, "schedule.decay_steps": 40, "checkpoint.every": 10**6}
    process = start(options(text, "stopped", **steps))
    wait_for_lines(process, "stopped", 5)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["stopped_by"] == signal.Signals(number).name
    assert checkpoint.newest(Path("stopped")).name == f"step-{result['steps']:08d}"
    assert "Traceback" not in err
    if number == signal.SIGTERM:  # it goes on exactly where it stopped
        stop = result["steps"] + 3
        assert train("--out", "stopped", "--resume", f"--training.steps={stop}") == 0
        assert [line[0] for line in losses("stopped")] == list(range(1, stop + 1))


# ---------------------------------------------------------------- damage


def damage_file(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "flip":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "truncate":
        path.write_bytes(content[:-1])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "trainer.json", "manifest.json"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(finished_run, name, how, capsys):
    damaged = finished_run / "checkpoints/step-00000040"
    damage_file(damaged / name, how)
    found = checkpoint.newest(finished_run)
    if name == "manifest.json" and how == "flip":  # one bit of it may fall into white space
        assert found is not None
        return
    assert found.name == "step-00000035"
    assert f"{damaged} is damaged" in capsys.readouterr().err
    load(finished_run)
    with pytest.raises(UserError, match="damaged"):
        load(damaged)


def test_training_and_generating_go_on_after_damage(finished_run, capsys):
    before = losses(finished_run)
    newest = finished_run / "checkpoints/step-00000040"
    damage_file(newest / "model.safetensors", "truncate")
    capsys.readouterr()
    assert (
        main(["generate", "--checkpoint", str(finished_run), "--max-tokens=5", "--prompt=the"]) == 0
    )
    assert f"{newest} is damaged" in capsys.readouterr().err
    assert train("--out", str(finished_run), "--resume") == 0
    assert f"{newest} is damaged" in capsys.readouterr().err
    assert losses(finished_run) == before
    assert checkpoint.damage(newest) is None
    for folder in (finished_run / "checkpoints").iterdir():
        shutil.rmtree(folder / "tokenizer")
    assert train("--out", str(finished_run), "--resume") == 2
    assert "none of its 2 checkpoints is whole" in capsys.readouterr().err


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


def full_in_safetensors(*_args, **_kwargs):
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


@pytest.mark.parametrize("failing", ["save_file", "write_text"])
def test_a_full_disk_ends_with_one_message_and_loses_nothing(
    text, whole, monkeypatch, capsys, failing
):
    """The file layer fails while the third checkpoint is written; with space again, the run goes on."""
    original = getattr(checkpoint, failing)
    calls = []

    def sometimes(*args, **kwargs):
        calls.append(args)
        if len(calls) > 5:
            (full_in_safetensors if failing == "save_file" else full)()
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, failing, sometimes)
        assert train(*options(text, "run")) == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err and "Traceback" not in err
    assert [p.name for p in Path("run/checkpoints").iterdir() if p.name.startswith(".")] == []
    assert train("--out", "run", "--resume") == 0
    assert losses("run") == losses(whole)


@pytest.mark.slow
def test_a_really_full_disk(text, whole, capsys):
    """On a tiny tmpfs, as a process meets it."""
    disk = text.parent / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root, and is not allowed here")
    try:
        assert train(*options(text, str(disk / "run"))) == 2
        err = capsys.readouterr().err
        assert "No space left on device" in err and "Traceback" not in err
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        assert train("--out", str(disk / "run"), "--resume") == 0
        assert losses(disk / "run") == losses(whole)
    finally:
        subprocess.run(["umount", disk], check=True)


# ---------------------------------------------------------------- numbers


def test_a_nan_never_reaches_the_weights(text, monkeypatch, capsys):
    """Step 9's gradient is poisoned; the checkpoint of step 7 stays the newest, and stays whole."""
    original = torch.nn.utils.get_total_norm
    calls = []

    def poisoned(gradients, *args, **kwargs):
        calls.append(None)
        if len(calls) == 9:
            gradients[0][0, 0] = float("nan")
        return original(gradients, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", poisoned)
    assert train(*options(text, "run")) == 2
    err = capsys.readouterr().err
    assert "not finite at step 9" in err and "Traceback" not in err
    assert [line[0] for line in losses("run")] == list(range(1, 9))
    assert checkpoint.newest(Path("run")).name == "step-00000007"
    model, _ = load("run")
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_on_a_device_a_nan_is_reported_at_the_next_log_point(text, monkeypatch, capsys):
    """The device's path on CPU tensors: no read in the step, the weights those before the bad one."""
    original_guard = trainer_module.FiniteGuard
    monkeypatch.setattr(
        trainer_module,
        "FiniteGuard",
        lambda device, immediate: original_guard(device, immediate=False),
    )
    original = torch.nn.utils.get_total_norm
    models, calls = [], []

    def poisoned(gradients, *args, **kwargs):
        calls.append(None)
        return original(gradients, *args, **kwargs) * (float("inf") if len(calls) == 9 else 1)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", poisoned)
    original_init = trainer_module.Trainer.__init__

    def remember(self, *args, **kwargs):
        original_init(self, *args, **kwargs)
        models.append(self.model)

    monkeypatch.setattr(trainer_module.Trainer, "__init__", remember)
    changes = {"training.log_every": 20, "training.eval_every": 0, "checkpoint.every": 100}
    assert train(*options(text, "run", **changes)) == 2
    assert "not finite at step 9" in capsys.readouterr().err
    assert len(calls) == 20  # it went on until the log point
    bad = {name: value.clone() for name, value in models[0].state_dict().items()}
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", original)
    assert train(*options(text, "eight", **{"training.steps": 8, "schedule.decay_steps": 40})) == 0
    model, _ = load("eight")
    for name, value in model.state_dict().items():
        assert torch.equal(value, bad[name]), name


def test_out_of_memory_says_what_to_lower(text, monkeypatch, capsys):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(trainer_module.Trainer, "step", exhausted)
    assert train(*options(text, "run")) == 2
    assert "lower training.batch_size" in capsys.readouterr().err


def test_compiling_without_a_compiler_is_named(text, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(text.parent))
    assert train(*options(text, "run", **{"training.compile": "true"})) == 2
    assert "C++ compiler" in capsys.readouterr().err


@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.05), ("fp16", 0.02)])
def test_mixed_precision_follows_fp32(text, precision, tolerance):
    """Clipping comes after unscaling: with a clip far below the scaled norm the losses still agree."""
    changes = {"model.dropout": 0.0, "optimizer.clip": 0.1, "training.steps": 20}
    assert train(*options(text, "fp32", **changes)) == 0
    assert train(*options(text, precision, **{**changes, "training.precision": precision})) == 0
    for full, mixed in zip(losses("fp32"), losses(precision), strict=True):
        assert mixed[1] == pytest.approx(full[1], abs=tolerance)
    assert checkpoint.newest(Path(precision)) is not None


def test_fp16_resumes_with_its_loss_scale(text):
    changes = {"training.precision": "fp16", "schedule.decay_steps": 40}
    assert train(*options(text, "whole", **changes)) == 0
    assert train(*options(text, "half", **{**changes, "training.steps": 14})) == 0
    assert train("--out", "half", "--resume", "--training.steps=40") == 0
    assert [line[:3] for line in losses("half")] == [line[:3] for line in losses("whole")]


def test_muon_wsd_and_checkpointing_resume_too(text):
    changes = {
        "optimizer.name": "muon",
        "schedule.name": "wsd",
        "schedule.decay_steps": 20,
        "schedule.decay_fraction": 0.5,
        "model.gradient_checkpointing": "selective",
    }
    assert train(*options(text, "whole", **changes, **{"training.steps": 20})) == 0
    assert train(*options(text, "half", **changes, **{"training.steps": 12})) == 0
    assert train("--out", "half", "--resume", "--training.steps=20") == 0
    assert [line[:3] for line in losses("half")] == [line[:3] for line in losses("whole")]
    lines = [json.loads(line) for line in Path("half/metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines]
    assert set(rates[4:10]) == {0.003} and rates[15 - 1] == pytest.approx(0.003 - 0.0027 / 2)
    assert train("--out", "half", "--resume", "--optimizer.name=adamw") == 2


@pytest.mark.slow
def test_compiled_training_follows_eager(text):
    changes = {"model.dropout": 0.0, "training.steps": 20}
    assert train(*options(text, "eager", **changes)) == 0
    assert train(*options(text, "compiled", **{**changes, "training.compile": "true"})) == 0
    for eager, compiled in zip(losses("eager"), losses("compiled"), strict=True):
        assert compiled[1] == pytest.approx(eager[1], abs=2e-3)


def test_a_model_with_more_ids_than_its_tokenizer_writes_text_all_the_same(text, capsys):
    """At three steps all 500 ids are about equally likely, and the tokenizer knows 24."""
    changes = {"model.vocab_size": 500, "training.steps": 3, "training.sample_every": 3}
    assert train(*options(text, "run", **changes)) == 0
    assert main(["generate", "--checkpoint=run", "--prompt=the", "--top-k=None", "--seed=1"]) == 0
    model, tokenizer = load("run")
    assert model.config.vocab_size == 500 and tokenizer.vocab_size < 30


def test_too_little_text_and_a_wrong_device_are_named(text, capsys):
    assert train(*options(text, "run", **{"model.block_size": 5000})) == 2
    assert "the val split is too small" in capsys.readouterr().err
    assert not Path("run").exists()  # nothing was begun
    assert train(*options(text, "run2", **{"device": "cuda:99"})) == 2
    assert "cuda:99" in capsys.readouterr().err
    assert train(*options(text, "run3", **{"model.vocab_size": 3})) == 2
    assert "model.vocab_size is 3" in capsys.readouterr().err
    assert train(*options(text.with_name("nowhere.txt"), "run4")) == 2
    assert "nowhere.txt" in capsys.readouterr().err

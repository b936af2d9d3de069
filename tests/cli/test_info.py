"""``almostgpt info --check`` and ``--plan``: what is right passes, what is wrong is named."""

import dataclasses
import json

import pytest
import torch

from almostgpt import kernels
from almostgpt.cli.main import main
from almostgpt.kernels import check as checks
from almostgpt.kernels import emulator
from almostgpt.kernels.dispatch import Kernel
from almostgpt.kernels.rms_norm import reference
from almostgpt.training import plan as training_plan

RMS_NORM = ["info", "--check", "--device=cpu", "--op=rms_norm", "--shape=5x24"]


def wrong_kernel(monkeypatch, run):
    """Puts a kernel in the place of all those of rms_norm."""
    kernel = Kernel("reference", "wrong", lambda *args, **kwargs: None, run)
    op = dataclasses.replace(kernels.OPS["rms_norm"], kernels=(kernel,))
    monkeypatch.setitem(kernels.OPS, "rms_norm", op)


def test_every_op_is_checked_and_passes(capsys):
    assert {case.op for case in checks.CASES.values()} == set(kernels.OPS)
    assert main(["info", "--check", "--device=cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and not report["left_out"]
    found = {found["case"]: found for found in report["checks"]}
    assert set(found) == set(checks.CASES)
    tensors = [a["tensor"] for a in found["rms_norm with a residual"]["accuracies"]]
    assert tensors == ["y", "sum", "dx", "dweight", "dresidual"]
    assert all(a["ok"] and a["bound"] > 0 for f in found.values() for a in f["accuracies"])
    stored_in_8_bits = found.pop("kv_append, int8")["accuracies"][2:]
    assert [a["tensor"] for a in stored_in_8_bits] == ["keys", "values"]
    assert all(a["bound"] < 0.05 for a in stored_in_8_bits)
    x_in_16_bits = found.pop("int8_linear")["accuracies"]
    assert all(a["bound"] < 0.01 for a in x_in_16_bits)
    assert all(a["bound"] < 1e-3 for f in found.values() for a in f["accuracies"])
    assert [a["tensor"] for a in found["decode_attention"]["accuracies"]] == ["out"]
    assert all(f["speeds"] == [] for f in found.values())  # times of a CPU say nothing of a kernel


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("shape", ["1x1", "300x7", "2x1000"])
def test_the_references_are_within_bounds_on_odd_shapes(shape, dtype, capsys):
    assert main(["info", "--check", "--op=rms_norm", f"--shape={shape}", f"--dtype={dtype}"]) == 0
    attention = shape.replace("x", "x3x") + "x8" if shape != "2x1000" else "1x1x67x24"
    assert (
        main(
            ["info", "--check", "--op=flash_attention", f"--shape={attention}", f"--dtype={dtype}"]
        )
        == 0
    )


@pytest.mark.parametrize("shape", ["1x1x1x1", "3x6x2x7", "2x5x19x20"])
@pytest.mark.parametrize("op", ["kv_append", "decode_attention"])
def test_the_caches_references_are_within_bounds_on_odd_shapes(op, shape):
    for dtype in checks.DTYPES:
        assert main(["info", "--check", f"--op={op}", f"--shape={shape}", f"--dtype={dtype}"]) == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda layer: layer.values[0, 0, 0, 0].neg_(),  # of a token that was there before
        lambda layer: layer.keys.copy_(layer.keys.roll(1, 2)),
        lambda layer: layer.keys[..., -1].zero_(),
    ],
)
def test_what_an_op_writes_into_a_layer_is_checked(damage, monkeypatch, capsys):
    op = kernels.OPS["kv_append"]
    right = op.kernels[-1]

    def run(q, k, v, layer, **options):
        outputs = right.run(q, k, v, layer, **options)
        damage(layer)
        return outputs

    wrong = dataclasses.replace(op, kernels=(dataclasses.replace(right, run=run),))
    monkeypatch.setitem(kernels.OPS, "kv_append", wrong)
    assert main(["info", "--check", "--device=cpu", "--op=kv_append"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_the_table_names_kernel_errors_and_bounds(capsys):
    assert main(RMS_NORM) == 0
    out = capsys.readouterr().out
    assert "rms_norm: reference (plain PyTorch), 5 x 24, fp32" in out
    assert "dweight" in out and "bound" in out and "FAILED" not in out


@pytest.mark.parametrize(
    "damage",
    [
        lambda y: y * 1.001,
        lambda y: torch.where(torch.arange(y.shape[-1]) == 3, y + 1e-3, y),  # one column
        lambda y: y / 0 * 0,  # NaN
    ],
)
def test_a_wrong_kernel_fails(damage, monkeypatch, capsys):
    def run(x, weight, eps=1e-5, residual=None):
        out = reference(x, weight, eps, residual)
        return damage(out) if residual is None else (damage(out[0]), out[1])

    wrong_kernel(monkeypatch, run)
    assert main(RMS_NORM) == 1
    assert "FAILED" in capsys.readouterr().out
    assert main([*RMS_NORM, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"] and not report["checks"][0]["ok"]
    assert report["checks"][0]["kernel"] == "wrong"


def test_a_wrong_gradient_alone_fails(monkeypatch, capsys):
    def run(x, weight, eps=1e-5, residual=None):
        return reference(x, weight.detach() + 0 * weight, eps, residual)

    wrong_kernel(monkeypatch, run)
    assert main([*RMS_NORM, "--json"]) == 1
    accuracies = json.loads(capsys.readouterr().out)["checks"][0]["accuracies"]
    assert [a["tensor"] for a in accuracies if not a["ok"]] == ["dweight"]


def test_what_the_emulator_finds_is_a_failure(monkeypatch, capsys):
    def run(*args):
        raise emulator.EmulatorError("race", "race: two writes to shared memory")

    wrong_kernel(monkeypatch, run)
    assert main(RMS_NORM) == 1
    assert "FAILED: race: two writes to shared memory" in capsys.readouterr().out


def test_a_rate_is_of_what_takes_the_card_longer(monkeypatch):
    """Times and rates that a GPU would give; the reference's after ours."""
    times = iter([{"forward": 2e-3, "backward": 5e-3}, {"forward": 4e-3, "backward": 5e-3}] * 2)
    monkeypatch.setattr(checks, "_times", lambda *args: next(times))
    monkeypatch.setattr(checks, "_copy_rate", lambda device: 4e12)
    monkeypatch.setattr(checks, "_matmul_rate", lambda device, dtype: 500e12)

    def speeds(name, shape):
        return checks._speeds(
            checks.CASES[name], shape, None, {"x": torch.empty(shape, device="meta")}, []
        )

    forward, backward = speeds("rms_norm", (10**5, 10**4))  # fp32: 4 GB a tensor
    assert (forward.unit, backward.unit) == ("GB/s", "GB/s")
    assert (forward.speedup, backward.speedup) == (2, 1)
    assert forward.rate == pytest.approx(2 * 4 / 2e-3) and forward.share == pytest.approx(1.0)
    assert backward.rate == pytest.approx(3 * 4 / 5e-3) and backward.share == pytest.approx(0.6)
    forward, backward = speeds("flash_attention, causal", (1, 10, 10_000, 100))  # 0.2 TFLOP
    assert (forward.unit, backward.unit) == ("TFLOP/s", "TFLOP/s")
    assert forward.rate == pytest.approx(0.2 / 2e-3) and forward.share == pytest.approx(0.2)
    assert backward.rate == pytest.approx(0.5 / 5e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_it_measures(capsys):
    assert main(["info", "--check", "--device=cuda", "--json"]) == 0
    for found in json.loads(capsys.readouterr().out)["checks"]:
        case = checks.CASES[found["case"]]
        directions = ["forward", "backward"] if case.gradients else ["forward"]
        assert [speed["direction"] for speed in found["speeds"]] == directions
        assert all(0 < speed["share"] < 1.3 for speed in found["speeds"])


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--op", "rms_nrom"], "did you mean rms_norm"),
        (["--op", "rms_norm", "--shape", "4x"], "not whole numbers"),
        (["--op", "rms_norm", "--shape", "4x0"], "ROWSxWIDTH, not 4x0"),
        (["--op", "flash_attention", "--shape", "4x4"], "BxHxTxD, not 4x4"),
        (["--shape", "4x4"], "say which with --op"),
        (["--dtype", "bfloat16"], "did you mean"),
        (["--dtype", "int8"], "not one of bf16, fp16, fp32"),
        (["--backend", "cdua"], "no backend named 'cdua'"),
        (["--backend", "cuda", "--op", "rms_norm"], "cannot run rms_norm"),
        (["--backend", "cuda"], "nothing to check"),
        (["--capability", "9.0"], "--backend emulator"),
        (["--backend", "emulator", "--capability", "ninety"], "capability must be one of 8.0, "),
        (["--backend", "emulator", "--capability", "7.5"], "capability must be one of"),
    ],
)
def test_mistakes_are_named(arguments, expected, capsys):
    assert main(["info", "--check", "--device=cpu", *arguments]) == 2
    out, err = capsys.readouterr()
    assert expected in err and err.startswith("error: ") and "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize("option", ["op=rms_norm", "shape=4x4", "dtype=fp32", "backend=reference"])
def test_an_option_of_check_does_nothing_in_silence_without_it(option, capsys):
    assert main(["info", f"--{option}"]) == 2
    assert "needs --check" in capsys.readouterr().err


@pytest.mark.skipif(emulator.refuse() is not None, reason="the emulator was not built")
@pytest.mark.parametrize("capability", ["8.0", "9.0"])
def test_the_emulator_is_checked_and_ops_without_it_are_left_out(capability, capsys):
    arguments = ["info", "--check", "--backend=emulator", f"--capability={capability}", "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert {found["backend"] for found in report["checks"]} == {"emulator"}
    checked = {found["case"] for found in report["checks"]}
    assert {"rms_norm", "rms_norm with a residual"} <= checked
    assert checked | set(report["left_out"]) == set(checks.CASES)


# ---------------------------------------------------------------- --plan

PLAN = ["info", "--plan", "--device=cpu", "--config=shakespeare-char-cpu"]
TINY = ["--model.n-layer=3", "--model.block-size=16", "--training.batch-size=2"]


@pytest.fixture
def little_memory(monkeypatch):
    """So that the largest micro-batch is found soon."""
    monkeypatch.setattr(training_plan, "free_memory", lambda device: 10**8)


def test_a_plan_says_what_training_takes(capsys, little_memory):
    settings = ["--model.vocab-size=65", "--training.steps=200", "--training.eval-every=100"]
    assert main([*PLAN, *TINY, *settings, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    # GPT-2's plain block of width 128, three of them; LayerNorms without biases; 128 rows of 65 ids.
    block = 2 * 128 + 128 * 3 * 128 + 128 * 128 + 2 * 128 * 512
    assert plan["parameters"] == 3 * block + 128 + 128 * 128
    assert plan["config"] == "shakespeare-char-cpu" and plan["device"] == "cpu"
    assert plan["tokens_per_step"] == 32 and plan["tokens"] == 6400 and plan["notes"] == []
    kinds = plan["checkpointing"]
    assert list(kinds) == ["none", "selective", "full"]
    assert kinds["full"]["activations"] < kinds["selective"]["activations"]
    assert kinds["selective"]["activations"] < kinds["none"]["activations"] < kinds["none"]["peak"]
    assert all(kind["gradients"] == 4 * plan["parameters"] for kind in kinds.values())
    rows = plan["fit"]["largest_micro_batch"]  # a row takes what 16 tokens do
    assert kinds["none"]["peak"] < 10**8 and 90 < rows < 10**4
    duration = plan["duration"]
    assert duration["run"] == pytest.approx(200 * duration["step"] + duration["evaluation"])
    assert duration["measured"] == "steps of the whole model with 2 of 2 rows"


def test_a_plan_is_shown_in_tables(capsys, little_memory):
    assert main([*PLAN, *TINY, "--model.gradient-checkpointing=full"]) == 0
    out = capsys.readouterr().out
    for words in ("parameters", "FLOPs", "optimizer", "full (chosen)", "largest micro-batch"):
        assert words in out
    assert "it ends at" in out and "note: a vocabulary of 128 characters is assumed" in out


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--config=nope"], "no configuration named 'nope'"),
        (["--device=cuda:99"], "torch sees"),
        (["--model.n-head=7"], "not a multiple of model.n_head (7)"),
        (["--model.norm=rsmnorm"], "did you mean rmsnorm"),
        (["--data.tokenizer=bytes"], "did you mean byte"),
        (["--model.n-embd=65536", "--model.n-layer=9"], "not even one layer would fit"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments, expected, capsys):
    assert main([*PLAN, *arguments]) == 2
    out, err = capsys.readouterr()
    assert expected in err and err.startswith("error: ") and "Traceback" not in err
    assert out == ""

"""Ablations: Student's intervals, matched parameters, and runs that are done once and never mixed up."""

import json
import math
import os
import random
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from almostgpt.cli.main import main
from almostgpt.config import Config, overlay, resolve
from almostgpt.config_file import load_config
from almostgpt.errors import UserError
from almostgpt.training import trainer
from almostgpt.training.ablation import matching, runs, variants
from almostgpt.training.ablation.report import make_rows
from almostgpt.training.ablation.runs import Outcome
from almostgpt.training.ablation.statistics import estimate, t_probability, t_quantile
from almostgpt.training.trainer import Trainer, TrainingDiverged

# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    "degrees, expected",
    # The table of any textbook, two-sided 95 % (Abramowitz & Stegun, table 26.10).
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (10, 2.228), (29, 2.045)],
)
def test_quantiles_are_those_of_the_table(degrees, expected):
    assert t_quantile(degrees) == pytest.approx(expected, abs=6e-4)


def test_quantiles_of_other_levels_and_in_closed_form():
    assert t_quantile(5, 0.99) == pytest.approx(4.032, abs=6e-4)
    assert t_quantile(120, 0.95) == pytest.approx(1.980, abs=6e-4)
    assert t_quantile(1, 0.5) == pytest.approx(1.0)  # of a Cauchy variable: tan(π/4)
    p = 0.95  # two degrees: p = t / √(2 + t²)
    assert t_quantile(2) == pytest.approx(p * math.sqrt(2 / (1 - p**2)))


@given(st.floats(0.01, 30), st.integers(1, 60))
def test_the_probability_is_the_integral_of_the_density(t, degrees):
    """Simpson's rule over the density, in terms of the gamma function."""
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
    scale /= math.sqrt(degrees * math.pi)

    def density(x):
        return scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)

    n, h = 2000, t / 2000
    inner = sum((4 if i % 2 else 2) * density(i * h) for i in range(1, n))
    integral = 2 * (density(0) + inner + density(t)) * h / 3
    assert t_probability(t, degrees) == pytest.approx(integral, abs=1e-6)


def test_an_interval_by_hand():
    found = estimate([1.0, 2.0, 3.0])  # mean 2, s = 1: 4.3027 / √3
    assert found.mean == 2 and found.n == 3
    assert found.half_width == pytest.approx(2.4841, abs=1e-4)
    assert estimate([5.0]).half_width is None and estimate([]) is None


def test_differences_are_taken_seed_by_seed():
    """Losses that vary by 1 from seed to seed, and between the variants always by 0.5."""
    first = [Outcome(seed, "finished", loss) for seed, loss in ((1, 1.0), (2, 2.0), (3, 3.0))]
    second = [Outcome(seed, "finished", loss) for seed, loss in ((1, 1.5), (2, 2.5), (4, 9.0))]
    second.append(Outcome(3, "diverged", problem="NaN"))
    made = variants.make_variants(
        Config(), {"model.norm": ["rmsnorm", "layernorm"]}, complete, "none"
    )
    rows = make_rows(made, [first, second])
    assert rows[0].difference is None and rows[1].difference.n == 2  # seeds 1 and 2 have both
    assert rows[1].difference.mean == 0.5 and rows[1].difference.half_width == 0
    assert rows[1].val_loss.n == 3 and rows[1].remarks == "1 of 4 diverged"


# ---------------------------------------------------------------- variants

SIZES = {"model.n_layer": 3, "model.n_embd": 64, "model.n_head": 4, "model.block_size": 32}


def complete(config: Config) -> Config:
    return overlay(resolve(config), {"model.vocab_size": 100})


def made(varied: dict, match: str = "parameters", **settings):
    base = overlay(Config(), {**SIZES, **settings})
    return variants.make_variants(base, varied, complete, match)


def closed_form(model) -> int:
    """Parameters of a GPT without biases, tied: matrices, norms, the table padded to 128 rows."""
    heads = (2 * model.n_head + 2 * model.n_kv_head) * model.head_dim
    matrices = 3 if model.feedforward == "swiglu" else 2
    learned = model.block_size if model.position == "learned" else 0
    block = model.n_embd * (heads + matrices * model.mlp_hidden + 2)
    return model.n_layer * block + model.n_embd * (1 + 128 + learned)


def test_parameters_are_matched_by_the_hidden_width():
    found = made(
        {
            "model.feedforward": ["swiglu", "gelu"],
            "model.n_kv_head": [4, 1],
            "model.position": ["rope", "learned"],
        }
    )
    assert len(found) == 8
    target = closed_form(found[0].config.model)
    assert found[0].config.model.mlp_hidden == 192  # as it is without any matching
    for variant in found:
        model = variant.config.model
        assert variant.parameters == closed_form(model)
        per_step = 8 * model.n_layer * model.n_embd * (3 if model.feedforward == "swiglu" else 2)
        assert model.mlp_hidden % 8 == 0 and abs(variant.parameters - target) <= per_step / 2
    widths = [v.config.model.mlp_hidden for v in made({"model.n_kv_head": [4, 1]}, "none")]
    assert widths == [192, 192]


@settings(max_examples=20)
@given(st.integers(1, 40), st.sampled_from(["swiglu", "gelu"]), st.integers(1, 64))
def test_no_width_is_nearer(steps, kind, difference):
    model = resolve(overlay(Config(), {**SIZES, "model.feedforward": kind})).model
    model = overlay(Config(model=model), {"model.vocab_size": 100}).model
    wanted = closed_form(overlay(Config(model=model), {"model.mlp_hidden": 8 * steps}).model)
    target = wanted + 64 * difference
    chosen = matching.match_parameters(model, target)
    others = [8 * n for n in range(1, 60)] + [model.mlp_hidden]
    nearest = min(
        abs(closed_form(overlay(Config(model=model), {"model.mlp_hidden": h}).model) - target)
        for h in others
    )
    assert abs(closed_form(chosen) - target) == nearest


def test_options_of_a_part_go_with_it_and_equal_variants_are_one():
    varied = {
        "model.attention": ["full", "sliding_window"],
        "model.attention_window": [4, 8],
    }
    found = made(varied)
    assert [variant.name for variant in found] == [
        "attention=full",
        "attention=sliding_window attention_window=4",
        "attention=sliding_window attention_window=8",
    ]
    assert found[0].config.model.attention_window is None
    assert found[2].config.model.attention_window == 8
    assert found[2].folder == "attention=sliding_window,attention_window=8"
    given = made({"model.attention": ["full", "sliding_window"]}, **{"model.attention_window": 6})
    assert [v.config.model.attention_window for v in given] == [None, 6]


def test_names_show_values_as_they_are_written():
    """1 and true are equal in Python, and not the same."""
    found = made({"model.n_kv_head": [1, None], "model.qk_norm": [False, True]}, "none")
    assert [variant.name for variant in found] == [
        "n_kv_head=1 qk_norm=false",
        "n_kv_head=1 qk_norm=true",
        "n_kv_head=null qk_norm=false",
        "n_kv_head=null qk_norm=true",
    ]
    found = made({"optimizer.name": ["adamw", "muon"], "schedule.name": ["wsd"]})
    assert found[1].name == "optimizer.name=muon schedule.name=wsd"


def test_all_that_cannot_be_is_refused_at_once():
    with pytest.raises(UserError) as error:
        made(
            {"model.n_head": [3, 4, 5], "model.position": ["rope", "learned"]},
            **{"model.attention_window": 4},
        )
    message = str(error.value)
    assert message.count("n_head=3") == 2 and message.count("n_head=5") == 2
    assert "n_head=4" not in message
    assert "model.attention_window is given, but no variant has a part that uses it" in message
    with pytest.raises(UserError, match="leaves none for that of the"):
        made({"model.n_layer": [2, 9]})
    with pytest.raises(UserError, match="add --match none"):
        made({"model.mlp_ratio": [2.0, 4.0]})
    assert len(made({"model.mlp_ratio": [2.0, 4.0]}, "none")) == 2
    with pytest.raises(UserError, match="did you mean parameters"):
        made({"model.n_layer": [2]}, "parametres")


def test_values_are_read_by_type():
    found = variants.parse_varied(
        ["optimizer.lr=1e-3, 3e-3", "model.bias=true,false", "model.n-kv-head=2,null"]
    )
    assert found == {
        "optimizer.lr": [0.001, 0.003],
        "model.bias": [True, False],
        "model.n_kv_head": [2, None],
    }


@pytest.mark.parametrize(
    "words, expected",
    [
        ("model.norm", "say KEY=VALUE,VALUE"),
        ("model.norm=", "say KEY=VALUE,VALUE"),
        ("model.nrom=a,b", "did you mean model.norm"),
        ("model.n_layer=2,two", "expected a whole number, found 'two'"),
        ("model.n_layer=2,2", "2 is given twice"),
        ("seed=1,2", "--seeds says how many"),
        ("optimizer.betas=0.9,0.95", "pairs cannot be varied"),
        ("training.batch_size=4,8", "the same for all variants"),
        ("model.block_size=4,8", "the same for all variants"),
        ("data.corpus=stdlib,shakespeare", "the same for all variants"),
        ("device=cpu,cuda", "the same for all variants"),
    ],
)
def test_what_cannot_be_varied_is_said(words, expected):
    with pytest.raises(UserError) as error:
        variants.parse_varied(["model.qk_norm=true,maybe", words])
    message = str(error.value)
    assert expected in message and "expected true or false, found 'maybe'" in message


# ---------------------------------------------------------------- runs

TINY = ["--model.n-layer=1", "--model.n-head=2", "--model.n-embd=16", "--model.block-size=8"]
TINY += ["--training.steps=4", "--training.batch-size=2", "--training.eval-batches=2"]
TINY += ["--checkpoint.every=2", "--schedule.warmup-steps=1", "--device=cpu"]
NORMS = "--vary=model.norm=rmsnorm,layernorm"


@pytest.fixture
def text(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ALMOSTGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    # A picture of every run takes longer than the run.
    monkeypatch.setattr(trainer, "plot_loss", lambda *_: None)
    words = random.Random(0).choices("the quick brown fox jumps over a dog\n".split(" "), k=500)
    Path("text.txt").write_text(" ".join(words))
    return Path("text.txt")


def ablate(*arguments: str, seeds: int = 2) -> int:
    common = ["--data.path=text.txt", "--out=out", f"--seeds={seeds}"]
    return main(["ablate", *common, *TINY, *arguments])


def result(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def trained(monkeypatch) -> list[tuple]:
    """The runs that a trainer was made for, and from which step on."""
    seen = []
    train = Trainer.train

    def counting(self, progress):
        seen.append((self.run.parent.name, self.config.seed, self.step_number))
        return train(self, progress)

    monkeypatch.setattr(Trainer, "train", counting)
    return seen


def test_a_whole_ablation(text, capsys, trained):
    assert ablate(NORMS, "--vary=model.feedforward=swiglu,gelu") == 0
    out, err = capsys.readouterr()
    last = json.loads(out.splitlines()[-1])
    names = [
        f"norm={n} feedforward={f}" for n in ("rmsnorm", "layernorm") for f in ("swiglu", "gelu")
    ]
    assert [variant["name"] for variant in last["variants"]] == names
    assert "mlp_hidden" in err and "8/8" in err
    assert out.startswith("| variant | parameters |") and out.count("(n = 2)") == 4

    results = json.loads(Path("out/results.json").read_text())
    assert results["tokens"] == 4 * 2 * 8 and results["seeds"] == [1337, 1338]
    assert results["command"].startswith("almostgpt ablate --data.path=text.txt")
    for variant, summary in zip(results["variants"], last["variants"], strict=True):
        losses = []
        for run in variant["runs"]:
            folder = Path("out/runs", variant["name"].replace(" ", ","), f"seed-{run['seed']}")
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            losses.append(json.loads(lines[-1])["val_loss"])
            assert run["val_loss"] == losses[-1] and run["status"] == "finished"
            config = load_config(folder / "config.yaml")
            assert config.seed == run["seed"] and config.model.mlp_hidden == variant["mlp_hidden"]
        mean = sum(losses) / 2  # of two values: t · |a − b| / 2, t = 12.7062
        assert summary["val_loss"] == pytest.approx(mean)
        assert summary["interval"] == pytest.approx(
            12.7062 * abs(losses[0] - losses[1]) / 2, rel=1e-5
        )
    assert Path("out/ablation.png").read_bytes().startswith(b"\x89PNG")
    markdown = Path("out/results.md").read_text()
    assert out.splitlines()[2] in markdown and "64 tokens each, matched parameters" in markdown

    before = results["variants"]
    trained.clear()  # and once more: everything is there, a third seed is not
    assert ablate(NORMS, "--vary=model.feedforward=swiglu,gelu", seeds=3) == 0
    assert {seed for _, seed, _ in trained} == {1339} and len(trained) == 4
    again = json.loads(Path("out/results.json").read_text())["variants"]
    assert [v["runs"] for v in before] == [v["runs"][:2] for v in again]


def test_all_variants_see_the_same_batches(text, monkeypatch):
    seen = {}
    step = Trainer.step

    def watched(self, number, lr):
        window = self.batches.next_batch
        self.batches.next_batch = lambda: (
            seen.setdefault((self.config.seed, self.config.model.norm), []).append(
                batch := window()
            )
            or batch
        )
        try:
            return step(self, number, lr)
        finally:
            del self.batches.next_batch

    monkeypatch.setattr(Trainer, "step", watched)
    assert ablate(NORMS) == 0
    for seed in (1337, 1338):
        first, second = (seen[seed, norm] for norm in ("rmsnorm", "layernorm"))
        assert len(first) == len(second) == 4
        assert all(a.ids.equal(b.ids) for a, b in zip(first, second, strict=True))
    assert not seen[1337, "rmsnorm"][0].ids.equal(seen[1338, "rmsnorm"][0].ids)


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(text, capsys, monkeypatch, trained):
    assert ablate(NORMS, "--out=whole") == 0
    whole = result(capsys)
    trained.clear()
    step = Trainer.step

    def interrupted(self, number, lr):
        if (self.config.seed, self.config.model.norm, number) == (1337, "layernorm", 3):
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number, lr)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert ablate(NORMS) == 0
    stopped = result(capsys)
    assert stopped["stopped_by"] == "SIGINT"
    assert [variant["n"] for variant in stopped["variants"]] == [1, 0]
    assert ablate(NORMS) == 0
    assert trained[2:] == [("norm=layernorm", 1337, 3), *(
        (f"norm={norm}", 1338, 0) for norm in ("rmsnorm", "layernorm")
    )]  # fmt: skip
    compared = ("name", "val_loss", "interval", "difference", "difference_interval", "n")
    for one, other in zip(whole["variants"], result(capsys)["variants"], strict=True):
        assert [one[key] for key in compared] == [other[key] for key in compared]


def test_killed_in_a_run_it_goes_on_from_the_checkpoint(text, capsys, monkeypatch, trained):
    assert ablate(NORMS, "--out=whole", seeds=1) == 0
    whole = result(capsys)
    trained.clear()
    step = Trainer.step

    def killed(self, number, lr):
        if self.config.model.norm == "layernorm" and number == 4:
            raise SystemExit(137)  # nothing of ours catches it: no file is closed in a better state
        return step(self, number, lr)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", killed)
        with pytest.raises(SystemExit):
            ablate(NORMS, seeds=1)
    assert ablate(NORMS, seeds=1) == 0
    assert trained[-1] == ("norm=layernorm", 1337, 2) and len(trained) == 3
    for one, other in zip(whole["variants"], result(capsys)["variants"], strict=True):
        assert one["val_loss"] == other["val_loss"]


def test_a_variant_that_diverges_or_fails_does_not_stop_the_others(
    text, capsys, monkeypatch, trained
):
    step = Trainer.step

    def failing(self, number, lr):
        if self.config.model.norm == "layernorm" and self.config.seed == 1338:
            raise TrainingDiverged("the loss is not finite at step 1")
        if self.config.model.feedforward == "gelu":
            raise UserError("out of memory")
        return step(self, number, lr)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", failing)
        assert ablate(NORMS, "--vary=model.feedforward=swiglu,gelu") == 0
    found = {variant["name"]: variant for variant in result(capsys)["variants"]}
    assert found["norm=rmsnorm feedforward=swiglu"]["remarks"] == ""
    assert found["norm=layernorm feedforward=swiglu"]["remarks"] == "1 of 2 diverged"
    failed = found["norm=rmsnorm feedforward=gelu"]
    assert failed["remarks"] == "2 of 2 failed" and failed["val_loss"] is None
    trained.clear()  # what failed is tried again, what diverged is known to
    assert ablate(NORMS, "--vary=model.feedforward=swiglu,gelu") == 0
    assert [(name.split("=")[-1], seed) for name, seed, _ in trained] == [
        ("gelu", seed) for seed in (1337, 1337, 1338)
    ]


def test_other_settings_need_another_folder(text, capsys):
    assert ablate(NORMS, seeds=1) == 0
    assert result(capsys)["variants"][0]["interval"] is None  # one run tells nothing of it
    assert ablate(NORMS, "--optimizer.lr=0.5", seeds=1) == 2
    assert "optimizer.lr: norm=layernorm has" in capsys.readouterr().err
    assert ablate(NORMS, "--training.log-every=1", seeds=1) == 0
    Path("used").mkdir()
    Path("used/file").touch()
    assert ablate(NORMS, "--out=used") == 2
    assert "holds no ablation" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "say what to vary"),
        ([NORMS, "--seeds=0"], "--seeds is 0"),
        ([NORMS, "--match=none", "--model.n-head=3"], "not a multiple of model.n_head"),
        (["--vary=model.norm=rmsnorm,layernrm"], "did you mean layernorm"),
        ([NORMS, "--data.path=nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_end_before_anything_is_trained(text, arguments, expected, capsys):
    assert ablate(*arguments) == 2
    assert expected in capsys.readouterr().err
    assert not Path("out").exists()


def test_it_can_begin_with_the_weights_of_a_model(text, capsys):
    assert main(["train", "--data.path=text.txt", "--out=source", *TINY]) == 0
    steps = ["--training.steps=1", "--init=source"]
    assert ablate("--vary=optimizer.lr=0,1e-3", "--schedule.min-lr=0", *steps[1:], seeds=1) == 0
    config = load_config("out/runs/lr=0.0/seed-1337/config.yaml")
    assert config.init == str(Path("source/checkpoints/step-00000004").absolute())
    capsys.readouterr()
    assert ablate("--vary=model.feedforward=swiglu,gelu", "--init=source", "--out=no") == 2
    assert "model.feedforward: the weights have 'swiglu'" in capsys.readouterr().err


def test_the_folder_is_named_after_what_is_varied(text):
    vary = [NORMS, "--vary=model.qk_norm=true"]
    assert main(["ablate", "--data.path=text.txt", "--seeds=1", *TINY, *vary]) == 0
    assert Path("runs/ablation-norm-qk_norm/results.json").is_file()


def test_a_damaged_result_is_named(text, capsys):
    assert ablate(NORMS, seeds=1) == 0
    Path("out/runs/norm=rmsnorm/seed-1337", runs.RESULT).write_text("{")
    assert ablate(NORMS, seeds=1) == 2
    assert "result.json: damaged" in capsys.readouterr().err

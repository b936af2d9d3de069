"""Schedule, optimizer, guard, metrics and run folder, each alone."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from almostgpt import GPT, GPTConfig
from almostgpt.config import Config, OptimizerConfig, flatten, overlay, resolve
from almostgpt.errors import UserError
from almostgpt.training import metrics, optimizer
from almostgpt.training.run import (
    RESUMABLE,
    check_is_run,
    new_run_folder,
    resume_config,
    stored_config,
    write_config,
)
from almostgpt.training.schedule import SCHEDULES, learning_rate


def test_schedule_against_nanogpts_formula():
    settings = {
        "optimizer.lr": 1e-3,
        "schedule.min_lr": 1e-4,
        "schedule.warmup_steps": 100,
        "schedule.decay_steps": 2000,
    }
    config = resolve(overlay(Config(), settings))
    for step in (1, 50, 100):
        assert learning_rate(config, step) == pytest.approx(1e-3 * step / 100)
    for step in (101, 700, 1050, 1999):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 100) / 1900))
        assert learning_rate(config, step) == pytest.approx(1e-4 + cosine * 9e-4)
    assert learning_rate(config, 2000) == learning_rate(config, 10**6) == pytest.approx(1e-4)


def wsd(**changes):
    settings = {
        "optimizer.lr": 1e-3,
        "schedule.name": "wsd",
        "schedule.min_lr": 1e-4,
        "schedule.warmup_steps": 100,
        "schedule.decay_fraction": 0.2,
        "training.steps": 2000,
        **{f"schedule.{key}": value for key, value in changes.items()},
    }
    return resolve(overlay(Config(), settings))


def test_wsd_is_flat_and_then_a_straight_line():
    config = wsd()
    assert learning_rate(config, 50) == pytest.approx(5e-4)
    assert {learning_rate(config, step) for step in range(100, 1601)} == {1e-3}
    assert learning_rate(config, 1700) == pytest.approx(1e-3 - 9e-4 / 4)
    assert learning_rate(config, 1800) == pytest.approx(1e-3 - 9e-4 / 2)
    assert learning_rate(config, 2000) == learning_rate(config, 2500) == pytest.approx(1e-4)
    whole = wsd(decay_fraction=1.0)  # never before the warm-up is over
    assert learning_rate(whole, 100) == 1e-3
    assert learning_rate(whole, 1050) == pytest.approx(5.5e-4)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_more_steps_change_no_rate_of_the_first_ones(name):
    stored = wsd(name=name)
    longer = resume_config(stored, resolve(overlay(stored, {"training.steps": 9000})), 2000)
    rates = [learning_rate(longer, step) for step in range(1, 4000)]
    assert rates[:2000] == [learning_rate(stored, step) for step in range(1, 2001)]
    assert set(rates[2000:]) == {rates[1999]}


@pytest.mark.parametrize(
    "changed, step, allowed",
    [
        ({"schedule.decay_steps": 4000}, 1600, True),  # still stable: it decays later
        ({"schedule.decay_steps": 4000}, 1700, False),  # it has begun to decay
        ({"schedule.decay_steps": 1700, "schedule.decay_fraction": 0.05}, 1600, True),
        ({"schedule.decay_steps": 1500}, 1600, False),  # it should have decayed long since
        ({"schedule.decay_fraction": 0.1}, 1600, True),
    ],
)
def test_a_stable_run_may_decay_at_another_time(changed, step, allowed):
    stored = wsd()
    wanted = resolve(overlay(stored, changed))
    if not allowed:
        with pytest.raises(UserError, match=f"not the rates of the {step} steps taken"):
            resume_config(stored, wanted, step)
        return
    resumed = resume_config(stored, wanted, step)
    for s in range(1, step + 1):
        assert learning_rate(resumed, s) == learning_rate(stored, s)
    assert learning_rate(resumed, resumed.schedule.decay_steps) == pytest.approx(1e-4)


@given(
    st.integers(0, 50),
    st.integers(1, 50),
    st.floats(0, 1, exclude_min=True),
    st.sampled_from(sorted(SCHEDULES)),
)
def test_schedule_stays_between_zero_and_peak(warmup, decay, fraction, name):
    settings = {
        "schedule.warmup_steps": warmup,
        "schedule.decay_steps": decay,
        "schedule.decay_fraction": fraction,
        "schedule.name": name,
    }
    config = resolve(overlay(Config(), settings))
    rates = [learning_rate(config, step) for step in range(1, 110)]
    assert all(0 < rate <= config.optimizer.lr * (1 + 1e-12) for rate in rates)
    after_warmup = rates[warmup:]
    assert all(a >= b for a, b in zip(after_warmup, after_warmup[1:], strict=False))


def small_model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16, bias=True))


def test_adamw_step_against_the_paper_in_fp64():
    """One and two steps of Algorithm 2 (Loshchilov & Hutter 2019); decay on matrices only."""
    model = small_model()
    config = OptimizerConfig(lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5)
    adamw = optimizer.build_optimizer(model, config)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    m = {name: torch.zeros_like(w) for name, w in weights.items()}
    v = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in (1, 2):
        for name, parameter in model.named_parameters():
            g = torch.randn_like(parameter)
            parameter.grad = g
            g = g.double()
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.99 * v[name] + 0.01 * g**2
            update = (m[name] / (1 - 0.9**step)) / ((v[name] / (1 - 0.99**step)).sqrt() + 1e-8)
            decay = 0.5 if parameter.dim() == 2 else 0.0
            weights[name] = weights[name] - 0.01 * (update + decay * weights[name])
        adamw.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), weights[name], rtol=1e-5, atol=1e-6)


def take_steps(model, adamw, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        adamw.step()


def test_optimizer_state_survives_a_round_trip():
    first, second = small_model(), small_model()
    adamw = optimizer.build_optimizer(first, OptimizerConfig())
    take_steps(first, adamw, 3, seed=1)
    second.load_state_dict(first.state_dict())
    restored = optimizer.build_optimizer(second, OptimizerConfig())
    state = {
        name: value.clone() for name, value in optimizer.optimizer_tensors(adamw, first).items()
    }
    optimizer.load_optimizer_tensors(restored, second, state)
    take_steps(first, adamw, 2, seed=2)
    take_steps(second, restored, 2, seed=2)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_foreign_optimizer_state_is_refused():
    model = small_model()
    adamw = optimizer.build_optimizer(model, OptimizerConfig())
    with pytest.raises(UserError, match="'nowhere'"):
        optimizer.load_optimizer_tensors(adamw, model, {"nowhere/exp_avg": torch.zeros(1)})
    with pytest.raises(UserError, match="shape"):
        optimizer.load_optimizer_tensors(adamw, model, {"norm.weight/exp_avg": torch.zeros(3)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_guard_on_a_device_holds_the_weights_from_the_first_bad_step_on(bad):
    """The fused update reads the flag by itself; here on CPU tensors, the same kernel interface."""
    model = small_model()
    adamw = optimizer.build_optimizer(model, OptimizerConfig())
    guard = optimizer.FiniteGuard(torch.device("cpu"), immediate=False)
    one = torch.ones(())
    for step, norm in enumerate((one, one, one * bad, one, one * bad), start=1):
        before = [p.detach().clone() for p in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, norm.item())
        guard.check(step, one, norm)
        guard.hold_back(adamw)
        adamw.step()
        changed = any(
            not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)
        )
        assert changed == (step < 3)
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert guard.first_bad_step() == (None if step < 3 else 3)


def test_flops_per_token_counts_every_matrix_product():
    """Against torch's own counter on the forward pass (attention counted there without the mask)."""
    from torch.utils.flop_counter import FlopCounterMode

    model = GPT(
        GPTConfig(block_size=32, vocab_size=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=64)
    )
    ids = torch.zeros(3, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, all_logits=True)
    full_attention = 2 * 2 * 2 * 4 * 16 * 32  # layers · QKᵀ and PV · 2 · heads · width · keys
    causal_attention = full_attention * 33 / 64
    counted = counter.get_total_flops() / (3 * 32)
    # torch's counter may not know the fused attention on a CPU: then it counted the matrices alone.
    matrices = metrics.flops_per_token(model, 32) / 3 - causal_attention
    assert counted in (matrices, matrices + full_attention)


def test_metrics_are_json_and_cut_at_the_step_resumed_from(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = metrics.StepLog(path, 0)
    for step in (1, 10, 20):
        file.write({"step": step, "loss": float("nan") if step == 10 else 1.5})
        assert json.loads(path.read_text().splitlines()[-1])["step"] == step  # flushed line by line
    file.close()
    with open(path, "a") as torn:
        torn.write('{"step": 21, "lo')
    metrics.StepLog(path, 10).close()
    assert metrics.read_metrics(path) == [{"step": 1, "loss": 1.5}, {"step": 10, "loss": None}]


def test_peaks_are_matched_by_name(monkeypatch):
    device = torch.device("cuda", 0)
    for name, precision, tflops in (
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 80GB HBM3", "fp16", 989),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert metrics.peak_flops(device, precision) == tflops * 1e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Unheard Of")
    assert metrics.peak_flops(device, "bf16") is None
    assert metrics.peak_flops(torch.device("cpu"), "fp32") is None


def test_run_folders_are_numbered_and_never_reused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = resolve(Config())
    names = [new_run_folder(None, "mine").as_posix() for _ in range(3)]
    assert names == ["runs/mine", "runs/mine-2", "runs/mine-3"]
    run = tmp_path / "runs/mine"
    write_config(run, config, new=True)
    assert stored_config(run, None) == config
    with pytest.raises(UserError, match="add --resume"):
        new_run_folder(run, "mine")
    with pytest.raises(UserError, match="add --resume"):  # another process was there in between
        write_config(run, config, new=True)
    killed_at_its_start = tmp_path / "killed"
    killed_at_its_start.mkdir()
    (killed_at_its_start / ".config.yaml.0.partial").write_text("mod")
    assert new_run_folder(killed_at_its_start, "mine") == killed_at_its_start
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name another folder"):
        new_run_folder(tmp_path / "file", "mine")
    with pytest.raises(UserError, match="there is no run"):
        check_is_run(tmp_path / "nowhere")


def test_a_dangling_runs_folder_is_an_error_and_no_endless_loop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(tmp_path / "unmounted" / "disk")
    with pytest.raises(OSError, match="runs"):
        new_run_folder(None, "mine")


@pytest.mark.parametrize("key", sorted(flatten(Config())))
def test_resuming_changes_only_what_it_may(key):
    """Every setting, one by one: allowed, or refused with both values."""
    stored = resolve(Config())
    value = flatten(stored)[key]
    if isinstance(value, bool):
        other = not value
    elif isinstance(value, (int, float)):
        other = value + 1
    elif isinstance(value, tuple):
        other = (0.5, 0.5)
    else:
        other = "another"
    wanted = overlay(stored, {key: other})
    if key in RESUMABLE or key == "schedule.decay_fraction":  # which the default has no use for
        assert resume_config(stored, wanted, step=1000) == wanted
    else:
        with pytest.raises(UserError) as error:
            resume_config(stored, wanted, step=1000)
        assert key in str(error.value)
        assert repr(value) in str(error.value) and repr(other) in str(error.value)

"""The emulator as Python meets it: loaded on demand, its settings, its findings as exceptions."""

import copy
import os
import subprocess
import sys

import pytest
import torch

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.kernels import emulator
from almostgpt.kernels.emulator import EmulatedOps

needs_library = pytest.mark.skipif(
    emulator.refuse() is not None, reason=f"no emulator: {emulator.refuse()}"
)

# One row of four warps: the threads that share it have to wait for each other.
X, W = torch.randn(2, 1024), torch.randn(1024)
BYTES = X.numel() * X.element_size()


def emulated(x=X, weight=W):
    with kernels.use_backend("emulator"):
        return kernels.rms_norm(x, weight)


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True
    )


# --- the library -----------------------------------------------------------------------------------


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="was not built"):
        emulator.load(tmp_path / "_emulator.so")
    monkeypatch.setattr(emulator, "refuse", lambda: "the emulator library was not built")
    with pytest.raises(UserError, match="'emulator' is forced but cannot run rms_norm: .*built"):
        emulated()
    assert kernels.explain("rms_norm", X, W).backend == "reference"


def test_a_broken_library_is_named(tmp_path):
    broken = tmp_path / "_emulator.so"
    broken.write_bytes(b"no library")
    with pytest.raises(UserError, match="_emulator.so does not load"):
        emulator.load(broken)


@needs_library
def test_it_is_loaded_on_demand_and_begins_as_the_environment_says():
    code = (
        "import torch\nfrom almostgpt import kernels\nfrom almostgpt.kernels import emulator\n"
        "def loaded():\n    return '_emulator.so' in open('/proc/self/maps').read()\n"
        "x, w = torch.ones(2, 8, requires_grad=True), torch.ones(8)\n"
        "kernels.rms_norm(x, w).sum().backward()\n"
        "kernels.explain('rms_norm', x, w, capability=(9, 0))\n"
        "assert not loaded()\n"
        "with kernels.use_backend('emulator'):\n"
        "    assert not loaded()\n    kernels.rms_norm(x, w)\n"
        "assert loaded()\nprint(emulator.options())\n"
    )
    env = {"SEED": "7", "ASYNC": "early", "CHECK": "0", "MULTIPROCESSORS": "3"}
    run = python(code, **{f"ALMOSTGPT_EMULATOR_{name}": value for name, value in env.items()})
    assert run.returncode == 0, run.stderr
    assert eval(run.stdout) == {
        "seed": 7,
        "asynchrony": "early",
        "check": False,
        "multiprocessors": 3,
    }


@needs_library
def test_a_bad_value_in_the_environment_is_an_exception():
    code = (
        "from almostgpt.kernels import emulator\n"
        "try:\n    emulator.options()\nexcept ValueError as error:\n    print(error)\n"
    )
    run = python(code, ALMOSTGPT_EMULATOR_SEED="often")
    assert run.returncode == 0 and "ALMOSTGPT_EMULATOR_SEED=often" in run.stdout, run.stderr


# --- settings, statistics, faults ------------------------------------------------------------------


@needs_library
def test_settings_hold_for_a_block():
    before = emulator.options()
    with emulator.settings(seed=5, check=False):
        assert emulator.options() == {**before, "seed": 5, "check": False}
        with pytest.raises(UserError, match="late, early or random, not 'never'"):
            with emulator.settings(asynchrony="never"):
                pass
        with emulator.settings(asynchrony="random", multiprocessors=2):
            assert emulator.options() == {
                "seed": 5,
                "asynchrony": "random",
                "check": False,
                "multiprocessors": 2,
            }
    assert emulator.options() == before
    with pytest.raises(ZeroDivisionError), emulator.settings(seed=6):
        1 / 0  # noqa: B018
    assert emulator.options() == before


@needs_library
def test_statistics_and_sites_count_from_the_last_reset():
    emulator.reset_statistics()
    assert emulator.statistics() == {"kernels": {}} and emulator.sites() == []
    for _ in range(3):
        emulated()
    (kernel,) = emulator.statistics()["kernels"].values()
    assert kernel["launches"] == 3
    assert kernel["buffers"]["x"] == {"read": 3 * BYTES, "written": 0}
    assert kernel["buffers"]["y"] == {"read": 0, "written": 3 * BYTES}
    assert any("cta_sync" in site["site"] and site["mutations"] for site in emulator.sites())
    emulator.reset_statistics()
    assert emulator.statistics() == {"kernels": {}} and emulator.sites() == []


def barrier() -> tuple[str, str]:
    """The barrier in the middle of a row, and what may be done to it."""
    emulator.reset_statistics()
    emulated()
    site = next(site for site in emulator.sites() if "cta_sync" in site["site"])
    return site["site"], site["mutations"][0]


@needs_library
def test_a_finding_is_an_exception_and_the_process_goes_on():
    expected = emulated()
    site, mutation = barrier()
    with emulator.fault(site, mutation):
        with pytest.raises(kernels.EmulatorError) as error:
            emulated()
    # Which of the two threads comes first decides what it is.
    assert error.value.kind in ("race", "uninitialised")
    for part in (error.value.kind, site.split()[0].split(":")[0], "what to do: "):
        assert part in str(error.value)
    assert str(copy.copy(error.value)) == str(error.value)
    assert torch.equal(emulated(), expected)  # the fault is gone, and nothing else is left of it
    with pytest.raises(UserError, match="emulator: .*forget"):
        with emulator.fault(site, "forget"):
            pass


@needs_library
def test_a_finding_in_backward_is_the_same_exception():
    x = X.clone().requires_grad_()
    y, again = emulated(x), emulated(x)
    emulator.reset_statistics()
    y.sum().backward()  # outside of use_backend: the choice was made in forward
    kernels_run = emulator.statistics()["kernels"]
    assert kernels_run and all("backward" in name or "sum" in name for name in kernels_run)
    site = next(site for site in emulator.sites() if site["mutations"] and "sync" in site["site"])
    with emulator.fault(site["site"], site["mutations"][0]):
        with pytest.raises(kernels.EmulatorError):
            again.sum().backward()


@needs_library
def test_a_card_that_nobody_knows_is_a_finding_too():
    for card in ((7, 5), (99, 9)):
        with pytest.raises(kernels.EmulatorError) as error:
            EmulatedOps(card).rms_norm_forward(X, W, 1e-5)
        assert error.value.kind == "card"


@needs_library
def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="rms_norm_forward: weight must be") as error:
        EmulatedOps((8, 0)).rms_norm_forward(X, W[1:], 1e-5)
    assert not isinstance(error.value, kernels.EmulatorError)


# --- as a backend ----------------------------------------------------------------------------------


@needs_library
def test_explain_says_that_it_runs_only_when_forced():
    assert kernels.explain("rms_norm", X, W).reasons["emulator"] == "it runs only when forced"
    with kernels.use_backend("emulator", ops=["rms_norm"]):
        answer = kernels.explain("rms_norm", X, W)
        assert answer.backend == "emulator" and answer.kernel == "rms_norm_forward"
        assert kernels.explain("rms_norm", X.to("meta"), W.to("meta")).backend == "emulator"
    with kernels.use_backend("emulator"), pytest.raises(UserError, match="float64"):
        kernels.rms_norm(X.double(), W.double())


@needs_library
def test_compiled_code_calls_the_emulator_of_the_card_that_is_forced():
    compiled = torch.compile(
        lambda x: kernels.rms_norm(x, W), fullgraph=True, backend="aot_eager", dynamic=True
    )
    reference = with_gradient(lambda x: kernels.rms_norm(x, W))
    for capability in ((8, 0), (9, 0)):
        emulator.reset_statistics()
        with kernels.use_backend("emulator", capability=capability):
            torch.testing.assert_close(with_gradient(compiled), reference)
        launches = [kernel["launches"] for kernel in emulator.statistics()["kernels"].values()]
        assert sum(launches) >= 2  # forward and backward
    site, mutation = barrier()
    with kernels.use_backend("emulator", capability=(9, 0)), emulator.fault(site, mutation):
        with pytest.raises(RuntimeError, match="EmulatorError"):  # nothing is there to translate it
            compiled(X)


def with_gradient(norm) -> tuple[torch.Tensor, torch.Tensor]:
    x = X.clone().requires_grad_()
    y = norm(x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 2**63}, "seed must be"),
        ({"seed": "a"}, "seed must be"),
        ({"multiprocessors": 2**33}, "multiprocessors must be"),
        ({"asynchrony": 3}, "late, early or random"),
        ({"check": "no"}, "check must be True or False"),
    ],
)
def test_bad_settings_are_named(wrong, says):
    with pytest.raises(UserError, match=says):
        with emulator.settings(**wrong):
            pass

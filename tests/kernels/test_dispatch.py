"""The choice of a backend: explained, forced, and kept for backward."""

import contextvars
import os
import subprocess
import sys
import threading

import pytest
import torch

from almostgpt import kernels
from almostgpt.errors import UserError
from almostgpt.kernels import dispatch, native
from almostgpt.kernels.csrc import csrc_kernels
from almostgpt.kernels.dispatch import Kernel, Op, observing
from almostgpt.kernels.emulator import EmulatedOps

X, W = torch.randn(3, 8), torch.randn(8)
Q = torch.randn(1, 2, 3, 4)


def test_explain_gives_a_reason_for_every_other_backend():
    answer = kernels.explain("rms_norm", X, W)
    assert answer.backend == "reference"
    assert set(answer.reasons) == set(kernels.BACKENDS) - {"reference"}
    assert answer.reasons["cuda"] == "the tensors are on cpu"
    assert answer.reasons["triton"] == "no triton kernel for this op"
    assert "rms_norm: reference" in str(answer) and "not cuda: the tensors are" in str(answer)


def test_explain_refuses_what_the_op_refuses():
    with pytest.raises(UserError, match="weight must be"):
        kernels.explain("rms_norm", X, W[:2])
    with pytest.raises(UserError, match="rms_norm, flash_attention"):
        kernels.explain("layer_norm", X)


def test_a_forced_backend_never_falls_back():
    with kernels.use_backend("reference"):
        assert kernels.explain("rms_norm", X, W).backend == "reference"
    with kernels.use_backend("cuda"), pytest.raises(UserError, match="'cuda'.*are on cpu"):
        kernels.rms_norm(X, W)
    with kernels.use_backend("triton", ops=["rms_norm"]):
        with pytest.raises(UserError, match="no triton kernel"):
            kernels.rms_norm(X, W)


def test_an_op_without_a_kernel_of_the_forced_backend_is_left_alone():
    with kernels.use_backend("triton"):
        assert kernels.explain("rms_norm", X, W).backend == "reference"
        kernels.rms_norm(X, W)
    with kernels.use_backend("reference"), kernels.use_backend("triton"):
        assert kernels.explain("rms_norm", X, W).reasons["emulator"] != "it runs only when forced"
    kernels.rms_norm(X, W)


def test_some_ops_alone_are_forced():
    with kernels.use_backend("triton", ops=["rms_norm"]):
        with pytest.raises(UserError, match="no triton kernel"):
            kernels.rms_norm(X, W)
        kernels.flash_attention(Q, Q, Q)
    with kernels.use_backend("triton", ops="flash_attention"):
        kernels.rms_norm(X, W)
    with pytest.raises(UserError, match="no op named 'norm'; the ops are rms_norm"):
        with kernels.use_backend("reference", ops=["norm"]):
            pass


def test_of_nested_blocks_the_innermost_that_is_for_the_op_holds():
    def backends():
        return [
            dispatch.forced(op) and dispatch.forced(op).backend
            for op in (kernels.OPS["rms_norm"], kernels.OPS["flash_attention"])
        ]

    assert backends() == [None, None]
    with kernels.use_backend("cuda"):
        with kernels.use_backend("reference", ops=["rms_norm"]):
            assert backends() == ["reference", "cuda"]
            with kernels.use_backend("triton", ops=["flash_attention"]):
                assert backends() == ["reference", "triton"]
            with kernels.use_backend("emulator"):
                assert backends() == ["emulator", "emulator"]
        assert backends() == ["cuda", "cuda"]


def op_for_cards(least: tuple[int, int]) -> Op:
    """An op with one csrc kernel, for cards from ``least`` on."""

    def refuse(card, x):
        return None if card >= least else f"needs {least}"

    return Op(
        "rms_norm",
        lambda x: None,
        (
            *csrc_kernels("on the card", refuse, lambda ops, x: ops),
            Kernel("reference", "plain", lambda card, x: None, lambda x: "reference"),
        ),
    )


def test_explain_for_a_card_that_is_not_here():
    op = op_for_cards((9, 0))
    for x in (X, X.to("meta")):
        assert op.explain(x).backend == "reference"
        assert op.explain(x, capability=(9, 0)).backend == "cuda"
        older = op.explain(x, capability=(8, 9))
        assert older.backend == "reference" and older.reasons["cuda"] == "needs (9, 0)"
    with pytest.raises(UserError, match=r"capability must be one of \(8, 0\), .* not \(7, 5\)"):
        kernels.explain("rms_norm", X, W, capability=(7, 5))
    assert kernels.explain("rms_norm", X, W, capability=(12, 0)).backend == "cuda"


def test_the_emulator_plays_the_card_it_is_told(monkeypatch):
    monkeypatch.setattr(kernels.emulator, "refuse", lambda: None)
    op = op_for_cards((8, 6))
    with kernels.use_backend("emulator"):
        with pytest.raises(UserError, match=r"cannot run rms_norm: needs \(8, 6\)"):
            op(X)
    with kernels.use_backend("emulator", capability=(9, 0)):
        assert op(X) == EmulatedOps((9, 0))
        with kernels.use_backend("emulator", ops=["flash_attention"], capability=(10, 0)):
            assert op(X) == EmulatedOps((9, 0))
    for capability in ((7, 5), (9, 1), 90, "9.0"):
        with pytest.raises(UserError, match="capability must be one of"):
            with kernels.use_backend("emulator", capability=capability):
                pass


def test_unknown_names_and_options_are_refused():
    with pytest.raises(UserError, match="cuda, triton, cpu, emulator, reference"):
        with kernels.use_backend("cudnn"):
            pass
    with pytest.raises(UserError, match="takes no option 'capability'"):
        with kernels.use_backend("cuda", capability=(8, 0)):
            pass


def test_forcing_holds_in_its_own_thread_only():
    seen = []
    with kernels.use_backend("cuda"):
        thread = threading.Thread(target=lambda: seen.append(kernels.rms_norm(X, W)))
        thread.start()
        thread.join()
    assert len(seen) == 1


def test_environment_forces_for_a_process():
    code = (
        "import torch\nfrom almostgpt import kernels\n"
        "x, w = torch.ones(2, 4), torch.ones(4)\n"
        "with kernels.use_backend('reference'):\n    kernels.rms_norm(x, w)\n"  # it wins
        "try:\n    kernels.rms_norm(x, w)\nexcept ValueError as error:\n    print(error)\n"
    )
    env = {**os.environ, "ALMOSTGPT_BACKEND": "cuda"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "the tensors are on cpu" in run.stdout, run.stderr


def test_an_unknown_name_in_the_environment_is_named_at_the_first_call():
    context = contextvars.copy_context()
    # As the variable's default would be.
    context.run(dispatch._FORCED.set, (dispatch.Forced("nonsense"),))
    with pytest.raises(UserError, match="'nonsense'.*ALMOSTGPT_BACKEND.*cuda, triton"):
        context.run(kernels.rms_norm, X, W)


def test_the_first_that_serves_runs_and_the_emulator_only_when_forced():
    def kernel(backend, refusal=None):
        # The emulator's run takes the card first.
        forced = backend == "emulator"
        return Kernel(backend, backend, lambda card, x: refusal, lambda *args: backend, forced)

    op = Op("op", lambda x: None, tuple(kernel(name) for name in ("emulator", "cuda", "reference")))
    assert op(1) == "cuda"
    assert op.explain(1).reasons["emulator"] == "it runs only when forced"
    assert op.explain(1).reasons["reference"] == "it could serve, but cuda comes first"
    with kernels.use_backend("emulator"):
        assert op(1) == "emulator"
    refusing = Op("op", lambda x: None, (kernel("cuda", "too odd"), kernel("reference")))
    assert refusing(1) == "reference"
    assert refusing.explain(1).reasons["cuda"] == "too odd"


def test_backward_keeps_the_choice_of_forward():
    x = X.clone().requires_grad_()
    loss = torch.ops.almostgpt.rms_norm_forward(x, W, 1e-5)[0].sum()
    failures = []

    def backward():
        try:
            with kernels.use_backend("triton"):  # would refuse, were it asked
                loss.backward()
        except UserError as error:
            failures.append(error)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert not failures and x.grad is not None


def test_compiled_code_follows_the_forced_backend():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda x, w: kernels.rms_norm(x, w), fullgraph=True, backend=count, dynamic=True
    )
    expected = kernels.rms_norm(X, W)
    torch.testing.assert_close(compiled(X, W), expected)
    with kernels.use_backend("reference"):
        torch.testing.assert_close(compiled(X, W), expected)
    torch.testing.assert_close(compiled(X[:2], W), expected[:2])
    assert len(graphs) == 2  # one for each choice, none for the new shape
    with kernels.use_backend("reference", ops=["rms_norm"]):
        torch.testing.assert_close(compiled(X, W), expected)
    with kernels.use_backend("cuda", ops=["rms_norm"]):
        with pytest.raises(Exception, match="the tensors are on cpu"):
            compiled(X, W)
    with kernels.use_backend("cuda", ops=["flash_attention"]):
        torch.testing.assert_close(compiled(X, W), expected)


def test_serves():
    default = ("80-real", "90a-real", "100-real", "120")
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (13, 0)):
        assert native.serves(default, capability)
    for capability in ((7, 5), (11, 0)):
        assert not native.serves(default, capability)
    assert not native.serves(("90a-real",), (9, 1))
    assert native.serves(("80-virtual",), (9, 0)) and not native.serves(("80-real",), (9, 0))


def test_a_library_that_does_not_load_is_a_warning(tmp_path):
    assert "was not built" in native.load(tmp_path / "_C.so").error
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"no library")
    with pytest.warns(RuntimeWarning, match="does not load"):
        loaded = native.load(broken)
    assert "does not load" in loaded.refuse()


def test_build_info():
    info = kernels.build_info()
    assert set(info) == {"path", "error", "cuda", "archs", "torch", "compiler", "plan"}
    if info["error"] is None:
        assert info["compiler"] and info["torch"]


def test_in_forward_mode_the_kernels_of_csrc_leave_it_to_the_reference():
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
        explanation = kernels.explain("rms_norm", dual, W)
        assert explanation.backend == "reference"
        assert "forward-mode" in explanation.reasons["cuda"]
        tangent = torch.autograd.forward_ad.unpack_dual(kernels.rms_norm(dual, W)).tangent
    step = 1e-3
    expected = (kernels.rms_norm(X + step, W) - kernels.rms_norm(X - step, W)) / (2 * step)
    torch.testing.assert_close(tangent, expected, rtol=1e-2, atol=1e-2)


# ---------------------------------------------------------------- observers


def test_an_observer_is_told_of_every_call_and_of_none_after_it():
    seen = []
    x, weight = torch.randn(3, 8), torch.ones(8)
    with observing(lambda op, args, kwargs: seen.append((op.name, args, kwargs))):
        kernels.rms_norm(x, weight, residual=x)
        with pytest.raises(UserError):
            kernels.rms_norm(x, torch.ones(7))  # it does not run
        other = threading.Thread(target=lambda: kernels.rms_norm(x, weight))
        other.start()
        other.join()
    kernels.rms_norm(x, weight)
    assert [name for name, _, _ in seen] == ["rms_norm"]
    _, args, _ = seen[0]
    assert args[0] is x and args[1] is weight and any(extra is x for extra in args[2:])


def test_compiled_code_is_not_observed_and_has_no_break():
    seen = []
    x, weight = torch.randn(3, 8), torch.ones(8)
    compiled = torch.compile(kernels.rms_norm, fullgraph=True, backend="eager")
    with observing(lambda op, args, kwargs: seen.append(op.name)):
        y = compiled(x, weight)
    assert seen == [] and torch.equal(y, kernels.rms_norm(x, weight))

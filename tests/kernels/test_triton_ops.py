"""What the Triton ops share: what a compiler sees of them, the table of settings, the choice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from almostgpt import kernels
from almostgpt.kernels import triton_ops
from almostgpt.kernels.dispatch import CARDS

needs_triton = pytest.mark.skipif(triton_ops.MISSING is not None, reason=str(triton_ops.MISSING))

# A compiler sees the kernels of a triton_op only where they are not interpreted, and can then tell
# what they write, which needs a target but no GPU.
TRACED = """
from types import SimpleNamespace
import torch, triton
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget
from almostgpt import kernels

target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
triton.runtime.driver.set_active(target)
ops = torch.ops.almostgpt

def show(name, function, *tensors, dynamic=False):
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        tensors = [mode.from_tensor(t, static_shapes=not dynamic) for t in tensors]
        floating = [t.requires_grad_() if t.is_floating_point() else t for t in tensors]
        graph = aot_export_joint_simple(lambda *t: (function(*t),), floating, trace_joint=True).graph
    calls = [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    sizes = [n.meta["val"].numel() for n in graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    written = [",".join(call.kwargs["tensors_to_clone"]) for call in calls]
    print(name, *written, "any size" if dynamic else max(sizes))

T, n, V = 192, 16, 512
hidden, weight, targets = torch.empty(T, n), torch.empty(V, n), torch.zeros(T, dtype=torch.int64)

class Loss(torch.autograd.Function):  # as _Sum of linear_cross_entropy.py
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        losses, *gradients = ops.linear_cross_entropy(
            hidden, weight, targets, None, -1, 0.0, V, 64, torch.float32, True, True)
        ctx.save_for_backward(*gradients)
        return losses.sum()
    @staticmethod
    def backward(ctx, dloss):
        return *(gradient * dloss for gradient in ctx.saved_tensors), None

show("loss", Loss.apply, hidden, weight, targets)
show("cross_entropy", lambda z, t: ops.cross_entropy_forward(z, t, -1, 0.0)[0].sum(),
     torch.empty(T, V), targets)
show("rope", lambda x: ops.rope(x, torch.ones(8, 4), torch.ones(8, 4), None, 0, False).sum(),
     torch.empty(2, 8, 3, 8))
for name, gated in (("silu", True), ("gelu", False)):
    run = lambda x: ops.activation(2 * x, name, gated).sum()
    show(name, run, torch.empty(4, 64), dynamic=not gated)
print(kernels.explain("swiglu", torch.zeros(2, 4)).reasons["triton"])
"""


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="it plays a GPU")
def test_a_compiler_sees_the_kernels_and_what_they_write(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", TRACED],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [
        # Three parts of 64 tokens: no tensor is larger than the logits of one.
        f"loss {'logits,losses ' * 3}{64 * 512}",
        f"cross_entropy losses,lses dlogits {192 * 512}",
        f"rope out out {2 * 8 * 3 * 8}",
        f"silu y dx {4 * 64}",
        "gelu y dx any size",
        "the tensors are on cpu; Triton's interpreter runs where TRITON_INTERPRET=1 is set before "
        "Python starts",
    ], done.stderr[-2000:]


@needs_triton
def test_the_table_of_settings():
    table = json.loads(Path(triton_ops.__file__).with_name("triton_settings.json").read_text())
    for kernel, cards in table.items():
        assert "default" in cards
        for name, chosen in cards.items():
            assert name == "default" or tuple(map(int, name.split("."))) in CARDS
            block, warps = chosen["BLOCK"], chosen["num_warps"]
            assert block & (block - 1) == 0 == warps & (warps - 1) and 1 <= warps <= 32
        for card in (None, *CARDS):
            name = "default" if card is None else f"{card[0]}.{card[1]}"
            assert triton_ops.settings_of(kernel, card) == cards.get(name, cards["default"])
    triton_ops.settings_of("rope", None)["BLOCK"] = 1  # a copy: the table stays as it is
    assert triton_ops.settings_of("rope", None) == table["rope"]["default"]


@needs_triton
def test_the_interpreter_runs_only_where_it_is_asked_for():
    x = torch.randn(3, 8)
    free = kernels.explain("swiglu", x)
    assert free.backend == "reference"
    if triton_ops.INTERPRETED:
        assert free.reasons["triton"] == "it runs only when forced"
        with kernels.use_backend("triton"):
            assert kernels.explain("swiglu", x).kernel == "swiglu, interpreted"
    assert kernels.explain("swiglu", x, capability=(9, 0)).kernel == "swiglu"

"""cross_entropy and linear_cross_entropy against float64, in plain PyTorch and in Triton.

Without a GPU the Triton kernels run in Triton's interpreter (see tests/conftest.py).
"""

import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._library.triton import set_wrap_triton_enabled
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from almostgpt import kernels
from almostgpt.config import GPTConfig
from almostgpt.errors import UserError
from almostgpt.kernels import linear_cross_entropy_triton
from almostgpt.kernels.linear_cross_entropy import chunk_rows
from almostgpt.model import GPT

# The package gives the name to the function.
kernels_module = sys.modules["almostgpt.kernels.linear_cross_entropy"]

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BACKENDS = ("reference", "triton")
HALVES = (torch.bfloat16, torch.float16)


def on(backend: str):
    return kernels.use_backend(backend, ops=["cross_entropy", "linear_cross_entropy"])


def plain(z, targets, *, softcap, reduction, vocab_size=None):
    """The definition, in z's dtype; the mean of nothing is 0."""
    z = z[..., :vocab_size]
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    losses = F.cross_entropy(
        z.flatten(0, -2), targets.flatten().long(), ignore_index=-1, reduction="none"
    )
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() / (max((targets != -1).sum(), 1) if reduction == "mean" else 1)


def plain_linear(hidden, weight, targets, **options):
    return plain(hidden @ weight.t(), targets, **options)


def with_gradients(function, inputs, upstream):
    """The loss, and the gradients of what requires one."""
    loss = function(*inputs)
    leaves = [t for t in inputs if t.requires_grad]
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss))


def doubles(tensors):
    return [
        t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for t in tensors
    ]


def assert_follows(function, definition, options, inputs, upstream):
    """The rule of docs/kernels.md: at most twice the plain error in the same dtype, and 4 ulps.

    Of a sum or mean the plain error is that of its terms, whose signs may happen to cancel.
    """
    define = partial(definition, **options)
    ours = with_gradients(function, inputs, upstream)
    same = with_gradients(define, [t.detach().requires_grad_(t.requires_grad) for t in inputs],
                          upstream)  # fmt: skip
    exact = with_gradients(define, doubles(inputs), upstream)
    with torch.no_grad():
        of_each = partial(definition, **{**options, "reduction": "none"})
        errors = (of_each(*inputs).double() - of_each(*doubles(inputs))).abs()
        counted = max((inputs[-1] != -1).sum().item(), 1)
    terms = {"none": 0.0, "sum": errors.sum().item(), "mean": errors.sum().item() / counted}
    plain_errors = [terms[options["reduction"]], *[0.0] * (len(exact) - 1)]
    largest = max((t.abs().max().item() for t in exact if t.numel()), default=0.0)
    for got, plainly, truth, plain_error in zip(ours, same, exact, plain_errors, strict=True):
        assert got.shape == truth.shape
        if not truth.numel():
            continue
        error = (got.double() - truth).abs().max().item()
        plain_error = max(plain_error, (plainly.double() - truth).abs().max().item())
        ulps = 4 * torch.finfo(got.dtype).eps * truth.abs().max().item()
        residue = 4 * torch.finfo(torch.float32).eps * largest
        assert error <= 2 * plain_error + ulps + residue


def draw_targets(shape, vocab_size, generator, ignored=0.3):
    targets = torch.randint(vocab_size, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < ignored] = -1
    return targets


@st.composite
def linear_cases(draw):
    """Inputs of linear_cross_entropy and its options, in parts of 64 tokens."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float32, *HALVES]))
    shape = draw(st.sampled_from([(1,), (3, 7), (64,), (65,), (2, 37), (0,), (2, 0)]))
    width = draw(st.integers(1, 24))
    vocab_size = draw(st.sampled_from([1, 2, 65, 257, 1000]))
    V = vocab_size + draw(st.sampled_from([0, 1, 7]))
    targets = draw_targets(shape, vocab_size, generator, draw(st.sampled_from([0.0, 0.3, 1.0])))
    hidden = torch.randn(*shape, width, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(V, width, generator=generator).to(DEVICE, dtype)
    trained = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    inputs = [hidden.requires_grad_(trained[0]), weight.requires_grad_(trained[1]),
              targets.to(DEVICE)]  # fmt: skip
    options = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "softcap": draw(st.sampled_from([0.0, 2.0, 30.0])),
        "vocab_size": vocab_size,
    }
    return inputs, options, generator


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=8, deadline=None)
@given(case=linear_cases())
def test_linear_cross_entropy_is_that_of_float64(backend, case):
    inputs, options, generator = case
    shape = inputs[2].shape if options["reduction"] == "none" else ()
    upstream = torch.randn(shape, generator=generator).to(DEVICE)

    def ours(hidden, weight, targets):
        with on(backend):
            return kernels.linear_cross_entropy(hidden, weight, targets, chunk_bytes=1, **options)

    assert_follows(ours, plain_linear, options, inputs, upstream)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12, deadline=None)
@given(case=linear_cases())
def test_cross_entropy_is_that_of_float64(backend, case):
    (hidden, weight, targets), options, generator = case
    del options["vocab_size"]
    logits = (hidden @ weight.t()).detach()
    every_second = torch.stack([logits, logits], -2).flatten(-3, -2)[..., ::2, :]
    logits = every_second.view_as(logits) if logits.dim() == 2 else logits
    shape = targets.shape if options["reduction"] == "none" else ()
    upstream = torch.randn(shape, generator=generator).to(DEVICE)

    def ours(logits, targets):
        with on(backend):
            return kernels.cross_entropy(logits, targets, **options)

    inputs = [logits.requires_grad_(), targets]
    assert_follows(ours, plain, options, inputs, upstream)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_vocabulary_of_gpt2(backend, tokens):
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 8, generator=generator, device="cpu").to(DEVICE).requires_grad_()
    weight = torch.randn(50304, 8, generator=generator).to(DEVICE).requires_grad_()
    targets = torch.tensor([50256, 0, 777][:tokens], device=DEVICE)

    def ours(*tensors):
        with on(backend):
            return kernels.linear_cross_entropy(*tensors, vocab_size=50257)

    options = {"softcap": 0, "reduction": "mean", "vocab_size": 50257}
    upstream = torch.ones((), device=DEVICE)
    assert_follows(ours, plain_linear, options, [hidden, weight, targets], upstream)
    dweight = torch.autograd.grad(ours(hidden, weight, targets), weight)[0]
    assert not dweight[50257:].any()  # the padding is no token


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_with_every_token_ignored_nothing_is_lost_and_nothing_moves(backend, reduction):
    hidden, weight = torch.randn(70, 4, device=DEVICE), torch.randn(9, 4, device=DEVICE)
    hidden.requires_grad_(), weight.requires_grad_()
    targets = torch.full((70,), -7, device=DEVICE)
    with on(backend):
        options = {"ignore_index": -7, "reduction": reduction}
        loss = kernels.linear_cross_entropy(hidden, weight, targets, chunk_bytes=1, **options)
        logits = torch.randn(70, 9, device=DEVICE).requires_grad_()
        alone = kernels.cross_entropy(logits, targets, **options)
    for value, leaves in ((loss, (hidden, weight)), (alone, (logits,))):
        assert not value.any()
        for gradient in torch.autograd.grad(value.sum(), leaves):
            assert not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_saved_for_backward_stays(backend):
    hidden = torch.randn(20, 4, device=DEVICE).requires_grad_()
    weight = torch.randn(9, 4, device=DEVICE).requires_grad_()
    logits = torch.randn(20, 9, device=DEVICE).requires_grad_()
    targets = torch.randint(9, (20,), device=DEVICE)
    before = logits.detach().clone()
    with on(backend):
        losses = [
            (kernels.linear_cross_entropy(hidden, weight, targets), (hidden, weight)),
            (kernels.linear_cross_entropy(hidden, weight, targets, reduction="none").sum(),
             (hidden, weight)),
            (kernels.cross_entropy(logits, targets), (logits,)),
        ]  # fmt: skip
    for loss, leaves in losses:
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        kept = [gradient.clone() for gradient in first]
        for gradient in first:
            gradient.zero_()
        for again, once in zip(torch.autograd.grad(loss, leaves), kept, strict=True):
            assert torch.equal(again, once)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_parts_add_up_in_float32(backend):
    """The terms of one row of dweight are all 1: a bfloat16 sum of them stops at 256."""
    parts = 2
    hidden = torch.ones(64 * parts, 1, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    targets = torch.zeros(64 * parts, dtype=torch.int64, device=DEVICE)
    with on(backend):
        loss = kernels.linear_cross_entropy(hidden, weight, targets, reduction="sum", chunk_bytes=1)
    (dweight,) = torch.autograd.grad(loss, weight)
    assert dweight.tolist() == [[-32.0 * parts], [32.0 * parts]]
    # Of many small terms after a large one nothing is left in bfloat16.
    hidden[64:] = 2**-9
    with on(backend):
        loss = kernels.linear_cross_entropy(hidden, weight, targets, reduction="sum", chunk_bytes=1)
        exact = 32 + 32 * (parts - 1) * 2**-9
    (dweight,) = torch.autograd.grad(loss, weight)
    assert dweight[1].item() == pytest.approx(exact, rel=2**-8)
    with torch.autocast(DEVICE, torch.bfloat16), on(backend):
        wide = weight.detach().float().requires_grad_()
        loss = kernels.linear_cross_entropy(hidden, wide, targets, reduction="sum", chunk_bytes=1)
    (dweight,) = torch.autograd.grad(loss, wide)
    assert dweight[1].item() == exact


def in_the_open(*args):
    """What the Triton op is made of, where a dispatch mode sees it."""
    with set_wrap_triton_enabled(False):
        return linear_cross_entropy_triton.in_parts(*args)


class Largest(TorchDispatchMode):
    """The most bytes that any tensor made within it takes."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_logits_are_never_all_there(backend, reduction, monkeypatch):
    if backend == "triton":  # the op is opaque to the mode, what it is made of is not
        monkeypatch.setattr(kernels_module.kernel, "IN_PARTS", in_the_open)
    T, n, V = 130, 4, 2000
    hidden = torch.randn(T, n, device=DEVICE).requires_grad_()
    weight = torch.randn(V, n, device=DEVICE).requires_grad_()
    targets = torch.randint(V, (T,), device=DEVICE)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with Largest() as seen, on(backend), hooks:
        loss = kernels.linear_cross_entropy(
            hidden, weight, targets, reduction=reduction, chunk_bytes=64 * V * 4
        )
        loss.sum().backward()
    assert seen.nbytes == 64 * V * 4
    assert sum(tensor.numel() for tensor in kept) < 2 * V * n


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_is_made_that_nobody_asked_for(backend, monkeypatch):
    if backend == "triton":
        monkeypatch.setattr(kernels_module.kernel, "IN_PARTS", in_the_open)

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
            return function(*args, **(kwargs or {}))

    hidden, weight = torch.randn(9, 4, device=DEVICE), torch.randn(9, 4, device=DEVICE)
    targets = torch.zeros(9, dtype=torch.int64, device=DEVICE)
    for trained, grad, products in (((1, 1), 0, 1), ((1, 1), 1, 3), ((0, 1), 1, 2), ((0, 0), 1, 1)):
        leaves = [
            t.requires_grad_(bool(yes)) for t, yes in zip((hidden, weight), trained, strict=True)
        ]
        with torch.set_grad_enabled(bool(grad)), on(backend), Products() as seen:
            kernels.linear_cross_entropy(*leaves, targets)
        assert seen.count == products


def test_nor_are_those_of_a_model(monkeypatch):
    config = GPTConfig(
        block_size=128, vocab_size=50257, n_layer=1, n_head=1, n_embd=8, mlp_hidden=8
    )
    torch.manual_seed(0)
    model = GPT(config).to(DEVICE)
    ids = torch.randint(50257, (4, 128), device=DEVICE)
    # 512 tokens of 50,304 float32 logits are 103 MB, more than a part may have on a CPU.
    limit = 1 << 26
    monkeypatch.setattr(kernels_module, "GPU_CHUNK_BYTES", 1 << 25)
    with Largest() as seen, on("reference"):
        model(ids, ids)[1].backward()
    assert 50304 * 64 * 4 <= seen.nbytes <= limit


def test_a_compiled_model_has_no_graph_break_and_no_logits_either():
    sizes = []

    def look(graph, _):
        for node in graph.graph.nodes:
            value = node.meta.get("val", node.meta.get("example_value"))
            sizes.extend(v.numel() for v in (value if isinstance(value, tuple) else (value,))
                         if isinstance(v, torch.Tensor))  # fmt: skip
        return graph

    from torch._dynamo.backends.common import aot_autograd

    T, n, V = 512, 4, 50000
    hidden, weight = torch.randn(T, n).requires_grad_(), torch.randn(V, n).requires_grad_()
    targets = torch.randint(V, (T,))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *tensors: kernels.linear_cross_entropy(*tensors),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=look, bw_compiler=look),
    )
    loss = compiled(hidden, weight, targets)
    loss.backward()
    assert max(sizes) <= (1 << 26) // 4
    gradients = [t.grad.clone() for t in (hidden, weight)]
    hidden.grad = weight.grad = None
    kernels.linear_cross_entropy(hidden, weight, targets).backward()
    for gradient, leaf in zip(gradients, (hidden, weight), strict=True):
        torch.testing.assert_close(gradient, leaf.grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nor_does_compiled_code_keep_them_for_backward(reduction):
    """The compiler must not find that backward's products are those of forward."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    kept = []

    def forward(graph, _):
        (outputs,) = next(node for node in graph.graph.nodes if node.op == "output").args
        kept.extend(node.meta["val"] for node in outputs)
        return graph

    T, n, V = 256, 4, 500
    hidden, weight = torch.randn(T, n).requires_grad_(), torch.randn(V, n).requires_grad_()
    targets = torch.randint(V, (T,))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *tensors: kernels.linear_cross_entropy(
            *tensors, reduction=reduction, chunk_bytes=1
        ).sum(),
        fullgraph=True,
        backend=aot_autograd(
            fw_compiler=forward,
            bw_compiler=lambda graph, _: graph,
            partition_fn=min_cut_rematerialization_partition,
        ),
    )
    compiled(hidden, weight, targets).backward()
    assert sum(t.numel() for t in kept if isinstance(t, torch.Tensor)) < T * V // 4


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_is_eager(backend, reduction):
    torch._dynamo.reset()
    hidden, weight = (
        torch.randn(*shape, device=DEVICE).requires_grad_() for shape in ((2, 33, 4), (90, 4))
    )
    targets = torch.randint(-1, 80, (2, 33), device=DEVICE)

    def loss(*tensors):
        return kernels.linear_cross_entropy(
            *tensors, reduction=reduction, softcap=3.0, vocab_size=80, chunk_bytes=1
        ).sum() + kernels.cross_entropy(tensors[0], targets.clamp(max=3))

    with on(backend):
        ours = with_gradients(loss, (hidden, weight, targets), torch.ones(()))
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        theirs = with_gradients(compiled, (hidden, weight, targets), torch.ones(()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck():
    hidden, weight = (
        torch.randn(*shape, device=DEVICE).requires_grad_() for shape in ((9, 4), (90, 4))
    )
    targets = torch.randint(-1, 80, (9,), device=DEVICE)
    ops = torch.ops.almostgpt
    options = (-1, 2.0, 80, 5, torch.float32)
    for gradients in (False, True):
        tensors = [t.detach().requires_grad_(not gradients) for t in (hidden, weight)]
        torch.library.opcheck(
            ops.linear_cross_entropy.default,
            (*tensors, targets, None, *options, gradients, gradients),
        )
    logits = torch.randn(9, 90, device=DEVICE).requires_grad_()
    torch.library.opcheck(ops.cross_entropy_forward.default, (logits, targets, -1, 0.0))
    losses, lses = ops.cross_entropy_forward(logits, targets, -1, 0.0)
    torch.library.opcheck(
        ops.cross_entropy_backward.default,
        (torch.ones(9, device=DEVICE), logits.detach(), targets, lses.detach(), -1, 0.0),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
def test_under_autocast_the_products_are_in_its_dtype(backend, dtype):
    hidden, weight = torch.randn(70, 16, device=DEVICE), torch.randn(90, 16, device=DEVICE)
    hidden.requires_grad_(), weight.requires_grad_()
    targets = torch.randint(90, (70,), device=DEVICE)
    with on(backend):
        with torch.autocast(DEVICE, dtype):
            loss = kernels.linear_cross_entropy(hidden, weight, targets)
        gradients = torch.autograd.grad(loss, (hidden, weight))
        halves = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
        same = kernels.linear_cross_entropy(*halves, targets)
        expected = torch.autograd.grad(same, halves)
    assert torch.equal(loss, same) and loss.dtype == torch.float32
    for gradient, half in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.float32
        # atol: half of what separates float16's subnormal numbers.
        torch.testing.assert_close(
            gradient, half.float(), rtol=2 * torch.finfo(dtype).eps, atol=2**-24
        )
    # The sum of the weight's gradient is kept as it is, not rounded to the products' dtype.
    assert not torch.equal(gradients[1], gradients[1].to(dtype).float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_within_autocast_is_that_without(backend):
    hidden, weight = torch.randn(130, 8, device=DEVICE), torch.randn(9, 8, device=DEVICE)
    hidden.requires_grad_(), weight.requires_grad_()
    targets = torch.randint(9, (130,), device=DEVICE)
    with on(backend):
        losses = kernels.linear_cross_entropy(
            hidden, weight, targets, reduction="none", chunk_bytes=1
        )
    wanted = torch.autograd.grad(losses.sum(), (hidden, weight), retain_graph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = torch.autograd.grad(losses.sum(), (hidden, weight))
    assert all(map(torch.equal, found, wanted))


def test_autocast_leaves_float64_alone():
    hidden = torch.randn(5, 4, dtype=torch.float64, device=DEVICE)
    weight = torch.randn(9, 4, dtype=torch.float64, device=DEVICE)
    targets = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = kernels.linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(loss, kernels.linear_cross_entropy(hidden, weight, targets))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_row(backend):
    logits, target = torch.randn(7, device=DEVICE), torch.tensor(2, device=DEVICE)
    with on(backend):
        for reduction in ("mean", "none"):
            loss = kernels.cross_entropy(logits, target, reduction=reduction)
            torch.testing.assert_close(loss, F.cross_entropy(logits, target))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [15.0, 1e3, 1e6])
def test_a_softcap_far_above_the_logits_costs_no_accuracy(backend, softcap):
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets = torch.arange(20, device=DEVICE)
    options = {"softcap": softcap, "reduction": "none"}
    exact = plain(logits.double(), targets, **options)
    with on(backend):
        losses = kernels.cross_entropy(logits, targets, **options)
    torch.testing.assert_close(losses.double(), exact, rtol=0, atol=4e-6)


def test_other_derivatives_are_those_of_plain_pytorch():
    """torch.func and forward mode, of the loss as of cross_entropy."""
    hidden, weight = torch.randn(6, 4, device=DEVICE), torch.randn(9, 4, device=DEVICE)
    targets = torch.tensor([0, -1, 3, 6, 1, 2], device=DEVICE)
    options = {"softcap": 3.0, "vocab_size": 7, "reduction": "mean"}

    def ours(hidden):
        return kernels.linear_cross_entropy(hidden, weight, targets, **options)

    def definition(hidden):
        return plain_linear(hidden, weight, targets, **options)

    gradient = torch.func.grad(definition)(hidden)
    torch.testing.assert_close(torch.func.grad(ours)(hidden), gradient)
    both = torch.func.vmap(ours)(torch.stack([hidden, -hidden]))
    torch.testing.assert_close(both, torch.stack([definition(hidden), definition(-hidden)]))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(ours(forward_ad.make_dual(hidden, hidden))).tangent
    torch.testing.assert_close(tangent, (gradient * hidden).sum())


def test_tensors_without_data():
    hidden, weight = torch.empty(6, 4, device="meta"), torch.empty(9, 4, device="meta")
    targets = torch.empty(6, dtype=torch.int64, device="meta")
    assert kernels.linear_cross_entropy(hidden, weight, targets).shape == ()
    assert kernels.cross_entropy(hidden, targets, reduction="none").shape == (6,)


def test_float16_keeps_the_gradients_of_many_tokens():
    """1/T of a probability would vanish in float16; the loss scale comes too late to save it."""
    T = 4096
    hidden = torch.full((T, 1), 1.0, dtype=torch.float16, device=DEVICE).requires_grad_()
    weight = torch.zeros(1024, 1, dtype=torch.float16, device=DEVICE)
    weight[0] = 1
    loss = kernels.linear_cross_entropy(hidden, weight, torch.zeros_like(hidden[:, 0]).long())
    (gradient,) = torch.autograd.grad(loss * 2.0**14, hidden)
    p = torch.e / (torch.e + 1023)
    torch.testing.assert_close(
        gradient, torch.full_like(gradient, (p - 1) * 2**14 / T), rtol=4e-3, atol=0
    )


def test_targets_that_are_no_tokens():
    hidden, weight = torch.randn(3, 4, device=DEVICE), torch.randn(9, 4, device=DEVICE)
    for bad in (8, -2):
        targets = torch.tensor([0, bad, 1], device=DEVICE)
        if not CUDA:
            with pytest.raises(UserError, match=rf"target {bad} is neither in \[0, 8\)"):
                kernels.linear_cross_entropy(hidden, weight, targets, vocab_size=8)
            with pytest.raises(UserError, match=rf"cross_entropy: target {bad} is neither"):
                kernels.cross_entropy(hidden @ weight.t()[:, :8], targets)
        with on("triton"):
            loss = kernels.linear_cross_entropy(hidden, weight, targets, vocab_size=8)
        assert loss.isnan()


def test_a_second_derivative_is_refused():
    hidden, weight = torch.randn(3, 4).requires_grad_(), torch.randn(9, 4)
    for reduction in ("sum", "none"):
        loss = kernels.linear_cross_entropy(
            hidden, weight, torch.tensor([0, 1, 2]), reduction=reduction
        )
        with pytest.raises(UserError, match="no second derivative: write F.cross_entropy"):
            torch.autograd.grad(loss.sum(), hidden, create_graph=True)


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.integers(0, 100_000),
    vocab=st.integers(1, 300_000),
    itemsize=st.sampled_from([2, 4, 8]),
    budget=st.integers(1, 1 << 30),
)
def test_parts_are_equal_and_within_the_budget(tokens, vocab, itemsize, budget):
    rows = chunk_rows(tokens, vocab, itemsize, budget)
    assert rows >= 1
    assert rows <= 64 or rows * vocab * itemsize <= budget or rows == tokens <= 64
    parts = -(-tokens // rows)
    fewest = -(-tokens // max(64, budget // (vocab * itemsize) // 64 * 64))
    assert parts <= fewest
    if parts > 1:
        assert rows % 64 == 0 and parts * rows - tokens < 64 * parts


def call(op, **changed):
    arguments = {
        "hidden": torch.randn(2, 3, 4),
        "weight": torch.randn(9, 4),
        "targets": torch.zeros(2, 3, dtype=torch.int64),
    } | changed
    if op == "cross_entropy":
        del arguments["weight"]
        arguments["logits"] = arguments.pop("hidden")
    names = ("hidden", "weight", "logits", "targets")
    tensors = [arguments.pop(name) for name in names if name in arguments]
    return getattr(kernels, op)(*tensors, **arguments)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"hidden": torch.tensor(1.0)}, r"must be \(\.\.\., \w\) with \w ≥ 1, not \(\)"),
        ({"hidden": torch.randn(2, 3, 0)}, r"not \(2, 3, 0\)"),
        (
            {"targets": torch.zeros(3, 2, dtype=torch.int64)},
            r"must be \(2, 3\) for .* not \(3, 2\)",
        ),
        (
            {"hidden": torch.zeros(2, 3, 4, dtype=torch.int64)},
            "a floating tensor .* not torch.int64",
        ),
        ({"targets": torch.zeros(2, 3)}, "int64 or int32, not torch.float32"),
        ({"reduction": "avg"}, "'avg', not one of mean, sum, none"),
        ({"softcap": -1.0}, "softcap must be 0 .* not -1.0"),
        ({"softcap": float("nan")}, "softcap must be 0"),
        ({"targets": torch.zeros(2, 3, dtype=torch.int64, device="meta")}, "on meta"),
    ],
)
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_bad_input_of_both(op, changed, message):
    with pytest.raises(UserError, match=f"{op}: .*{message}"):
        call(op, **changed)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"weight": torch.randn(9, 5)}, r"weight must be \(V, 4\), V ≥ 1, not \(9, 5\)"),
        ({"weight": torch.randn(0, 4)}, r"not \(0, 4\)"),
        ({"weight": torch.randn(9, 4).half()}, "weight must be torch.float32 .* not torch.float16"),
        ({"vocab_size": 0}, r"vocab_size is 0, but must be in \[1, 9\]"),
        ({"vocab_size": 10}, r"must be in \[1, 9\]"),
        ({"chunk_bytes": 0}, "chunk_bytes is 0"),
    ],
)
def test_bad_input_of_linear_cross_entropy(changed, message):
    with pytest.raises(UserError, match=f"linear_cross_entropy: .*{message}"):
        call("linear_cross_entropy", **changed)


def test_a_gpu_with_little_memory_left_gets_smaller_parts(monkeypatch):
    free = {"driver": 0, "allocator": 0}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["driver"], 1 << 40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: free["allocator"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)

    def budget(driver, allocator=0):
        free.update(driver=driver, allocator=allocator)
        return kernels_module.chunk_budget(torch.device("cuda", 0))

    GiB = 1 << 30
    assert budget(100 * GiB) == GiB // 2
    assert budget(2 * GiB) == GiB // 4 == budget(0, allocator=2 * GiB)
    # A little more or less does not change how the sums are rounded.
    assert budget(int(2.5 * GiB)) == budget(2 * GiB) and budget(GiB) == GiB // 8
    assert budget(0) == 1 << 24
    assert kernels_module.chunk_budget(torch.device("cpu")) == 1 << 26

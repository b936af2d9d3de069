"""What of the Triton ops only a GPU can show; their tests against float64 are in tests/kernels/."""

import pytest
import torch
from torch.nn import functional as F

from almostgpt import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

BF16 = torch.bfloat16


def inputs_of_a_loss(tokens, width, vocab_size, dtype=BF16, seed=0):
    torch.manual_seed(seed)
    hidden = torch.randn(tokens, width, device="cuda", dtype=dtype).requires_grad_()
    weight = 0.02 * torch.randn(vocab_size, width, device="cuda", dtype=dtype)
    targets = torch.randint(vocab_size, (tokens,), device="cuda")
    return hidden, weight.requires_grad_(), targets


def with_gradients(loss, *leaves):
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def calls():
    """Each op on an ordinary shape: (name, function of tensors, the tensors)."""
    torch.manual_seed(0)
    x = torch.randn(512, 2 * 1024, device="cuda", dtype=BF16)
    qk = torch.randn(2, 256, 24, 64, device="cuda", dtype=BF16)[:, :, :16]
    table = torch.rand(256, 32, device="cuda")
    hidden, weight, targets = inputs_of_a_loss(512, 256, 50304)
    return [
        ("swiglu", kernels.swiglu, (x,)),
        ("gelu", kernels.gelu, (x,)),
        ("relu_squared", kernels.relu_squared, (x,)),
        ("rope", lambda qk: kernels.rope(qk, table, table), (qk,)),
        ("cross_entropy", lambda x: kernels.cross_entropy(x, targets), (x,)),
        (
            "linear_cross_entropy",
            lambda h, w: kernels.linear_cross_entropy(h, w, targets, vocab_size=50257),
            (hidden, weight),
        ),
    ]


@pytest.mark.conformance
def test_each_op_runs_its_triton_kernel_and_follows_the_reference():
    for name, function, tensors in calls():
        leaves = [t.detach().requires_grad_() for t in tensors]
        with kernels.use_backend("triton", ops=[name]):
            ours = with_gradients(function(*leaves).float().sum(), *leaves)
        with kernels.use_backend("reference", ops=[name]):
            plain = with_gradients(function(*leaves).float().sum(), *leaves)
        for a, b in zip(ours, plain, strict=True):
            assert (a - b).float().norm() <= 2**-6 * b.float().norm(), name


def test_compiled_is_one_graph_and_gives_the_same():
    torch._dynamo.reset()
    for name, function, tensors in calls():
        leaves = [t.detach().requires_grad_() for t in tensors]
        compiled = torch.compile(function, fullgraph=True)
        eager = with_gradients(function(*leaves).float().sum(), *leaves)
        ours = with_gradients(compiled(*leaves).float().sum(), *leaves)
        for a, b in zip(ours, eager, strict=True):
            assert (a - b).float().norm() <= 2**-6 * b.float().norm(), name


def test_no_call_waits_for_the_gpu(no_host_sync):
    prepared = calls()
    for _, function, tensors in prepared:  # compiled before: that does wait
        function(*tensors).float().sum().backward()
    no_host_sync()
    for _, function, tensors in prepared:
        function(*tensors).float().sum().backward()


def test_it_runs_on_the_current_stream():
    for name, function, tensors in calls():
        with torch.no_grad():
            expected = function(*tensors)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                late = [t.mul(2.0).div(2.0) for t in tensors]
                got = function(*late)
            stream.synchronize()
        torch.testing.assert_close(got, expected, msg=name)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_it_runs_on_the_device_of_the_tensors():
    x = torch.randn(64, 512, device="cuda:1", dtype=BF16).requires_grad_()
    kernels.swiglu(x).sum().backward()
    assert torch.isfinite(x.grad).all() and torch.cuda.current_device() == 0


def test_a_graph_of_the_loss_can_be_replayed():
    hidden, weight, targets = inputs_of_a_loss(256, 128, 5000)

    def step():
        hidden.grad = weight.grad = None
        loss = kernels.linear_cross_entropy(hidden, weight, targets)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    hidden.grad = weight.grad = None
    with torch.cuda.graph(graph):
        loss = step()
    with torch.no_grad():
        hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    expected = F.cross_entropy((hidden.detach() @ weight.detach().t()).float(), targets)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)


def test_the_peak_is_far_below_the_logits():
    hidden, weight, targets = inputs_of_a_loss(16384, 768, 50304)
    logits = hidden.shape[0] * weight.shape[0] * hidden.element_size()
    with torch.no_grad():
        torch.mm(hidden[:64], weight.t())  # cuBLAS takes its workspace
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernels.linear_cross_entropy(hidden, weight, targets).backward()
    assert torch.cuda.max_memory_allocated() - before < 0.75 * logits
    assert (weight.grad.float().norm() - plain_weight_norm(hidden, weight, targets)).abs() < 1e-3


def plain_weight_norm(hidden, weight, targets):
    leaf = weight.detach().requires_grad_()
    loss = F.cross_entropy((hidden.detach() @ leaf.t()).float(), targets)
    return torch.autograd.grad(loss, leaf)[0].float().norm()


def test_sums_are_in_float32():
    """Eight parts whose terms differ by 2⁹: a bfloat16 sum would lose all but the first."""
    hidden = torch.full((512, 8), 2.0**-9, device="cuda", dtype=BF16)
    hidden[:64] = 1
    weight = torch.zeros(16, 8, device="cuda").requires_grad_()
    targets = torch.zeros(512, dtype=torch.int64, device="cuda")
    with torch.autocast("cuda", BF16):
        loss = kernels.linear_cross_entropy(hidden, weight, targets, reduction="sum", chunk_bytes=1)
    loss.backward()
    exact = (64 + 448 * 2**-9) / 16
    torch.testing.assert_close(weight.grad[1], torch.full_like(weight.grad[1], exact), rtol=1e-6,
                               atol=0)  # fmt: skip


def test_cross_entropy_of_more_than_2_to_the_31_logits():
    rows, V = 2**31 // 50304 + 100, 50304
    if torch.cuda.mem_get_info()[0] < 3 * rows * V * 2:
        pytest.skip("needs 13 GB of free GPU memory")
    logits = torch.zeros(rows, V, device="cuda", dtype=BF16)
    logits[-50:] = torch.randn(50, V, device="cuda")
    targets = torch.randint(V, (rows,), device="cuda")
    logits.requires_grad_()
    losses = kernels.cross_entropy(logits, targets, reduction="none")
    (dlogits,) = torch.autograd.grad(losses.sum(), logits)
    tail = logits[-50:].detach().clone().requires_grad_()
    tail_losses = kernels.cross_entropy(tail, targets[-50:], reduction="none")
    (dtail,) = torch.autograd.grad(tail_losses.sum(), tail)
    assert torch.equal(losses[-50:], tail_losses) and torch.equal(dlogits[-50:], dtail)


@pytest.mark.parametrize("op", ["swiglu", "rope"])
def test_more_than_2_to_the_31_elements(op):
    if torch.cuda.mem_get_info()[0] < 6 * 2**32:
        pytest.skip("needs 26 GB of free GPU memory")
    table = torch.rand(64, 32, device="cuda")
    if op == "swiglu":
        x = torch.ones(2**31 // 4096 + 100, 4096, device="cuda", dtype=BF16)
        function = kernels.swiglu
    else:
        x = torch.ones(2**31 // (64 * 64) // 16 + 100, 64, 16, 64, device="cuda", dtype=BF16)
        function = lambda x: kernels.rope(x, table, table)  # noqa: E731
    x[-2:] = torch.randn_like(x[-2:])
    with torch.no_grad():
        assert torch.equal(function(x)[-2:], function(x[-2:].clone()))

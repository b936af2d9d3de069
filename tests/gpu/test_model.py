"""The model on a GPU: which kernels it takes, and that they agree with the reference."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from almostgpt import GPT, GPTConfig, kernels
from almostgpt.model.position import positions_in_documents

PRECISIONS = [None, torch.bfloat16]  # of autocast


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(block_size=96, vocab_size=250, n_layer=3, n_head=4, n_kv_head=2, n_embd=192)
    return GPT(config).cuda()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    ids, targets = torch.randint(250, (2, 5, 83), device="cuda")
    return ids, targets


def autocast(dtype: torch.dtype | None):
    return nullcontext() if dtype is None else torch.autocast("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_runs_on_the_cuda_kernel(dtype):
    x, weight = torch.randn(4, 192, device="cuda", dtype=dtype), torch.ones(192, device="cuda")
    answer = kernels.explain("rms_norm", x, weight)
    assert answer.backend == "cuda", str(answer)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=["fp32", "bf16"])
def test_loss_and_gradients_agree_with_the_reference(model, batch, dtype):
    def run() -> tuple[float, torch.Tensor]:
        with autocast(dtype):
            _, loss = model(*batch)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return loss.item(), torch.cat([gradient.flatten().double() for gradient in gradients])

    loss, gradient = run()
    with kernels.use_backend("reference"):
        reference_loss, reference_gradient = run()
    assert loss == pytest.approx(reference_loss, rel=1e-5 if dtype is None else 2e-3)
    error = (gradient - reference_gradient).norm() / reference_gradient.norm()
    assert error <= (1e-4 if dtype is None else 2e-2)


BORDERS = [0, 40, 83, 2 * 83, 170, 3 * 83, 4 * 83, 5 * 83, 5 * 83]  # of packed documents


@pytest.mark.parametrize("borders", [None, BORDERS], ids=["rows", "packed"])
def test_cpu_and_gpu_agree(model, batch, borders):
    if borders is not None:
        batch = (*batch, torch.tensor(borders, dtype=torch.int32, device="cuda"))
    with torch.no_grad():
        on_gpu = model(*batch)[1].item()
        on_cpu = model.cpu()(*(tensor.cpu() for tensor in batch))[1].item()
    assert on_gpu == pytest.approx(on_cpu, rel=1e-5)


def test_positions_in_documents_wait_for_nothing(no_host_sync):
    cu_seqlens = torch.tensor([0, 3, 5, 5, 8, 10, 10], dtype=torch.int32, device="cuda")
    positions_in_documents(cu_seqlens, 2, 5)  # libraries may wait while they start
    no_host_sync()
    positions = positions_in_documents(cu_seqlens, 2, 5)
    torch.cuda.set_sync_debug_mode("default")
    assert positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_generation_with_and_without_cache_agrees(position):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=48, vocab_size=250, n_layer=2, n_head=4, n_embd=64,
                          position=position)).cuda()  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # wide logits: rounding breaks no tie
    prompt = torch.randint(250, (3, 7), device="cuda")
    cached, plain = (
        model.generate(prompt, 41, temperature=0, cache=cache) for cache in ("auto", "none")
    )
    assert cached.is_cuda and torch.equal(cached, plain)


def test_sampling_repeats_with_a_seed(model):
    prompt = torch.zeros(2, 1, dtype=torch.int64, device="cuda")
    options = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": 3}
    first, second = (model.generate(prompt, 20, **options) for _ in range(2))
    assert torch.equal(first, second)


def test_the_whole_model_compiles_with_our_op_in_it(model, batch):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile(model, fullgraph=True, backend=keep)(*batch)  # a graph break would raise
    assert len(graphs) == 1
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    # The first norm has no residual yet; all others add it.
    assert sum("almostgpt.rms_norm_forward" in name for name in called) == 1
    assert (
        sum("almostgpt.add_rms_norm_forward" in name for name in called) == 2 * model.config.n_layer
    )


@pytest.mark.parametrize("dtype", PRECISIONS, ids=["fp32", "bf16"])
def test_the_compiled_model_has_the_same_loss_and_trains(model, batch, dtype):
    compiled = torch.compile(model, fullgraph=True)
    with autocast(dtype):
        eager = model(*batch)[1]
        loss = compiled(*batch)[1]
    assert loss.item() == pytest.approx(eager.item(), rel=1e-5 if dtype is None else 5e-3)
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())

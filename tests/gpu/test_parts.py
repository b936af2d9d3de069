"""Every swappable part on a GPU: as on a CPU, without a wait of the host, and as a captured step."""

from __future__ import annotations

import pytest
import torch

from almostgpt import GPT, GPTConfig, kernels

PARTS = {
    "sliding window": {"attention": "sliding_window", "attention_window": 9},
    "some local layers": {"attention": "sliding_window", "window_pattern": "LG", "qk_norm": True},
    "ALiBi": {"attention": "sliding_window", "position": "alibi", "n_kv_head": 1},
    "linear": {"attention": "linear"},
    "linear, softmax features": {
        "attention": "linear",
        "feature_map": "softmax",
        "position": "none",
    },
    "block-sparse": {"attention": "block_sparse", "sparse_block": 8, "n_kv_head": 2},
    "experts": {"feedforward": "moe", "n_experts": 4, "norm": "scalenorm"},
    "GELU experts": {"feedforward": "moe", "expert": "gelu", "experts_per_token": 1, "bias": True},
    "scaled rope": {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_fraction": 0.5},
    "softcap": {"logit_softcap": 15.0, "tie_weights": False},
}
each = pytest.mark.parametrize("options", PARTS.values(), ids=PARTS.keys())


def make(**options) -> GPT:
    torch.manual_seed(0)
    sizes = dict(block_size=96, vocab_size=250, n_layer=2, n_head=4, n_embd=128)
    model = GPT(GPTConfig(**{**sizes, **options}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(250, (3, 97), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def loss_and_gradient(model: GPT, device: str, dtype: torch.dtype | None = None):
    model = model.to(device).train()
    with torch.autocast(device, dtype, enabled=dtype is not None):
        _, loss = model(*(t.to(device) for t in batch()))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), torch.cat([g.flatten().double().cpu() for g in gradients])


@each
def test_cpu_and_gpu_agree(options):
    on_cpu, its_gradient = loss_and_gradient(make(**options), "cpu")
    on_gpu, gradient = loss_and_gradient(make(**options), "cuda")
    assert on_gpu == pytest.approx(on_cpu, rel=1e-4)
    assert (gradient - its_gradient).norm() <= 1e-3 * its_gradient.norm()


@each
def test_bf16_kernels_agree_with_the_reference(options):
    loss, gradient = loss_and_gradient(make(**options), "cuda", torch.bfloat16)
    with kernels.use_backend("reference"):
        plain, its_gradient = loss_and_gradient(make(**options), "cuda", torch.bfloat16)
    assert loss == pytest.approx(plain, rel=5e-3)
    # Of a mixture, close experts may be chosen differently.
    bound = 0.2 if "feedforward" in options else 3e-2
    assert (gradient - its_gradient).norm() <= bound * its_gradient.norm()


@each
def test_a_training_pass_waits_for_nothing(options, no_host_sync):
    model = make(**options).cuda().train()
    ids, targets = (t.cuda() for t in batch())

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            _, loss = model(ids, targets)
        loss.backward()

    step()  # libraries may wait while they start
    no_host_sync()
    step()
    torch.cuda.set_sync_debug_mode("default")


@each
def test_text_is_the_same_with_a_captured_step_and_without_a_cache(options):
    model = make(**options).cuda()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # wide logits: rounding breaks no tie
    prompts = [torch.randint(250, (n,), device="cuda") for n in (7, 3)]
    captured, eager, plain = (
        model.generate(prompts, 41, temperature=0, **how)
        for how in ({}, {"graph": False}, {"cache": "none"})
    )
    for a, b, c in zip(captured, eager, plain, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@each
def test_it_compiles(options):
    model = make(**options).cuda().train()
    ids, targets = (t.cuda() for t in batch())
    eager = model(ids, targets)[1].item()
    loss = torch.compile(model, fullgraph=True)(ids, targets)[1]
    assert loss.item() == pytest.approx(eager, rel=1e-4)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

"""Caches through the CUDA kernels, in the emulator: a model's logits, and ``model.generate``."""

import copy

import pytest
import torch

from almostgpt import GPT, GPTConfig, kernels
from almostgpt.inference.cache import KVCache
from almostgpt.kernels import emulator

pytestmark = pytest.mark.skipif(
    emulator.refuse() is not None, reason=f"no emulator: {emulator.refuse()}"
)

OPS = ["kv_append", "decode_attention"]
CACHES = {
    "full": lambda config, **options: KVCache.full(config, 2, 60, **options),
    "int8": lambda config, **options: KVCache.full(config, 2, 60, int8=True, **options),
    "rolling": lambda config, **options: KVCache.rolling(config, 2, 21, 3, **options),
    "rolling int8": lambda config, **options: KVCache.rolling(
        config, 2, 21, 3, int8=True, **options
    ),
    "no sinks": lambda config, **options: KVCache.rolling(config, 2, 21, 0, **options),
}


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(
        block_size=60, vocab_size=61, n_layer=2, n_head=4, n_kv_head=2, head_dim=24, n_embd=64
    )
    model = GPT(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:  # attention that is not flat
            torch.nn.init.normal_(parameter, std=0.15)
    return model.bfloat16().eval()


@torch.no_grad()
def read(model: GPT, ids: torch.Tensor, make_cache) -> torch.Tensor:
    """Logits of every token, (B, T, V): a prompt of 25 in one piece, then by 1, 4, 16 and 5."""
    weight = model.token_embedding.weight
    cache = make_cache(model.config, dtype=weight.dtype)
    parts = ids.split([25, 1, 1, 4, 16, 5], dim=1)
    return torch.cat([model(part, cache=cache, all_logits=True)[0] for part in parts], dim=1)


@pytest.mark.parametrize("card", [(8, 0), (9, 0)], ids=str)
@pytest.mark.parametrize("kind", CACHES)
def test_logits_are_as_far_from_float64_as_those_of_pytorch(model, kind, card):
    ids = torch.randint(61, (2, 52), generator=torch.Generator().manual_seed(1))
    truth = read(copy.deepcopy(model).double(), ids, CACHES[kind])
    peer = read(model, ids, CACHES[kind])
    with kernels.use_backend("emulator", ops=[*OPS, "flash_attention"], capability=card):
        ours = read(model, ids, CACHES[kind])
    error, allowed = (ours - truth).abs().max(), (peer - truth).abs().max()
    assert error <= 2 * allowed + 4 * torch.finfo(torch.bfloat16).eps * truth.abs().max()
    assert not torch.equal(ours, peer)  # they did run


@pytest.mark.parametrize(
    "options",
    [
        {"cache": "auto"},
        {"cache": "rolling", "window": 21, "sink_tokens": 3},
        {"cache": "int8"},
        {"cache": "int8", "window": 21},
    ],
    ids=str,
)
def test_generate(model, options):
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(2))
    emulator.reset_statistics()
    with kernels.use_backend("emulator", ops=OPS, capability=(9, 0)):
        text = model.generate(ids, 30, temperature=0, **options)
    launches = {}
    for name, kernel in emulator.statistics()["kernels"].items():
        name = name.partition("<")[0]
        launches[name] = launches.get(name, 0) + kernel["launches"]
    # One launch a layer for each forward: a prompt of 9, and 29 tokens.
    assert launches == {"append_kernel": 30 * 2, "decode_kernel": 30 * 2}
    # Each token is among those that the exact logits leave in doubt.
    exact = copy.deepcopy(model).double()
    cache = KVCache.for_model(
        exact, 2, **{"kind": options["cache"], "tokens": 39, "window": options.get("window")},
        sink_tokens=options.get("sink_tokens"),
    )  # fmt: skip
    with torch.no_grad():
        logits, _ = exact(text[:, :-1], cache=cache, all_logits=True)
    logits = logits[:, 8:]
    chosen = logits.gather(-1, text[:, 9:, None])[..., 0]
    assert (logits.amax(-1) - chosen).max() < 0.05 * logits.abs().max()

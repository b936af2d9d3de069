"""What activation checkpointing keeps and what it computes again; that it changes no gradient is
tested in test_gpt.py and test_packed_documents.py."""

from collections import Counter

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from almostgpt import GPT, GPTConfig, kernels
from almostgpt.kernels.flash_attention import _run_csrc

B, T, LAYERS, WIDTH, HIDDEN = 2, 16, 2, 32, 96
MODES = ("none", "selective", "full")


def make(checkpointing: str, norm: str = "rmsnorm") -> GPT:
    torch.manual_seed(0)
    sizes = {"n_layer": LAYERS, "n_head": 4, "n_kv_head": 2, "n_embd": WIDTH, "mlp_hidden": HIDDEN}
    parts = {"gradient_checkpointing": checkpointing, "norm": norm}
    return GPT(GPTConfig(block_size=T, vocab_size=31, **sizes, **parts)).train()


def ids() -> torch.Tensor:
    return torch.randint(31, (B, T), generator=torch.Generator().manual_seed(1))


class Watch(TorchDispatchMode):
    """Counts the calls of every op, and knows the memory of all their results that is still held."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.results = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[func.name()] += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.results[StorageWeakRef(storage)] = storage.nbytes()
        return out

    def held(self, model: GPT) -> int:
        """Bytes of results that are alive, without the model's own."""
        own = {StorageWeakRef(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
        return sum(
            size
            for storage, size in self.results.items()
            if not storage.expired() and storage not in own
        )


def test_selective_keeps_more_than_full_and_less_than_none():
    held = {}
    for mode in MODES:
        model, tokens = make(mode), ids()
        with Watch() as watch:
            loss = model(tokens, tokens)[1]
        held[mode] = watch.held(model)
        del loss
    assert held["none"] > held["selective"] > held["full"]
    # What full keeps is one stream a block. selective keeps two of them, where the first block has one:
    # with the second, the output of a block, go those of the other products and of attention.
    stream, head = B * T * WIDTH * 4, WIDTH // 4
    products = {"qkv": 8 * head, "attention": WIDTH, "out": WIDTH, "gate and up": 2 * HIDDEN}
    logsumexp = B * T * 4 * 4
    kept = LAYERS * (B * T * 4 * sum(products.values()) + logsumexp + stream)
    assert held["selective"] - held["full"] == kept


def test_selective_repeats_no_matrix_product_and_no_attention():
    calls = {}
    for mode in MODES:
        model, tokens = make(mode, norm="layernorm"), ids()
        with Watch() as watch:
            model(tokens, tokens)[1].backward()
        calls[mode] = watch.calls
    assert calls["selective"]["aten::mm"] == calls["none"]["aten::mm"] < calls["full"]["aten::mm"]
    attention = {m: calls[m]["aten::_scaled_dot_product_flash_attention_for_cpu"] for m in MODES}
    assert attention == {"none": LAYERS, "selective": LAYERS, "full": 2 * LAYERS}
    norms = {mode: calls[mode]["aten::native_layer_norm"] for mode in MODES}
    assert norms == {"none": 2 * LAYERS + 1, "selective": 4 * LAYERS + 1, "full": 4 * LAYERS + 1}


def our_attention(q, k, v, **options):
    """The op of the CUDA kernel, with the CPU side that it has for tests."""
    defaults = {"window": None, "scale": None, "softcap": 0.0, "alibi_slopes": None}
    defaults |= {"sink_logits": None, "deterministic": False, "return_lse": False}
    return _run_csrc(torch.ops.almostgpt, q, k, v, **{**defaults, **options})


def test_our_attention_kernel_runs_once(monkeypatch):
    monkeypatch.setattr(kernels, "flash_attention", our_attention)
    gradients, calls = {}, {}
    for mode in MODES:
        model, tokens = make(mode), ids()
        with Watch() as watch:
            model(tokens, tokens)[1].backward()
        calls[mode] = watch.calls["almostgpt::flash_attention_forward"]
        gradients[mode] = [p.grad for p in model.parameters()]
    assert calls == {"none": LAYERS, "selective": LAYERS, "full": 2 * LAYERS}
    for mode in ("selective", "full"):
        for one, other in zip(gradients["none"], gradients[mode], strict=True):
            assert torch.equal(one, other)


def test_our_attention_kernel_runs_once_when_compiled(monkeypatch):
    monkeypatch.setattr(kernels, "flash_attention", our_attention)
    plain, model, tokens, graphs = make("none"), make("selective"), ids(), []
    plain(tokens, tokens)[1].backward()
    compiled = torch.compile(model, fullgraph=True, backend=collecting(graphs))
    compiled(tokens, tokens)[1].backward()
    names = [str(node.target) for graph in graphs for node in graph.nodes]
    assert len(graphs) == 2  # forward and backward
    assert names.count("almostgpt.flash_attention_forward.default") == LAYERS
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def collecting(graphs: list):
    """A backend that runs forward and backward as they are, and keeps their graphs."""

    def compiler(graph, _inputs):
        graphs.append(graph.graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)

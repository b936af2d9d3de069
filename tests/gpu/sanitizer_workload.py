"""Every op that has a kernel once on odd shapes: the program that compute-sanitizer watches.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python sanitizer_workload.py

Without the caching allocator every tensor is an allocation of its own, so an access beside it is
seen. Results are not looked at here: the tests do that.
"""

from __future__ import annotations

import itertools
import sys

import torch

from almostgpt import kernels
from almostgpt.kernels.attention_ladder import STEPS
from almostgpt.kernels.attention_ladder import attention_ladder as ladder
from almostgpt.kernels.rope import turns_of


def rms_norm() -> int:
    shapes = [(1, 1), (3, 7), (113, 203), (1, 65536), (700, 33), (2, 3, 130)]  # element by element
    shapes += [
        (5, 16),
        (300, 768),
        (7, 1600),
        (3, 4096),
        (3, 8192),
        (2, 16384),
        (2, 32768),
    ]  # vectors
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    for shape, dtype in itertools.product(shapes, dtypes):
        # Copied from the host: then no kernel of torch's own random numbers is in the way.
        wide = torch.randn(*shape[:-1], shape[-1] + 3).to(dtype).cuda()
        weight = torch.randn(shape[-1]).to(dtype).cuda().requires_grad_()
        # A whole tensor, and rows that lie apart and start unaligned.
        for x in (wide[..., 3:].contiguous(), wide[..., 3:]):
            x = x.detach().requires_grad_()
            residual, dy = (torch.randn(shape).to(dtype).cuda() for _ in range(2))
            y = kernels.rms_norm(x, weight)
            torch.autograd.grad(y, (x, weight), dy)
            y = kernels.rms_norm(x, weight, residual=residual.requires_grad_())
            torch.autograd.grad(y, (x, weight, residual), (dy, residual.detach()))
    return 4 * len(shapes) * len(dtypes)


def flash_attention() -> int:
    shapes = [(1, 1), (113, 203), (239, 1), (203, 113), (300, 300)]
    widths, dtypes = [40, 64, 128, 256], [torch.bfloat16, torch.float16]
    for (Tq, Tk), D, dtype in itertools.product(shapes, widths, dtypes):
        q, dout = (torch.randn(2, 4, Tq, D).to(dtype).cuda() for _ in range(2))
        k, v = (torch.randn(2, 2, Tk, D).to(dtype).cuda() for _ in range(2))
        leaves = [t.requires_grad_() for t in (q, k, v)]
        per_head = torch.rand(4).cuda()
        bent = {"softcap": 5.0, "alibi_slopes": per_head, "sink_logits": per_head}
        for deterministic, options in itertools.product((False, True), ({}, bent)):
            out = kernels.flash_attention(
                *leaves, causal=True, window=(70, -1), deterministic=deterministic, **options
            )
            torch.autograd.grad(out, leaves, dout)
        if Tq == 300 and D != 40:  # more tiles of queries than multiprocessors
            many = torch.randn(2, 64, Tq, D).to(dtype).cuda()
            kernels.flash_attention(many, *(t.detach() for t in leaves[1:]), causal=True)
        if Tq == Tk:
            borders = torch.tensor([0, 5, Tq // 2, Tq, Tq], dtype=torch.int32).cuda()
            if Tq > 5:
                one = [t[:1] for t in leaves]
                out = kernels.flash_attention(*one, causal=True, cu_seqlens=borders)
                torch.autograd.grad(out, leaves, dout[:1])
    return 4 * len(shapes) * len(widths) * len(dtypes)


def attention_ladder() -> int:
    q, k, v = (torch.randn(2, 3, 113, 64).bfloat16().cuda() for _ in range(3))
    for step in STEPS:
        ladder(step, q, k, v, causal=True)
    return len(STEPS)


def activations() -> int:
    shapes = [(1, 1), (3, 7), (113, 203), (0, 8), (64, 256), (5, 4096)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    functions = [(kernels.swiglu, 2), (kernels.gelu, 1), (kernels.relu_squared, 1)]
    for shape, dtype, (function, wide) in itertools.product(shapes, dtypes, functions):
        columns = wide * shape[1]
        rows = torch.randn(shape[0], columns + 3).to(dtype).cuda()
        for x in (rows[:, 3:].contiguous(), rows[:, 3:]):
            x = x.detach().requires_grad_()
            torch.autograd.grad(function(x), x, torch.randn(shape).to(dtype).cuda())
    return 2 * len(shapes) * len(dtypes) * len(functions)


def rope() -> int:
    shapes = [(1, 1, 1, 2), (2, 7, 3, 20), (1, 113, 5, 64), (3, 33, 12, 128)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    for (B, T, H, D), dtype in itertools.product(shapes, dtypes):
        fused = torch.randn(B, T, 2 * H, D).to(dtype).cuda()
        cos, sin = (torch.rand(T + 3, D // 2).cuda() for _ in range(2))
        positions = torch.arange(T).expand(B, T).contiguous().cuda()
        for x, where in ((fused[:, :, :H], 3), (fused[:, :, H:], positions)):
            x = x.detach().requires_grad_()
            torch.autograd.grad(kernels.rope(x, cos, sin, where), x, torch.ones_like(x))
        with torch.no_grad():
            kernels.rope(fused[:, :, :H], cos, sin, inplace=True)
    return 3 * len(shapes) * len(dtypes)


def cross_entropy() -> int:
    shapes = [(1, 1), (3, 7), (113, 203), (65, 50304)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    for (rows, V), dtype in itertools.product(shapes, dtypes):
        logits = torch.randn(rows, V).to(dtype).cuda().requires_grad_()
        targets = torch.randint(-1, V, (rows,)).cuda()
        torch.autograd.grad(kernels.cross_entropy(logits, targets, softcap=5.0), logits)
        hidden, weight = (torch.randn(n, 16).to(dtype).cuda().requires_grad_() for n in (rows, V))
        for reduction in ("mean", "none"):
            loss = kernels.linear_cross_entropy(
                hidden, weight, targets, reduction=reduction, chunk_bytes=1
            )
            torch.autograd.grad(loss.sum(), (hidden, weight))
    return 3 * len(shapes) * len(dtypes)


def kv_cache() -> int:
    """Appends and attends: a prompt, then tokens that some sequences lack; keys of many tiles, and few."""
    capacities, widths, dtypes = [19, 700], [40, 64, 128, 256], [torch.bfloat16, torch.float16]
    cases = itertools.product(capacities, widths, dtypes, (False, True), (False, True))
    for C, D, dtype, int8, ring in cases:
        options = {"window": C - 15, "sink_tokens": 3} if ring else {}
        layer = kernels.KVLayer.empty(
            2, 2, C, D, dtype=torch.int8 if int8 else dtype, device="cuda", **options
        )
        # Whole vectors of 16 bytes turn, or a few elements; without turns nothing is given back.
        few, all_of_them = (turns_of(torch.rand(n).double()).cuda() for n in (3, D // 2))
        bent = {"alibi_slopes": torch.rand(8).cuda(), "sink_logits": torch.rand(8).cuda()}
        for T, turns, given in ((C // 2, all_of_them, {}), (5, few, bent), (1, None, {})):
            fused = torch.randn(2, T, 12, D).to(dtype).cuda().transpose(1, 2)
            added = torch.tensor([T, T // 2], dtype=torch.int32).cuda()
            q, q_sink = kernels.kv_append(
                *fused.split([8, 2, 2], dim=1), layer, new_lengths=added, turns=turns
            )
            if T <= 5:
                kernels.decode_attention(q, layer, q_sink=q_sink, new_lengths=added, **given)
                kernels.decode_attention(q, layer, softcap=5.0)
            layer.lengths.add_(added)
    return 3 * len(capacities) * len(widths) * len(dtypes) * 4


def sample() -> int:
    """Rows of every alignment, in shared memory and beyond it; each way to filter."""
    lengths, dtypes = (
        [1, 7, 257, 5003, 50257, 70001],
        [torch.float32, torch.bfloat16, torch.float16],
    )
    ways = [
        {"temperature": 0},
        {},
        {"top_k": 50, "top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.3, "top_p": 0.7},
    ]
    for V, dtype, options in itertools.product(lengths, dtypes, ways):
        wide = torch.randn(9, V + 3).to(dtype).cuda()
        rows = tuple(torch.arange(9).cuda() + n for n in (5, 2**40, -3))
        seen = (torch.rand(9, V) < 0.3).cuda() if "repetition_penalty" in options else None
        for logits in (wide[:, :V].contiguous(), wide[:, 3:]):
            kernels.sample(logits, *rows, seen=seen, logprobs=True, **options)
    return 2 * len(lengths) * len(dtypes) * len(ways)


def int8_linear() -> int:
    shapes = [
        (1, 1, 16),
        (3, 17, 48),
        (8, 50, 80),
        (9, 4801, 1600),
        (16, 50257, 64),
        (2, 768, 6400),
    ]
    dtypes = [torch.bfloat16, torch.float16]
    for (rows, N, K), dtype in itertools.product(shapes, dtypes):
        weight, scales = kernels.quantize_rows(torch.randn(N, K))
        weight, scales = weight.cuda(), scales.cuda()
        wide = torch.randn(rows, K + 11).to(dtype).cuda()
        for bias in (None, torch.randn(N).cuda(), torch.randn(N).to(dtype).cuda()):
            # A whole tensor, and rows that lie apart and start unaligned.
            for x in (wide[:, 11:].contiguous(), wide[:, 11:]):
                kernels.int8_linear(x, weight, scales, bias)
    return 6 * len(shapes) * len(dtypes)


# An op without a kernel of ours has nothing to watch.
WORKLOADS = {
    "rms_norm": rms_norm,
    "flash_attention": flash_attention,
    "attention_ladder": attention_ladder,
    "activations": activations,
    "rope": rope,
    "cross_entropy": cross_entropy,
    "kv_cache": kv_cache,
    "sample": sample,
    "int8_linear": int8_linear,
}


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA GPU: nothing to watch")
        return 2
    for name, workload in WORKLOADS.items():
        cases = workload()
        torch.cuda.synchronize()
        print(f"{name}: {cases} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The cases of linear attention, experts and block-sparse attention; see check_cases.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import elu
from torch.utils.checkpoint import checkpoint

from almostgpt.kernels.block_sparse_attention import BlockPattern, random_blocks
from almostgpt.kernels.check_case import Case, Shape, Work
from almostgpt.kernels.linear_attention import EPS


def _linear_attention_inputs(shape: Shape, normal) -> dict[str, Tensor]:
    """Of (B, H, T, D): features that are above 0, and values."""
    return {"q": elu(normal(shape)) + 1, "k": elu(normal(shape)) + 1, "v": normal(shape)}


def _plain_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``linear_attention`` as it is defined, with every product of a query and a key."""
    products = (q @ k.mT).tril()
    return products @ v / (products.sum(-1, keepdim=True) + EPS)


def _linear_attention_work(shape: Shape) -> dict[str, Work]:
    """Of the recurrence: 4 · D² operations a token and head."""
    elements = math.prod(shape)
    flops = 4.0 * elements * shape[3]
    return {"forward": Work(4 * elements, flops), "backward": Work(7 * elements, 2 * flops)}


def _expert_linear_inputs(shape: Shape, normal) -> dict[str, Tensor]:
    """Of (experts, rows, in, out)."""
    E, N, K, M = shape
    return {"x": normal((N, K)), "weight": normal((E, M, K))}


def _expert_linear_offsets(shape: Shape) -> dict[str, Tensor]:
    """Twice as many rows for the even experts as for the odd ones, but none for the first."""
    E, N, *_ = shape
    shares = (torch.arange(E) % 2 == 0).double() + 1
    shares[0] = float(E == 1)
    return {"offsets": (N * (shares.cumsum(0) / shares.sum())).round().int()}


def _plain_expert_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``expert_linear`` as it is defined, in the dtype of its inputs."""
    ends = offsets.tolist()
    parts = zip([0, *ends], ends, weight, strict=False)
    return torch.cat([x[start:end] @ own.t() for start, end, own in parts])


def _expert_linear_work(shape: Shape) -> dict[str, Work]:
    E, N, K, M = shape
    elements, flops = N * (K + M) + E * K * M, 2.0 * N * K * M
    return {"forward": Work(elements, flops), "backward": Work(2 * elements, 2 * flops)}


def _block_sparse_attention_inputs(shape: Shape, normal) -> dict[str, Tensor | BlockPattern]:
    """Of (B, H, T, D), with blocks of 16 tokens or, of long sequences, 64: 3 last, 1 first, 2 drawn."""
    _, H, T, _ = shape
    block = 64 if T >= 1024 else 16
    random = random_blocks(0, H, -(-T // block), window=3, global_blocks=1, count=2)
    q, k, v = (normal(shape) for _ in range(3))
    return {"q": q, "k": k, "v": v, "pattern": BlockPattern(block, 3, 1, random.to(q.device))}


def _plain_block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern) -> Tensor:
    """``block_sparse_attention`` as it is defined, with a whole mask: of one head at a time."""
    B, H, T, D = q.shape
    place = torch.arange(T, device=q.device)
    block = place // pattern.block
    distance = block[:, None] - block  # in blocks
    everywhere = (block < pattern.global_blocks) | ((distance >= 0) & (distance < pattern.window))

    def one_head(q, k, v, drawn):
        sees = everywhere | (drawn[block][:, None, :] == block[None, :, None]).any(-1)
        sees = sees & (place <= place[:, None])
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(~sees, -math.inf)
        return scores.softmax(-1) @ v

    random = pattern.random.to(q.device)
    heads = [
        checkpoint(one_head, q[b, h], k[b, h], v[b, h], random[h], use_reentrant=False)
        for b in range(B)
        for h in range(H)
    ]
    return torch.stack(heads).view_as(q)


def _block_sparse_attention_work(shape: Shape) -> dict[str, Work]:
    """With 6 blocks of keys for a query, or all keys before it where there are fewer."""
    B, H, T, D = shape
    elements = math.prod(shape)
    seen = min(6 * (64 if T >= 1024 else 16), (T + 1) / 2)
    flops = 4 * B * H * T * seen * D
    return {"forward": Work(4 * elements, flops), "backward": Work(8 * elements, 2.5 * flops)}


CASES: dict[str, Case] = {
    "linear_attention": Case(
        "linear_attention",
        dimensions="BxHxTxD",
        inputs=_linear_attention_inputs,
        plain=_plain_linear_attention,
        outputs=("y",),
        work=_linear_attention_work,
        shapes={"cuda": (4, 16, 2048, 128), "cpu": (2, 4, 160, 64), "emulator": (1, 2, 80, 64)},
    ),
    "expert_linear": Case(
        "expert_linear",
        dimensions="EXPERTSxROWSxINPUTSxOUTPUTS",
        inputs=_expert_linear_inputs,
        plain=_plain_expert_linear,
        outputs=("y",),
        work=_expert_linear_work,
        shapes={"cuda": (8, 16384, 1024, 4096), "cpu": (4, 96, 64, 96), "emulator": (3, 9, 16, 8)},
        constants=_expert_linear_offsets,
        output=lambda shape: (shape[1], shape[3]),
    ),
    "block_sparse_attention": Case(
        "block_sparse_attention",
        dimensions="BxHxTxD",
        inputs=_block_sparse_attention_inputs,
        plain=_plain_block_sparse_attention,
        outputs=("out",),
        work=_block_sparse_attention_work,
        shapes={"cuda": (4, 16, 4096, 128), "cpu": (2, 4, 160, 64), "emulator": (1, 2, 80, 64)},
    ),
}

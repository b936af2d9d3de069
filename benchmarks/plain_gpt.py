"""The opponent: a GPT-2-like model and its training step, written the plain way in one file.

This is how nanoGPT and many tutorials write it, with what PyTorch offers and nothing else: learned
positions (or rotary ones), LayerNorm without bias, GELU, ``scaled_dot_product_attention``, a tied
output projection; AdamW in its default form on a CPU and fused on CUDA; gradients clipped to norm
1.0; a batch gathered from a memory-mapped file window by window. It shares no code with the package.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class PlainConfig:
    block_size: int = 64
    vocab_size: int = 65
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    gelu_approximate: str = "none"
    rope: bool = False  # instead of learned positions


class PlainLayerNorm(nn.Module):
    """LayerNorm with a weight and no bias."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions for x: (B, H, T, D), the dimensions i and i + D/2 a pair."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


class PlainAttention(nn.Module):
    def __init__(self, config: PlainConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.rope = config.rope
        if config.rope:
            width = config.n_embd // config.n_head
            frequencies = 10000.0 ** -(torch.arange(0, width, 2) / width)
            angles = torch.outer(torch.arange(config.block_size), frequencies)
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.rope:
            q = rotate(q, self.cos[:T], self.sin[:T])
            k = rotate(k, self.cos[:T], self.sin[:T])
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class PlainMLP(nn.Module):
    def __init__(self, config: PlainConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.gelu = nn.GELU(config.gelu_approximate)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class PlainBlock(nn.Module):
    def __init__(self, config: PlainConfig):
        super().__init__()
        self.ln_1, self.attn = PlainLayerNorm(config.n_embd), PlainAttention(config)
        self.ln_2, self.mlp = PlainLayerNorm(config.n_embd), PlainMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class PlainGPT(nn.Module):
    """``model(ids, targets)`` → ``(logits, loss)``."""

    def __init__(self, config: PlainConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = None if config.rope else nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.ln_f = PlainLayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_stream = name.endswith("c_proj.weight")
                nn.init.normal_(p, 0, 0.02 / math.sqrt(2 * config.n_layer) if into_stream else 0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.wte(ids)
        if self.wpe is not None:
            positions = torch.arange(0, ids.size(1), dtype=torch.long, device=ids.device)
            x = x + self.wpe(positions)
        x = self.drop(x)
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits, loss


class PlainTrainer:
    """The loop body: batch, forward, backward, clip, update.

    Args:
        model: on its device.
        data: a file of uint16 tokens and nothing else.
        dtype: of autocast; None trains in the model's own.
    """

    def __init__(
        self,
        model: PlainGPT,
        data: Path,
        *,
        batch_size: int,
        lr: float,
        betas: tuple[float, float],
        dtype: torch.dtype | None = None,
        compile: bool = False,
    ):
        self.model, self.data, self.batch_size = model, data, batch_size
        self.forward = torch.compile(model) if compile else model
        self.device = next(model.parameters()).device
        cuda = self.device.type == "cuda"
        decay = [p for p in model.parameters() if p.dim() >= 2]
        no_decay = [p for p in model.parameters() if p.dim() < 2]
        groups = [
            {"params": decay, "weight_decay": 0.1},
            {"params": no_decay, "weight_decay": 0.0},
        ]
        extra = {"fused": True} if cuda else {}  # the default elsewhere
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, **extra)
        self.autocast = nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def get_batch(self) -> tuple[Tensor, Tensor]:
        # Mapped anew for every batch: a long-lived memmap was held to leak memory.
        data = np.memmap(self.data, dtype=np.uint16, mode="r")
        block_size = self.model.config.block_size
        starts = torch.randint(len(data) - block_size, (self.batch_size,))
        ids = torch.stack(
            [torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in starts]
        )
        targets = torch.stack(
            [torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in starts]
        )
        if self.device.type == "cuda":
            ids, targets = ids.pin_memory(), targets.pin_memory()
        return ids.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

    def step(self, lr: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        ids, targets = self.get_batch()
        with self.autocast:
            _, loss = self.forward(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

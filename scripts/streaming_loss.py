#!/usr/bin/env python3
"""How well a model reads on and on: its loss over 20 times the context that it was trained on.

Validation texts, many side by side, go through a cache of one kind after the other:

  4 sinks    rolling, with the first 4 tokens kept
  no sinks   rolling, without them: a plain sliding window
  full       every token kept: distances grow beyond all that the model was trained on

With --checkpoint, of a trained run. With --text, of a model that learns the text in a few minutes and whose
heads come to rest on its first token, as those of large models do (Xiao et al., arXiv:2309.17453): 2 layers,
windows of 64 tokens behind a BOS, tokens that are the 500 most frequent words and characters (rarer words are
spelt), and a feed-forward that is all but absent, so that attention must do the work.

    python scripts/streaming_loss.py --text tinyshakespeare.txt --out docs/images/streaming.svg
    python scripts/streaming_loss.py --checkpoint runs/quickstart

The last line on stdout is a JSON object: the mean loss in each eighth of the way, in nats a token, and the
attention that each head pays to the first token within a context of the training.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from almostgpt import checkpoint
from almostgpt.config import GPTConfig
from almostgpt.config_file import load_config
from almostgpt.data.prepare import cached_dataset
from almostgpt.errors import UserError
from almostgpt.inference.cache import KVCache
from almostgpt.model import GPT

BLOCK, BATCH, PIECES = 64, 32, 500
LR, WARMUP, DECAY = 1e-2, 50, 0.1
TIMES, CHUNK, EIGHTHS = 20, 16, 8
PIECE = re.compile(r" ?\w+|\n *|[^\w\s]+|\s")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("--checkpoint", type=Path, help="a run or a checkpoint, with rope")
    of.add_argument("--text", type=Path, help="what a small model is to learn")
    parser.add_argument("--steps", type=int, default=1000, help="of the small model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--texts", type=int, default=32, help="side by side, evenly apart")
    parser.add_argument("--out", type=Path, help="draw the chart here (.svg or .png)")
    given = parser.parse_args(arguments)
    try:
        return run(given)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(given: argparse.Namespace) -> int:
    began = time.perf_counter()
    model, texts = trained(given) if given.text else loaded(given)
    seconds = time.perf_counter() - began
    block, length = model.config.block_size, texts.shape[1] - 1
    caches = {
        "4 sinks": KVCache.rolling(model.config, len(texts), sink_tokens=4),
        "no sinks": KVCache.rolling(model.config, len(texts), sink_tokens=0),
        "full": KVCache.full(model.config, len(texts), length),
    }
    losses = {name: read(model, texts, cache) for name, cache in caches.items()}
    if given.out is not None:
        draw(losses, block, given.out)
    eighths = {
        name: [round(part.mean().item(), 3) for part in loss.tensor_split(EIGHTHS)]
        for name, loss in losses.items()
    }
    result = {
        "parameters": model.num_parameters(),
        "seconds_before": round(seconds),  # of training, or loading
        "tokens": length,
        "texts": len(texts),
        "loss_by_eighths": eighths,
        "attention_to_first": attention_to_first(model, texts[:, :block]),
    }
    print(json.dumps(result))
    return 0


def loaded(given: argparse.Namespace) -> tuple[GPT, Tensor]:
    """A trained model, and (texts, tokens) of its validation data."""
    model, _ = checkpoint.load(given.checkpoint, "cpu")
    config = load_config(checkpoint.find(given.checkpoint) / checkpoint.CONFIG)
    tokens = np.concatenate(cached_dataset(config.data).val).astype(np.int64)
    length = TIMES * model.config.block_size + 1
    return model, torch.from_numpy(tokens[starts(tokens, given.texts, length) + np.arange(length)])


def trained(given: argparse.Namespace) -> tuple[GPT, Tensor]:
    """The small model, and (texts, tokens) of the last tenth of the text, each behind a BOS."""
    torch.manual_seed(given.seed)
    tokens, pieces = tokenized(given.text.read_text(encoding="utf-8"))
    validation = tokens[-len(tokens) // 10 :]
    length = TIMES * BLOCK
    first = starts(validation, given.texts, length)  # too short a text is said before training
    model = GPT(
        GPTConfig(
            block_size=BLOCK,
            vocab_size=pieces + 1,
            n_layer=2,
            n_head=4,
            n_embd=64,
            head_dim=32,
            mlp_hidden=2,
            rope_base=1e6,
        )
    )
    train(model, tokens[: -len(validation)], given.steps, np.random.default_rng(given.seed))
    return model, behind_bos(validation, first[:, 0], length, pieces)


def starts(tokens: np.ndarray, count: int, length: int) -> np.ndarray:
    """(count, 1): where texts of that length begin, from all over the tokens."""
    if len(tokens) < length:
        raise UserError(f"{len(tokens)} tokens of validation text are fewer than {length}")
    return np.linspace(0, len(tokens) - length, count).astype(int)[:, None]


def tokenized(text: str) -> tuple[np.ndarray, int]:
    """The text as ids, and how many different ones there are."""
    found = PIECE.findall(text)
    pieces = sorted(set(text))
    words = (piece for piece, _ in Counter(found).most_common() if len(piece) > 1)
    pieces += [word for word, _ in zip(words, range(PIECES - len(pieces)), strict=False)]
    ids = {piece: i for i, piece in enumerate(pieces)}
    spelt = (((piece,) if piece in ids else piece) for piece in found)
    return np.array([ids[part] for parts in spelt for part in parts]), len(pieces)


def behind_bos(tokens: np.ndarray, starts: np.ndarray, length: int, bos: int) -> Tensor:
    """(starts, 1 + length) int64."""
    rows = tokens[starts[:, None] + np.arange(length)]
    return torch.from_numpy(np.pad(rows, ((0, 0), (1, 0)), constant_values=bos))


def train(model: GPT, tokens: np.ndarray, steps: int, rng: np.random.Generator) -> None:
    model.train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), weight_decay=DECAY)
    bos = model.config.vocab_size - 1
    for step in range(steps):
        for group in optimizer.param_groups:
            cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)  # 1 … 0.1
            group["lr"] = LR * min(1, (step + 1) / WARMUP) * cosine
        windows = behind_bos(tokens, rng.integers(0, len(tokens) - BLOCK, BATCH), BLOCK, bos)
        _, loss = model(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps} · loss {loss.item():.3f}", file=sys.stderr, flush=True)
    model.eval()


@torch.no_grad()
def read(model: GPT, texts: Tensor, cache: KVCache) -> Tensor:
    """(tokens,): the loss at each position in nats, over all texts."""
    found = []
    for start in range(0, texts.shape[1] - 1, CHUNK):
        stop = min(start + CHUNK, texts.shape[1] - 1)
        logits, _ = model(texts[:, start:stop], cache=cache, all_logits=True)
        targets = texts[:, start + 1 : stop + 1]
        found.append(cross_entropy(logits.mT.float(), targets, reduction="none").mean(0))
    return torch.cat(found)


@torch.no_grad()
def attention_to_first(model: GPT, ids: Tensor) -> list[list[float]]:
    """Of each layer and head: the mean weight on position 0 over the second half of ids: (B, T)."""
    projected = []
    hooks = [
        block.attention.qkv.register_forward_hook(lambda *call: projected.append(call[-1]))
        for block in model.blocks
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    B, T = ids.shape
    config = model.config
    heads, shared, size = config.n_head, config.n_head // config.n_kv_head, config.head_dim
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    shares = []
    for qkv in projected:
        qk = qkv.view(B, T, -1, size)[:, :, : heads + config.n_kv_head]
        qk = model.position.rotate(qk, slice(0, T)).transpose(1, 2)
        q, k = qk[:, :heads], qk[:, heads:].repeat_interleave(shared, 1)
        weights = (q @ k.mT / math.sqrt(size)).masked_fill(future, -math.inf).softmax(-1)
        shares.append([round(x, 2) for x in weights[:, :, T // 2 :, 0].mean((0, 2)).tolist()])
    return shares


def draw(losses: dict[str, Tensor], block: int, path: Path) -> None:
    """Means over a quarter of a context each."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    step = max(1, block // 4)
    for name, loss in losses.items():
        means = [part.mean().item() for part in loss.split(step)]
        axes.plot([(i + 0.5) * step / block for i in range(len(means))], means, label=name)
    axes.axvline(1, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_xlabel("position, in contexts of the training")
    axes.set_ylabel("loss, nats a token")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "almostgpt"}):  # text as text
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    sys.exit(main())

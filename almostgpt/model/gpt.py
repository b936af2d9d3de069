"""The GPT: embeddings, blocks, a final norm and the output projection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from almostgpt import kernels
from almostgpt.config import GPTConfig, model_problems, not_one_of, resolve_model
from almostgpt.errors import UserError
from almostgpt.model.attention import ATTENTIONS, Cache, checked_lengths
from almostgpt.model.block import Block
from almostgpt.model.checkpointing import CHECKPOINTING
from almostgpt.model.feedforward import FEEDFORWARDS
from almostgpt.model.norm import NORMS
from almostgpt.model.position import POSITIONS, positions_in_documents
from almostgpt.model.presets import MODEL_PRESETS
from almostgpt.model.quantized import QUANTIZED

PARTS = {
    "norm": NORMS,
    "feedforward": FEEDFORWARDS,
    "position": POSITIONS,
    "attention": ATTENTIONS,
}


class GPT(nn.Module):
    """A decoder-only transformer with the parts that ``config`` names.

    Raises:
        UserError: sizes that do not fit together or unknown parts, all of them in one message.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        problems = model_problems(config, PARTS)
        if config.vocab_size is None:
            problems.append("model.vocab_size is not set: give the number of token ids")
        if problems:
            raise UserError("the model cannot be built:\n" + "\n".join(f"  {p}" for p in problems))
        self.config = config = resolve_model(config)
        linear, embedding, _ = QUANTIZED[config.quantize]
        self.token_embedding = embedding(config.padded_vocab_size, config.n_embd)
        self.position = POSITIONS[config.position](config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = NORMS[config.norm](config)
        if not config.tie_weights:
            self.head = linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.feedforward == "moe":
            # Of the last pass in training, the share of each expert in each layer: for a log.
            load = torch.zeros(config.n_layer, config.n_experts)
            self.register_buffer("expert_load", load, persistent=False)
        self._initialise()
        if config.quantize != "none":
            self.requires_grad_(False)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> GPT:
        """A fresh model by name (``tiny`` … ``gpt2-xl``); ``overrides`` are GPTConfig fields."""
        if name not in MODEL_PRESETS:
            raise UserError(f"the preset is {not_one_of(name, MODEL_PRESETS)}")
        return cls(GPTConfig(**{**MODEL_PRESETS[name], **overrides}))

    @classmethod
    def from_pretrained(cls, id_or_folder: str | Path, **options) -> GPT:
        """A model of Hugging Face, by hub id or local folder, in evaluation mode.

        Which are served, options and errors: see :func:`almostgpt.hub.load_pretrained`, which gives
        the tokenizer, too.
        """
        # An arrow that points up, as in generate: the room is hub/.
        from almostgpt.hub import load_model

        return load_model(id_or_folder, **options)

    def _initialise(self) -> None:
        """GPT-2's: N(0, 0.02²) for matrices, those into the residual stream scaled by 1/√(2·n_layer).

        Each block adds twice to the stream; the scaling keeps its variance independent of the depth.
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                into_stream = name.endswith(("attention.out.weight", "feedforward.down.weight"))
                nn.init.normal_(parameter, std=residual_std if into_stream else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def output_weight(self) -> Tensor:
        """(padded_vocab_size, n_embd): the embedding when tied, else the head's own.

        Of a quantised model it is made anew at every call.
        """
        matrix = self.token_embedding if self.config.tie_weights else self.head
        return matrix.dense(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the residual stream: that of the norms, which no quantisation touches."""
        return self.norm.weight.dtype

    @property
    def endless(self) -> bool:
        """Whether it can go on beyond ``block_size`` over a cache."""
        return self.what_ends is None

    @property
    def what_ends(self) -> str | None:
        """Such as "learned positions end", of what ends at ``block_size`` over a cache, too; or None."""
        if not self.position.endless:
            return f"{self.config.position} positions end"
        if not ATTENTIONS[self.config.attention].endless:
            return f"{self.config.attention} attention ends"
        return None

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def num_parameters(self) -> int:
        """Trained values, in 8 bits or more, a tied matrix counted once."""
        quantized = (b.numel() for b in self.buffers() if b.dtype == torch.int8)
        return sum(p.numel() for p in self.parameters()) + sum(quantized)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        all_logits: bool = False,
        cache: Cache | None = None,
        new_lengths: Sequence[int] | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits, or the loss when targets are given.

        Args:
            ids: (B, T) int64, every value in [0, vocab_size). They are checked where they enter (loader,
                tokenizer, ``generate``), not here: a check would cost every step a device sync.
            targets: (B, T) int64, the id that follows each position; −1 is ignored.
            cu_seqlens: (n + 1,) int32, on the device of ids: where n packed documents begin and end, the
                rows taken as one sequence of B·T tokens. The first is 0, none is lower than the one
                before, the last is B·T, and every row begins a document; empty documents do no harm.
                Each document is computed as if it were alone: its tokens attend to one another only,
                their positions start at 0. The values are not checked, for the same reason.
            all_logits: logits of every position instead of the last one.
            cache: keys and values of the tokens before ``ids``; the new ones are appended. Only under
                ``torch.no_grad()``. Where anything fails, the cache counts what it did before.
            new_lengths: B numbers, on the host: of each row only so many of the T ids are there, the
                first ones. What comes out for the others means nothing; give them the target −1.

        Returns:
            ``(logits, None)`` with logits (B, 1, vocab_size) of each row's last token, or of every token
            (B, T, vocab_size) with ``all_logits``; with targets ``(None, loss)``, the mean cross-entropy
            in nats, to which a mixture of experts in training mode adds its routers' penalties.

        Raises:
            UserError: more tokens than ``block_size`` (with a cache: than it has room for, or than the
                model has positions), shapes that do not fit, documents with a cache, or a cache where a
                gradient is asked for.
        """
        if ids.dim() != 2 or ids.shape[1] == 0:
            raise UserError(
                f"ids must have the shape (batch, at least 1 token), not {tuple(ids.shape)}"
            )
        B, T = ids.shape
        if targets is not None and targets.shape != ids.shape:
            raise UserError(
                f"targets have the shape {tuple(targets.shape)}, but ids {tuple(ids.shape)}"
            )
        if new_lengths is not None:
            new_lengths = checked_lengths(new_lengths, B, T)
        if cu_seqlens is not None:
            _check_documents(cu_seqlens, cache, new_lengths)
        if cache is not None:
            self._check_positions(cache, B, T, new_lengths)
            positions = cache.begin(T, new_lengths)
        else:
            self._check_length(T)
            positions = slice(0, T)
            if cu_seqlens is not None:
                positions = positions_in_documents(cu_seqlens, B, T)
        x = self.position.embed(self.token_embedding(ids).to(self.dtype), positions)
        x = self.dropout(x)
        residual, routings = None, []
        run = CHECKPOINTING[self.config.gradient_checkpointing if self.training else "none"]
        for block in self.blocks:
            x, residual, routing = run(
                block, x, residual, self.position, positions, cu_seqlens, cache
            )
            routings += [] if routing is None else [routing]
        if targets is not None:
            # The padding rows make the products aligned; they are no tokens and take no part.
            loss = kernels.linear_cross_entropy(
                self.norm(x, residual)[0],
                self.output_weight,
                targets,
                vocab_size=self.config.vocab_size,
                softcap=self.config.logit_softcap,
            )
            if routings:
                penalties, loads = zip(*routings, strict=True)
                loss = loss + torch.stack(penalties).sum()
                self.expert_load.copy_(torch.stack(loads))
            result = None, loss
        else:
            if not all_logits:  # the norm acts on each position alone
                x, residual = _last_tokens(new_lengths, x, residual)
            result = self._logits(self.norm(x, residual)[0]), None
        if cache is not None:
            cache.advance()
        return result

    def _check_length(self, T: int) -> None:
        if T > self.config.block_size:
            raise UserError(
                f"{T} tokens are more than the model's block_size of {self.config.block_size}: "
                "shorten the sequence"
            )

    def _check_positions(self, cache: Cache, B: int, T: int, new_lengths: list[int] | None) -> None:
        """What a cache cannot know of: the ids, and whether there are positions past block_size."""
        cache.check_model(self.config)
        cached = cache.lengths
        if len(cached) != B:
            raise UserError(f"the cache is of {len(cached)} sequences, but ids of {B}")
        if self.endless:
            return
        for before, new in zip(cached, new_lengths or [T] * B, strict=True):
            if before + new > self.config.block_size:
                raise UserError(
                    f"{new} tokens after {before} cached ones are more than the model's block_size of "
                    f"{self.config.block_size}, where {self.what_ends}: shorten the sequence"
                )

    def _logits(self, x: Tensor) -> Tensor:
        project = self.token_embedding.logits if self.config.tie_weights else self.head
        logits = project(x)[..., : self.config.vocab_size]
        cap = self.config.logit_softcap  # Gemma 2, arXiv:2408.00118
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    def generate(self, prompts, max_new_tokens: int, **options):
        """Continues prompts: (B, T) by ``max_new_tokens`` → (B, T + max_new_tokens).

        Prompts of several lengths, options and what they return: see
        :func:`almostgpt.inference.generate.generate` and ``stream`` there.
        """
        # An arrow that points up: the method is a convenience, the room is inference/.
        from almostgpt.inference.generate import generate

        return generate(self, prompts, max_new_tokens, **options)


def _last_tokens(new_lengths: list[int] | None, *streams: Tensor) -> tuple[Tensor, ...]:
    """(B, T, C) → (B, 1, C), of each row the last token that is there (of an empty row: the first)."""
    if new_lengths is None:
        return tuple(x[:, -1:] for x in streams)
    last = torch.tensor([max(length - 1, 0) for length in new_lengths], dtype=torch.int64)
    last = last.to(streams[0].device, non_blocking=True)  # nothing waits
    rows = torch.arange(len(new_lengths), device=last.device)
    return tuple(x[rows, last].unsqueeze(1) for x in streams)


def _check_documents(
    cu_seqlens: Tensor, cache: Cache | None, new_lengths: list[int] | None
) -> None:
    if cache is not None:
        raise UserError(
            "cu_seqlens cannot be used with a cache: decode documents as rows of a batch"
        )
    if new_lengths is not None:
        raise UserError("cu_seqlens cannot be used with new_lengths: pack the documents instead")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or len(cu_seqlens) < 2:
        raise UserError(
            "cu_seqlens must be int32 of the shape (documents + 1,), "
            f"not {cu_seqlens.dtype} of {tuple(cu_seqlens.shape)}"
        )

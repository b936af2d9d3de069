"""Who generates text in the benchmarks: a GPT of ours in its versions, and transformers' GPT-2.

All of them have the same random weights, continue the same prompts greedily, and tell when a token was
there. ``scripts/generation_speed.py`` takes its peers from here, too.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from almostgpt.config import GPTConfig
from almostgpt.inference.generate import stream
from almostgpt.model import GPT
from almostgpt.model.quantized import Int8Embedding, Int8Linear, quantize

from . import harness

Tick = Callable[[], None]  # to be called when another token of every sequence is drawn
GPT2_PARTS = {
    "norm": "layernorm",
    "feedforward": "gelu_tanh",
    "position": "learned",
    "bias": True,
    "tie_weights": True,
    "vocab_multiple": 1,
}
GPT2_NAMES = {  # ours: transformers'
    "token_embedding.": "transformer.wte.",
    "position.": "transformer.wpe.",
    "blocks.": "transformer.h.",
    "attention_norm.": "ln_1.",
    "feedforward_norm.": "ln_2.",
    "attention.qkv.": "attn.c_attn.",
    "attention.out.": "attn.c_proj.",
    "feedforward.up.": "mlp.c_fc.",
    "feedforward.down.": "mlp.c_proj.",
}


class Timing(NamedTuple):
    """Of one generation.

    Attributes:
        ids: (B, new) int64, what was drawn.
        first: seconds until the first new token was there, the prompt's computation.
        later: seconds of a token after that, the mean; NaN of a single one.
    """

    ids: Tensor
    first: float
    later: float


@dataclass(frozen=True)
class Generator:
    """One way to generate.

    Attributes:
        run: from prompts (B, T) and the number of new tokens; gives these, (B, new).
        exact: the float32 model of the very numbers that its weights stand for.
        step_bytes: of a batch and the tokens before: what a step must read, every weight once and the
            keys and values; None where a step does not read but compute.
    """

    run: Callable[[Tensor, int, Tick], Tensor]
    exact: GPT
    step_bytes: Callable[[int, float], float] | None

    def timed(self, prompts: Tensor, new: int) -> Timing:
        stamps: list[float] = []

        def tick() -> None:
            if len(stamps) == 0:  # a GPU draws the later ones while nobody waits for each
                harness.wait()
                stamps.append(time.perf_counter())

        harness.wait()
        began = time.perf_counter()
        ids = self.run(prompts, new, tick)
        harness.wait()
        ended = time.perf_counter()
        later = (ended - stamps[0]) / (new - 1) if new > 1 else float("nan")
        return Timing(ids, stamps[0] - began, later)


def generators(config: GPTConfig, seed: int = 0) -> tuple[dict[str, Generator], list[str]]:
    """All that run here, our model first; and why the others do not."""
    dtype = torch.bfloat16 if harness.DEVICE.type == "cuda" else torch.float32
    model = random_model(config, seed).to(harness.DEVICE, dtype)
    int8 = quantize(copy.deepcopy(model))
    exact = model if dtype == torch.float32 else copy.deepcopy(model).float()
    found = {
        f"almostgpt, {'bf16' if dtype == torch.bfloat16 else 'fp32'}": ours(model, exact),
        "almostgpt, int8": ours(int8, dequantized(int8)),
    }
    if why := transformers_trouble(config):
        notes = [f"no transformers: {why}"]
    else:
        twin, notes = transformers_gpt2(model), []
        found["transformers"] = theirs(twin, exact, model)
        if harness.DEVICE.type == "cuda":
            if trouble := harness.compile_trouble():
                notes.append(f"no transformers, static cache, compiled: {trouble}")
            else:
                found["transformers, static cache, compiled"] = theirs(
                    twin, exact, model, cache_implementation="static"
                )
    found["almostgpt, no cache"] = ours(model, exact, cache="none")
    return found, notes


# ---------------------------------------------------------------- models


def random_model(config: GPTConfig, seed: int) -> GPT:
    """One whose greedy text depends on all of it.

    As it is initialised, a tied model draws its last token again and again, whatever its blocks do. So
    here their matrices pass on numbers larger than the embedding's; and norms and biases get their own.
    """
    torch.manual_seed(seed)
    with harness.DEVICE:
        model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.4 / parameter.shape[1] ** 0.5)
            else:
                parameter += 0.01 * torch.randn_like(parameter)
    return model


def dequantized(model: GPT) -> GPT:
    """The float32 model of what an int8 model's matrices stand for."""
    with model.device:
        plain = GPT(dataclasses.replace(model.config, quantize="none")).eval()
    matrices = {
        f"{name}.weight": module.dense(torch.float32)
        for name, module in model.named_modules()
        if isinstance(module, (Int8Linear, Int8Embedding))
    }
    state = {n: v for n, v in model.state_dict().items() if not n.endswith(".scales")}
    plain.load_state_dict(state | matrices)
    return plain


def transformers_trouble(config: GPTConfig) -> str | None:
    """Why transformers has no twin of such a model here, or None."""
    try:
        from transformers import GPT2LMHeadModel  # noqa: F401
    except ModuleNotFoundError:
        return "not installed (pip install -e '.[test]')"
    except Exception as error:  # of a version that does not go with this torch, …
        return f"it cannot be imported: {harness.first_line(error)}"
    other = [f"{part} {getattr(config, part)}" for part in GPT2_PARTS if not _as_gpt2(config, part)]
    return f"its GPT-2 has no {', '.join(other)}" if other else None


def _as_gpt2(config: GPTConfig, part: str) -> bool:
    return getattr(config, part) == GPT2_PARTS[part]


def transformers_gpt2(model: GPT) -> nn.Module:
    """transformers' GPT-2 with a model's weights; it never meets an end of text."""
    import transformers

    config = model.config
    with model.device:
        twin = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=config.vocab_size,
                n_positions=config.block_size,
                n_embd=config.n_embd,
                n_layer=config.n_layer,
                n_head=config.n_head,
                layer_norm_epsilon=config.norm_eps,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    state = {}
    for name, value in model.state_dict().items():
        in_block = name.startswith("blocks.")
        for our_part, their_part in GPT2_NAMES.items():
            name = name.replace(our_part, their_part)
        name = f"transformer.ln_f.{name[5:]}" if name.startswith("norm.") else name
        state[name] = value.t() if in_block and value.dim() == 2 else value  # its Conv1D: (in, out)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    twin.load_state_dict(state)
    return twin.to(model.dtype).eval()


# ---------------------------------------------------------------- ways to generate


def ours(model: GPT, exact: GPT, cache: str = "full") -> Generator:
    def run(prompts: Tensor, new: int, tick: Tick) -> Tensor:
        drawn = []
        for step in stream(model, prompts, new, temperature=0, cache=cache):
            tick()
            drawn.append(step.ids)
        return torch.stack(drawn, dim=1)

    return Generator(run, exact, None if cache == "none" else _step_bytes(model))


def theirs(twin: nn.Module, exact: GPT, model: GPT, **options: object) -> Generator:
    """``generate`` of transformers. model: ours, of as many bytes."""

    class Streamer:
        def __init__(self, tick: Tick):
            self.tick = tick

        def put(self, tokens: Tensor) -> None:
            if tokens.dim() == 1:  # the prompts come first, as a matrix
                self.tick()

        def end(self) -> None:
            pass

    def run(prompts: Tensor, new: int, tick: Tick) -> Tensor:
        ids = twin.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            do_sample=False,
            streamer=Streamer(tick),
            **options,
        )
        return ids[:, prompts.shape[1] :]

    return Generator(run, exact, _step_bytes(model))


def _step_bytes(model: GPT) -> Callable[[int, float], float]:
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    # Of a table of positions, and of one of tokens that is no output matrix, a row is read.
    tables = (
        [model.position] if model.config.tie_weights else [model.position, model.token_embedding]
    )
    weights -= sum(p.nbytes for table in tables for p in (*table.parameters(), *table.buffers()))
    config = model.config
    token = 2 * config.n_layer * config.n_kv_head * config.head_dim * model.dtype.itemsize
    return lambda batch, tokens: weights + batch * tokens * token


# ---------------------------------------------------------------- do they draw what they should?


@torch.no_grad()
def shortfall(generator: Generator, prompts: Tensor, drawn: Tensor) -> float:
    """How far a drawn token's logit lies below the largest one, at most, in deviations of all logits.

    By the exact model along the very text that was drawn: so a near tie that is decided the other way
    costs next to nothing, while a token drawn at random lies about 4 below.
    """
    worst = 0.0
    for prompt, new in zip(prompts, drawn, strict=True):
        text = torch.cat([prompt, new])[None, :-1]
        logits = generator.exact(text, all_logits=True)[0][0, len(prompt) - 1 :]
        below = logits.amax(-1) - logits.gather(-1, new[:, None])[:, 0]
        worst = max(worst, float((below / logits.std(-1)).max()))
    return worst

"""Which backend each part of a model uses, found by watching its own calls.

The model runs on fake tensors: they have shapes, dtypes and devices, but no data, so a step of any
size costs nothing, and a card need not be there. Every op that is called says which kernel it would
choose (``kernels.explain``, with the very arguments), and hooks say which part called it. So the answer
follows the code, whatever parts there are.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from almostgpt.config import Config, GPTConfig
from almostgpt.device import pick_precision
from almostgpt.errors import UserError
from almostgpt.inference.cache import KVCache
from almostgpt.inference.decoder import Decoder
from almostgpt.inference.sampling import Sampling
from almostgpt.kernels import use_backend
from almostgpt.kernels.dispatch import Card, Explanation, Op, observing
from almostgpt.model import GPT
from almostgpt.model.position import Position
from almostgpt.training.trainer import AUTOCAST

# What calls an op outside of every part.
_OUTSIDE = {"linear_cross_entropy": "loss", "cross_entropy": "loss", "sample": "sampling"}
_PROMPT = 16  # tokens that are in the cache before the one that is watched


@dataclass(frozen=True)
class Use:
    """What a part does by one op. Alike in several layers, it is one."""

    part: str  # attention_norm, attention, position, …, norm, head, loss, sampling
    kind: str  # the part's entry, such as "rmsnorm"
    blocks: tuple[int, ...]  # the layers; empty: it belongs to none
    modules: tuple[str, ...]  # whose calls they are, within the part: qkv, out
    dtypes: tuple[str, ...]  # of what the op is given
    op: str | None  # None: it calls no op of ours, PyTorch does it all
    backend: str
    kernel: str
    reasons: dict[str, str]  # why no other backend


def training_uses(config: Config, device: torch.device, card: Card | None = None) -> list[Use]:
    """Of a training step: forward with gradients, whose backward belongs to the same kernels.

    Args:
        config: resolved, with ``model.vocab_size``.
        device: the one that is asked about, where it is here.
        card: a card's compute capability instead, see ``kernels.explain``; autocast then goes by the
            rules that PyTorch has for ``device``.
    """
    dtype = AUTOCAST.get(config.training.precision)
    with _watching(config.model, torch.float32, device, card) as (model, watch):
        shape = (config.training.batch_size, config.model.block_size)
        ids = torch.zeros(shape, dtype=torch.int64, device=device)
        with nullcontext() if dtype is None else torch.autocast(device.type, dtype):
            model.train()(ids, ids)
    return watch.uses()


def generation_uses(
    config: Config, device: torch.device, card: Card | None = None, precision: str = "auto"
) -> list[Use]:
    """The same of decoding one token with a cache, after a short prompt. ``precision``: the weights'."""
    dtype = pick_precision(precision, device)
    if precision == "auto" and card is not None:
        dtype = torch.bfloat16
    with _watching(config.model, dtype, device, card) as (model, watch):
        most = config.model.block_size
        cache = KVCache.for_model(model.eval(), batch=1, tokens=most)
        decoder = Decoder(model, cache, Sampling(), seed=0, sequences=[0])
        prompt = max(1, min(_PROMPT, most - 1))
        decoder.begin([torch.zeros(prompt, dtype=torch.int64, device=device)])
        if prompt < most:  # else a token is all that there is
            watch.forget()
            decoder.step()
    return watch.uses()


# ---------------------------------------------------------------- watching


@dataclass(frozen=True)
class _Call:
    place: tuple[str, ...]  # ("blocks", "0", "attention", "qkv")
    explanation: Explanation | None  # None: the place was entered
    dtype: str = ""


class _Watch:
    """Collects the calls of ops, and where in the model each was made."""

    def __init__(self, model: GPT, card: Card | None):
        self.model, self.card = model, card
        self.calls: list[_Call] = []
        self._places: list[tuple[str, ...]] = [()]
        self._caller = contextvars.copy_context()  # in which no backend is forced but by the user
        for name, module in model.named_modules():
            if name:
                place = tuple(name.split("."))
                module.register_forward_pre_hook(functools.partial(self._enter, place))
                module.register_forward_hook(self._leave, always_call=True)
        # A position part is not called as a module, but by the methods that it has of its own.
        for name, method in vars(Position).items():
            own = getattr(type(model.position), name)
            if callable(method) and own is not method:
                watched = self._within("position", getattr(model.position, name))
                setattr(model.position, name, watched)

    def _enter(self, place: tuple[str, ...], _module: nn.Module, _inputs: object) -> None:
        self._places.append(place)
        self.calls.append(_Call(place, None))

    def _leave(self, _module: nn.Module, _inputs: object, _output: object) -> None:
        self._places.pop()

    def _within(self, part: str, method: Callable) -> Callable:
        @functools.wraps(method)
        def watched(*args, **kwargs):
            self._places.append((part,))
            self.calls.append(_Call((part,), None))
            try:
                return method(*args, **kwargs)
            finally:
                self._places.pop()

        return watched

    def tell(self, op: Op, args: tuple, kwargs: dict) -> None:
        """An op is called. What chooses looks at dispatch modes, and ours is not there otherwise."""
        with unset_fake_temporarily():
            explanation = self._caller.run(self._explain, op, args, kwargs)
        place = self._places[-1] or (_OUTSIDE.get(op.name, "head"),)
        given: Tensor = args[0]
        self.calls.append(_Call(place, explanation, str(given.dtype).removeprefix("torch.")))

    def _explain(self, op: Op, args: tuple, kwargs: dict) -> Explanation:
        try:
            return op.explain(*args, capability=self.card, **kwargs)
        except (
            UserError
        ) as error:  # a forced backend cannot run it: this is where one comes to see why
            return Explanation(op.name, "none", str(error), {})

    def forget(self) -> None:
        """What was seen up to here."""
        self.calls = []

    def uses(self) -> list[Use]:
        """In the order of the first calls; of what is alike in several layers or modules, one."""
        found: dict[tuple, list[_Call]] = {}
        parts = [_located(call.place)[1] for call in self.calls]
        busy = {
            p for p, call in zip(parts, self.calls, strict=True) if call.explanation is not None
        }
        for part, call in zip(parts, self.calls, strict=True):
            why = call.explanation
            if part is None or (why is None and part in busy):
                continue
            key = (part,) if why is None else (part, why.op, why.kernel, *why.reasons.items())
            found.setdefault(key, []).append(call)
        order = list(dict.fromkeys(parts))  # position is called within attention
        return sorted(map(self._use, found.values()), key=lambda use: order.index(use.part))

    def _use(self, calls: list[_Call]) -> Use:
        places = [_located(call.place) for call in calls]
        layers, parts, modules = zip(*places, strict=True)
        why = calls[0].explanation
        return Use(
            part=parts[0],
            kind=_kind(self.model.config, parts[0]),
            blocks=tuple(sorted({layer for layer in layers if layer is not None})),
            modules=tuple(dict.fromkeys(module for module in modules if module)),
            dtypes=tuple(dict.fromkeys(call.dtype for call in calls if call.dtype)),
            op=None if why is None else why.op,
            backend="PyTorch" if why is None else why.backend,
            kernel="its own ops" if why is None else why.kernel,
            reasons={} if why is None else why.reasons,
        )


def _located(place: tuple[str, ...]) -> tuple[int | None, str | None, str]:
    """The layer, the part and the module within it; no part: a whole block, or a dropout."""
    layer = None
    if place[0] == "blocks":
        if len(place) < 3:
            return None, None, ""
        layer, place = int(place[1]), place[2:]
    part, *within = place
    return layer, None if part == "dropout" else part, ".".join(within)


def _kind(config: GPTConfig, part: str) -> str:
    """What the configuration calls it."""
    kinds = {"attention": config.attention, "feedforward": config.feedforward}
    kinds |= dict.fromkeys(("attention_norm", "feedforward_norm", "norm"), config.norm)
    kinds |= {"position": config.position, "head": "tied" if config.tie_weights else "untied"}
    return kinds.get(part, "")


@contextmanager
def _watching(
    config: GPTConfig, dtype: torch.dtype, device: torch.device, card: Card | None
) -> Iterator[tuple[GPT, _Watch]]:
    """A model without data, which is watched while it runs; on the reference, which runs anywhere."""
    with torch.device("meta"):
        model = GPT(config).to(dtype)
    with FakeTensorMode():
        _without_data(model, device)
        watch = _Watch(model, card)
        with use_backend("reference"), observing(watch.tell):
            yield model, watch


def _without_data(model: GPT, device: torch.device) -> None:
    """Fake parameters and buffers on ``device`` in the place of those without one."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                if isinstance(tensor, nn.Parameter):
                    fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                tensors[name] = fake

"""One training step rehearsed on made-up tokens: its bytes without any data, its seconds with some.

The rehearsal runs the model, the optimizer and the order of the trainer's own step, so what it finds
follows the code, whatever parts a model is made of.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from almostgpt.config import Config, overlay
from almostgpt.model import GPT
from almostgpt.training.metrics import Stopwatch
from almostgpt.training.optimizer import build_optimizer
from almostgpt.training.process import prepare
from almostgpt.training.trainer import AUTOCAST

# What a measured pass may take, and all repetitions of it, in seconds.
PASS_SECONDS = 1.0
REPEAT_SECONDS = 2.0


class Rehearsal:
    """A model, its optimizer and one micro-batch of rows of ``block_size`` tokens.

    Left out of the trainer's step, as they are small: the loader, loss scaling, the check for
    non-finite values. Nothing is compiled. Every row is one document.
    """

    def __init__(self, config: Config, model: GPT):
        self.config, self.model = config, model
        self.optimizer = build_optimizer(model, config.optimizer)
        self.device = model.output_weight.device
        shape = (config.training.batch_size, config.model.block_size)
        self.ids = torch.randint(config.model.vocab_size, shape, device=self.device)

    def forward(self) -> Tensor:
        """The loss of the micro-batch."""
        dtype = AUTOCAST.get(self.config.training.precision)
        with nullcontext() if dtype is None else torch.autocast(self.device.type, dtype):
            return self.model(self.ids, self.ids)[1]

    def micro_batch(self) -> None:
        """Forward and backward; adds to the gradients."""
        self.forward().backward()

    def clip_and_update(self) -> None:
        """What a step does after its last micro-batch, but for dropping the gradients."""
        gradients = [p.grad for p in self.model.parameters()]
        norm = nn.utils.get_total_norm(gradients)
        if self.config.optimizer.clip > 0:
            nn.utils.clip_grads_with_norm_(
                self.model.parameters(), self.config.optimizer.clip, norm
            )
        self.optimizer.step()


# ---------------------------------------------------------------- bytes


@dataclass(frozen=True)
class StepBytes:
    """Bytes that a training step needs, each category at the time when it is largest."""

    weights: int  # parameters, and tables such as that of rotary positions
    gradients: int
    optimizer: int  # its state
    activations: int  # kept for backward by everything before the output projection
    logits_and_loss: (
        int  # most at a time between the final norm and the gradient that returns to it
    )
    peak: int  # most at a time of all; less than the sum, for not all are there at the same time


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, by what they are for.

    A storage counts once, whatever views it has, from the operation that makes it until nobody holds
    it. What an operation uses inside of itself is not seen.
    """

    supports_higher_order_operators = True  # a Triton kernel is called by one

    def __init__(self):
        super().__init__()
        self.purpose = "weights"  # of what is made from now on
        self.now: Counter[str] = Counter()  # bytes by purpose
        self.most: Counter[str] = Counter()
        self.peak = 0
        self._storages: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def serve(self, purpose: str) -> None:
        """What is made from now on is for ``purpose``."""
        self.purpose = purpose

    def move(self, tensor: Tensor, purpose: str) -> None:
        """The storage of ``tensor`` is for ``purpose`` from now on."""
        key = tensor.untyped_storage()._cdata
        before, size = self._storages[key]
        self._storages[key] = (purpose, size)
        self.now[before] -= size
        self._count(purpose, size)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = (self.purpose, storage.nbytes())
            weakref.finalize(storage, self._lose, key)
            self._count(self.purpose, storage.nbytes())

    def _count(self, purpose: str, size: int) -> None:
        self.now[purpose] += size
        self.most[purpose] = max(self.most[purpose], self.now[purpose])
        self.peak = max(self.peak, self.now.total())

    def _lose(self, key: int) -> None:
        purpose, size = self._storages.pop(key)
        self.now[purpose] -= size


def state_bytes(config: Config, device: torch.device) -> int:
    """Weights, gradients and optimizer state of ``config``: what is there whatever the micro-batch."""
    with FakeTensorMode(), LiveBytes() as live:
        _alive = _with_state(live, config, device)  # until its bytes are counted
        return sum(live.now[purpose] for purpose in ("weights", "gradients", "optimizer"))


def step_bytes(config: Config, device: torch.device) -> StepBytes:
    """What a step of ``config`` (resolved, with a vocabulary) needs on ``device``; allocates nothing.

    The step runs on fake tensors: shapes, dtypes and devices, but no data. Operations, autograd,
    checkpointing and the choice of kernels are the real ones. Buffers inside an operation and what an
    allocator loses are not counted.
    """
    with FakeTensorMode(), LiveBytes() as live:
        rehearsal = _with_state(live, config, device)
        weights, gradients, optimizer = (
            live.now[purpose] for purpose in ("weights", "gradients", "optimizer")
        )
        if config.training.accumulate == 1:  # else they are there from the second micro-batch on
            rehearsal.optimizer.zero_grad(set_to_none=True)

        def enter_loss(_norm: nn.Module, _inputs: object, output: tuple[Tensor, Tensor]) -> None:
            live.serve("loss")
            output[0].register_hook(lambda _: live.serve("backward"))

        rehearsal.model.norm.register_forward_hook(enter_loss)
        live.peak = live.now.total()
        live.serve("activations")
        loss = rehearsal.forward()
        activations = live.now["activations"]
        loss.backward()
        del loss
        rehearsal.clip_and_update()
        return StepBytes(weights, gradients, optimizer, activations, live.most["loss"], live.peak)


def _with_state(live: LiveBytes, config: Config, device: torch.device) -> Rehearsal:
    """A model with gradients and optimizer state, as it is before any step but the first."""
    with device:  # fake parameters cannot be moved to it
        model = GPT(config.model)
    live.serve("activations")
    rehearsal = Rehearsal(config, model)
    live.serve("gradients")
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
        parameter.register_post_accumulate_grad_hook(lambda p: live.move(p.grad, "gradients"))
    live.serve("optimizer")
    rehearsal.clip_and_update()
    return rehearsal


# ---------------------------------------------------------------- seconds


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of the parts of a run, and of what size the model was that they were measured with."""

    micro_batch: float  # forward and backward
    update: float  # clipping and the optimizer, once a step
    evaluation: float  # forward alone, without gradients
    layers: int
    rows: int


class BlockClock:
    """Seconds of a pass in the blocks and outside of them.

    Whatever the order of forward and backward, a pass is outside, in the blocks, outside, and with a
    backward in the blocks and outside once more.
    """

    def __init__(self, model: GPT, device: torch.device):
        self._clock = Stopwatch(device)
        self._laps: list[float] = []
        model.blocks[0].register_forward_pre_hook(self._first_block)
        model.norm.register_forward_pre_hook(self._boundary)

    def time(self, run: Callable[[], object]) -> tuple[float, float]:
        """Seconds of ``run`` outside of the blocks and in them, the device waited for."""
        self._laps = []
        self._clock.lap()
        run()
        self._laps.append(self._clock.lap())
        return sum(self._laps[::2]), sum(self._laps[1::2])

    def _first_block(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not self._laps:  # checkpointing calls the block again, in backward
            self._boundary(block, inputs)

    def _boundary(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._laps.append(self._clock.lap())
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda _: self._laps.append(self._clock.lap()))


def step_seconds(config: Config, device: torch.device, most_rows: int) -> StepSeconds:
    """Measures real passes of ``config`` (resolved, with a vocabulary) for a few seconds on ``device``.

    A first pass of two layers (with a ``window_pattern``, of all that it names) and one row tells what
    a full one would take. If it is short, the whole model is measured; else those layers of it, whose
    blocks then count as often as there are layers, while embedding, output projection and loss count
    once. So no small difference of large times is ever extrapolated. Where not all rows are affordable
    as many are taken as are, and time is proportional to rows from there on.

    Args:
        most_rows: a micro-batch that fits into memory, at least 1.
    """
    prepare(config, device)
    layers, wanted = config.model.n_layer, config.training.batch_size
    few = min(max(2, len(config.model.window_pattern or "")), layers)
    fitting = min(wanted, most_rows)
    found = _measure(config, device, few, rows=1)
    whole = found.micro_batch * fitting <= PASS_SECONDS
    rows = fitting
    if not whole:  # rather few layers than few rows, which read and write the weights for little
        row_seconds = found.micro_batch * few / layers
        rows = max(1, min(fitting, int(PASS_SECONDS / row_seconds)))
    measured = layers if whole else few
    if (measured, rows) != (few, 1):
        found = _measure(config, device, measured, rows)
    return dataclasses.replace(
        found,
        micro_batch=found.micro_batch * wanted / rows,
        evaluation=found.evaluation * wanted / rows,
    )


def _measure(config: Config, device: torch.device, layers: int, rows: int) -> StepSeconds:
    """The least of a few times for ``rows`` rows of the whole model, from one of so many layers."""
    settings = {"model.n_layer": layers, "training.batch_size": rows}
    config_here = overlay(config, settings)
    model = GPT(config_here.model).to(device)
    rehearsal = Rehearsal(config_here, model)
    clock = BlockClock(model, device)
    repeats = config.model.n_layer / layers

    def seconds(run: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
        taken, spent = [], 0.0
        while len(taken) < 3 or (len(taken) < 9 and spent < REPEAT_SECONDS):
            before()
            outside, inside = clock.time(run)
            spent += outside + inside
            taken.append(outside + inside * repeats)
        # What else the machine does only ever adds to a time.
        return min(taken)

    rehearsal.micro_batch()  # the first of all is slower: memory is claimed, libraries wake up
    rehearsal.clip_and_update()
    micro_batch = seconds(
        rehearsal.micro_batch, lambda: rehearsal.optimizer.zero_grad(set_to_none=True)
    )
    update = seconds(rehearsal.clip_and_update)
    model.eval()
    with torch.no_grad():
        evaluation = seconds(rehearsal.forward)
    parameters = model.num_parameters()
    block = sum(p.numel() for p in model.blocks[0].parameters())
    grown = 1 + block * (config.model.n_layer - layers) / parameters
    return StepSeconds(micro_batch, update * grown, evaluation, layers, rows)

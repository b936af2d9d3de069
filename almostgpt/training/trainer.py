"""The training loop."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from almostgpt import checkpoint
from almostgpt.config import Config
from almostgpt.config_file import load_config
from almostgpt.data.dataset import Dataset
from almostgpt.data.loader import TokenLoader, document_start
from almostgpt.data.mixture import Mixture
from almostgpt.data.prefetch import Prefetcher
from almostgpt.device import random_state, set_random_state
from almostgpt.errors import UserError
from almostgpt.model import GPT
from almostgpt.training.initial import load_initial_weights
from almostgpt.training.metrics import (
    StepLog,
    Stopwatch,
    finite,
    flops_per_token,
    memory_bytes,
    peak_flops,
    plot_loss,
    read_metrics,
)
from almostgpt.training.optimizer import (
    FUSED_DEVICES,
    FiniteGuard,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
)
from almostgpt.training.process import prepare
from almostgpt.training.progress import PlainProgress
from almostgpt.training.schedule import learning_rate

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingDiverged(UserError):
    """A loss or gradient became infinite or NaN."""


class Trainer:
    """Trains one model in one run folder, from the newest whole checkpoint in it or from step 0.

    Everything that decides what the next step computes (weights, optimizer, random state, position in
    the data, loss scale) is in a checkpoint, so a run that was killed and resumed takes the same steps
    as one that was not.

    Args:
        config: resolved, with ``model.vocab_size`` set.
        dataset: the prepared tokens, of one set or of a mixture.
        run: the run folder; nothing is written into it before :meth:`train`.
        device: where the model lives.
        resume_from: the checkpoint to go on from; by default the newest whole one in ``run``.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset | Mixture,
        run: Path,
        device: torch.device,
        resume_from: Path | None = None,
    ):
        self.config, self.dataset, self.run, self.device = config, dataset, run, device
        if config.training.precision == "fp16" and device.type == "mps":
            raise UserError("training.precision=fp16 has no loss scaling on mps; use bf16 or fp32")
        if config.training.compile and device.type == "cpu" and not _has_cpp_compiler():
            raise UserError(
                "training.compile needs a C++ compiler on a CPU; install g++ or leave it off"
            )
        prepare(config, device)
        # Before the model is built: a text that is too small is an error now, not in an hour.
        self.loader = self._loader("train")
        self.val_loader = self._loader("val")
        torch.manual_seed(config.seed)  # weights and dropout
        self.model = GPT(config.model).to(device)
        self.forward = torch.compile(self.model) if config.training.compile else self.model
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.training.precision == "fp16")
        self.guard = FiniteGuard(
            device, immediate=device.type == "cpu" or device.type not in FUSED_DEVICES
        )
        self.tokens_per_step = (
            config.training.batch_size * config.training.accumulate * config.model.block_size
        )
        self.flops_per_token = flops_per_token(self.model, config.model.block_size)
        self.peak_flops = peak_flops(device, config.training.precision)
        self.step_number = 0
        self.seconds = 0.0  # spent training, over all sessions of the run
        self.last: dict[str, Any] = {}  # newest metrics
        self.stop_signal: str | None = None
        self._restore(resume_from)
        self._try_out()
        self.batches = Prefetcher(self.loader, device)

    # ------------------------------------------------------------ the loop

    def train(self, progress: PlainProgress) -> dict[str, Any]:
        """Takes the steps that are left; returns the result that the command line prints.

        Raises:
            TrainingDiverged: a loss or gradient is not finite; the weights are those before it.
            UserError: the device's memory does not hold a step.
        """
        try:
            self._loop(progress)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory on {self.device} in step {self.step_number + 1}: lower "
                "training.batch_size and raise training.accumulate by the same factor, or set "
                "model.gradient_checkpointing=selective (less memory still: full)"
            ) from error
        plot_loss(read_metrics(self.run / "metrics.jsonl"), self.run / "loss.png", self.run.name)
        return self.result()

    def _loop(self, progress: PlainProgress) -> None:
        training = self.config.training
        clock = Stopwatch(self.device)
        saved = logged = self.step_number
        metrics = StepLog(self.run / "metrics.jsonl", self.step_number)
        self.samples = StepLog(self.run / "samples.jsonl", self.step_number)
        try:
            with self._stop_on_signals(), progress:
                while self.step_number < training.steps and self.stop_signal is None:
                    step = self.step_number + 1
                    lr = learning_rate(self.config, step)
                    loss, norm = self.step(step, lr)
                    self.step_number = step
                    final = step == training.steps
                    evaluating = final or _due(step, training.eval_every)
                    if step == 1 or evaluating or _due(step, training.log_every):
                        self._measure(loss, norm, lr, steps=step - logged, seconds=clock.lap())
                        logged = step
                        with clock.paused():
                            if evaluating:
                                self.last["val_loss"] = self.validation_loss()
                            metrics.write(self._line(evaluating))
                            self._show(progress)
                    if _due(step, training.sample_every):
                        with clock.paused():
                            progress.note(self._sample(step))
                    if final or _due(step, self.config.checkpoint.every):
                        with clock.paused():
                            self.save()
                        saved = step
                if self.step_number > saved:  # a signal came between two checkpoints
                    self.save()
        finally:
            self.batches.close()
            metrics.close()
            self.samples.close()

    def _measure(
        self, loss: Tensor, norm: Tensor, lr: float, *, steps: int, seconds: float
    ) -> None:
        """Reads the newest step's values and the speed since the last log point into ``self.last``."""
        self._raise_if_diverged()
        rate = steps * self.tokens_per_step / seconds
        self.seconds += seconds
        self.last |= {
            "step": self.step_number,
            "loss": float(loss),
            "lr": lr,
            "grad_norm": float(norm),
            "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token / self.peak_flops if self.peak_flops else None,
            "seconds": self.seconds,
        }
        if self.config.model.feedforward == "moe":  # of the newest micro-batch
            load = self.model.expert_load.tolist()
            self.last["expert_load"] = [[round(share, 4) for share in layer] for layer in load]

    def _line(self, evaluating: bool) -> dict[str, Any]:
        """What goes into metrics.jsonl: no MFU where the peak is unknown, a val_loss only when new."""
        left_out = {"mfu"} if self.last["mfu"] is None else set()
        left_out |= set() if evaluating else {"val_loss"}
        return {key: value for key, value in self.last.items() if key not in left_out}

    def _show(self, progress: PlainProgress) -> None:
        steps = self.config.training.steps
        left = (steps - self.step_number) * self.seconds / self.step_number
        shown = {**self.last, "memory": memory_bytes(self.device)}
        progress.step(self.step_number, steps, shown, left)

    def result(self) -> dict[str, Any]:
        """What the command line prints as its last line."""
        rate = (
            self.tokens_per_step * self.last.get("step", 0) / self.seconds if self.seconds else None
        )
        result = {
            "run": str(self.run),
            "steps": self.step_number,
            "loss": self.last.get("loss"),
            "val_loss": self.last.get("val_loss"),
            "tokens_per_second": rate,  # of the whole run; metrics.jsonl has each interval's
            "seconds": self.seconds,
        }
        return result | ({"stopped_by": self.stop_signal} if self.stop_signal else {})

    def step(self, step: int, lr: float) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns its mean loss and the gradient norm before clipping, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        accumulate = self.config.training.accumulate
        total = torch.zeros((), device=self.device)
        for _ in range(accumulate):
            batch = self.batches.next_batch()
            with self._autocast():
                _, loss = self.forward(*batch)
                loss = loss / accumulate
            total += loss.detach()
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)  # before clipping: the limit is for true gradients
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        clip = self.config.optimizer.clip
        # Where reading the norm costs nothing, gradients that are short enough are not passed over.
        if clip > 0 and not (self.guard.immediate and norm <= clip):
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), clip, norm)
        # Overflowing gradients are what loss scaling expects: it skips the step and lowers the scale.
        self.guard.check(step, *([total] if self.scaler.is_enabled() else [total, norm]))
        if self.guard.immediate:
            self._raise_if_diverged()
        elif not self.scaler.is_enabled():
            self.guard.hold_back(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss in nats per token over the same ``training.eval_batches`` batches every time."""
        total = torch.zeros((), device=self.device)
        self.model.eval()
        self.val_loader.row = 0
        with Prefetcher(self.val_loader, self.device) as batches:
            for _ in range(self.config.training.eval_batches):
                batch = batches.next_batch()
                with self._autocast():
                    _, loss = self.forward(*batch)
                total += loss
        self.model.train()
        return float(total) / self.config.training.eval_batches

    # ------------------------------------------------------------ pieces of a step

    def _loader(self, split: str) -> TokenLoader:
        """From the first batch of ``split`` (train or val) on."""
        data = self.config.data
        return TokenLoader(
            getattr(self.dataset, split),
            block_size=self.config.model.block_size,
            batch_size=self.config.training.batch_size,
            seed=self.config.seed,
            sampling=data.sampling,
            vocab_size=self.config.model.vocab_size,
            end_of_text=document_start(data.documents, self.dataset.tokenizer, data.sampling),
            packed=data.documents == "packed",
            weights=self.dataset.weights,
            split=split,
        )

    def _autocast(self):
        dtype = AUTOCAST.get(self.config.training.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _raise_if_diverged(self) -> None:
        bad = self.guard.first_bad_step()
        if bad is None and self.scaler.is_enabled() and self.scaler.get_scale() < 2**-10:
            bad = self.step_number  # scaled down as far as that, the gradients still overflow
        if bad is not None:
            raise TrainingDiverged(
                f"the loss or a gradient is not finite at step {bad}; that step reached neither the "
                f"weights nor a checkpoint in {self.run}. Start a new run with a lower "
                "optimizer.lr, a longer schedule.warmup_steps, or training.precision=fp32"
            )

    def _sample(self, step: int) -> str:
        """Text from the model, also written to samples.jsonl; leaves the training's random state alone.

        Never ends a run: past the positions it goes without a cache, and where it cannot, it says why.
        """
        tokenizer = self.dataset.tokenizer
        generator = torch.Generator().manual_seed(self.config.seed + step)
        prompt = torch.randint(tokenizer.vocab_size, (1, 1), generator=generator).to(self.device)
        tokens = self.config.training.sample_tokens
        fits = self.model.endless or 1 + tokens <= self.config.model.block_size
        try:
            ids = self.model.generate(
                prompt,
                tokens,
                temperature=0.8,
                top_k=200,
                seed=self.config.seed + step,
                cache="auto" if fits else "none",
                vocab_size=tokenizer.vocab_size,
            )
        except UserError as error:
            return f"--- no sample after step {step}: {error}\n"
        text = tokenizer.decode(ids[0].tolist())
        self.samples.write({"step": step, "text": text})
        return f"--- sample after step {step}\n{text}\n"

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the loop after the step under way; a second one ends the process."""

        def stop(number: int, _frame: object) -> None:
            self.stop_signal = signal.Signals(number).name
            signal.signal(number, before[number])

        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ------------------------------------------------------------ checkpoints

    def save(self) -> Path:
        """Writes a checkpoint of this moment."""
        self._raise_if_diverged()
        return checkpoint.save(
            self.run,
            self.step_number,
            config=self.config,
            tokenizer=self.dataset.tokenizer,
            weights=self.model.state_dict(),
            optimizer=optimizer_tensors(self.optimizer, self.model),
            state={
                "step": self.step_number,
                "seconds": self.seconds,
                "last": finite(self.last),
                "data": self.dataset.fingerprint,
                "loader": self.batches.state_dict(),
                "scaler": self.scaler.state_dict(),
                "random": random_state(self.device),
            },
            keep=self.config.checkpoint.keep,
        )

    def _try_out(self) -> None:
        """One token through the model: a forced backend that cannot serve it is an error here."""
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        cu_seqlens = None
        if self.loader.packed:
            cu_seqlens = torch.arange(2, dtype=torch.int32, device=self.device)
        with torch.no_grad(), self._autocast():
            self.model.eval()(ids, cu_seqlens=cu_seqlens)
        self.model.train()

    def _check_nothing_is_lost(self) -> None:
        """A run that logged steps beyond its first checkpoint had one: do not start it anew."""
        logged = max((line["step"] for line in read_metrics(self.run / "metrics.jsonl")), default=0)
        if logged and logged > load_config(self.run / "config.yaml").checkpoint.every:
            raise UserError(
                f"{self.run}: metrics.jsonl goes to step {logged}, but there is no checkpoint in "
                "it any more; bring checkpoints/ back, or start a new run with another --out"
            )

    def _restore(self, folder: Path | None) -> None:
        """Goes to ``folder``, or to the newest whole checkpoint of the run, if it has one."""
        folder = folder or checkpoint.newest(self.run)
        if folder is None:
            self._check_nothing_is_lost()
            if self.config.init is not None:
                load_initial_weights(self.model, self.config.init)
            return
        saved = checkpoint.read(folder)
        if saved.state["data"] != self.dataset.fingerprint:
            raise UserError(
                f"--resume: the data is not what {self.run} was trained on (its content or tokenizer "
                "changed); bring the old data back or start a new run"
            )
        checkpoint.load_weights(self.model, saved.weights, folder)
        load_optimizer_tensors(self.optimizer, self.model, saved.optimizer)
        self.loader.load_state_dict(saved.state["loader"])
        self.scaler.load_state_dict(saved.state["scaler"])
        set_random_state(saved.state["random"], self.device)
        self.step_number = saved.state["step"]
        self.seconds = saved.state["seconds"]
        self.last = saved.state["last"]


def _has_cpp_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++"))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0

"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from almostgpt.config import Config


def _cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine (Loshchilov & Hutter 2017)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def _constant(progress: float) -> float:
    return 1.0


SCHEDULES = {"cosine": _cosine, "constant": _constant}


def learning_rate(config: Config, step: int) -> float:
    """The rate of step 1, 2, … of a resolved configuration.

    Linear from 0 over ``warmup_steps``, which reaches the peak, then from ``optimizer.lr`` to
    ``schedule.min_lr`` at ``decay_steps``, and ``min_lr`` from there on.
    """
    schedule, peak = config.schedule, config.optimizer.lr
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    decay = schedule.decay_steps - schedule.warmup_steps
    progress = min(1.0, (step - schedule.warmup_steps) / decay) if decay > 0 else 1.0
    return schedule.min_lr + (peak - schedule.min_lr) * SCHEDULES[schedule.name](progress)

"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from almostgpt.config import Config, ScheduleConfig


def _progress(step: int, begin: float, end: float) -> float:
    """How far ``step`` is on the way from ``begin`` to ``end``, in [0, 1]."""
    return min(1.0, max(0.0, (step - begin) / (end - begin))) if end > begin else 1.0


def _cosine(schedule: ScheduleConfig, step: int) -> float:
    """From 1 to 0 along half a cosine (Loshchilov & Hutter 2017)."""
    progress = _progress(step, schedule.warmup_steps, schedule.decay_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def _wsd(schedule: ScheduleConfig, step: int) -> float:
    """1 until the last ``decay_fraction`` of ``decay_steps``, then linear to 0 (Hu et al. 2024)."""
    stable_until = schedule.decay_steps * (1 - schedule.decay_fraction)
    return 1 - _progress(step, max(schedule.warmup_steps, stable_until), schedule.decay_steps)


def _constant(schedule: ScheduleConfig, step: int) -> float:
    return 1.0


# The share of the way from min_lr up to the peak, at a step after the warm-up.
SCHEDULES = {"cosine": _cosine, "wsd": _wsd, "constant": _constant}


def learning_rate(config: Config, step: int) -> float:
    """The rate of step 1, 2, … of a resolved configuration.

    Linear from 0 over ``warmup_steps``, which reaches the peak, then from ``optimizer.lr`` to
    ``schedule.min_lr`` at ``decay_steps``, and ``min_lr`` from there on.
    """
    schedule, peak = config.schedule, config.optimizer.lr
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    return schedule.min_lr + (peak - schedule.min_lr) * SCHEDULES[schedule.name](schedule, step)

"""Learning-rate schedules: plain functions of the epochs and optimisation steps done.

A resumed run therefore needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

Schedule = Callable[[float, int], float]
"""(epochs done, with a fraction for the current one; optimisation steps done) → factor on a group's
learning rate."""


def constant(epoch: float, step: int) -> float:
    """The learning rate as given."""
    return 1.0


class Rates(NamedTuple):
    """How the rates of a run move.

    Attributes:
        schedule: of all groups that have none of their own.
        momentum: schedule of the momentum (Adam's first beta) of the same groups; None leaves it
            constant.
        least: the rate when `schedule` is 0, the same for all groups: torch's `eta_min`.
        warmup: steps during which all rates rise linearly to what their schedules say.
    """

    schedule: Schedule = constant
    momentum: Schedule | None = None
    least: float = 0.0
    warmup: int = 0


def step_decay(every: int, gamma: float) -> Schedule:
    """gamma^(epoch // every): the published schedules' StepLR, by epochs."""
    return lambda epoch, step: gamma ** (int(epoch) // every)


def milestones(steps: Sequence[int], gamma: float) -> Schedule:
    """gamma^(milestones passed), by optimisation steps."""
    return lambda epoch, step: gamma ** sum(step >= milestone for milestone in steps)


def rise(total_steps: int, warmup: int | None) -> int:
    """Steps before the cosine begins: those of the warm-up, or of its own rise if there is none."""
    return max(1, round(0.1 * total_steps)) if warmup is None else warmup


def cosine(
    total_steps: int,
    steps_per_epoch: int | None = None,
    *,
    warmup: int | None = None,
    floor: float = 0.0,
    length: int | None = None,
) -> Schedule:
    """Linear from 0 during a tenth of all steps, then half a cosine from 1 down to `floor`.

    With `steps_per_epoch` it follows the epochs instead of the steps, so that it ends with the last
    epoch even if epochs turn out longer or shorter, as they do in divide and conquer.

    Args:
        total_steps: of the run.
        warmup: steps of a warm-up of all groups (see `Rates`), after which the cosine begins with
            no rise of its own. 0 means neither a warm-up nor a rise.
        floor: the factor at the end of the cosine.
        length: steps after which the cosine ends; None is the end of the run. A longer cosine is
            cut off by the end of the run. After a shorter one the rates rise again, as with torch's
            `CosineAnnealingLR`.
    """
    end, rising = length or total_steps, rise(total_steps, warmup)

    def factor(epoch: float, step: int) -> float:
        position = step if steps_per_epoch is None else epoch * steps_per_epoch
        if position < rising:
            return min(1.0, (position + 1) / rising) if warmup is None else 1.0
        done = (position - rising) / max(1, end - rising)
        done = done if length else min(1.0, done)
        return floor + (1 - floor) * (0.5 * (1 + math.cos(math.pi * done)))

    return factor


def one_cycle(total_steps: int, steps_per_epoch: int | None = None) -> tuple[Schedule, Schedule]:
    """The rate and the momentum of torch's `OneCycleLR` with `pct_start` .1, as UNICOM has it.

    The factor on the rate goes from 1/25 up to 1 in the first tenth and down to 1/250,000 at the
    end, the momentum from .95 down to .85 and back, each in half cosines. `steps_per_epoch` is that
    of `cosine`. (Smith and Topin, Super-Convergence, 2017.)

    Returns:
        Two schedules: factors on the rate, and the momentum itself.
    """

    def cycle(begin: float, top: float, end: float) -> Schedule:
        peak = 0.1 * total_steps - 1

        def value(epoch: float, step: int) -> float:
            position = step if steps_per_epoch is None else epoch * steps_per_epoch
            if position < peak:
                return _half_cosine(begin, top, position / peak)
            return _half_cosine(top, end, (position - peak) / max(1, total_steps - 1 - peak))

        return value

    return cycle(1 / 25, 1.0, 1 / 25e4), cycle(0.95, 0.85, 0.95)


def _half_cosine(start: float, end: float, done: float) -> float:
    """Half a cosine from `start` to `end`, of which the fraction `done` has passed."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

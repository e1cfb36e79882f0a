"""How far a run is, when it evaluates, saves and ends, and what happened since the last row."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from flags import Options
from net.replay import CALLS_BEFORE


@dataclass
class Clock:
    """Where a run stands.

    Attributes:
        epoch, step: done so far. step_in_epoch: steps done of the running epoch.
        begun: whether the routines have begun the running epoch (`Routine.begin_epoch`).
        best, best_epoch: the highest R@1 so far, and the epoch after which it was reached.
        seconds: of training, evaluations not counted.
    """

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    begun: bool = False
    best: float = -1.0
    best_epoch: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Length:
    """When a run ends, and when it evaluates and saves before that; see the flags of these names.

    If `steps` is given, it decides when the run ends, and `epochs` is only an estimate: epochs
    differ in length when clusters are trained.
    """

    epochs: int
    steps: int | None = None
    max_steps: int | None = None
    eval_every: int = 1
    eval_steps: int | None = None
    save_every: int | None = None

    @classmethod
    def of(cls, options: Options, steps_per_epoch: int) -> Length:
        """From the options of these names."""
        given = {name: getattr(options, name) for name in cls.__dataclass_fields__}
        if given["steps"]:
            given["epochs"] = math.ceil(given["steps"] / steps_per_epoch)
        return cls(**given)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimisation steps of the whole run."""
        return self.steps or self.epochs * steps_per_epoch

    def last_step(self, steps_per_epoch: int) -> int:
        """The step at which it ends: that of the whole run, or --max-steps before it."""
        total = self.total_steps(steps_per_epoch)
        return min(total, self.max_steps or total)

    def epochs_begun(self, steps_per_epoch: int) -> int:
        """How many epochs the run begins, if all have `steps_per_epoch` steps."""
        return math.ceil(self.last_step(steps_per_epoch) / steps_per_epoch)

    def evaluates_once(self, steps_per_epoch: int) -> bool:
        """Whether the only evaluation is the one at the end, so that no epoch is picked."""
        every = self.eval_steps or self.eval_every * steps_per_epoch
        return every >= self.last_step(steps_per_epoch)

    def steps_left(self, clock: Clock, steps_per_epoch: int) -> int:
        """Optimisation steps to the end of the run."""
        return self.last_step(steps_per_epoch) - clock.step

    def place(self, epoch: int, step: int) -> str:
        """How far a run is, in words; by steps with --steps, as epochs may differ in length."""
        if self.steps:
            return f"epoch {epoch:>3}, step {step}/{self.steps}"
        return f"epoch {epoch:>3}/{self.epochs}"

    def is_over(self, clock: Clock) -> bool:
        """Whether all epochs, or all of --steps or --max-steps, are done."""
        ended = clock.epoch >= self.epochs and not self.steps
        return ended or any(limit and clock.step >= limit for limit in (self.steps, self.max_steps))

    def evaluates_at(self, clock: Clock) -> bool:
        """Whether --eval-steps wants an evaluation after this step."""
        return bool(self.eval_steps) and clock.step % self.eval_steps == 0

    def saves_at(self, clock: Clock) -> bool:
        """Whether --save-every wants a checkpoint after this step."""
        return bool(self.save_every) and clock.step % self.save_every == 0

    def evaluation_due(self, clock: Clock) -> bool:
        """Whether to evaluate now: every --eval-steps or --eval-every epochs, and at the end."""
        if self.is_over(clock) or self.evaluates_at(clock):
            return True
        ended = clock.step_in_epoch == 0
        return not self.eval_steps and ended and clock.epoch % self.eval_every == 0

    def epochs_between_evaluations(self, steps_per_epoch: int) -> int:
        """The largest number of epochs between two evaluations, at least one."""
        return math.ceil(self.eval_steps / steps_per_epoch) if self.eval_steps else self.eval_every


@dataclass
class Estimate:
    """Estimates once, from the first steps after the start, how long the rest of a run takes.

    The very first steps are not counted, because libraries set themselves up in them, and on a GPU
    one of them is recorded (net/replay.py).
    """

    not_counted: int = 2
    counted: int = 10
    steps: int = 0
    seconds: float = 0.0

    @classmethod
    def on(cls, device: torch.device) -> Estimate:
        """For a run on this device."""
        return cls(CALLS_BEFORE + 2) if device.type == "cuda" else cls()

    @property
    def waits(self) -> bool:
        """Whether to wait for the GPU now, before the next step.

        True before the last step that is not counted and before the last that is: then one step's
        work is still to be done by the GPU when the clock starts, and when it stops.
        """
        return self.steps + 1 in (self.not_counted, self.not_counted + self.counted)

    def after(self, seconds: float, steps_left: int) -> float | None:
        """Seconds that are left, after the one step at which that is known; None after others."""
        self.steps += 1
        if self.steps > self.not_counted:
            self.seconds += seconds
        if self.steps != self.not_counted + self.counted:
            return None
        return steps_left * self.seconds / self.counted


@dataclass
class Lap:
    """What happened since the last row of metrics.csv.

    Sums of 0-d tensors stay on the device until they are read.
    """

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Adds one step's values."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
            self.counts[name] = self.counts.get(name, 0) + 1

    def summary(self) -> dict[str, float]:
        """Means of all values, images per second, and the share of time spent on waiting."""
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        seconds = max(self.seconds, 1e-9)
        return {
            **means,
            "images_per_second": self.images / seconds,
            "data_wait": self.waited / seconds,
        }

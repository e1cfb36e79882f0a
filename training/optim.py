"""Parameter groups, their optimisers and their learning-rate schedules.

The network and every criterion say how their parameters are trained (`parameter_groups(lr)`); this
file turns the groups into optimisers. A group is a dict with `name`, `params`, `lr` and, where it
differs from the rest, `weight_decay`, `optimizer`, or `step` and `gamma` (a step decay of its own).
A schedule is a plain function of the epochs and optimisation steps done, so a resumed run needs no
scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import torch
from torch import nn

import processes

Schedule = Callable[[float, int], float]
"""(epochs done, with the part of the present one; optimisation steps done) → factor on a group's
learning rate."""


def constant(epoch: float, step: int) -> float:
    """The learning rate as given."""
    return 1.0


def step_decay(every: int, gamma: float) -> Schedule:
    """gamma^(epoch // every): the published schedules' StepLR, by epochs."""
    return lambda epoch, step: gamma ** (int(epoch) // every)


def milestones(steps: Sequence[int], gamma: float) -> Schedule:
    """gamma^(milestones passed), by optimisation steps."""
    return lambda epoch, step: gamma ** sum(step >= milestone for milestone in steps)


def cosine(total_steps: int, steps_per_epoch: int | None = None, rise: float = 0.1) -> Schedule:
    """Linear from 0 during the share `rise` of all steps, then half a cosine down to 0.

    With `steps_per_epoch` it follows the epochs, which may turn out longer or shorter (those of
    divide and conquer do): it reaches 0 at the end of the last, not before and not never.
    """
    rising = max(1, round(rise * total_steps))

    def factor(epoch: float, step: int) -> float:
        position = step if steps_per_epoch is None else epoch * steps_per_epoch
        if position < rising:
            return min(1.0, (position + 1) / rising)
        done = min(1.0, (position - rising) / max(1, total_steps - rising))
        return 0.5 * (1 + math.cos(math.pi * done))

    return factor


def _make(name: str, groups: list[dict], weight_decay: float) -> torch.optim.Optimizer:
    fused = {"fused": True} if _can_fuse(groups) else {}
    match name:
        case "adamw":
            return torch.optim.AdamW(groups, weight_decay=weight_decay, **fused)
        case "adam":
            return torch.optim.Adam(groups, weight_decay=weight_decay, **fused)
        case "sgd":
            return torch.optim.SGD(
                groups, lr=0.0, momentum=0.9, nesterov=True, weight_decay=weight_decay, **fused
            )
        case "rmsprop":
            return torch.optim.RMSprop(groups, alpha=0.9, momentum=0.9, weight_decay=weight_decay)
    raise ValueError(f"unknown optimizer {name!r}; choose adamw, adam, sgd or rmsprop")


def _can_fuse(groups: list[dict]) -> bool:
    parameters = [parameter for group in groups for parameter in group["params"]]
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)


def _total_norm(parameters: list[nn.Parameter]) -> torch.Tensor:
    """0-d: the norm of all gradients together, in one pass over them."""
    return nn.utils.get_total_norm(parameter.grad for parameter in parameters)


class Optimisers:
    """One or more torch optimisers that step together, each group on its own schedule.

    torch's are made when they are first asked for: the first one of a process loads torch's
    compiler, which takes a second or two that nobody has to wait for to see what would run.

    Args:
        groups: parameter groups (see the file's header); empty groups are dropped.
        optimizer: adamw, adam, sgd (momentum .9, Nesterov) or rmsprop (alpha .9, momentum .9), for
            the groups that name none.
        weight_decay: for the groups that name none.
        schedule: for the groups without a `step` and `gamma` of their own.
        clip: limit on the absolute value of each gradient entry; 0 is none.
        scaler: of the mixed precision; disabled unless fp16.
    """

    def __init__(
        self,
        groups: Iterable[dict],
        *,
        optimizer: str,
        weight_decay: float,
        schedule: Schedule,
        clip: float = 0.0,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.clip = clip
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        self._weight_decay = weight_decay
        # Groups of one kind share an optimiser; a second one is made only for another kind.
        self._members: dict[str, list[dict]] = {}
        self._schedules: dict[str, Schedule] = {}
        self._holds: dict[str, float] = {}
        for group in groups:
            group = {**group, "params": list(group["params"])}
            if not group["params"]:
                continue
            every, gamma = group.pop("step", None), group.pop("gamma", None)
            own = every is not None
            self._schedules[group["name"]] = step_decay(every, gamma) if own else schedule
            group["base_lr"] = group["lr"]
            self._members.setdefault(group.pop("optimizer", optimizer), []).append(group)

    @cached_property
    def optimisers(self) -> list[torch.optim.Optimizer]:
        """torch's, one for each kind."""
        return [_make(kind, part, self._weight_decay) for kind, part in self._members.items()]

    @property
    def kinds(self) -> list[str]:
        """The kind of each."""
        return list(self._members)

    @property
    def groups(self) -> list[dict]:
        """All parameter groups, in the order given within each optimiser."""
        return [group for optimiser in self.optimisers for group in optimiser.param_groups]

    def hold(self, name: str, factor: float) -> None:
        """Multiplies the rate of a group, and of its `vectors`, on top of its schedule."""
        self._holds |= {name: factor, f"{name} vectors": factor}

    def replace(self, name: str, parameters: list[nn.Parameter]) -> None:
        """Gives a group other parameters and fresh moments; with none it trains no more."""
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                if group["name"] == name:
                    for parameter in group["params"]:
                        optimiser.state.pop(parameter, None)
                    group["params"] = parameters

    def set_learning_rates(self, epoch: float, step: int) -> None:
        """Sets every group's rate for the step that follows `step` done ones, after `epoch`s."""
        for group in self.groups:
            name = group["name"]
            factor = self._schedules[name](epoch, step) * self._holds.get(name, 1.0)
            group["lr"] = group["base_lr"] * factor

    def step(
        self, loss: torch.Tensor, epoch: float, step: int, *, careful: bool = False
    ) -> torch.Tensor:
        """Backward, sum over processes, unscale, clip, and one update of every group.

        Args:
            loss: 0-d, with its graph.
            epoch, step: epochs (and the part of this one), and optimisation steps, done before.
            careful: leave the update out when the loss or a gradient is not finite; this waits for
                the device.

        Returns:
            0-d bool on the device: whether loss and gradients were finite. A scaler deals with
            gradients that overflow by itself, so under one only the loss counts.
        """
        self.set_learning_rates(epoch, step)
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        processes.sum_gradients(p for group in self.groups for p in group["params"])
        for optimiser in self.optimisers:
            self.scaler.unscale_(optimiser)
        parameters = [p for group in self.groups for p in group["params"] if p.grad is not None]
        finite = loss.detach().isfinite()
        if parameters and not self.scaler.is_enabled():
            finite = finite & _total_norm(parameters).isfinite()
        finite = processes.in_all(finite)
        if careful and not finite:
            return finite
        if self.clip:
            nn.utils.clip_grad_value_(parameters, self.clip)
        for optimiser in self.optimisers:
            self.scaler.step(optimiser)
        self.scaler.update()
        return finite

    def learning_rates(self) -> dict[str, float]:
        """Group name → its current learning rate."""
        return {group["name"]: float(group["lr"]) for group in self.groups}

    def describe(self) -> list[str]:
        """One line per group: name, parameters, learning rate, weight decay, optimiser."""
        lines = []
        for kind, members in self._members.items():
            for group in members:
                count = sum(parameter.numel() for parameter in group["params"])
                decay = group.get("weight_decay", self._weight_decay)
                lines.append(
                    f"{group['name']:<16}{count:>10,} parameters lr {group['base_lr']:<6g} "
                    f"decay {decay:<6g} {kind}"
                )
        return lines

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return {
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues from `state_dict()`.

        Raises:
            ValueError: it is of other parameters.
        """
        kinds: dict[type, set[frozenset]] = {}  # what each kind of optimiser keeps of a parameter
        for optimiser, content in zip(self.optimisers, state["optimisers"], strict=True):
            groups = zip(optimiser.param_groups, content["param_groups"], strict=True)
            if not all(_is_like(stored, own) for own, stored in groups):
                raise ValueError("its parameter groups are others")
            optimiser.load_state_dict(content)
            for parameter, kept in optimiser.state.items():
                kinds.setdefault(type(optimiser), set()).add(frozenset(kept))
                for name, value in kept.items():
                    if not _fits(value, parameter):
                        raise ValueError(f"its {name} does not fit the parameter")
        if any(len(names) > 1 for names in kinds.values()):
            raise ValueError("it lacks the moments of a parameter")
        self.scaler.load_state_dict(state["scaler"])


def _is_like(stored: dict, own: dict) -> bool:
    """Whether a parameter group was stored by such an optimiser, of whichever version of torch."""
    if stored.get("name") != own["name"] or not {"lr", "base_lr", "weight_decay"} <= stored.keys():
        return False
    numbers = (name for name, value in own.items() if type(value) in (int, float))
    kinds = [type(stored[name]) in (int, float) for name in numbers if name in stored]
    switches = ((name, value) for name, value in own.items() if isinstance(value, bool))
    return all(kinds) and all(stored.get(name, value) is value for name, value in switches)


def _fits(value: object, parameter: torch.Tensor) -> bool:
    """Whether an optimiser can have kept this of a parameter: a number, or one for each entry."""
    if not isinstance(value, torch.Tensor):
        return value is None or isinstance(value, int | float)
    sizes = ((), parameter.shape)
    return value.layout == torch.strided and value.is_floating_point() and value.shape in sizes

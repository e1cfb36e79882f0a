"""Parameter groups and their optimisers.

The network and every criterion say how their parameters are trained (`parameter_groups(lr)`); this
file makes optimisers of such groups (`ParameterGroup`). Groups of one name, such as the layers of a
backbone, share a schedule (see schedules.py) and differ in their rates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

import processes
from criteria.base import ParameterGroup
from training.schedules import Rates, Schedule, step_decay


@dataclass(frozen=True)
class Rule:
    """How parameters are updated.

    Attributes:
        name: adamw, adam, sgd or rmsprop (alpha .9).
        eps: of adamw and adam. momentum: of sgd and rmsprop. nesterov: of sgd with momentum.
        weight_decay: of groups that do not name their own.
    """

    name: str
    eps: float = 1e-8
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 0.0

    def optimiser(self, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
        """Makes the optimiser of these groups."""
        fused = {"fused": True} if _can_fuse(groups) else {}
        common = {"weight_decay": self.weight_decay, **fused}
        match self.name:
            case "adamw":
                return torch.optim.AdamW(groups, eps=self.eps, **common)
            case "adam":
                return torch.optim.Adam(groups, eps=self.eps, **common)
            case "sgd":
                nesterov = self.nesterov and self.momentum > 0
                more = {"lr": 0.0, "momentum": self.momentum, "nesterov": nesterov}
                return torch.optim.SGD(groups, **more, **common)
            case "rmsprop":
                more = {"alpha": 0.9, "momentum": self.momentum}
                return torch.optim.RMSprop(groups, weight_decay=self.weight_decay, **more)
        raise ValueError(f"unknown optimizer {self.name!r}; choose adamw, adam, sgd or rmsprop")

    def of_kind(self, name: str) -> Rule:
        """This rule, or that of a group that names another optimizer, with default settings."""
        return self if name == self.name else Rule(name, weight_decay=self.weight_decay)


class Clipping(NamedTuple):
    """Limits on gradients; 0 means no limit.

    Attributes:
        norm: on the norm of all gradients together, including the criterion's.
        entry: on the absolute value of each entry, applied after `norm`.
    """

    norm: float = 0.0
    entry: float = 0.0


def _can_fuse(groups: list[ParameterGroup]) -> bool:
    parameters = [parameter for group in groups for parameter in group["params"]]
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)


def _total_norm(parameters: list[nn.Parameter]) -> torch.Tensor:
    """0-d: the norm of all gradients together, in one pass over them."""
    divided = [parameter for parameter in parameters if processes.share_of(parameter)]
    if not divided:
        return nn.utils.get_total_norm(parameter.grad for parameter in parameters)
    whole = [parameter for parameter in parameters if not processes.share_of(parameter)]
    squares, own = (
        nn.utils.get_total_norm([parameter.grad for parameter in part]).square()
        for part in (whole, divided)
    )
    return (squares.to(own) + processes.sum_over(own)).sqrt()


class _Course(NamedTuple):
    """How the rate and the momentum of all groups of one name change; see `Rates`."""

    schedule: Schedule
    least: float = 0.0
    momentum: Schedule | None = None


class Optimisers:
    """One or more torch optimisers that step together, each group on its own schedule.

    torch's optimisers are made when they are first used: the first one of a process loads torch's
    compiler, and --dry-run need not wait the second or two that this takes.

    Args:
        groups: empty ones are dropped.
        rule: how groups are updated that do not name another `optimizer`.
        rates: of groups without a `step` and `gamma` of their own.
        clipping: limits on the gradients.
        scaler: for mixed precision; disabled unless that is fp16.
    """

    def __init__(
        self,
        groups: Iterable[ParameterGroup],
        rule: Rule,
        rates: Rates,
        clipping: Clipping,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.rule, self.rates, self.clipping = rule, rates, clipping
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        # All groups of one kind share an optimiser.
        self._members: dict[str, list[ParameterGroup]] = {}
        self._courses: dict[str, _Course] = {}
        self._holds: dict[str, float] = {}
        shared = _Course(rates.schedule, rates.least, rates.momentum)
        for group in groups:
            group = {**group, "params": list(group["params"])}
            if not group["params"]:
                continue
            every, gamma = group.pop("step", None), group.pop("gamma", None)
            own = None if every is None else _Course(step_decay(every, gamma))
            self._courses[group["name"]] = own or shared
            group["base_lr"] = group["lr"]
            self._members.setdefault(group.pop("optimizer", rule.name), []).append(group)

    @cached_property
    def optimisers(self) -> list[torch.optim.Optimizer]:
        """torch's optimisers, one for each kind."""
        return [self.rule.of_kind(kind).optimiser(part) for kind, part in self._members.items()]

    @property
    def kinds(self) -> list[str]:
        """The kind of each optimiser: adamw, sgd, …"""
        return list(self._members)

    @property
    def groups(self) -> list[ParameterGroup]:
        """All parameter groups, in the order given within each optimiser."""
        return [group for optimiser in self.optimisers for group in optimiser.param_groups]

    def hold(self, name: str, factor: float) -> None:
        """Multiplies the rate of a group, and that of its `vectors`, whatever their schedule."""
        self._holds |= {name: factor, f"{name} vectors": factor}

    def replace(self, name: str, parameters: list[nn.Parameter]) -> None:
        """Gives a group other parameters, with fresh moments; without any it no longer trains."""
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                if group["name"] == name:
                    for parameter in group["params"]:
                        optimiser.state.pop(parameter, None)
                    group["params"] = parameters

    def set_learning_rates(self, epoch: float, step: int) -> None:
        """Sets every group's rate for the next step, after `epoch` epochs and `step` steps."""
        warmup = self.rates.warmup
        risen = min(1.0, (step + 1) / warmup) if warmup else 1.0
        for group in self.groups:
            schedule, least, momentum = self._courses[group["name"]]
            scheduled, held = schedule(epoch, step), self._holds.get(group["name"], 1.0)
            group["lr"] = group["base_lr"] * (scheduled * held * risen)
            group["lr"] += least * (1 - scheduled) * held * risen
            if momentum is not None:
                _set_momentum(group, momentum(epoch, step))

    def step(
        self, loss: torch.Tensor, epoch: float, step: int, *, careful: bool = False
    ) -> torch.Tensor:
        """Backward, sum over processes, unscale, clip, and one update of every group.

        Args:
            loss: 0-d, with its graph.
            epoch, step: epochs (with a fraction for the current one) and steps done before.
            careful: whether to skip the update if the loss or a gradient is not finite, which makes
                the program wait for the device.

        Returns:
            0-d bool on the device, or where `careful` in the host's memory: whether loss and
            gradients were finite. With a scaler, which deals with gradients that overflow, only the
            loss counts.
        """
        self.set_learning_rates(epoch, step)
        self.forget_gradients()
        self.scaler.scale(loss).backward()
        processes.sum_gradients(p for group in self.groups for p in group["params"])
        for optimiser in self.optimisers:
            self.scaler.unscale_(optimiser)
        parameters = [p for group in self.groups for p in group["params"] if p.grad is not None]
        finite, scaled = loss.detach().isfinite(), self.scaler.is_enabled()
        limit = self.clipping.norm
        norm = _total_norm(parameters) if parameters and (limit or not scaled) else None
        if norm is not None and not scaled:
            finite = finite & norm.isfinite()
        finite = processes.in_all(finite)
        if careful:
            finite = finite.cpu()  # who asks for it again does not wait for the update too
            if not finite:
                self.scaler.update()  # otherwise the next step's gradients could not be unscaled
                return finite
        if limit and norm is not None:
            # The scaler deals with gradients that overflow; they must not spoil the others.
            norm = torch.where(norm.isfinite(), norm, torch.zeros_like(norm))
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        if self.clipping.entry:
            nn.utils.clip_grad_value_(parameters, self.clipping.entry)
        for optimiser in self.optimisers:
            self.scaler.step(optimiser)
        self.scaler.update()
        return finite

    def forget_gradients(self) -> None:
        """Frees the memory of the last step's gradients."""
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)

    def learning_rates(self) -> dict[str, float]:
        """Group name → its current learning rate; the highest if several groups have the name."""
        rates: dict[str, float] = {}
        for group in self.groups:
            rates[group["name"]] = max(rates.get(group["name"], 0.0), float(group["lr"]))
        return rates

    def describe(self) -> list[str]:
        """One line per name of groups: parameters, highest rate, weight decay, optimiser.

        If groups of one name have several rates, another line says how many, and the lowest.
        """
        lines = []
        for kind, part in self._members.items():
            by_name: dict[str, list[ParameterGroup]] = {}
            for group in part:
                by_name.setdefault(group["name"], []).append(group)
            for name, members in by_name.items():
                count = sum(processes.whole_size(p) for group in members for p in group["params"])
                rates = sorted({group["base_lr"] for group in members})
                decay = members[0].get("weight_decay", self.rule.weight_decay)
                lines.append(
                    f"{name:<16}{count:>10,} parameters lr {rates[-1]:<6g} decay {decay:<6g} {kind}"
                )
                if len(rates) > 1:
                    lines.append(f"{'':<16}at {len(rates)} rates, the lowest lr {rates[0]:.3g}")
        return lines

    def bytes_of_state(self) -> int:
        """The most that optimisers take in a checkpoint: two tensors per parameter, one for SGD.

        Frozen parameters count too, because they train after a warm-up.
        """
        return sum(
            (1 if kind == "sgd" else 2) * parameter.numel() * parameter.element_size()
            for kind, members in self._members.items()
            for group in members
            for parameter in group["params"]
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "optimisers": [
                _divided(optimiser, optimiser.state_dict(), processes.Share.whole)
                for optimiser in self.optimisers
            ],
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict()`.

        Raises:
            ValueError: the state belongs to other parameters.
        """
        kinds: dict[type, set[frozenset]] = {}  # names that each kind keeps for a parameter
        for optimiser, content in zip(self.optimisers, state["optimisers"], strict=True):
            groups = zip(optimiser.param_groups, content["param_groups"], strict=True)
            if not all(_is_like(stored, own) for own, stored in groups):
                raise ValueError("its parameter groups are others")
            optimiser.load_state_dict(_divided(optimiser, content, processes.Share.of))
            for parameter, kept in optimiser.state.items():
                kinds.setdefault(type(optimiser), set()).add(frozenset(kept))
                for name, value in kept.items():
                    if not _fits(value, parameter):
                        raise ValueError(f"its {name} does not fit the parameter")
        if any(len(names) > 1 for names in kinds.values()):
            raise ValueError("it lacks the moments of a parameter")
        self.scaler.load_state_dict(state["scaler"])


def _divided(
    optimiser: torch.optim.Optimizer,
    content: dict[str, Any],
    convert: Callable[[processes.Share, torch.Tensor], torch.Tensor],
) -> dict[str, Any]:
    """A state_dict with `convert` applied to the moments of divided parameters."""
    state = dict(content["state"])
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        share = processes.share_of(parameter)
        if share is None or number not in state:
            continue
        state[number] = {
            name: convert(share, value) if isinstance(value, torch.Tensor) and value.ndim else value
            for name, value in state[number].items()
        }
    return {**content, "state": state}


def _set_momentum(group: ParameterGroup, value: float) -> None:
    """Sets Adam's first beta, or the momentum."""
    if "betas" in group:
        group["betas"] = (value, group["betas"][1])
    else:
        group["momentum"] = value


def _is_like(stored: ParameterGroup, own: ParameterGroup) -> bool:
    """Whether a stored parameter group is one of such an optimiser, in any version of torch."""
    if stored.get("name") != own["name"] or not {"lr", "base_lr", "weight_decay"} <= stored.keys():
        return False
    numbers = (name for name, value in own.items() if type(value) in (int, float))
    kinds = [type(stored[name]) in (int, float) for name in numbers if name in stored]
    switches = ((name, value) for name, value in own.items() if isinstance(value, bool))
    return all(kinds) and all(stored.get(name, value) is value for name, value in switches)


def _fits(value: object, parameter: torch.Tensor) -> bool:
    """Whether it can be a value kept for a parameter: a number, or one number per entry."""
    if not isinstance(value, torch.Tensor):
        return value is None or isinstance(value, int | float)
    sizes = ((), parameter.shape)
    return value.layout == torch.strided and value.is_floating_point() and value.shape in sizes

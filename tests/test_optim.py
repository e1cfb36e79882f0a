"""How parameters are updated: schedules, warm-up, clipping by norm, rules; as torch does each."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial

import pytest
import tiny
import together
import torch
from conftest import ROOT, refusal
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, StepLR
from torch.utils._python_dispatch import TorchDispatchMode

import net
import options
import processes
import train
from training import optim, schedules
from training.describing import describe
from utils import InputError

STEPS = 60


SGD = optim.Rule("sgd")


def optimisers(
    groups: list[dict],
    rule: optim.Rule = SGD,
    *,
    clip_norm: float = 0.0,
    clip: float = 0.0,
    scaler: torch.amp.GradScaler | None = None,
    **rates: object,
) -> optim.Optimisers:
    """Those of these groups, without decay of weights or rates unless something says otherwise."""
    clipping = optim.Clipping(clip_norm, clip)
    return optim.Optimisers(groups, rule, schedules.Rates(**rates), clipping, scaler)


def parameters(*shapes: tuple[int, ...], seed: int = 0) -> list[nn.Parameter]:
    draws = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draws)) for shape in shapes]


def group(members: list[nn.Parameter], name: str = "weights", **more: object) -> dict:
    return {"name": name, "params": members, "lr": 0.01, **more}


def quartic(members: list[nn.Parameter]) -> torch.Tensor:
    """A loss with large gradients."""
    return sum((p**4).sum() for p in members)


# --- schedules ------------------------------------------------------------------------------------


def test_one_cycle_is_that_of_torch():
    rate, momentum = schedules.one_cycle(STEPS)
    theirs = torch.optim.AdamW(parameters((3,)), lr=0.2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(theirs, 0.2, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        (known,) = theirs.param_groups
        assert 0.2 * rate(0, step) == pytest.approx(known["lr"], rel=1e-12)
        assert momentum(0, step) == pytest.approx(known["betas"][0], rel=1e-12)
        theirs.step()
        if step < STEPS - 1:
            schedule.step()
    by_epochs, _ = schedules.one_cycle(STEPS, 10)
    assert by_epochs(3.5, 0) == rate(0, 35)


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_one_cycle_moves_the_momentum_of_the_groups_that_follow_it(rule):
    rate, momentum = schedules.one_cycle(STEPS)
    free, own = parameters((2,), (2,))
    groups = [group([free]), group([own], "margins", step=5, gamma=0.1)]
    made = optimisers(groups, optim.Rule(rule), schedule=rate, momentum=momentum)
    made.set_learning_rates(0.0, 30)
    first, second = made.groups
    key = {"adamw": lambda g: g["betas"][0], "sgd": lambda g: g["momentum"]}[rule]
    assert key(first) == momentum(0, 30) and key(second) == 0.9
    assert first["lr"] == 0.01 * rate(0, 30) and second["lr"] == 0.01


def test_steps_and_milestones_are_those_of_torch():
    (weight,) = parameters((2,))
    for ours, theirs in (
        (schedules.step_decay(3, 0.5), partial(StepLR, step_size=3, gamma=0.5)),
        (schedules.milestones([2, 7], 0.1), partial(MultiStepLR, milestones=[2, 7], gamma=0.1)),
    ):
        optimiser = torch.optim.SGD([weight], lr=1.0)
        schedule = theirs(optimiser)
        for done in range(10):
            # One step per epoch; the part of an epoch that lies behind does not count.
            assert ours(done + 0.9, done) == pytest.approx(schedule.get_last_lr()[0])
            optimiser.step()
            schedule.step()


def test_the_least_rate_is_that_of_every_group_on_the_schedule():
    one, other, own = parameters((2,), (2,), (2,))
    groups = [group([one]), group([other], "head", lr=0.1), group([], "nothing")]
    groups += [{"name": "margins", "params": iter([own]), "lr": 0.01, "step": 10, "gamma": 0.5}]
    made = optimisers(groups, schedule=schedules.cosine(STEPS, warmup=0), least=0.002)
    made.hold("head", 0.5)
    theirs = torch.optim.SGD([{"params": [one], "lr": 0.01}, {"params": [other], "lr": 0.1}])
    schedule = CosineAnnealingLR(theirs, STEPS, eta_min=0.002)
    for done in range(STEPS):
        made.set_learning_rates(done, done)
        weights, head = schedule.get_last_lr()
        expected = {"weights": weights, "head": head / 2, "margins": 0.01 * 0.5 ** (done // 10)}
        assert made.learning_rates() == pytest.approx(expected)
        theirs.step()
        schedule.step()


def test_a_cosine_ends_at_its_floor_and_needs_no_rise():
    plain = schedules.cosine(STEPS, warmup=0)
    assert plain(0, 0) == 1.0 and plain(0, STEPS // 2) == pytest.approx(0.5)
    floored = schedules.cosine(STEPS, warmup=0, floor=0.1)
    assert floored(0, STEPS) == pytest.approx(0.1) and floored(0, 10 * STEPS) == pytest.approx(0.1)
    for step in range(STEPS):
        assert floored(0, step) == pytest.approx(0.1 + 0.9 * plain(0, step))
    risen = schedules.cosine(STEPS)
    assert risen(0, 2) == pytest.approx(3 / 6) and risen(0, 6) == 1.0


def test_the_warm_up_is_linear_in_steps_and_in_front_of_every_schedule():
    for schedule in (
        schedules.constant,
        schedules.step_decay(2, 0.5),
        schedules.milestones([3, 8], 0.1),
        schedules.cosine(STEPS, warmup=4, floor=0.2),
    ):
        one, other = parameters((2,), (3,))
        groups = [group([one]), group([other], "margins", step=1, gamma=0.5)]
        made = optimisers(groups, schedule=schedule, warmup=4)
        for step in range(12):
            epoch = step / 3
            made.set_learning_rates(epoch, step)
            risen = min(1.0, (step + 1) / 4)
            rates = made.learning_rates()
            assert rates["weights"] == pytest.approx(0.01 * risen * schedule(epoch, step))
            assert rates["margins"] == pytest.approx(0.01 * risen * 0.5 ** int(epoch))
    assert schedules.cosine(STEPS, warmup=4)(0, 3) == schedules.cosine(STEPS, warmup=4)(0, 4) == 1.0


# --- clipping by norm -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 10.0])
@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_by_norm_is_that_of_torch(limit, value):
    shapes = ((4, 3), (5,), ())
    ours, theirs = parameters(*shapes), parameters(*shapes)
    # In two optimisers of ours: the norm is that of all gradients, wherever they are used.
    groups = [group(ours[:2]), group(ours[2:], "margins", optimizer="adamw", step=9, gamma=0.5)]
    made = optimisers(groups, clip_norm=limit, clip=value)
    plain = torch.optim.SGD(theirs[:2], lr=0.01, momentum=0.9, nesterov=True, fused=True)
    other = torch.optim.AdamW(theirs[2:], lr=0.01, weight_decay=0.0, fused=True)
    for step in range(5):
        assert made.step(quartic(ours), 0.0, step)
        plain.zero_grad(), other.zero_grad()
        quartic(theirs).backward()
        norm = nn.utils.clip_grad_norm_(theirs, limit)
        assert (norm > limit) == (limit < 1)  # it is tried on both sides
        if value:
            nn.utils.clip_grad_value_(theirs, value)
        plain.step(), other.step()
        for one, two in zip(ours, theirs, strict=True):
            assert torch.equal(one.grad, two.grad) and torch.equal(one, two)


class Norms(TorchDispatchMode):
    """Counts the norms of all gradients together."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._foreach_norm.Scalar
        return func(*args, **(kwargs or {}))


def test_the_norm_is_computed_once_a_step():
    ours = parameters((3,))
    made = optimisers([group(ours)], clip_norm=1.0, clip=10.0)
    with Norms() as seen:
        made.step(quartic(ours), 0.0, 0)
    assert seen.count == 1


def test_clipping_by_norm_measures_gradients_without_the_scale_of_fp16():
    ours, theirs = parameters((6,)), parameters((6,))
    made = optimisers(
        [group(ours)], clip_norm=0.7, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10)
    )
    plain = optimisers([group(theirs)], clip_norm=0.7)
    for step in range(3):
        made.step(quartic(ours), 0.0, step)
        plain.step(quartic(theirs), 0.0, step)
        assert float(ours[0].grad.norm()) == pytest.approx(0.7, rel=1e-5)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-7)


def test_an_overflow_under_a_scaler_spoils_no_other_gradient():
    fine, spoilt = parameters((3,), (3,))
    # Two optimisers: the scaler leaves out the step of the one whose gradients overflow.
    groups = [group([fine]), group([spoilt], "margins", optimizer="adamw", step=9, gamma=0.5)]
    made = optimisers(groups, clip_norm=0.7, scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    for bad in (math.inf, math.nan):
        before = spoilt.detach().clone()
        spoilt.register_hook(lambda gradient, bad=bad: torch.full_like(gradient, bad))
        made.step((fine**2).sum() + (spoilt**2).sum(), 0.0, 0)
        assert torch.equal(spoilt, before) and fine.isfinite().all()
        assert fine.grad.isfinite().all() and fine.grad.abs().max() > 0


def test_after_a_step_that_was_left_out_a_scaler_goes_on_with_a_smaller_scale():
    ours = parameters((3,))
    made = optimisers([group(ours)], scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    before = ours[0].detach().clone()
    assert not made.step(math.inf * quartic(ours), 0.0, 0, careful=True)
    assert torch.equal(ours[0], before) and made.scaler.get_scale() == 1.0
    assert made.step(quartic(ours), 0.0, 1, careful=True) and not torch.equal(ours[0], before)


def test_processes_clip_by_the_norm_of_the_summed_gradients(tmp_path):
    whole = parameters((6,))
    alone = optimisers([group(whole)], clip_norm=0.7)
    alone.step(quartic(whole), 0.0, 0)

    def work() -> dict[str, torch.Tensor]:
        (own,) = parameters((6,))
        made = optimisers([group([own])], clip_norm=0.7)
        made.step((own[processes.shard(6)] ** 4).sum(), 0.0, 0)
        return {"weights": own.detach()}

    for result in together.run(2, work, tmp_path):
        torch.testing.assert_close(result["weights"], whole[0].detach(), rtol=1e-6, atol=1e-7)


# --- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "theirs"),
    [
        (optim.Rule("adamw", eps=1e-4), lambda p: torch.optim.AdamW(p, 0.01, eps=1e-4)),
        (optim.Rule("adam", eps=1e-2), lambda p: torch.optim.Adam(p, 0.01, eps=1e-2)),
        (optim.Rule("sgd", momentum=0.0), lambda p: torch.optim.SGD(p, 0.01)),
        (
            optim.Rule("sgd", momentum=0.99),
            lambda p: torch.optim.SGD(p, 0.01, momentum=0.99, nesterov=True),
        ),
        (
            optim.Rule("sgd", momentum=0.5, nesterov=False),
            lambda p: torch.optim.SGD(p, 0.01, momentum=0.5),
        ),
        (
            optim.Rule("rmsprop", momentum=0.3),
            lambda p: torch.optim.RMSprop(p, 0.01, alpha=0.9, momentum=0.3),
        ),
    ],
)
def test_rules_update_as_torch_does(rule, theirs):
    ours, copies = parameters((4,)), parameters((4,))
    rule = replace(rule, weight_decay=0.3)
    made, plain = optimisers([group(ours)], rule=rule), theirs(copies)
    plain.param_groups[0]["weight_decay"] = 0.3
    for step in range(4):
        made.step((ours[0] ** 2).sum(), 0.0, step)
        plain.zero_grad()
        (copies[0] ** 2).sum().backward()
        plain.step()
        torch.testing.assert_close(ours[0], copies[0])


def test_a_rule_is_not_that_of_a_criterion_with_a_kind_of_its_own():
    one, other = parameters((2,), (2,))
    groups = [group([one]), group([other], "margins", optimizer="adamw")]
    made = optimisers(groups, rule=optim.Rule("adam", eps=1e-2))
    assert [g["eps"] for g in made.groups] == [1e-2, 1e-8]


# --- layer-wise rates -----------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["resnet10", "bn_inception"])
def test_every_block_learns_a_factor_slower_than_the_one_above_it(model):
    network = net.build(net.Architecture(model, 8))
    blocks = network.block_parameters()
    for decay_all in (True, False):
        groups = network.parameter_groups(0.1, 0.2, decay_all=decay_all, layer_decay=0.5)
        rate_of = {p: group["lr"] for group in groups for p in group["params"]}
        for above, block in enumerate(reversed(blocks)):
            assert {rate_of[p] for p in block} == {0.1 * 0.5**above}
        assert {rate_of[p] for p in network.head_parameters()} == {0.2}
        assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
        undecayed = {p for g in groups for p in g["params"] if g.get("weight_decay") == 0.0}
        vectors = {p for p in network.parameters() if p.dim() < 2}
        assert undecayed == (set() if decay_all else vectors)
    assert len(blocks) > 4


def test_layer_wise_rates_are_listed_in_a_line_and_logged_in_a_column(images):
    made = tiny.prepare(images, "--layer-decay 0.5 --lr 1e-3 --decay-vectors 0 --warm 0")
    lines = made.optimisers.describe()
    assert [line.split()[0] for line in lines if line[0] != " "] == [
        "backbone",
        "backbone",
        "head",
        "head",
        "proxies",
    ]
    count = len(made.network.blocks())
    words = f"at {count} rates, the lowest lr {1e-3 * 0.5 ** (count - 1):.3g}"
    assert sum(words in line for line in lines) == 2
    assert all(len(f"optimiser   {line}") <= 80 for line in lines)
    made.optimisers.hold("backbone", 0.5)
    made.optimisers.set_learning_rates(0, 0)
    assert made.optimisers.learning_rates() == pytest.approx(
        {
            "backbone": 5e-4, "backbone vectors": 5e-4, "head": 1e-3, "head vectors": 1e-3,
            "proxies": 0.1,
        }
    )  # fmt: skip
    lowest = min(g["lr"] for g in made.optimisers.groups)
    assert lowest == pytest.approx(5e-4 * 0.5 ** (count - 1))


def test_a_warm_up_longer_than_the_run_is_noticed(images):
    said = describe(tiny.prepare(images, "--lr-warmup 9 --epochs 2"))
    assert "note        --lr-warmup 9: the run has 8 steps, so its rates only rise" in said
    assert "note" not in describe(tiny.prepare(images, "--lr-warmup 7 --epochs 2"))


@pytest.mark.parametrize(("flags", "rise"), [("", 6), ("--lr-warmup 5", 5), ("--lr-warmup 4", 4)])
def test_a_cosine_that_ends_before_the_rates_have_risen_is_refused(flags, rise, images):
    flags = f"--epochs 15 --schedule cosine --cosine-epochs 1 {flags}"  # of four steps each
    with pytest.raises(
        InputError, match=f"over after step 4, and the rates rise until step {rise}"
    ):
        tiny.prepare(images, flags)
    made = tiny.prepare(images, flags.replace("--cosine-epochs 1", "--cosine-epochs 2"))
    rates = []
    for step in range(rise, 9):
        made.optimisers.set_learning_rates(step / 4, step)
        rates.append(made.optimisers.learning_rates()["head"])
    assert rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("schedule", ["step --lr-decay-step 1", "onecycle"])
def test_what_a_file_of_flags_says_of_another_schedule_changes_no_rate(schedule, images, tmp_path):
    file = tmp_path / "flags.txt"
    file.write_text("--schedule cosine --lr-min 2e-5 --lr-warmup 3 --cosine-epochs 2")
    file.write_text(
        file.read_text() if schedule == "onecycle" else "--schedule cosine --lr-min 2e-5"
    )
    rates = []
    for flags in (f"@{file} --schedule {schedule}", f"--schedule {schedule}"):
        made = tiny.prepare(images, f"{flags} --epochs 3")
        for step in range(12):
            made.optimisers.set_learning_rates(step / 4, step)
            rates.append(made.optimisers.learning_rates())
        said = describe(made)
        assert ("--lr-min in the file of flags has no effect" in said) == flags.startswith("@")
    assert rates[:12] == rates[12:]


def test_a_run_with_layer_wise_rates_is_continued_bit_by_bit(images, tmp_path):
    flags = "--layer-decay 0.7 --clip-norm 1 --schedule onecycle --optimizer sgd --epochs 2"
    whole = tiny.run(images, tmp_path, "whole", flags)
    half = tiny.run(images, tmp_path, "half", f"{flags} --max-steps 3")
    tiny.resume(half, "--max-steps 8 --no-report")
    assert tiny.same(tiny.saved(whole)["optimisers"], tiny.saved(half)["optimisers"])
    assert tiny.same(tiny.saved(whole)["model_state_dict"], tiny.saved(half)["model_state_dict"])


# --- flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lr-floor 0.1", ["--lr-floor", "--schedule cosine"]),
        ("--schedule onecycle --lr-warmup 5", ["--lr-warmup", "--schedule step, milestones"]),
        ("--optimizer sgd --adam-eps 1e-4", ["--adam-eps", "--optimizer adamw or adam"]),
        ("--momentum 0.5", ["--momentum", "--optimizer sgd or rmsprop"]),
        ("--optimizer sgd --momentum 0 --nesterov 1", ["--nesterov", "--momentum above 0"]),
        ("--clip-norm -1", ["--clip-norm", "from 0"]),
        ("--lr-floor 2 --schedule cosine", ["--lr-floor", "from 0 to 1"]),
        ("--schedule cosine --lr-floor 0.1 --lr-min 1e-6", ["--lr-min and --lr-floor"]),
        ("--schedule cosine --lr 1e-5 --lr-min 1e-4", ["--lr-min 0.0001", "is above --lr 1e-05"]),
        ("--schedule cosine --lr_p 0 --lr-min 1e-6", ["--lr-min 1e-06", "is above --lr_p 0"]),
        ("--lr-min 1e-6", ["--lr-min", "--schedule cosine"]),
        ("--cosine-epochs 5", ["--cosine-epochs", "--schedule cosine"]),
        ("--schedule milestones", ["--milestones names"]),
        ("--optimizer sgd --momentum 0 --schedule onecycle", ["--momentum", "of its own"]),
        ("--freeze-blocks all --lr_p 1e-4", ["--lr_p", "a backbone that trains"]),
        ("--freeze-blocks all --layer-decay 0.5", ["--layer-decay", "a backbone that trains"]),
        ("--freeze-blocks all --drop-path 0.5", ["--drop-path", "a backbone that trains"]),
        ("--freeze-blocks all --warm 2", ["--warm", "a backbone that trains"]),
        ("--freeze-blocks all --bn-freeze 0", ["--bn-freeze", "a backbone that trains"]),
        ("--freeze-blocks all --bn-momentum 0.5", ["--bn-momentum", "a backbone that trains"]),
    ],
)
def test_flags_that_cannot_act_are_refused(flags, words, capsys):
    said = refusal(capsys, options.parse_train, flags.split())
    assert all(word in said for word in words)


def test_the_commands_of_the_page_on_optimisation_are_accepted():
    text = (ROOT / "docs" / "optimisation.md").read_text(encoding="utf-8")
    block = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", "")
    commands = [line for line in block.splitlines() if line.startswith("python train.py")]
    assert commands
    for command in commands:
        args = options.parse_train(command.split()[2:])
        assert args.layer_decay == 0.75 and args.ema == 0.999


@pytest.mark.parametrize("epochs", [3, 8, 12])
def test_a_cosine_of_its_own_length_is_torchs(epochs, images):
    """With one end for all groups, at whole epochs; in the longest run the rates rise again."""
    flags = f"--schedule cosine --lr-warmup 0 --cosine-epochs 8 --lr-min 1e-4 --epochs {epochs}"
    made = tiny.prepare(images, f"{flags} --lr 1e-2 --proxy-lr-scale 50").optimisers
    base = {group["name"]: group["base_lr"] for group in made.groups}
    assert base["proxies"] == pytest.approx(0.5)
    for name, rate in base.items():
        peer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], rate)
        theirs = torch.optim.lr_scheduler.CosineAnnealingLR(peer, 8, 1e-4)
        for epoch in range(epochs + 1):
            made.set_learning_rates(epoch, epoch * 8)
            assert made.learning_rates()[name] == pytest.approx(theirs.get_last_lr()[0], rel=1e-6)
            peer.step()
            theirs.step()


def test_a_schedule_that_does_not_act_is_noted(images, capsys):
    train.main(tiny.parse(images, "--schedule milestones --milestones 2 99 --epochs 2 --dry-run"))
    said = capsys.readouterr().out
    assert "--milestones 99 lies behind the last of the run's" in " ".join(said.split())


@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "cosine --cosine-epochs 4", "step"])
def test_a_run_that_is_made_longer_says_that_its_rates_are_stretched(
    schedule, images, tmp_path, capsys
):
    folder = tiny.run(images, tmp_path, "run", f"--epochs 1 --warm 0 --schedule {schedule}")
    tiny.resume(folder, "--epochs 2 --dry-run")
    told = "--epochs 2 stretches the" in capsys.readouterr().out
    assert told == (schedule in ("cosine", "onecycle"))


@pytest.mark.parametrize("kind", ["sgd", "rmsprop", "adam", "adamw"])
def test_the_disk_that_a_run_is_said_to_need_is_enough(kind, images, tmp_path):
    made = tiny.prepare(images, f"--optimizer {kind} --warm 0").optimisers
    folder = tiny.run(images, tmp_path, "run", f"--optimizer {kind} --warm 0 --max-steps 1")
    kept = [
        tensor
        for optimiser in tiny.saved(folder)["optimisers"]["optimisers"]
        for state in optimiser["state"].values()
        for tensor in state.values()
        if torch.is_tensor(tensor) and tensor.dim()
    ]
    assert sum(t.numel() * t.element_size() for t in kept) == made.bytes_of_state() > 0


def test_the_command_line_reaches_the_optimisers(images):
    made = tiny.prepare(
        images, "--clip-norm 3 --clip 0 --adam-eps 1e-4 --lr-warmup 2 --schedule cosine "
        "--lr-floor 0.5 --epochs 2 --lr 1e-3"
    ).optimisers  # fmt: skip
    assert (*made.clipping, made.groups[0]["eps"]) == (3.0, 0.0, 1e-4)
    rates = []
    for step in range(9):
        made.set_learning_rates(step / 4, step)
        rates.append(made.learning_rates()["backbone"] / 1e-3)
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0]) and rates[8] == pytest.approx(0.5)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    sgd = tiny.prepare(images, "--optimizer sgd --nesterov 0 --schedule onecycle")
    assert sgd.optimisers.groups[0]["nesterov"] is False
    sgd.optimisers.set_learning_rates(0, 0)
    assert sgd.optimisers.groups[0]["momentum"] == pytest.approx(0.95)

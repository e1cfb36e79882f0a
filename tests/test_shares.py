"""Proxies divided among processes: the numbers and the checkpoints of one process."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import together
import torch
import torch.nn.functional as F
from tiny import same, saved
from together import five_steps, in_float64, largest_difference
from torch import Tensor

import losses
import processes
import train
from criteria import amloss, strips
from training import setup
from utils import InputError

LOSSES = {
    "Proxy-Anchor": "--loss Proxy_Anchor",
    "AMLoss": "--loss AMLoss --mrg-lr 1e-3",
    "ProxyNCA++": "--loss ProxyNCA_pp --loss-args proxy_lr_scale=100 proxy_eps=1e-8",
    "normalised softmax": "--loss NormSoftmax --loss-args smoothing=0.1",
    "ArcFace": "--loss ArcFace --loss-args sub_centers=3 exact_gradient=true",
    "ArcFace, a sample of the classes": "--loss ArcFace --loss-args sub_centers=2 sample_rate=0.5",
    "CosFace, few classes": "--loss CosFace --loss-args sample_rate=0.01",
    "CosFace, norm of all gradients": "--loss CosFace --clip-norm 0.5",
    "HIER": "--loss HIER --loss-args ancestors=16 proxy_lr_scale=10 --IPC 3",
    "SupAP's softmax": "--loss SupAP --loss-args proxy_lr=0.01 --IPC 3",
    "IDML": "--loss AMLoss --introspective paper --mixup 1",
    "DDML": "--loss AMLoss --disent True --al 1 --be 0.1 --gam 1e-5",
    "Matryoshka": "--loss Proxy_Anchor --matryoshka 2 8",
    "divide and conquer": "--loss Proxy_Anchor --nb-clusters 2 --mod-epoch 1 --IPC 2",
}
DIVIDED = "--shard-proxies"


def divided_steps(images: Path, flags: str) -> dict:
    """Five steps with divided proxies, and how many numbers of them this process has."""
    held = []
    build = setup.build_objective

    def watched(*given):
        held.append(build(*given))
        return held[0]

    setup.build_objective = watched
    result = five_steps(images, f"{flags} {DIVIDED}")
    setup.build_objective = build
    own = sum(p.numel() for p in held[0].parameters() if processes.share_of(p))
    return {**result, "own": torch.tensor(own)}


by_one_process = cache(five_steps)


@pytest.mark.parametrize("pieces", ["whole", "strips"])
@pytest.mark.parametrize("loss", LOSSES)
def test_five_steps_are_those_of_one_process(loss, pieces, images, tmp_path, monkeypatch):
    """In float64, with a fast rate: nothing but rounding is left. Three processes have 2, 3, 3.

    Statistics of a batch, which take most of a step's messages, are test_processes.py's.
    """
    in_float64(monkeypatch)
    count = 3 if pieces == "whole" else 2
    flags = f"{LOSSES[loss]} --lr 1e-3 --lr_p 1e-3 --bn-freeze 1"
    alone = by_one_process(images, flags)
    if pieces == "strips":  # two classes at a time, and three proxies of the crowding term
        monkeypatch.setattr(strips, "STRIP_ELEMENTS", 24)
        monkeypatch.setattr(amloss.ProxyCrowding, "strip_elements", 12)
    results = together.run(count, partial(divided_steps, images, flags), tmp_path)
    proxies = [key for key in alone if key.endswith("proxies")]
    total = sum(alone[key].numel() for key in proxies)
    assert sum(int(result.pop("own")) for result in results) == total > 0
    for result in results:
        assert largest_difference(alone, result) < 1e-9
        assert all(torch.equal(result[key], results[0][key]) for key in result)


class Whole(losses.ProxyLoss):
    """A loss of one's own, which looks at the whole table."""

    def forward(
        self, embeddings: Tensor, labels: Tensor, uncertainty: Tensor | None = None
    ) -> Tensor:
        return F.cross_entropy(16 * self.similarity(embeddings, uncertainty), labels)


@pytest.mark.parametrize("flags", ["", "--introspective paper --mixup 0"])
def test_the_whole_table_of_divided_proxies(flags, images, tmp_path, monkeypatch):
    in_float64(monkeypatch)
    monkeypatch.setitem(losses.CRITERIA, "NormSoftmax", Whole)
    flags = f"--loss NormSoftmax --lr 1e-3 {flags}"
    alone = five_steps(images, flags)
    results = together.run(3, partial(divided_steps, images, flags), tmp_path)
    assert [int(result.pop("own")) for result in results] == [16, 24, 24]
    for result in results:
        assert largest_difference(alone, result) < 1e-9


def test_five_steps_in_float32_differ_by_rounding(images, tmp_path):
    flags = "--loss AMLoss --mrg-lr 1e-3"
    alone = five_steps(images, flags)
    for result in together.run(2, partial(divided_steps, images, flags), tmp_path):
        del result["own"]
        assert largest_difference(alone, result) < 1e-5


def trained(images: Path, logs: Path, name: str, flags: str) -> dict:
    """A run, in as many processes as there are; what is left of it."""
    tiny.run(images, logs, name, f"--loss AMLoss --warm 0 --amp off --epochs 2 {flags}")
    return {}


def continued(folder: Path, flags: str) -> dict:
    tiny.resume(folder, flags)
    return {}


def test_checkpoints_know_no_number_of_processes(images, tmp_path):
    """Two processes, then one; one, then two: what comes out is what one process makes."""
    logs = tmp_path / "logs"
    trained(images, logs, "whole", "")
    half = "--max-steps 5"
    together.run(2, partial(trained, images, logs, "two", f"{DIVIDED} {half}"), tmp_path)
    trained(images, logs, "one", half)
    kept, alone = saved(logs / "two"), saved(logs / "one")
    moments = [state["optimisers"]["optimisers"][0]["state"] for state in (kept, alone)]
    shapes = [{n: v["exp_avg"].shape for n, v in each.items()} for each in moments]
    assert shapes[0] == shapes[1]
    for part in ("criterion_state_dict", "model_state_dict"):
        assert kept[part].keys() == alone[part].keys()
    tiny.resume(logs / "two", "")
    together.run(2, partial(continued, logs / "one", DIVIDED), tmp_path)
    whole = saved(logs / "whole")
    for name in ("two", "one"):
        end = saved(logs / name)
        assert end["clock"]["step"] == whole["clock"]["step"] > 5
        for part in ("criterion_state_dict", "model_state_dict"):
            for key, value in whole[part].items():
                assert torch.allclose(end[part][key], value, rtol=1e-4, atol=1e-5), key


def test_two_processes_go_on_bit_by_bit(images, tmp_path):
    logs = tmp_path / "logs"
    run = partial(together.run, 2, folder=tmp_path)
    run(partial(trained, images, logs, "whole", DIVIDED))
    run(partial(trained, images, logs, "parts", f"{DIVIDED} --max-steps 5"))
    run(partial(continued, logs / "parts", DIVIDED))
    for part in ("model_state_dict", "criterion_state_dict", "optimisers", "random"):
        assert same(saved(logs / "whole")[part], saved(logs / "parts")[part]), part


def test_each_holds_its_share_of_the_moments(images, tmp_path):
    def work() -> dict:
        training = tiny.prepare(images, f"--loss AMLoss --warm 0 {DIVIDED}")
        train.step(training, next(iter(training.loader)))
        (group,) = (g for g in training.optimisers.groups if g["name"] == "proxies")
        (proxies,) = group["params"]
        optimiser = training.optimisers.optimisers[0]
        said = train.describe(training)
        return {
            "rows": len(proxies),
            "moments": len(optimiser.state[proxies]["exp_avg"]),
            "counted": "proxies                 64 parameters" in said,
        }

    found = together.run(3, work, tmp_path)
    assert found == [{"rows": n, "moments": n, "counted": True} for n in (2, 3, 3)]


def test_a_rotten_gradient_in_one_share_stops_all(images, tmp_path):
    def work() -> dict:
        training = tiny.prepare(images, f"--loss AMLoss --warm 0 --on-nan skip {DIVIDED}")
        before = training.objective.state_dict()
        batch = next(iter(training.loader))
        if processes.rank() == 1:
            proxies = training.objective.parts["metric"].criterion.proxies
            proxies.register_hook(lambda gradient: gradient * torch.nan)
        skipped = train.step(training, batch) is None
        after = training.objective.state_dict()
        return {"skipped": skipped, "same": same(dict(before), dict(after))}

    assert together.run(2, work, tmp_path) == [{"skipped": True, "same": True}] * 2


# --- what is refused ------------------------------------------------------------------------------


def test_one_process_is_refused(images: Path) -> None:
    with pytest.raises(InputError, match="there is one, which has them all"):
        tiny.prepare(images, f"--loss AMLoss {DIVIDED}")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--loss MS --IPC 2", ["MS has no proxies", "AMLoss"]),
        ("--loss PFML", ["PFML has no proxies that can be divided", "AMLoss"]),
        ("--loss AMLoss --amp fp16", ["fp16 needs a GPU", "--amp"]),
        ("--loss AMLoss --ratio-classes 0.25", ["2 classes", "3 processes"]),
    ],
)
def test_what_cannot_be_divided_is_refused_in_one_sentence(flags, words, images, tmp_path):
    def work() -> dict:
        try:
            tiny.prepare(images, f"{flags} {DIVIDED}")
        except InputError as error:
            return {"said": str(error)}
        return {"said": ""}

    for found in together.run(3, work, tmp_path):
        assert all(word in found["said"] for word in words) and "\n" not in found["said"]


def test_shares_are_dealt_in_whole_classes(tmp_path) -> None:
    """As `processes.shard` deals them, whatever the proxies of a class."""
    whole = torch.arange(7 * 3 * 2).view(21, 2)
    parts = together.run(3, lambda: processes.Share(7, 3).of(whole).clone(), tmp_path)
    assert [len(part) for part in parts] == [6, 6, 9]
    assert torch.equal(torch.cat(parts), whole)
    assert np.all([len(part) % 3 == 0 for part in parts])

"""Proves that our training loop does the same as that of a method's authors, step by step.

    python scripts/parity.py [CASE ...]          the largest difference from the released loop

A case is a published command, shortened to six epochs of four steps, which include warm-up, decay
and freezing. train.py's loop runs it from its flags, in float64 on the CPU, from given weights, on
given batches and random draws (parity_inputs.py). tests/fixtures/loops holds the results of the
released loops with the same inputs; its README says how they were run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import official_layouts
import torch
from parity_inputs import (
    CLASSES,
    EPOCHS,
    IMAGES,
    SIDE,
    STEPS,
    Given,
    balanced,
    seed,
    share,
    shuffled,
)
from parity_inputs import weight as given_weight

import dataset
import net
import options
import train
from dataset.loader import Batch
from net.checkpoints import weights_of
from training.state import Training
from utils import InputError, sentence_errors

ANSWERS = ROOT / "tests" / "fixtures" / "loops"

# --- the cases ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A published command, and its inputs.

    Attributes:
        published: its flags. short: flags that replace some of them in so short a run.
        batches: epoch → its batches.
        clusters: the number at the end, in as many epochs as `--mod-epoch 2` needs; the batch of
            step i counts as one from cluster i, modulo their number.
    """

    published: str
    short: str
    batches: Callable[[int], Iterator[Given]] = shuffled
    clusters: int | None = None

    def flags(self, data: Path) -> list[str]:
        """train.py's command line, on a small copy of the data set."""
        here = f"--data-root {data} --pretrained none --image-size {SIDE} --stem imagenet"
        quiet = "--workers 0 --amp off --wandb disabled --no-report --metrics retrieval"
        return f"{self.published} {self.short} {here} {quiet}".split()


FAMILY = f"--epochs {EPOCHS} --batch-size 8 --lr-decay-step 2"
PROXY_ANCHOR = "--loss Proxy_Anchor --model bn_inception --embedding-size 512 --batch-size 180"
SPHERICAL = "--use_dataset CUB --lr 0.5e-5 --lr_p 0.25e-5 --lr_gamma 0.1 --use_loss"
DIVIDED = (
    "--experiment margin_loss_resnet50 --dataset=sop -i=1 -seed=4 --sz-embedding=512 --mod-epoch=2 "
    "--nb-clusters=32 --nb-epochs=180 --batch-size=80 --num-samples-per-class=2 "
    "--backend=faiss-gpu --lr-gamma=0.3 --mod-epoch-freeze=1 --weight-decay=1e-4 "
    "--batch-sampler=adaptbalanced --force-full-embedding-epoch=80"
)
SHORT = f"--steps {EPOCHS * STEPS} --milestones 12"


def spherical(loss: str, instances: int, constraint: str = "", short: str = SHORT) -> Case:
    """A command of the spherical embeddings' authors."""
    published = f"{SPHERICAL} {loss} --instances {instances} {constraint}"
    return Case(published, f"{short} --batch_size {4 * instances}", partial(balanced, instances))


def divided(options: str) -> Case:
    """A command of divide and conquer's authors."""
    short = f"--nb-clusters=4 --nb-epochs={EPOCHS} --batch-size=8 --force-full-embedding-epoch=5"
    return Case(f"{DIVIDED} {options}", short, partial(balanced, 2), clusters=4)


CASES = {
    "proxy_anchor": Case(
        f"{PROXY_ANCHOR} --lr 1e-4 --dataset cub --warm 1 --bn-freeze 1 --lr-decay-step 10", FAMILY
    ),
    "proxy_anchor_trained_norms": Case(
        f"{PROXY_ANCHOR} --lr 6e-4 --dataset SOP --warm 1 --bn-freeze 0 --lr-decay-step 20 "
        "--lr-decay-gamma 0.25",
        FAMILY,
    ),
    "amloss": Case(
        "--loss AMLoss --model bn_inception --embedding-size 512 --batch-size 180 --lr 1e-4 "
        "--dataset cub --warm 1 --bn-freeze 1 --lr-decay-step 20 --alphap 48 --alphan 48",
        f"{FAMILY} --mrg-lr-decay-step 3",
    ),
    "amloss_resnet50": Case(
        "--loss AMLoss --model resnet50 --embedding-size 512 --batch-size 180 --lr 6e-4 "
        "--dataset SOP --warm 5 --bn-freeze 0 --lr-decay-gamma 0.5",
        FAMILY,
    ),
    "ddml": Case(
        f"{PROXY_ANCHOR} --lr 1e-4 --dataset car --warm 1 --bn-freeze 1 --lr-decay-step 20 "
        "--disent True --al 1.0 --be 0.1 --gam 0.001",
        FAMILY,
    ),
    "ddml_trained_norms": Case(
        f"{PROXY_ANCHOR} --lr 6e-4 --dataset SOP --warm 1 --bn-freeze 0 --lr-decay-step 20 "
        "--lr-decay-gamma 0.25 --disent True --al 1.0 --be 1.0 --gam 0.0001",
        FAMILY,
    ),
    "sec_triplet": spherical("triplet", 3, "--sec_wei 1.0"),
    "sec_triplet_alone": spherical("triplet", 3),
    "sec_triplet_l2": spherical("triplet", 3, "--l2reg_wei 1e-4"),
    "sec_semihtriplet": spherical("semihtriplet", 3, "--sec_wei 0.5"),
    "sec_semihtriplet_ema": spherical("semihtriplet", 3, "--sec_wei 0.5 --norm_momentum 0.5"),
    "sec_n_npair": spherical("n-npair", 2, "--sec_wei 1.0"),
    "sec_ms": spherical("ms", 4, "--sec_wei 1.0", SHORT.replace("12", "8 16")),
    "sec_ms_alone": spherical("ms", 4, "--lr 1e-5 --lr_p 0.5e-5", SHORT.replace("12", "8 16")),
    "idml": Case(
        "--loss Proxy_Anchor --model resnet50 --embedding-size 512 --batch-size 120 --lr 0.0006 "
        "--dataset cub --warm 5 --bn-freeze 1 --lr-decay-step 5 --introspective",
        f"{FAMILY} --warm 3",
    ),
    "divide_learned": divided(
        "--sampler=distanceweighted --masking-lambda=0.01 --mask-lr-mult=100 --mask-wd-mult=1"
    ),
    "divide_fixed": divided("--sampler=distanceweighted --fixed-mask=1"),
    "divide_options": divided(
        "--sampler=distanceweighted --lr-beta=1e-3 --masks-freeze-one-cluster=1 --mask-relu=0 "
        "--masking-lambda=0.01 --stop-recluster --optimizer=AdamW --base-lr=1e-4 --mask-lr-mult=10"
    ),
}


# --- a run ----------------------------------------------------------------------------------------


@dataclass
class Record:
    """The results of a loop.

    Attributes:
        loss: of each step. rates: group → learning rate of each step.
        norms: our key of a tensor → its norm after each epoch.
    """

    loss: list[float] = field(default_factory=list)
    rates: dict[str, list[float]] = field(default_factory=dict)
    norms: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def released(cls, name: str) -> Record:
        """The results of the released loop."""
        answers = load(name)
        rates = dict(zip(answers["groups"].tolist(), answers["rates"].T.tolist(), strict=True))
        norms = dict(
            zip(answers["keys"].tolist(), torch.from_numpy(answers["norms"].T), strict=True)
        )
        learned = {key: norms.pop(key) for key in [*norms] if key.startswith("criterion.")}
        named = {**weights_of(norms), **learned}  # keys are mapped as for a released checkpoint
        return cls(
            answers["loss"].tolist(), rates, {k: v.flatten().tolist() for k, v in named.items()}
        )


def load(name: str) -> dict[str, np.ndarray]:
    """The released loop's results: loss (steps,), groups and rates (steps, groups); keys, shapes
    and norms (epochs, keys) of all tensors of the network and the loss."""
    with np.load(ANSWERS / f"{name}.npz") as archive:
        return {key: archive[key] for key in archive.files}


def run(name: str) -> Record:
    """The results of our loop on a case."""
    case, record = CASES[name], Record()
    with tempfile.TemporaryDirectory() as folder:
        training = train.prepare(options.parse_train(case.flags(write_data(case, Path(folder)))))
    start_as_given(training, load(name))
    training.loader = Loader(case)
    training.embed_training_images = partial(features, training)
    with recording(record), given_shares(training):
        while not training.finished:
            train.advance(training)
            training.end_lap(training.clock.epoch)
            if training.clock.step_in_epoch == 0:
                for key, value in tensors(training).items():
                    record.norms.setdefault(key, []).append(float(value.norm()))
    return record


def write_data(case: Case, folder: Path) -> Path:
    """Writes a small copy of the case's data set, although the given batches are trained on."""
    named = options.parse_train(case.published.split()).dataset
    name = dataset.find(named).name
    layout = next(layout for each, layout in official_layouts.LAYOUTS if each == name)
    official_layouts.write(name, layout, folder, 2 * CLASSES, IMAGES)
    return folder


def start_as_given(training: Training, answers: dict[str, np.ndarray]) -> None:
    """Converts to float64, and sets the given weights, which have released keys."""
    training.network.double()
    training.objective.double()
    shapes = [tuple(map(int, filter(None, text.split(",")))) for text in answers["shapes"].tolist()]
    given = {
        key: torch.from_numpy(given_weight(key, shape))
        for key, shape in zip(answers["keys"].tolist(), shapes, strict=True)
    }
    with torch.no_grad():
        for key, value in criterion_tensors(training).items():
            value.copy_(given.pop(key))
    # The masks, of which more are made later, are ones already.
    net.load_checkpoint(training.network, given, "given weights", masks=False)


def criterion_tensors(training: Training) -> dict[str, torch.Tensor]:
    """The loss's learned tensors, by the last part of their names."""
    return {
        f"criterion.{name.rpartition('.')[2]}": value.detach()
        for name, value in training.objective.named_parameters()
    }


def tensors(training: Training) -> dict[str, torch.Tensor]:
    """All tensors of the network and the loss that a run may change."""
    state = training.network.state_dict()
    floating = {key: value for key, value in state.items() if value.is_floating_point()}
    return floating | criterion_tensors(training)


def features(training: Training, *, pooled: bool) -> torch.Tensor:
    """(N, 2) features for clustering: classes on an arc, with a wide gap between its halves.

    The batches' clusters are given, so these features only need to be divisible.
    """
    labels = torch.from_numpy(training.data.train.labels)
    angle = (labels >> 2 & 1) * 1.0 + (labels >> 1 & 1) * 0.3 + (labels & 1) * 0.1
    return torch.stack([angle.cos(), angle.sin()], dim=1)


class Loader:
    """Replaces the data loader by the given batches."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.epoch = 0

    def wait_seconds(self) -> float:
        """No time: the batches are in memory."""
        return 0.0

    def __len__(self) -> int:
        return STEPS

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next batches."""
        self.epoch = epoch

    def skip(self, steps: int) -> None:
        """Does nothing, because the run is not continued."""
        assert steps == 0

    def set_sampler(self, sampler: object) -> None:
        """Does nothing, because the batches are given."""

    def __iter__(self) -> Iterator[Batch]:
        clusters = self.case.clusters and min(self.case.clusters, 2 ** (self.epoch // 2))
        for step, given in enumerate(self.case.batches(self.epoch)):
            torch.manual_seed(seed(self.epoch, step))
            yield Batch(*map(torch.from_numpy, given), clusters and step % clusters)


@contextmanager
def given_shares(training: Training) -> Iterator[None]:
    """Gives the shares of mixtures, which the released code draws from another generator."""

    def drawn(*_: object) -> torch.Tensor:
        return torch.tensor(share(training.clock.epoch, training.clock.step_in_epoch))

    with mock.patch.object(torch.distributions.Beta, "sample", drawn):
        yield


@contextmanager
def recording(record: Record) -> Iterator[None]:
    """Records the result of each of train.py's steps, and its learning rates."""
    step = train.step

    def noting(training: Training, batch: Batch) -> dict[str, torch.Tensor] | None:
        values = step(training, batch)
        record.loss.append(float(values["loss"]))
        for name, rate in training.optimisers.learning_rates().items():
            record.rates.setdefault(name, []).append(rate)
        return values

    with mock.patch.object(train, "step", noting):
        yield


# --- comparing ------------------------------------------------------------------------------------


def differences(name: str, own: Record) -> dict[str, float]:
    """The largest relative differences from the released loop, of loss, rates and norms.

    Raises:
        InputError: the loops have other steps, groups or tensors.
    """
    released = Record.released(name)
    found = {"loss": largest(own.loss, released.loss)}
    for what in ("rates", "norms"):
        ours, theirs = getattr(own, what), getattr(released, what)
        # Those of divide and conquer's masks and β were not recorded, because groups change there.
        missing = (ours.keys() ^ theirs.keys()) - ({"masks", "beta"} if what == "rates" else set())
        if missing:
            raise InputError(f"{name}: {what} of {', '.join(sorted(missing))} in one loop alone")
        found[what] = max(largest(ours[key], theirs[key]) for key in theirs)
    return found


def largest(own: list[float], released: list[float]) -> float:
    """The largest relative difference from the released numbers."""
    first, second = np.array(own), np.array(released)
    if first.shape != second.shape:
        raise InputError(f"{first.shape} numbers instead of {second.shape}")
    return float((np.abs(first - second) / np.maximum(np.abs(second), 1e-12)).max())


def main(words: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    args = parser.parse_args(words)
    if unknown := [name for name in args.cases if name not in CASES]:
        raise InputError(f"there is no case {unknown[0]}; choose from {', '.join(CASES)}")
    print(f"{'largest relative difference':32}  loss     rates    norms")
    for name in args.cases or CASES:
        found = differences(name, run(name))
        print(f"{name:32}  " + "  ".join(f"{value:.1e}" for value in found.values()), flush=True)


if __name__ == "__main__":
    with sentence_errors():
        main()

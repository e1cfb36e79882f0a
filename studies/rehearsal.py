"""Tries the hardest trainings of a study with --dry-run, so that none fails hours later."""

from __future__ import annotations

import contextlib
import io
import subprocess
from collections.abc import Sequence

import numpy as np

import dataset
import options
from studies.places import Place, train_command
from studies.plan import Entrant, Plan
from studies.trainer import last_words
from training.data import deal
from utils import InputError


def rehearse(plan: Plan, names: Sequence[str], place: Place) -> None:
    """Runs `train.py --dry-run` for the hardest folds of the methods in `names`.

    Raises:
        InputError: a method cannot be trained; the sentence names it and says why.
    """
    for one in plan.entrants:
        if one.name not in names:
            continue
        try:
            folds = hardest_folds(one, plan.folds)
        except InputError as error:
            raise InputError(f"{one.name}: {error}") from error
        for fold in folds:
            values = {r.name: r.first for r in one.space}
            flags = [*one.command(values), *plan.flags_of_fold(fold), *place.flags, "--dry-run"]
            done = subprocess.run(
                train_command(flags),
                capture_output=True,
                text=True,
                check=False,
                env=place.environment,
            )
            if done.returncode:
                raise InputError(f"{one.name}: {last_words(done.stderr, done.returncode)}")


def hardest_folds(entrant: Entrant, folds: int) -> list[int]:
    """The fold without which the fewest images are left, and that without which the fewest classes.

    All folds have about the same number of images. So if class sizes differ a lot, these are two
    folds, and it may be impossible to fill a batch without one of them.

    Raises:
        InputError: the images are missing, or have too few classes, or nothing can be measured on
            some fold.
    """
    chosen = dataset.Choice.of(options.parse_train(list(entrant.flags)))
    with contextlib.redirect_stderr(io.StringIO()):  # the training prints the same warnings
        train = chosen.load("train")
    of_class = deal(train.labels, train.num_classes, folds)
    sizes = np.bincount(train.labels, minlength=train.num_classes)
    if len(matched := np.unique(of_class[sizes > 1])) < folds:
        raise InputError(
            f"of {folds} folds only {len(matched)} would have two images of one "
            f"class, and nothing can be measured on the others; choose fewer folds"
        )
    images = np.bincount(of_class, weights=sizes, minlength=folds)
    classes = np.bincount(of_class, minlength=folds)
    return sorted({int(images.argmax()), int(classes.argmax())})

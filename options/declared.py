"""All flags of each command, including those of the methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import methods
from flags import Flag, Group
from options.evaluating import (
    EVALUATION,
    FILES,
    OVERVIEW,
    POSTPROCESSING,
    REPORT,
    SINGLE_IMAGES,
    as_evaluated,
)
from options.training import DATA, FINETUNING, LOSS, NETWORK, OPTIMISATION, RUN, SELECTION

TRAIN_GROUPS = (
    *(DATA, SELECTION, NETWORK, FINETUNING, LOSS, *methods.groups(), OPTIMISATION, RUN),
    *methods.dead_groups(),
)
EVALUATE_GROUPS = (
    *(EVALUATION, POSTPROCESSING, FILES, SINGLE_IMAGES),
    *(as_evaluated(DATA), as_evaluated(NETWORK)),
)
REPORT_GROUPS = (REPORT, OVERVIEW)


def flags_of(groups: Sequence[Group]) -> list[Flag]:
    """The flags of these groups, in their order."""
    return [entry for group in groups for entry in group.flags]


def train_flags() -> list[Flag]:
    """Every flag of train.py."""
    return flags_of(TRAIN_GROUPS)


def defaults(groups: Sequence[Group]) -> dict[str, Any]:
    """Option → default, of all options of these groups."""
    return {entry.dest: entry.default for entry in flags_of(groups)}

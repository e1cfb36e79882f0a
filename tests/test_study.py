"""docs/study.md: its numbers are those of the runs, and its file is what was studied."""

from __future__ import annotations

import csv
import re
from collections import defaultdict

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

from studies.plan import read

DOCUMENT = (ROOT / "docs" / "study.md").read_text()
PLAN = read(ROOT / "recipes" / "study.toml")


def rows(name):
    with (ROOT / "docs" / name).open() as file:
        return list(csv.DictReader(file))


def block(mark):
    """The lines of a table between its marks, by the method that they begin with."""
    (text,) = re.findall(rf"<!-- {mark} -->\n(.*?)<!-- end of {mark} -->", DOCUMENT, re.DOTALL)
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return lines[0], {line[0]: line[1:] for line in lines[2:]}


def test_means_and_intervals_are_those_of_the_runs():
    heads, table = block("means")
    seeds = defaultdict(list)
    for row in rows("study_runs.csv"):
        seeds[row["method"]].append(row)
    assert list(table) == [one.name for one in PLAN.entrants] == list(seeds)
    for name, cells in table.items():
        for head, cell in zip(heads[1:-1], cells, strict=False):
            values = 100 * np.array([float(row[head]) for row in seeds[name]])
            half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
            mean, spread = map(float, cell.split(" ± "))
            assert (mean, spread) == pytest.approx((values.mean(), half), abs=0.051), (name, head)
        assert int(cells[-1]) == len(seeds[name]) == PLAN.seeds


def test_every_method_had_the_same_number_of_trials_and_its_best_was_chosen():
    _, table = block("search")
    trials = defaultdict(list)
    for row in rows("study_trials.csv"):
        trials[row["method"]].append(row)
    for name, found in trials.items():
        assert len(found) == PLAN.trials
        reached = [float(r["mean MAP@R"]) for r in found if r["state"] == "complete"]
        assert float(table[name][4]) == pytest.approx(100 * max(reached), abs=0.051)
        early = sum(row["state"] == "pruned" for row in found)
        assert table[name][:3] == [f"{PLAN.trials} of {PLAN.trials}", str(early), "0"]

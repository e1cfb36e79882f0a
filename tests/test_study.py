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
    assert trials.keys() == table.keys()
    for name, found in trials.items():
        assert len(found) == PLAN.trials
        reached = [float(r["mean MAP@R"]) for r in found if r["state"] == "complete"]
        assert float(table[name][4]) == pytest.approx(100 * max(reached), abs=0.051)
        early = sum(row["state"] == "pruned" for row in found)
        assert table[name][:3] == [f"{PLAN.trials} of {PLAN.trials}", str(early), "0"]


def corrected(found):
    """Holm's correction of some p."""
    order = np.argsort(found)
    steps = np.maximum.accumulate((len(found) - np.arange(len(found))) * np.array(found)[order])
    return np.minimum(steps, 1)[np.argsort(order)]


@pytest.mark.parametrize("mark", ["tests", "pairs"])
def test_tests_over_seeds_are_those_of_the_runs(mark):
    seeds = defaultdict(list)
    for row in rows("study_runs.csv"):
        seeds[row["method"]].append(row)
    first, *others = seeds
    compared = {name: (first, name) for name in others}
    if mark == "pairs":
        compared = {f"{b} less {a}": (a, b) for a, b in PLAN.compare}
    heads, _ = block(mark)
    (text,) = re.findall(rf"<!-- {mark} -->\n(.*?)<!-- end of {mark} -->", DOCUMENT, re.DOTALL)
    over_seeds = text[: text.index("paired bootstrap")]
    for column, head in ((0, "R@1"), (3, "MAP@R")):
        assert heads[1 + column] == head
        less = {
            name: 100
            * np.array(
                [
                    float(y[head]) - float(x[head])
                    for x, y in zip(*(seeds[m] for m in pair), strict=True)
                ]
            )
            for name, pair in compared.items()
        }
        p = corrected([stats.ttest_1samp(values, 0).pvalue for values in less.values()])
        for (name, values), own in zip(less.items(), p, strict=True):
            (line,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", over_seeds, re.MULTILINE)
            cells = line.split(" | ")[column : column + 3]
            half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
            told = [float(cells[0]), *map(float, cells[1].strip("[]").split(", "))]
            mean = values.mean()
            assert told == pytest.approx([mean, mean - half, mean + half], abs=0.051), name
            p_told = 0.0005 if "&lt;" in cells[2] else float(cells[2])
            assert own == pytest.approx(p_told, abs=0.00051), name


def test_what_the_search_depended_on_is_that_of_the_trials():
    (text,) = re.findall(r"<!-- trials -->\n(.*?)<!-- end of trials -->", DOCUMENT, re.DOTALL)
    finished = defaultdict(list)
    for row in rows("study_trials.csv"):
        if row["state"] == "complete":
            finished[row["method"]].append(row)
    told = dict(re.findall(r"^- (.*?) \(\d+ trials\): (.*)$", text, flags=re.MULTILINE))
    assert set(told) == {name for name, found in finished.items() if len(found) >= 6}
    for name, words in told.items():
        for value, correlation, p in re.findall(r"([\w.-]+) ([+-][\d.]+) \(p ([\d.]+)\)", words):
            reached = [
                [float(row[head]) for row in finished[name]] for head in (value, "mean MAP@R")
            ]
            found = stats.spearmanr(*reached)
            assert [float(correlation), float(p)] == pytest.approx(found, abs=0.0051), (name, value)


def test_runs_on_a_gpu_are_beside_those_of_the_same_seeds_on_a_cpu():
    text = (ROOT / "docs" / "gpu.md").read_text()
    (table,) = re.findall(r"<!-- h200 -->\n(.*?)<!-- end of h200 -->", text, re.DOTALL)
    _, _, *lines = (line.strip("| ").split(" | ") for line in table.splitlines())
    on_gpu, on_cpu = (
        {(row["method"], row["seed"]): row for row in rows(name)}
        for name in ("study_runs_h200.csv", "study_runs.csv")
    )
    assert len(on_gpu) == sum(int(line[1]) for line in lines) == 28
    assert [line[0] for line in lines] == [one.name for one in PLAN.entrants]
    for method, _, *cells in lines:
        runs = [run for run in on_gpu if run[0] == method]
        means = [
            100 * np.mean([float(side[run][head]) for run in runs])
            for head in ("R@1", "MAP@R")
            for side in (on_gpu, on_cpu)
        ]
        assert list(map(float, cells)) == pytest.approx(means, abs=0.051), method
    for head, told in (
        ("MAP@R", "0.00 points on average (standard deviation 0.25, at most 0.91"),
        ("R@1", "+0.09 (0.45, at most 1.91"),
    ):
        less = 100 * np.array(
            [float(on_gpu[run][head]) - float(on_cpu[run][head]) for run in on_gpu]
        )
        found = [less.mean(), less.std(ddof=1), np.abs(less).max()]
        assert told in text.replace("\n", " ")
        numbers = [float(each) for each in re.findall(r"\d+\.\d+", told)]
        assert numbers == pytest.approx(np.abs(found), abs=0.0051), head
    assert all(on_gpu[run]["settings"] == on_cpu[run]["settings"] for run in on_gpu)

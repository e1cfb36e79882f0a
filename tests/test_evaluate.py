"""evaluate.py as users run it: comparisons, tables, single images, progress, faults."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import runpy
import shutil
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import official_layouts
import pytest
import tiny
import together
import torch
from conftest import ROOT, files_in, run_cli, run_python, start_python
from PIL import Image

import dataset
import evaluate
import metrics
import net
import options
import processes
from evaluation import files, meanings, tables
from evaluation.tables import Row
from metrics import comparison, retrieval_per_query, summarise
from metrics.comparison import Scores, query_scores, replicates
from storage import write_json
from utils import InputError

# --- statistics -----------------------------------------------------------------------------------


def scores_of(count: int = 400, noise: float = 1.0, seed: int = 0) -> tuple[dict, Scores]:
    rng = np.random.default_rng(seed)
    labels = np.random.default_rng(1).integers(0, 30, count)
    labels[:5] = np.arange(100, 105)  # without a match
    centres = np.random.default_rng(2).normal(size=(200, 16))
    found = retrieval_per_query(centres[labels] + noise * rng.normal(size=(count, 16)), labels)
    return found, query_scores(found, (1, 4), labels)


def test_means_of_the_scores_are_the_metrics():
    found, scores = scores_of()
    expected = summarise(found, (1, 4))
    assert expected["queries_without_match"] >= 5
    assert scores.means() == pytest.approx({name: expected[name] for name in scores.names})
    assert set(scores.names) == {"R@1", "R@4", "RP", "MAP@R", "mARP", "MRR"}


def test_a_replicate_is_the_metric_of_the_drawn_classes(monkeypatch):
    found, scores = scores_of(60)
    classes = scores.labels.unique()
    monkeypatch.setattr(comparison, "CHUNK", len(classes) * 4)  # several chunks of several draws
    (drawn,) = replicates([scores], 10, seed=3)
    generator = torch.Generator().manual_seed(3)
    for values in drawn:
        places = torch.randint(len(classes), (len(classes),), generator=generator)
        picked = torch.cat([(scores.labels == classes[place]).nonzero()[:, 0] for place in places])
        expected = summarise({name: v[picked] for name, v in found.items()}, (1, 4))
        assert values.tolist() == pytest.approx([expected[name] for name in scores.names])


def test_the_interval_is_scipys():
    """Over the classes: a peer that draws positions of a list of them."""
    peer = pytest.importorskip("scipy.stats")
    _, scores = scores_of(noise=1.6)
    (drawn,) = replicates([scores], 4000, seed=0)
    _, _, values, counted = scores.of_classes()
    for name in ("R@1", "MAP@R"):
        column = scores.names.index(name)

        def metric(places, column=column):
            return values[places, column].sum() / counted[places, column].sum()

        theirs = peer.bootstrap(
            (np.arange(len(values)),),
            metric,
            n_resamples=4000,
            method="percentile",
            vectorized=False,
            rng=np.random.default_rng(0),
        ).confidence_interval
        # Of so many classes the percentiles are not expanded.
        low, high = comparison.interval(drawn[:, column], classes=10**6)
        width = theirs.high - theirs.low
        assert low == pytest.approx(theirs.low, abs=0.05 * width)
        assert high == pytest.approx(theirs.high, abs=0.05 * width)


def test_queries_that_stand_and_fall_together_are_no_more_evidence_than_one():
    """Each query ten times over: the interval stays as wide as it was."""
    found, scores = scores_of(noise=1.6)
    often = {name: values.repeat_interleave(10, 0) for name, values in found.items()}
    copies = query_scores(often, (1, 4), scores.labels.repeat_interleave(10))
    for one, ten in zip(*replicates_of_each(scores, copies), strict=True):
        assert one == pytest.approx(ten)


def replicates_of_each(*scores: Scores) -> list[list[list[float]]]:
    drawn = [replicates([each], 200, seed=0)[0] for each in scores]
    return [
        [
            comparison.share_interval(share, column, 35)
            for share, column in zip(one.means().values(), values.T, strict=True)
        ]
        for one, values in zip(scores, drawn, strict=True)
    ]


@pytest.mark.parametrize("classes", [5, 10, 40])
@pytest.mark.parametrize("truth, least", [(0.7, 0.92), (0.95, 0.85), (0.99, 0.8)])
def test_intervals_over_few_classes_hold_the_truth(classes, truth, least):
    """The plain percentiles do in 81 to 93 % of the cases for .7, and in 25 % for .99."""
    rng = np.random.default_rng(0)
    held = []
    for seed in range(300):
        sizes = torch.from_numpy(rng.integers(4, 61, (classes, 1))).double()
        recall = rng.beta(4 * truth, 4 * (1 - truth), (classes, 1))
        right = torch.from_numpy(rng.binomial(sizes.numpy().astype(int), recall))
        scores = Scores(("R@1",), right.double(), sizes, torch.arange(classes))
        (drawn,) = replicates([scores], 500, seed)
        found = scores.means()["R@1"]
        low, high = comparison.share_interval(found, drawn[:, 0], classes)
        assert 0 <= low <= found <= high <= 1
        held.append(low <= truth <= high)
    assert np.mean(held) >= least


@pytest.mark.parametrize("right", [0, 3, 37, 40])
def test_the_interval_of_classes_of_one_image_is_wilsons(right):
    """As many draws as classes; with none missed, or none found, too."""
    peer = pytest.importorskip("scipy.stats")
    hits = (torch.arange(40) < right).double()[:, None]
    scores = Scores(("R@1",), hits, torch.ones(40, 1).double(), torch.arange(40))
    (drawn,) = replicates([scores], 40_000, seed=0)
    ours = comparison.share_interval(right / 40, drawn[:, 0], 40)
    # scipy's goes by the normal distribution: at the level that has the quantile of Student's.
    level = 2 * peer.norm.cdf(peer.t.ppf(0.975, 39)) - 1
    theirs = peer.binomtest(right, 40).proportion_ci(level, "wilson")
    assert ours == pytest.approx(tuple(theirs), abs=0.01)  # 39 draws' worth, of 40
    # Replicates that are alike say nothing of how many draws they are worth.
    alike = torch.full((9,), right / 40, dtype=torch.float64)
    ours = comparison.share_interval(right / 40, alike, 40, alike=400)
    theirs = peer.binomtest(10 * right, 400).proportion_ci(level, "wilson")
    assert ours == pytest.approx(tuple(theirs))


@pytest.mark.parametrize("classes", [5, 10, 539])
def test_an_interval_of_normal_replicates_is_students(classes):
    """Of a mean of n numbers, whose replicates vary by √((n - 1)/n) less."""
    peer = pytest.importorskip("scipy.stats")
    deviation = math.sqrt((classes - 1) / classes)
    drawn = torch.from_numpy(peer.norm.ppf((np.arange(400_000) + 0.5) / 400_000)) * deviation
    low, high = comparison.interval(drawn, classes)
    expected = peer.t.ppf(0.975, classes - 1)
    assert -low == pytest.approx(high) and high == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("classes", [6, 10, 100])
def test_an_interval_leaves_0_out_where_p_is_below_5_percent(classes):
    drawn = torch.linspace(0, 1, 40_001, dtype=torch.float64).square()  # skewed
    found = []
    for apart in np.linspace(-0.3, 1.3, 101):
        columns = torch.zeros(len(drawn), 1), (drawn - apart)[:, None]
        test = comparison.paired_differences({"R@1": 0.0}, {"R@1": 0.0}, *columns, [classes])["R@1"]
        found.append((test.low > 0 or test.high < 0, test.p < 0.05))
    assert [out for out, _ in found] == [small for _, small in found]
    assert {out for out, _ in found} == {True, False}


def test_one_class_says_nothing_of_others():
    drawn = torch.full((50, 1), 0.5)
    test = comparison.paired_differences({"R@1": 0.0}, {"R@1": 0.5}, 0 * drawn, drawn, [1])["R@1"]
    assert test.difference == 0.5
    assert all(math.isnan(value) for value in test[1:])


def test_a_metric_rests_on_the_classes_that_count_in_it():
    _, scores = scores_of()
    on = dict(zip(scores.names, scores.rest_on(), strict=True))
    assert on["R@1"] == len(scores.labels.unique())
    assert on["MAP@R"] == on["R@1"] - 5  # those of one image


def paired(a: Scores, b: Scores, a_drawn: torch.Tensor, b_drawn: torch.Tensor) -> dict:
    return comparison.paired_differences(a.means(), b.means(), a_drawn, b_drawn, a.rest_on())


def test_paired_test_finds_the_better_network():
    _, worse = scores_of(noise=1.6)
    _, better = scores_of(noise=1.2, seed=5)
    drawn = replicates([worse, better], 500, seed=0)
    found = paired(worse, better, *drawn)
    for name, test in found.items():
        assert test.difference == pytest.approx(better.means()[name] - worse.means()[name])
        assert 0 < test.low < test.difference < test.high
        assert 2 / 501 < test.p < 5 / 501  # 2 / 501, were there many classes
    backwards = paired(better, worse, *reversed(drawn))
    for name, test in backwards.items():  # two-sided: it does not matter which comes first
        assert test.p == found[name].p and test.difference == -found[name].difference


def test_the_paired_interval_is_narrower_than_one_of_two_samples():
    """The same queries are hard for both networks: that is what pairing takes away."""
    found, first = scores_of(noise=1.6)
    hard = dict(found)
    flipped = torch.arange(len(found["rank"])) % 40 == 0
    hard["rank"] = torch.where(flipped, found["rank"] + 1, found["rank"])
    second = query_scores(hard, (1, 4), first.labels)
    a, b = replicates([first, second], 1000, seed=0)
    (alone,) = replicates([second], 1000, seed=1)
    low, high = comparison.interval((b - a)[:, 0], 35)
    apart = comparison.interval((alone - a)[:, 0], 35)
    assert high - low < 0.5 * (apart[1] - apart[0])
    same = paired(first, first, a, a)["R@1"]
    assert same == (0.0, 0.0, 0.0, 1.0)


def test_the_p_value_of_equal_networks_is_uniform():
    """Two networks of one quality, many times over: p is below .1 in about a tenth of them."""
    ps = []
    for trial in range(100):
        _, a = scores_of(150, seed=2 * trial)
        _, b = scores_of(150, seed=2 * trial + 1)
        drawn = replicates([a, b], 200, seed=trial)
        ps.append(paired(a, b, *drawn)["MAP@R"].p)
    ps = np.array(ps)
    assert 0.3 < ps.mean() < 0.7
    assert 1 <= (ps < 0.1).sum() <= 22


def test_a_paired_bootstrap_needs_the_same_queries():
    with pytest.raises(ValueError, match=r"\[60, 80\]"):
        replicates([scores_of(60)[1], scores_of(80)[1]], 10, seed=0)


def test_metrics_of_single_classes():
    found, scores = scores_of(90)
    labels = scores.labels
    classes, sizes, values = comparison.by_class(scores)
    assert int(sizes.sum()) == 90
    for label, size, row in zip(classes, sizes, values, strict=True):
        chosen = labels == label
        expected = summarise({name: v[chosen] for name, v in found.items()}, (1, 4))
        assert int(size) == int(chosen.sum())
        of_name = dict(zip(scores.names, row.tolist(), strict=True))
        if size == 1:
            assert of_name["R@1"] == 0 and math.isnan(of_name["MAP@R"])
        else:
            assert of_name == pytest.approx({name: expected[name] for name in scores.names})


def test_seeds_of_one_configuration():
    one, other = {"loss": "AMLoss", "lr": 1e-4}, {"loss": "AMLoss", "lr": 1e-3}
    known, seeds = [one, other, {}, one, {}], [1, 3, None, 2, None]
    assert comparison.seeds_of_one(known, seeds) == [[0, 3]]
    assert comparison.seeds_of_one([one, one, one], [1, 1, 1]) == []
    assert comparison.seeds_of_one([one, one, one, one], [1, 1, 2, 1]) == [[0, 2]]
    means, deviations = comparison.mean_and_deviation(
        [{"R@1": 0.6, "NMI": 0.5}, {"R@1": 0.7}, {"R@1": 0.8}]
    )
    assert means == pytest.approx({"R@1": 0.7}) and deviations == pytest.approx({"R@1": 0.1})


def test_groups_of_seeds_are_compared_seed_by_seed():
    peer = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a = {seed: {"R@1": 0.5 + rng.normal(0, 0.01), "NMI": 0.7} for seed in (1, 2, 3, 4)}
    b = {seed: {"R@1": 0.51 + rng.normal(0, 0.01)} for seed in (2, 3, 4, 9)}
    test = comparison.seed_differences(a, b)
    assert list(test) == ["R@1"]
    shared = [[numbers[seed]["R@1"] for seed in (2, 3, 4)] for numbers in (b, a)]
    theirs = peer.ttest_rel(*shared)
    assert test["R@1"].p == pytest.approx(theirs.pvalue)
    assert test["R@1"][1:3] == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert comparison.seed_differences(a, {1: b[2]}) == {}
    undefined = comparison.seed_differences(a, {seed: {"R@1": None} for seed in a})
    assert all(math.isnan(value) for value in undefined["R@1"])
    same = comparison.seed_differences(a, a)["NMI"]
    assert same == (0, 0, 0, 1)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_seeds_that_all_differ_alike_are_no_certainty(seeds: int) -> None:
    """Two methods that find 28 or 29 of 30 images, each as often, are seldom told apart."""
    rng, surely, studies = np.random.default_rng(0), 0, 400
    for _ in range(studies):
        a, b = (
            {seed: {"R@1": float(rng.integers(28, 30)) / 30} for seed in range(seeds)}
            for _ in range(2)
        )
        surely += comparison.seed_differences(a, b)["R@1"].p < 0.05
    assert surely / studies < 0.05
    # 29/30 - 28/30 is not 28/30 - 27/30 to the last bit
    a = {seed: {"R@1": (28 - seed % 2) / 30} for seed in range(seeds)}
    b = {seed: {"R@1": (29 - seed % 2) / 30} for seed in range(seeds)}
    found = comparison.seed_differences(a, b)["R@1"]
    assert found.p == 2 ** (1 - seeds) and found.difference == pytest.approx(1 / 30)
    assert math.isnan(found.low) and math.isnan(found.high)


def test_corrected_p_values():
    peer = pytest.importorskip("scipy.stats")
    ps = [0.01, 0.04, 0.03, 0.005, math.nan]
    found = comparison.holm(ps)
    assert found[:4] == pytest.approx([0.03, 0.06, 0.06, 0.02]) and math.isnan(found[4])
    assert comparison.holm([0.7, 0.9, 0.2]) == pytest.approx([1.0, 1.0, 0.6])
    # Never less strict than the correction that controls less.
    assert (np.array(found[:4]) >= peer.false_discovery_control(ps[:4]) - 1e-12).all()


# --- tables ---------------------------------------------------------------------------------------

ROWS = [
    Row("cub", "a_1", {"R@1": 0.6, "R@10": 0.9, "R@2": 0.7, "mARP": 0.5, "queries": 9}),
    Row("cub", "a_2", {"R@1": 0.7, "R@2": 0.8, "R@10": 0.8, "mARP": 0.5, "queries": 9}),
    Row(
        "cub",
        "A & B, 2 seeds",
        {"R@1": 0.65, "R@2": 0.75, "R@10": 0.85, "mARP": 0.5},
        deviation={"R@1": 0.00707, "R@2": 0.00707, "R@10": 0.00707, "mARP": 0.0},
        members=("a_1", "a_2"),
        repeats=2,
    ),
    Row("cub", "c", {"R@1": 0.661, "R@2": 0.7, "R@10": 0.85}, intervals={"R@1": (0.65, 0.67)}),
]


@pytest.mark.parametrize("room", [40, 60, 80, 200])
def test_a_table_fits_the_terminal(room, monkeypatch):
    heads = [f"R@{k}" for k in (1, 2, 4, 8)] + ["RP", "MAP@R", "mARP", "MRR", "NMI", "F1", "AMI"]
    lines = [(title, [f"{title[0]}{i:.4f}" for i in range(11)]) for title in ("first", "second")]
    printed = tables.aligned(heads, lines, room).splitlines()
    assert max(map(len, printed)) <= room
    whole = tables.aligned(heads, lines).splitlines()
    assert len(whole) == 3 and (len(printed) == 3) == (len(whole[0]) <= room)
    for number, (title, cells) in enumerate([("", heads), *lines]):
        rows = printed[number::3]
        assert [word for row in rows for word in row.split() if word != title] == cells


def test_own_images_are_called_by_the_name_of_their_folder():
    rows = [Row("folder:/home/me/birds", "", {"R@1": 0.5}), Row("csv:b/fish.csv", "", {"R@1": 1})]
    assert tables.titles(rows) == ["birds", "fish.csv"]
    alike = [
        replace(row, task=f"folder:{place}/birds") for row, place in zip(rows, "ab", strict=True)
    ]
    assert tables.titles(alike) == [row.task for row in alike]


def test_screen_table():
    lines = tables.text(ROWS).splitlines()
    assert lines[0].split() == ["R@1", "R@2", "R@10", "mARP"]
    assert lines[1].split() == ["a_1", "0.6000", "0.7000", "0.9000", "0.5000"]
    assert lines[4].split()[-4:] == ["0.0635", "0.0635", "0.0635", "0.0000"]  # t of 1: 12.706
    assert lines[5].split() == ["c", "0.6610", "0.7000", "0.8500"]
    assert len({len(line) for line in lines}) == 1
    for word in ("R@K", "mARP", "instead of R"):
        assert word in tables.footnote(ROWS)
    assert "NMI" not in tables.footnote(ROWS)


@pytest.mark.parametrize(
    ("queries", "alone", "words"),
    [
        (1, 1, "The only query has no other image of its class to find"),
        (9, 9, "None of the 9 queries has another image of its class to find"),
        (9, 1, "1 of the 9 queries has no other image"),
        (9, 2, "2 of the 9 queries have no other image"),
    ],
)
def test_queries_without_anything_to_find_are_counted(queries, alone, words):
    numbers = {"queries": queries, "queries_without_match": alone}
    assert meanings.about_matches(numbers).startswith(words)
    assert meanings.nothing_to_find(numbers) == (queries == alone)


def test_a_line_alone_is_called_by_what_was_evaluated():
    for label, title in (("", "birds"), ("mean of 3 seeds", "mean of 3 seeds, birds")):
        lines = tables.text([Row("folder:/home/me/birds", label, {"R@1": 0.5})]).splitlines()
        assert lines[1] == f"{title} 0.5000"


def test_csv_table():
    header, lines = tables.csv_table(ROWS)
    records = [dict(zip(header, line, strict=True)) for line in lines]
    assert records[0]["R@1"] == "0.6" and records[0]["R@1 sd"] == ""
    assert records[2]["R@1 sd"] == "0.00707" and records[2]["R@1 ±"].startswith("0.0635")
    assert (records[3]["R@1 low"], records[3]["R@1 high"], records[3]["mARP"]) == (
        "0.65",
        "0.67",
        "",
    )
    assert "R@2 low" not in header


def latex_rows(text: str) -> list[list[str]]:
    body = text.split(r"\midrule", 1)[1].split(r"\bottomrule")[0]
    rows = [line.removesuffix(r"\\") for line in body.splitlines() if line.endswith(r"\\")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)&", row)] for row in rows]


def test_paper_table():
    text = tables.latex(ROWS, "50 % of _it_", "in/CUB & Cars_2.tex")
    assert r"\label{tab:CUB-Cars-2}" in text
    assert r"\caption{50 \% of \_it\_}" in text and r"\toprule" in text
    assert r"\begin{tabular}{lrrrr}" in text
    averaged, alone = latex_rows(text)  # the two seeds are in their mean
    assert averaged[:2] == [r"A \& B, 2 seeds", r"65.0 $\pm$ 6.4"]
    assert alone == ["c", r"\textbf{66.1}", "70.0", r"\textbf{85.0}", "--"]
    assert averaged[3] == r"\textbf{85.0} $\pm$ 6.4" and averaged[4] == r"50.0 $\pm$ 0.0"
    assert r"\sum_{j\le R}\mathrm{hit}_j" in text
    for opening, closing in ("{}", "[]"):
        assert text.count(opening) == text.count(closing)
    assert text.count(r"\begin") == text.count(r"\end") and text.count("$") % 2 == 0


def test_paper_table_of_several_tasks():
    rows = [Row(task, label, {"R@1": 0.5}) for label in "ab" for task in ("small", "large")]
    found = latex_rows(tables.latex(rows, "", "t.tex"))
    assert found[0] == [r"\multicolumn{2}{l}{small}"] and found[3] == [r"\multicolumn{2}{l}{large}"]
    assert [row[0] for row in found[1:3] + found[4:]] == ["a", "b", "a", "b"]


# --- the command line, on small data --------------------------------------------------------------


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


class Runs(NamedTuple):
    """Checkpoints: two seeds of one configuration, another loss, and one with uncertainty."""

    images: Path
    seed1: Path
    seed2: Path
    other: Path
    uncertain: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("evaluate")
    images = tiny.write_images(folder / "images", eval_images=5)
    flags = {
        "seed1": "--loss Proxy_Anchor --seed 1",
        "seed2": "--loss Proxy_Anchor --seed 2",
        "other": "--loss AMLoss",
        "uncertain": "--loss Proxy_Anchor --introspective paper",
    }
    found = {}
    for name, more in flags.items():
        run = tiny.run(images, folder / "logs", name, f"--epochs 2 --warm 0 --amp off {more}")
        (found[name],) = run.glob("*_best.pth")
    return Runs(images, **found)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`python evaluate.py …` in a folder of its own, without the seconds a new process costs."""

    def execute(*arguments: str | Path) -> Done:
        words = [str(a) for a in arguments]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words, "--workers", "0", "--amp", "off"])
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return Done(code, *capsys.readouterr())

    return execute


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def read_embeddings(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    with np.load(path) as file:
        return file["embeddings"], file["labels"], file["paths"].tolist()


def test_several_checkpoints_in_one_table(runs, tmp_path):
    """The real thing: a process of its own."""
    files = [str(path) for path in (runs.seed1, runs.other, runs.seed2)]
    written = ["--json", "n.json", "--csv", "n.csv", "--latex", "n.tex", "--workers", "0"]
    done = run_cli("evaluate.py", "--resume", *files, "--bootstrap", "200", *written, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert files_in(tmp_path) == ["n.csv", "n.json", "n.tex"]
    content = json.loads((tmp_path / "n.json").read_text())
    first, other, second, mean = content["results"]
    assert [r["label"] for r in content["results"][:3]] == ["seed1", "other", "seed2"]
    assert mean["mean_of"] == ["seed1", "seed2"] and "2 seeds" in mean["label"]
    for name in ("R@1", "R@8", "RP", "MAP@R", "mARP", "MRR", "NMI", "F1", "AMI"):
        values = np.array([first[name], second[name]])
        assert mean[name] == pytest.approx(values.mean())
        assert mean["standard_deviation"][name] == pytest.approx(values.std(ddof=1))
    assert set(first["interval_95"]) == {"R@1", "R@2", "R@4", "R@8", "RP", "MAP@R", "mARP", "MRR"}
    for name, (low, high) in first["interval_95"].items():
        assert low <= first[name] <= high and low < high
    (test,) = content["paired_tests"]  # seeds of one configuration are not compared
    assert (test["a"], test["b"], test["over"]) == (mean["label"], "other", "classes")
    difference = test["MAP@R"]
    assert difference["difference"] == pytest.approx(other["MAP@R"] - mean["MAP@R"])
    assert difference["p_corrected"] == difference["p"]
    assert difference["low"] <= difference["difference"] <= difference["high"]

    rows = read_csv(tmp_path / "n.csv")
    assert [row["label"] for row in rows][:3] == ["seed1", "other", "seed2"]
    assert float(rows[3]["R@1 sd"]) == pytest.approx(mean["standard_deviation"]["R@1"], rel=1e-4)
    assert rows[0]["images"] == "40" and rows[0]["checkpoint"] == files[0]
    printed = done.stdout
    assert f"other {other['R@1']:.4f}" in re.sub(" +", " ", printed)
    assert f"B = other less A = {mean['label']}" in printed
    assert "interval of the mean over seeds (Student's t)" in re.sub(r"\s+", " ", printed)
    found = latex_rows((tmp_path / "n.tex").read_text())
    assert [row[0] for row in found] == ["other", r"Proxy\_Anchor, resnet10, 2 seeds"]


def test_two_configurations_are_compared_over_the_seeds_that_both_have(runs, command, tmp_path):
    """Paired by seed, in whatever order they are named: the t-test is scipy's."""
    peer = pytest.importorskip("scipy.stats")
    content = torch.load(runs.other, weights_only=True)
    for seed in (3, 2):
        content["args"]["seed"] = seed
        content["model_state_dict"]["model.embedding.bias"].add_(0.1 * seed)
        torch.save(content, tmp_path / f"seed{seed}_best.pth")
    more = tmp_path / "seed3_best.pth", tmp_path / "seed2_best.pth", runs.other
    done = command("--resume", runs.seed1, runs.seed2, *more, "--json", "n.json")
    assert done.code == 0, done.err
    written = json.loads((tmp_path / "n.json").read_text())
    a1, a2, _, b2, b1 = written["results"][:5]
    (test,) = written["paired_tests"]
    assert test["over"] == "seeds"
    for name in ("R@1", "MAP@R", "NMI"):
        apart = [b1[name] - a1[name], b2[name] - a2[name]]
        expected = peer.ttest_1samp(apart, 0)
        low, high = expected.confidence_interval(0.95)
        found = [test[name][key] for key in ("difference", "low", "high", "p")]
        assert found == pytest.approx([np.mean(apart), low, high, expected.pvalue])


def test_one_checkpoint_gives_what_training_saw(runs, command, tmp_path):
    done = command("--resume", runs.seed1, "--json", "n.json")
    assert done.code == 0, done.err
    (numbers,) = json.loads((tmp_path / "n.json").read_text())["results"]
    best = max(tiny.metrics_rows(runs.seed1.parent), key=lambda row: float(row["R@1"]))
    for name in ("R@1", "MAP@R", "MRR", "NMI", "F1", "AMI"):
        assert numbers[name] == pytest.approx(float(best[name]), abs=2e-6)
    assert done.err == "" and "40 images, 8 classes" in done.out
    assert "mARP: the same sum over the number of right j ≤ R" in done.out


def test_numbers_are_those_of_the_metrics_on_the_exported_embeddings(runs, command, tmp_path):
    done = command("--resume", runs.seed1, "--json", "n.json", "--export", "e.npz")
    assert done.code == 0, done.err
    (numbers,) = json.loads((tmp_path / "n.json").read_text())["results"]
    x, labels, paths = read_embeddings(tmp_path / "e.npz")
    with np.load(tmp_path / "e.npz") as file:
        assert file["class_names"][labels].tolist() == [Path(path).parent.name for path in paths]
    expected = metrics.retrieval_metrics(x, labels, ks=(1, 2, 4, 8))
    expected |= metrics.clustering_metrics(x, labels, seed=1, ami=True)
    assert {name: numbers[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_metrics_choose_what_is_computed(runs, command, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "retrieval_per_query", None)  # would fail where it is called
    done = command("--resume", runs.seed1, "--json", "n.json", "--metrics", "nmi", "AMI")
    assert done.code == 0, done.err
    (numbers,) = json.loads((tmp_path / "n.json").read_text())["results"]
    assert {"NMI", "AMI"} <= set(numbers) and not {"R@1", "F1", "RP"} & set(numbers)
    assert "F1" not in done.out and "R@K" not in done.out
    monkeypatch.undo()


def test_block_size_changes_nothing(runs, command, tmp_path):
    found = []
    for size in ("7", "100"):
        done = command("--resume", runs.seed1, "--json", "n.json", "--block-size", size)
        assert done.code == 0, done.err
        found.append(json.loads((tmp_path / "n.json").read_text()))
    assert found[0] == found[1]


def test_data_are_loaded_once_for_all_checkpoints(runs, tmp_path, monkeypatch):
    loads = []
    load = dataset.Choice.load
    monkeypatch.setattr(dataset.Choice, "load", lambda *a, **k: loads.append(a) or load(*a, **k))
    line = ["--resume", str(runs.seed1), str(runs.other), "--metrics", "retrieval"]
    evaluate.run(options.parse_evaluate([*line, "--workers", "0"]))
    assert [arguments[1] for arguments in loads] == ["eval"]


@pytest.mark.parametrize(
    ("named", "averaged"),
    [
        (["{seed1}", "{copy}"], False),
        (["{seed1}", "{last1}"], False),
        (["{last1}", "{seed1}", "{copy}", "{seed2}"], True),
    ],
)
def test_a_seed_counts_once_in_an_average(named, averaged, runs, command, tmp_path):
    """Two checkpoints of one run, or a run made twice, are no two seeds."""
    shutil.copytree(runs.seed1.parent, tmp_path / "copy")
    places = {
        **runs._asdict(),
        "last1": runs.seed1.parent / "last.pth",
        "copy": tmp_path / "copy" / runs.seed1.name,
    }
    files = [each.format(**places) for each in named]
    done = command("--resume", *files, "--json", "n.json", "--metrics", "retrieval")
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "n.json").read_text())["results"]
    averages = [result for result in results if "mean_of" in result]
    if not averaged:
        assert averages == [] and len(results) == len(files)
        assert "seeds" not in done.out and "±" not in done.out
        return
    (mean,) = averages
    assert "2 seeds" in mean["label"]
    assert mean["checkpoint"] == f"{runs.seed1} {runs.seed2}"
    of_file = {result["checkpoint"]: result for result in results}
    own = [of_file[str(file)]["MAP@R"] for file in (runs.seed1, runs.seed2)]
    assert mean["MAP@R"] == pytest.approx(np.mean(own))


def test_bootstrap_follows_its_seed(runs, command, tmp_path):
    found = []
    for seed in ("1", "1", "2"):
        line = ("--bootstrap", "100", "--seed", seed, "--metrics", "retrieval", "--json", "n.json")
        assert command("--resume", runs.seed1, *line).code == 0
        (result,) = json.loads((tmp_path / "n.json").read_text())["results"]
        found.append(result["interval_95"]["MAP@R"])
    assert found[0] == found[1] != found[2]


# --- single images --------------------------------------------------------------------------------


def test_classes_one_by_one(runs, command, tmp_path):
    line = ("--per-class", "c.csv", "--export", "e.npz", "--metrics", "retrieval")
    assert command("--resume", runs.seed1, *line).code == 0
    x, labels, _ = read_embeddings(tmp_path / "e.npz")
    found = retrieval_per_query(x, labels)
    rows = read_csv(tmp_path / "c.csv")
    assert {row["class"] for row in rows} == {f"eval{c}" for c in range(8)}
    assert [float(row["R@1"]) for row in rows] == sorted(float(row["R@1"]) for row in rows)
    for row in rows:
        chosen = torch.from_numpy(labels == int(row["class"].removeprefix("eval")))
        expected = summarise({name: v[chosen] for name, v in found.items()}, (1, 2, 4, 8))
        assert int(row["images"]) == 5
        for name in ("R@1", "R@8", "RP", "MAP@R", "mARP", "MRR"):
            assert float(row[name]) == pytest.approx(expected[name], abs=1e-5)


def test_failures_are_the_worst_queries_with_their_neighbours(runs, command, tmp_path):
    line = ("--failures", "6", "--top", "3", "--out", "worst", "--export", "e.npz")
    done = command("--resume", runs.seed1, *line)
    assert done.code == 0, done.err
    assert files_in(tmp_path / "worst") == ["failures.csv", "failures.png"]
    assert "worst/failures.csv" in done.out
    x, labels, paths = read_embeddings(tmp_path / "e.npz")
    similarity = x.astype(np.float64) @ x.T.astype(np.float64)
    np.fill_diagonal(similarity, -2)
    order = np.argsort(-similarity, axis=1, kind="stable")
    rank = 1 + (labels[order] == labels[:, None]).argmax(1)
    rows = read_csv(tmp_path / "worst" / "failures.csv")
    assert len(rows) == 6
    ranks = [int(row["rank of the nearest right image"]) for row in rows]
    assert ranks == sorted(rank, reverse=True)[:6] and ranks[-1] > 1
    for row, expected in zip(rows, ranks, strict=True):
        query = paths.index(row["path"])
        assert rank[query] == expected and row["class"] == f"eval{labels[query]}"
        for place in (1, 2, 3):
            neighbour = order[query, place - 1]
            assert row[f"path {place}"] == paths[neighbour]
            assert row[f"class {place}"] == f"eval{labels[neighbour]}"
            cosine = similarity[query, neighbour]
            assert float(row[f"cosine {place}"]) == pytest.approx(cosine, abs=1e-5)
    with Image.open(tmp_path / "worst" / "failures.png") as picture:
        assert picture.format == "PNG" and picture.height > 6 * 60


def test_a_query_finds_its_own_file_and_what_is_like_it(runs, command, tmp_path, caplog):
    own = runs.images / "eval" / "eval3" / "2.png"
    other = runs.images / "train" / "train0" / "0.png"
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG broken")
    line = ("--query", own, bad, other, "--top", "4", "--metrics", "retrieval")
    done = command("--resume", runs.seed1, *line)
    assert done.code == 0, done.err
    assert "bad.png cannot be read" in caplog.text and "left out: 1 image" in done.out
    folder = runs.seed1.parent
    rows = read_csv(folder / "query.csv")
    assert len(rows) == 8 and rows[0]["path"] == str(own) and rows[0]["class"] == "eval3"
    assert float(rows[0]["cosine"]) == pytest.approx(1, abs=1e-5)
    assert all(row["query"] == str(other) for row in rows[4:])
    for part in (rows[:4], rows[4:]):
        cosines = [float(row["cosine"]) for row in part]
        assert cosines == sorted(cosines, reverse=True) and len(set(cosines)) == 4
        assert [row["place"] for row in part] == ["1", "2", "3", "4"]
        assert all(row["path"] in done.out for row in part)
    assert "searched: the 40 evaluated images of 8 classes" in done.out
    with Image.open(folder / "query.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 4 * 60
    for name in ("query.csv", "query.png"):
        (folder / name).unlink()


def test_a_query_to_drawings_in_memory_is_seen_whole_on_white(tmp_path):
    like = dataset.load("emoji", ROOT / "data", "eval")
    path = tmp_path / "wide.png"
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(path)
    found = files.own_images([str(path), str(path)], like)
    assert found.pixels.shape == (2, *like.pixels.shape[1:]) and len(found) == 2
    size = like.pixels.shape[1]
    assert (found.pixels[0][: size // 4 - 1] == 255).all()
    assert (found.pixels[0][size // 2] == 0).all()


def test_export_has_the_uncertainty(runs, command, tmp_path):
    line = ("--export", "e.npz", "--uncertain", "u.csv", "--metrics", "nmi")
    done = command("--resume", runs.uncertain, *line)
    assert done.code == 0, done.err
    with np.load(tmp_path / "e.npz") as file:
        norms = np.linalg.norm(file["uncertainty"], axis=1)
        of_path = dict(zip(file["paths"].tolist(), norms.tolist(), strict=True))
        assert file["uncertainty"].shape == file["embeddings"].shape == (40, 8)
    listed = {r["path"]: float(r["uncertainty"]) for r in read_csv(tmp_path / "u.csv")}
    assert listed == pytest.approx(of_path, rel=1e-4)
    assert command("--resume", runs.seed1, "--export", "e.npz").code == 0
    with np.load(tmp_path / "e.npz") as file:
        assert "uncertainty" not in file


# --- data sets with protocols of their own --------------------------------------------------------


def test_vehicleid_has_its_official_protocol_as_a_row(runs, command, tmp_path):
    official_layouts.write("vid", "official", tmp_path / "data", classes=16, images=5)
    line = ("--resume", runs.seed1, "--dataset", "vid", "--image-size", "32")
    done = command(*line, "--json", "n.json", "--export", "e.npz", "--ks", "1", "2")
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "n.json").read_text())["results"]
    titles = [result["title"] for result in results]
    assert titles[0] == "vid large" and len(titles) == 6
    assert titles[1] == "vid large, one image per class as gallery (10 draws)"
    x, labels, _ = read_embeddings(tmp_path / "e.npz")
    expected = metrics.one_per_class_gallery(x, labels, 10, seed=1, ks=(1, 2))
    for name in ("R@1", "R@2", "MRR"):
        assert results[1][name] == pytest.approx(expected[name], abs=1e-6)
        spread = results[1]["standard_deviation"][name]
        assert spread == pytest.approx(expected[f"{name}_sd"], abs=1e-6)
    half = results[1]["half_width_95"]["R@1"]  # Student's t of 9: 2.262
    assert half == pytest.approx(
        2.262 * results[1]["standard_deviation"]["R@1"] / 10**0.5, rel=1e-3
    )
    assert titles[1] in done.out and "of the mean over draws" in re.sub(r"\s+", " ", done.out)
    done = command(*line, "--metrics", "retrieval", "nmi", "--ks", "1")
    assert done.code == 0 and "one image per class" not in done.out


def test_queries_and_gallery(runs, command, tmp_path):
    official_layouts.write("inshop", "official", tmp_path / "data", classes=8, images=6)
    line = ("--resume", runs.seed1, "--dataset", "Inshop", "--image-size", "32", "--ks", "1")
    done = command(*line, "--failures", "3", "--export", "e.npz", "--json", "n.json")
    assert done.code == 0, done.err
    with np.load(tmp_path / "e.npz") as file:
        expected = metrics.retrieval_metrics(
            file["embeddings"],
            file["labels"],
            file["gallery_embeddings"],
            file["gallery_labels"],
            ks=(1,),
        )
    (numbers,) = json.loads((tmp_path / "n.json").read_text())["results"]
    assert {name: numbers[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    for name in ("failures.csv", "failures.png"):
        (runs.seed1.parent / name).unlink(missing_ok=True)


# --- several processes ----------------------------------------------------------------------------


def evaluated_here(line: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    evaluate.run(options.parse_evaluate(line))
    return capfd.readouterr().out


def evaluated_by_two(line: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    work = lambda: evaluate.run(options.parse_evaluate(line))  # noqa: E731
    together.run(2, work, Path("..").resolve())
    return capfd.readouterr().out


def evaluated_by_torchrun(line: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run_python(*torchrun, ROOT / "evaluate.py", *line, cwd=Path.cwd(), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "by_two",
    [evaluated_by_two, pytest.param(evaluated_by_torchrun, marks=pytest.mark.slow)],
)
def test_two_processes_write_what_one_writes(by_two, runs, tmp_path, monkeypatch, capfd):
    """Every kind of output; batches of 7, so that shares are uneven."""
    query = str(runs.images / "train" / "train0" / "0.png")
    line = ["--resume", str(runs.uncertain), "--workers", "0", "--amp", "off", "--batch-size", "7"]
    line += "--json n.json --csv n.csv --latex n.tex --per-class c.csv --export e.npz".split()
    line += "--uncertain u.csv --neighbours n.png --failures 4 --out . --bootstrap 100".split()
    line += ["--query", query]
    printed = {}
    for name, evaluated in (("one", evaluated_here), ("two", by_two)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        capfd.readouterr()
        printed[name] = re.sub(r"\d+\.\d s", "", evaluated(line, capfd))
    assert printed["one"] == printed["two"]
    files = files_in(tmp_path / "one")
    assert files == files_in(tmp_path / "two") and len(files) == 11
    for file in files:
        if file != "e.npz":  # a zip archive, which keeps the time
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    with np.load(tmp_path / "one" / "e.npz") as one, np.load(tmp_path / "two" / "e.npz") as two:
        assert set(one) == set(two)
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])


@pytest.mark.parametrize("what", ["network", "images"])
def test_processes_with_other_files_under_the_same_names_are_refused(
    what, runs, tmp_path, monkeypatch
):
    """As on two machines without a shared disk, one of which has an older copy."""
    for number, run in enumerate((runs.seed1, runs.seed2)):
        folder = tmp_path / str(number)
        tiny.write_images(folder / "own", images=4 + (number if what == "images" else 0))
        network = run if what == "network" else runs.seed1
        shutil.copytree(network.parent, folder / "run")

    def evaluated() -> str:
        monkeypatch.chdir(tmp_path / str(processes.rank()))
        line = "--resume run --dataset folder:own --image-size 32 --workers 0 --amp off"
        with pytest.raises(InputError) as raised:
            evaluate.run(options.parse_evaluate(line.split()))
        return str(raised.value)

    said = together.run(2, evaluated, tmp_path)
    name = "the network of run/" if what == "network" else "the images for run/"
    assert said[0] == said[1] and said[0].startswith(f"the processes differ in {name}")


@pytest.mark.parametrize("data", ["vid", "Inshop"])
def test_protocols_in_two_processes(data, runs, tmp_path):
    official_layouts.write(data.lower(), "official", tmp_path / "data", classes=16, images=5)
    line = ["--resume", str(runs.seed1), "--dataset", data, "--data-root", str(tmp_path / "data")]
    line += "--image-size 32 --ks 1 2 --workers 0 --amp off".split()

    def evaluated(file: str) -> None:
        evaluate.run(options.parse_evaluate([*line, "--json", str(tmp_path / file)]))

    # A batch holds all images, so the second process has none to embed.
    evaluated("one.json")
    together.run(2, lambda: evaluated("two.json"), tmp_path)
    assert (tmp_path / "two.json").read_text() == (tmp_path / "one.json").read_text()


# --- in training ----------------------------------------------------------------------------------


def test_training_computes_what_it_is_told_and_at_the_end_all(runs, tmp_path, capsys):
    folder = tiny.run(runs.images, tmp_path, "run", "--epochs 2 --metrics nmi --amp off")
    rows = tiny.metrics_rows(folder)
    assert len(rows) == 2
    for row in rows:
        assert float(row["R@1"]) >= 0 and float(row["NMI"]) >= 0
        assert "F1" not in row and "AMI" not in row
    (final,) = json.loads((folder / "results.json").read_text())["results"].values()
    assert {"R@1", "MAP@R", "NMI", "F1", "AMI"} <= set(final)
    best = max(rows, key=lambda row: float(row["R@1"]))
    for name in ("R@1", "NMI"):
        assert final[name] == pytest.approx(float(best[name]), abs=2e-6)
    assert "AMI" in capsys.readouterr().out.split("Best epoch")[1]


# --- progress -------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo-terminal")
def test_progress_on_a_terminal_has_the_time_left(runs, tmp_path):
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    command = [ROOT / "evaluate.py", "--resume", runs.seed1, "--workers", "0"]
    process = start_python(*command, cwd=tmp_path, streams={"stderr": theirs})
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux's end of a pseudo-terminal
            break
        if not part:
            break
        seen += part
    os.close(ours)
    assert process.wait() == 0
    shown = seen.decode()
    for title in ("search", "k-means"):
        assert re.search(rf"{title}: +\d+%\|.*\| \d+:\d+<", shown), title
    assert "img/s" in shown


# --- faults ---------------------------------------------------------------------------------------


def broken_copy(path: Path, folder: Path, kind: str) -> Path:
    """A checkpoint with a fault."""
    copy = folder / f"{kind}.pth"
    if kind == "truncated":
        copy.write_bytes(path.read_bytes()[:4000])
        return copy
    if kind == "text":
        copy.write_text("these are not weights\n")
        return copy
    content = torch.load(path, weights_only=True)
    weights = content["model_state_dict"]
    if kind in ("nan", "inf"):
        weights["model.embedding.bias"][3] = float(kind)
    elif kind == "short":
        weights["model.embedding.bias"] = weights["model.embedding.bias"][:7]
    elif kind == "foreign":
        content = {"someone": torch.zeros(3)}
    torch.save(content, copy)
    return copy


def assert_refused(done: Done, *words: str) -> None:
    assert done.code == 2, done.out + done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    assert len(done.err) > 30 and "Traceback" not in done.err
    for word in words:
        assert word in done.err


OUTPUTS = ("--json", "n.json", "--csv", "n.csv", "--latex", "n.tex")


@pytest.mark.parametrize(
    ("kind", "flags", "words"),
    [
        ("nan", (), ["40 of the 40 embeddings are NaN or infinite"]),
        ("inf", (), ["NaN or infinite", "training may have diverged"]),
        ("short", (), ["model.embedding.bias", "(7,)", "(8,)"]),
        ("truncated", (), ["truncated.pth", "cannot be read"]),
        ("text", (), ["text.pth", "cannot be read"]),
        ("foreign", (), ["foreign.pth"]),
        ("good", ("--embedding-size", "16"), ["8", "16"]),
        ("good", ("--ks", "1", "41"), ["R@41", "40", "--ks: ", "smaller K"]),
        ("good", ("--dataset", "folder:{empty}"), ["empty", "eval"]),
        ("good", ("--metrics", "recall"), ["--metrics", "recall"]),
        ("good", ("--metrics", "nmi", "--failures", "3"), ["--failures", "retrieval"]),
        ("good", ("--metrics", "retrieval", "--kmeans-restarts", "3"), ["--kmeans-restarts"]),
        ("good", ("--top", "3"), ["--top", "--query"]),
        ("good", ("--checkpoint", "other.pth"), ["--checkpoint is for training"]),
        ("good", ("--dropout=0.3",), ["--dropout is for training"]),
        ("good", ("--bn_freeze", "1"), ["--bn_freeze is for training"]),
        ("good", ("--lr", "1"), ["--lr is for training"]),
        ("good", ("--l2-norm", "0"), ["--l2-norm", "choose from 1"]),
        ("good", ("--pretrained", "imagenet"), ["--pretrained has no effect"]),
        ("good", ("--cache-size", "99"), ["--cache-size has no effect", "--decode cache"]),
        ("good", ("--dataset", "emoji", "--exif", "ignore"), ["--exif has no effect"]),
        ("good", ("--dataset", "emoji", "--eval-classes", "0.3"), ["--eval-classes has no effect"]),
        ("good", ("--out", "x"), ["--out", "--failures"]),
        ("good", ("--bootstrap", "10"), ["--bootstrap", "100"]),
        ("good", ("--block-size", "0"), ["--block-size", "1"]),
        ("good", ("--uncertain", "u.csv"), ["no uncertainty head"]),
        ("good", ("--query", "nowhere.png"), ["nowhere.png", "cannot be read"]),
        ("good", ("--query", "{text}"), ["notes.png", "cannot be read"]),
        ("good", ("--export", "n.json"), ["--json", "--export", "n.json"]),
        ("good", ("--export", "/proc/nowhere/e.npz"), ["--export", "/proc/nowhere"]),
        ("good", ("--per-class", "."), ["--per-class", "is a folder"]),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_overwritten(
    kind, flags, words, runs, command, tmp_path
):
    (tmp_path / "empty" / "train" / "a").mkdir(parents=True)
    (tmp_path / "empty" / "eval").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "empty" / "train" / "a" / "0.png")
    (tmp_path / "notes.png").write_text("this is no picture\n")
    for name in ("n.json", "n.csv", "n.tex", "u.csv"):
        (tmp_path / name).write_text("older")
    file = runs.seed1 if kind == "good" else broken_copy(runs.seed1, tmp_path, kind)
    places = {"empty": tmp_path / "empty", "text": tmp_path / "notes.png"}
    before = files_in(tmp_path), files_in(runs.seed1.parent)
    flags = [flag.format(**places) for flag in flags]
    assert_refused(command("--resume", file, *OUTPUTS, *flags), *words)
    assert (files_in(tmp_path), files_in(runs.seed1.parent)) == before
    assert all((tmp_path / name).read_text() == "older" for name in ("n.json", "n.csv", "n.tex"))


@pytest.mark.parametrize(
    "flags",
    [("--embedding-size", "4"), ("--head", "none"), ("--head-norm", "1"), ("--weights", "raw")],
)
def test_a_network_as_it_starts_is_not_given_what_only_a_checkpoint_has(flags, command):
    assert_refused(command("--model", "resnet10", *flags), flags[0], "no effect", "--resume")


def test_a_fault_in_the_second_checkpoint_is_found_before_the_first_is_evaluated(
    runs, command, tmp_path
):
    bad = broken_copy(runs.other, tmp_path, "truncated")
    done = command("--resume", runs.seed1, bad)
    assert_refused(done, "truncated.pth")
    assert done.out == ""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("{seed1}", "{seed1}"), ["twice"]),
        (("{seed1}", "{seed2}", "--export", "e.npz"), ["--export", "one checkpoint"]),
        (("{seed1}", "{seed2}", "--failures", "2"), ["--failures", "one checkpoint"]),
    ],
)
def test_what_several_checkpoints_cannot_have(flags, words, runs, command):
    done = command("--resume", *(flag.format(**runs._asdict()) for flag in flags))
    assert_refused(done, *words)


def test_embeddings_and_labels_of_different_lengths(runs, command, monkeypatch):
    """Embeddings that go missing on the way are noticed, not shifted against the labels."""
    whole = net.EmbeddingNet.embed
    monkeypatch.setattr(net.EmbeddingNet, "embed", lambda network, x: whole(network, x)[:-1])
    done = command("--resume", runs.seed1, "--batch-size", "40")
    assert_refused(done, "39 embeddings but 40 labels")


def test_bad_input_in_a_process_of_its_own(runs, tmp_path):
    bad = broken_copy(runs.seed1, tmp_path, "nan")
    line = ["--resume", str(bad), "--json", "n.json", "--workers", "0"]
    done = run_cli("evaluate.py", *line, cwd=tmp_path)
    assert_refused(Done(done.returncode, done.stdout, done.stderr), "NaN or infinite")
    assert not (tmp_path / "n.json").exists()


def test_a_full_disk_leaves_the_older_file(runs, command, tmp_path, monkeypatch):
    (tmp_path / "n.tex").write_text("older")
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space")))
    done = command("--resume", runs.seed1, "--latex", "n.tex", "--metrics", "retrieval")
    assert_refused(done, "n.tex", "No space")
    assert files_in(tmp_path) == ["n.tex"] and (tmp_path / "n.tex").read_text() == "older"


# --- metrics that are undefined, answers that are tied --------------------------------------------


def test_an_undefined_metric_is_no_number_anywhere(tmp_path):
    nan = float("nan")
    rows = [
        tables.Row("x", "a", {"R@1": 0.0, "MAP@R": nan}, intervals={"MAP@R": [nan, nan]}),
        tables.Row("x", "b", {"R@1": 0.5, "MAP@R": 0.25}),
    ]
    assert tables.text(rows).splitlines()[1].split() == ["a", "0.0000", "–"]
    assert "nan" not in tables.interval_text(rows)
    header, lines = tables.csv_table(rows)
    assert dict(zip(header, lines[0], strict=True))["MAP@R"] == ""
    paper = tables.latex(rows, "caption", "t.tex")
    assert "nan" not in paper and "--" in paper
    write_json(tmp_path / "n.json", {"numbers": {"MAP@R": nan}})
    assert json.loads((tmp_path / "n.json").read_text()) == {"numbers": {"MAP@R": None}}


def test_a_network_that_tells_nothing_apart_is_no_better_than_chance_and_says_so(
    runs, command, tmp_path
):
    checkpoint = torch.load(runs.seed1, weights_only=True)
    for name, value in checkpoint["model_state_dict"].items():
        if name.startswith("model.embedding"):
            value.fill_(1.0 if name.endswith("bias") else 0.0)
    flat = tmp_path / "flat" / "flat_best.pth"
    flat.parent.mkdir()
    torch.save(checkpoint, flat)
    done = command("--resume", flat, "--json", tmp_path / "n.json")
    assert done.code == 0, done.err
    (numbers,) = json.loads((tmp_path / "n.json").read_text())["results"]
    classes, images = numbers["classes"], numbers["images"]
    assert numbers["R@1"] == pytest.approx((images / classes - 1) / (images - 1))
    assert "exactly as close" in done.out

    # Beside others it is said of which of them, as are the thresholds.
    done = command("--resume", runs.seed1, flat, "--metrics", "retrieval", "verification")
    assert done.code == 0, done.err
    (said,) = (line for line in done.out.splitlines() if "exactly as close" in line)
    assert said.startswith(f"flat, folder:{runs.images}: {images} of {images} queries")
    for name in ("seed1", "flat"):
        assert f"{name}, {runs.images.name}, pairs of images" in done.out


def test_a_paper_is_not_told_that_classes_are_unseen_which_were_trained_on(
    runs, command, tmp_path, caplog
):
    trained_on = f"folder:{runs.images / 'train'}"
    done = command("--resume", runs.seed1, "--dataset", trained_on, "--latex", "t.tex")
    assert done.code == 0 and "not about unseen ones" in caplog.text
    assert "unseen" not in (tmp_path / "t.tex").read_text()


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (["small", "large"], ""),
        (["small", "small"], "Corrected: for the 2 tests (Holm)."),
        (["small", "large"] * 3, "Corrected: for the 3 tests of each evaluation (Holm)."),
    ],
)
def test_it_is_said_for_how_many_tests_p_is_corrected(tasks, words):
    tests = [comparison.Test("a", "b", task, "classes", 30, {}) for task in tasks]
    assert tables.about_tests(tests, 100).partition("p is two-sided.")[2].strip() == words

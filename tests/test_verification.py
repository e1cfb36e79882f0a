"""Verification: all pairs counted, thresholds recommended and kept, verdicts of pictures."""

from __future__ import annotations

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import tiny
import torch
from conftest import counted
from made_up import clusters
from sklearn.metrics import roc_auc_score, roc_curve

import evaluate
import options
from evaluation.thresholds import Found, Rate, Thresholds, thresholds_of
from evaluation.verifying import in_words, recommended
from metrics import comparison, resampling, verification
from metrics.sharing import Share
from metrics.verification import BINS, GRID, count_pairs, edge
from net import load_run
from storage import as_json
from utils import DamagedError, InputError

pytestmark = pytest.mark.usefixtures("one_thread")


def places(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where the cosines of all pairs lie on the grid, by numpy."""
    unit_x, unit_y = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (x, y))
    return np.floor(unit_x @ unit_y.T * GRID + GRID + 0.5).astype(int)


# --- all pairs ------------------------------------------------------------------------------------

SETS = [(40, 8, 16), (2, 150, 4), (200, 2, 8)]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("shape", SETS)
def test_pairs_are_those_of_a_plain_count(shape: tuple[int, int, int], apart: bool) -> None:
    x, labels = clusters(*shape)
    x[5] = x[6] = x[7]
    y, others = (x[100:], labels[100:]) if apart else (x, labels)
    x, labels = (x[:100], labels[:100]) if apart else (x, labels)
    at, same = places(x, y), labels[:, None] == others
    pairs = np.ones_like(same) if apart else np.triu(np.ones_like(same), 1)
    seen = np.ones_like(same) if apart else ~np.eye(len(x), dtype=bool)
    gallery = (y, others) if apart else ()
    for size in (None, 64):
        found = count_pairs(x, labels, *gallery, block_size=size)
        assert (found.same.numpy() == np.bincount(at[pairs & same], minlength=BINS)).all()
        assert (found.different.numpy() == np.bincount(at[pairs & ~same], minlength=BINS)).all()
        assert (found.nearest_same.numpy() == np.where(same & seen, at, -1).max(axis=1)).all()
        assert (found.nearest_different.numpy() == np.where(~same, at, -1).max(axis=1)).all()
        above = pairs & ~same & (at >= found.listed_from)
        assert len(found.listed.bin) == above.sum() <= max(10, 1e-3 * (pairs & ~same).sum())
        of_a_pair = int(np.sort(at[pairs & same])[5])  # which is at the threshold itself
        for row, threshold in enumerate(thresholds := (GRID, found.listed_from, of_a_pair)):
            ours = found.same_by_class(*thresholds)[row].numpy()
            every = np.unique(np.concatenate([labels, others]))
            chosen = pairs & same & (at >= threshold)
            assert (ours == [chosen[labels == label].sum() for label in every]).all()


@pytest.mark.parametrize("shape", SETS)
def test_the_curve_is_that_of_sklearn(shape: tuple[int, int, int]) -> None:
    x, labels = clusters(*shape)
    curve = count_pairs(x, labels).curve()
    upper = np.triu_indices(len(x), 1)
    scores, same = places(x, x)[upper], labels[upper[0]] == labels[upper[1]]
    far, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    ours_tar, ours_far = curve.rates
    np.testing.assert_allclose(ours_tar, tar)
    np.testing.assert_allclose(ours_far, far)
    assert curve.auc() == pytest.approx(roc_auc_score(same, scores))
    for rate in (1e-2, 1e-3):
        assert curve.tar_at(rate) == tar[far <= rate].max()
    # the cosines themselves, off the grid, give the same to its resolution
    exact = (x / np.linalg.norm(x, axis=1, keepdims=True)) @ x.T
    exact = (exact / np.linalg.norm(x, axis=1))[upper]
    assert curve.auc() == pytest.approx(roc_auc_score(same, exact), abs=1e-6)


def test_the_equal_error_rate_lies_between_two_thresholds() -> None:
    curve = verification.Curve(
        torch.tensor([9, 8, 7, 6]), torch.tensor([0, 5, 7, 9, 10]), torch.tensor([0, 0, 2, 4, 10])
    )
    # FAR - FRR: -.1 at .2/.3, +.3 at .4/.1: a quarter of the way, .2 + .2/4
    assert curve.eer() == pytest.approx(0.25)


def test_rates_that_too_few_pairs_carry_are_undefined() -> None:
    x, labels = clusters(10, 4, 8)  # 720 different pairs
    numbers = count_pairs(x, labels).curve().numbers()
    assert math.isnan(numbers["TAR@1e-3"]) and math.isnan(numbers["TAR@1e-4"])
    assert not math.isnan(numbers["EER"])
    assert math.isnan(numbers["TAR@1e-2"])  # seven of them are no ten
    alone = count_pairs(x, np.zeros(40, int)).curve().numbers()
    assert all(math.isnan(value) for value in alone.values())


def test_a_collapsed_network_is_as_good_as_chance() -> None:
    x, labels = np.ones((60, 8)), np.repeat(np.arange(12), 5)
    curve = count_pairs(x, labels).curve()
    assert curve.auc() == pytest.approx(0.5) and curve.eer() == pytest.approx(0.5)
    assert curve.tar_at(1e-2) == 0


def test_cosines_do_not_depend_on_lengths_or_order() -> None:
    x, labels = clusters(30, 4, 8)
    order = np.random.default_rng(0).permutation(len(x))
    whole = count_pairs(x, labels)
    lengths = np.random.default_rng(1).uniform(1, 9, (len(x), 1))
    other = count_pairs(x[order] * lengths, labels[order])
    assert torch.equal(whole.same, other.same) and torch.equal(whole.different, other.different)
    assert torch.equal(whole.nearest_different[torch.from_numpy(order)], other.nearest_different)


def test_the_list_of_near_pairs_is_dropped_as_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = clusters(40, 8, 4)
    whole = count_pairs(x, labels, listed_rate=0.01)
    monkeypatch.setattr(verification, "LISTED_AT_ONCE", 10)
    other = count_pairs(x, labels, listed_rate=0.01, block_size=32)
    assert whole.listed_from == other.listed_from
    for ours, theirs in zip(whole.listed, other.listed, strict=True):
        assert torch.equal(ours.sort().values, theirs.sort().values)


def test_of_very_many_near_pairs_a_part_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list does not grow with the square of the images; the errors are the same within 2 %."""
    x, labels = clusters(100, 8, 4)
    whole = count_pairs(x, labels, listed_rate=0.1)
    monkeypatch.setattr(verification, "LISTED_AT_ONCE", 500)
    monkeypatch.setattr(verification, "MOST_LISTED", 20_000)
    parts = [count_pairs(x, labels, listed_rate=0.1, block_size=size) for size in (128, 400)]
    for part in parts:
        assert len(whole.listed.bin) > 30_000 and 15_000 < len(part.listed.bin) < 17_000
        assert part.listed_from == whole.listed_from
        assert torch.equal(part.different, whole.different)
        for ours, first in zip(part.listed, parts[0].listed, strict=True):  # in blocks of any size
            assert torch.equal(ours.sort().values, first.sort().values)
    drawn, every = (
        resampling.rate_of_different_pairs(found, whole.listed_from) for found in (parts[0], whole)
    )
    assert float(drawn.mean()) == pytest.approx(float(every.mean()), rel=0.02)
    assert float(drawn.std()) == pytest.approx(float(every.std()), rel=0.2)
    none = replace(parts[0], listed=verification.Listed(*torch.empty(3, 0, dtype=torch.int64)))
    assert resampling.rate_of_different_pairs(none, none.listed_from).isnan().all()


@pytest.mark.parametrize("apart", [False, True])
def test_small_classes_are_compared_together(apart: bool) -> None:
    """And not one by one: ten times as many are not ten times the work."""
    counts = []
    for classes in (40, 400):
        x, labels = clusters(classes, 2, 8)
        found = count_pairs(x, labels, *((x, labels) if apart else ()))
        (every, *_), calls = counted(partial(found.same_by_class, 0))
        assert every.tolist() == found.of_one_class.tolist() == [4.0 if apart else 1.0] * classes
        counts.append(calls)
    assert counts[1] < 6 * counts[0]


def test_processes_share_the_pairs() -> None:
    """Three that count together, as threads here, have the whole answer each."""
    x, labels = clusters(40, 8, 8)
    whole = count_pairs(x, labels)
    meeting, brought = Barrier(3), [torch.empty(0)] * 3

    def count(number: int) -> verification.PairCounts:
        def total(value: torch.Tensor) -> torch.Tensor:
            brought[number] = value
            meeting.wait()
            found = torch.stack(brought).sum(dim=0).to(value.dtype)
            meeting.wait()
            return found

        return count_pairs(x, labels, block_size=64, share=Share(number, 3, total))

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(count, range(3)))
    for found in answers:
        assert torch.equal(found.same, whole.same)
        assert torch.equal(found.different, whole.different)
        assert torch.equal(found.nearest_same, whole.nearest_same)
        assert torch.equal(found.nearest_different, whole.nearest_different)
        assert str(recommended(found)) == str(recommended(whole))


# --- how sure -------------------------------------------------------------------------------------


def test_replicates_of_different_pairs_are_those_of_the_definition() -> None:
    x, labels = clusters(12, 4, 4)
    for gallery in ((), (x[::2], labels[::2])):
        found = count_pairs(x, labels, *gallery, listed_rate=0.05)
        y, others = gallery or (x, labels)
        accepted = places(x, y) >= found.listed_from
        ours = resampling.rate_of_different_pairs(found, found.listed_from).tolist()
        draws = torch.cat(list(comparison.class_draws(12, resampling.RESAMPLES, 1)))
        for replicate in range(0, len(ours), 100):
            w = draws[replicate].numpy()
            weight = np.outer(w[labels], w[others]) * (labels[:, None] != others)
            assert ours[replicate] == pytest.approx((weight * accepted).sum() / weight.sum())


@pytest.mark.slow
def test_intervals_hold_for_other_classes() -> None:
    """Of 100 small samples of classes, how often the error on many others is in the interval."""
    rng = np.random.default_rng(0)
    held = np.zeros(2)
    for seed in range(100):
        centres = rng.normal(size=(460, 8))
        x = centres[:, None] + 0.5 * rng.normal(size=(460, 5, 8))
        labels = np.repeat(np.arange(460), 5)
        few = count_pairs(x[:60].reshape(-1, 8), labels[:300])
        many = count_pairs(x[60:].reshape(-1, 8), labels[300:])
        found = recommended(few, seed)
        at = verification.bin_of(found.same)
        false = float(many.different[at:].sum() / many.different.sum())
        missed = float(many.same[: verification.bin_of(found.different)].sum() / many.same.sum())
        for place, (rate, value) in enumerate(
            [(found.false_same, false), (found.false_different, missed)]
        ):
            held[place] += rate.low <= value <= rate.high
    assert (held > 85).all(), held


# --- thresholds -----------------------------------------------------------------------------------


def test_thresholds_keep_the_rule() -> None:
    x, labels = clusters(60, 6, 16)
    pairs = count_pairs(x, labels)
    found = recommended(pairs)
    at, different = verification.bin_of(found.same), int(pairs.different.sum())
    allowed = 1e-3 * different
    assert pairs.different[at:].sum() <= allowed < pairs.different[at - 1 :].sum()
    below, same = verification.bin_of(found.different), int(pairs.same.sum())
    assert pairs.same[:below].sum() <= 0.05 * same < pairs.same[: below + 1].sum()
    assert found.false_same.low <= found.false_same.expected <= found.false_same.high
    assert found.false_same.expected == float(pairs.different[at:].sum()) / different
    assert found.found_same.expected == float(pairs.same[at:].sum()) / same
    assert found.found_different.expected == float(pairs.different[:below].sum()) / different
    assert found.different < found.same and found.index_size is None


def test_few_pairs_carry_a_higher_rate_or_none() -> None:
    x, labels = clusters(12, 6, 16)  # 2,376 different pairs, which carry no 1 in 1,000
    found = recommended(count_pairs(x, labels))
    assert 9 / 2376 < found.false_same.expected <= 10 / 2376
    assert recommended(count_pairs(*clusters(4, 3, 8))) is None
    alone = count_pairs(x, torch.arange(len(x))).curve().numbers()
    assert "nan" not in in_words("x", alone, None)


def test_thresholds_know_how_many_images_they_are_of() -> None:
    x, labels = clusters(60, 6, 16)
    assert recommended(count_pairs(x, labels)).images == 360
    assert recommended(count_pairs(x[:100], labels[:100], x, labels)).images == 100 + 360


@pytest.mark.parametrize("classes, rough", [(12, True), (20, False)])
def test_thresholds_of_few_classes_are_called_a_rough_guess(classes: int, rough: bool) -> None:
    pairs = count_pairs(*clusters(classes, 10, 16))
    words = in_words("x", pairs.curve().numbers(), recommended(pairs))
    assert (
        f"Measured on {classes} classes alone, these errors are a rough guess" in words
    ) == rough


def test_a_network_that_tells_all_apart_leaves_nothing_unsure() -> None:
    x, labels = clusters(20, 8, 64, spread=0.2)
    found = recommended(count_pairs(x, labels))
    assert found.same == found.different
    assert found.false_same.expected == found.false_different.expected == 0
    # Nothing went wrong among 20 classes, which does not show that nothing can.
    assert found.false_same.low == 0 < found.false_same.high < found.false_different.high < 0.2
    assert {found.verdict(cosine) for cosine in np.linspace(-1, 1, 99)} == {"same", "different"}


def test_a_verdict_is_of_the_cosine() -> None:
    rates = [Rate(0.0)] * 4
    found = Thresholds(0.7, 0.3, *rates)
    assert [found.verdict(cosine) for cosine in (1.0, 0.7, 0.69, 0.3, 0.29, math.nan)] == [
        *("same", "same", "unsure", "unsure", "different", "unsure")
    ]


def test_in_an_index_thresholds_are_those_of_what_is_nearest() -> None:
    x, labels = clusters(60, 6, 12)
    pairs = count_pairs(x, labels)
    found = recommended(pairs).in_index(0)
    assert found.index_size == len(x) - 6  # a query's own class is left out
    wrong = (pairs.nearest_different >= verification.bin_of(found.same)).double().mean()
    missed = (pairs.nearest_same < verification.bin_of(found.different)).double().mean()
    assert found.false_same.expected == pytest.approx(float(wrong)) and wrong <= 0.05
    assert found.false_different.expected == float(missed) <= 0.05
    assert found.same > recommended(pairs).same  # of 360 images the nearest is nearer than any


def test_a_larger_index_needs_a_higher_cosine() -> None:
    """Checked against a gallery that really is four times as large."""
    x, labels = clusters(800, 5, 10)
    small = recommended(count_pairs(x[:1000], labels[:1000], x[1000:1750], labels[1000:1750]))
    large = count_pairs(x[:1000], labels[:1000], x[1000:], labels[1000:])
    grown = small.in_index(3000)
    assert grown.same > small.in_index(740).same == small.in_index(10).same
    truly = float((large.nearest_different >= verification.bin_of(grown.same)).double().mean())
    assert truly == pytest.approx(grown.false_same.expected, abs=0.02)


def test_a_query_that_was_measured_among_few_classes_missed_its_own() -> None:
    """Labels that say nothing: any image is as good as one of another class.

    Each query was measured in four fifths of the images; an index of as many has them all.
    """
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(2000, 6)), rng.permutation(np.arange(2000) % 5)
    pairs = count_pairs(x, labels)
    found = recommended(pairs).in_index(2000)
    nearest = pairs.nearest_different.maximum(pairs.nearest_same)
    truly = float((nearest >= verification.bin_of(found.same)).double().mean())
    assert truly == pytest.approx(found.false_same.expected, abs=0.006) and truly < 0.05


def test_nothing_is_the_same_in_an_index_too_large_for_what_was_measured() -> None:
    rates = ((0.5, 0.6, 0.4, 0.6), (0.2, 0.98, 0.1, 0.3))  # all that 80 queries carry
    found = Found(images=80, queries=80, same=rates, different=0.5, missed=0.04, right=(0.9, 0.4))
    known = Thresholds(0.9, 0.5, *[Rate(0.1)] * 4, found=found)
    small = known.in_index(80)
    assert (small.same, small.false_same.expected) == (0.98, pytest.approx(0.2))
    for size in (128, 5000):
        large = known.in_index(size)
        assert {large.verdict(cosine) for cosine in (0.6, 0.99, 1.0)} == {"unsure"}
        assert large.verdict(0.4) == "different" and large.false_different.expected == 0.04
        assert large.found_same.expected == 0
        again = Thresholds.of_dict(json.loads(as_json(large.as_dict())))
        assert again.same == large.same == math.inf


def test_errors_of_cosines_that_cross_are_on_the_safe_side() -> None:
    x, labels = clusters(30, 8, 24, spread=0.5)
    pairs = count_pairs(x, labels)
    known = recommended(pairs)
    assert known.found.same[0][1] < known.found.different  # as measured, nothing is left unsure
    found = known.in_index(0)
    at = verification.bin_of(found.same)
    wrong = float((pairs.nearest_different >= at).double().mean())
    right = float((pairs.nearest_same >= at).double().mean())
    assert found.same == found.different
    assert wrong <= found.false_same.expected <= 0.05 + 1e-9
    assert 1 - right <= found.false_different.expected
    assert right >= found.found_same.expected == 1 - found.false_different.expected
    # Of entries on both sides of the mean the one below it counts.
    rates = tuple(
        (rate, cosine, rate, rate) for rate, cosine in ((0.05, 0.4), (0.02, 0.5), (0.01, 0.6))
    )
    made = Found(100, 100, rates, different=0.7, missed=0.03, right=(1.0, 0.99, 0.98))
    crossed = Thresholds(0.9, 0.5, *[Rate(0.1)] * 4, found=made).in_index(100)
    assert crossed.same == crossed.different == pytest.approx(0.55)
    assert crossed.false_same.expected == pytest.approx(0.02)
    assert crossed.found_same.expected == pytest.approx(0.97)


def test_thresholds_without_a_search_have_none_in_an_index() -> None:
    with pytest.raises(ValueError, match="pairs alone"):
        Thresholds(0.7, 0.3, *[Rate(0.0)] * 4).in_index(10)


def test_thresholds_survive_json() -> None:
    found = recommended(count_pairs(*clusters(60, 6, 16)), title="x", network="abc")
    content = json.loads(as_json(found.as_dict() | {"of a newer version": 1}))
    again = Thresholds.of_dict(content)
    assert str(again) == str(found)  # NaN does not equal itself
    assert isinstance(again.found, Found)


# --- a run's --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that kept a mean of its weights, on 64 held-out images, and went on after its best."""
    folder = tmp_path_factory.mktemp("verified")
    root = tiny.write_images(folder / "data", eval_images=8)
    run = tiny.run(root, folder, "run", "--max-steps 5 --ema 0.5 --lr 1e-1")
    assert tiny.saved(run, "best")["step"] == 4 and tiny.saved(run)["clock"]["step"] == 5
    return run


def test_a_run_keeps_thresholds_of_its_best_network(run: Path) -> None:
    content = json.loads((run / "results.json").read_text())
    (title, _) = content["thresholds"]
    assert content["verification"][title].keys() == set(verification.NAMES)
    assert not set(verification.NAMES) & content["results"][title].keys()
    mean, raw = (load_run(run, weights=weights).thresholds for weights in ("ema", "raw"))
    assert mean.network != raw.network and mean.title == title
    assert thresholds_of(tiny.best_checkpoint(run)).network == mean.network


def test_thresholds_of_other_weights_are_not_given(run: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in run.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    best = tiny.best_checkpoint(changed)
    content = torch.load(best, weights_only=True)
    key = next(iter(content["ema_state_dict"]))
    content["ema_state_dict"][key] += 1e-6
    torch.save(content, best)
    assert thresholds_of(changed) is None
    with pytest.raises(InputError, match="no thresholds were measured"):
        load_run(changed).compare(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8))
    (changed / "results.json").unlink()
    assert thresholds_of(changed) is None


def test_damaged_thresholds_are_named(run: Path, tmp_path: Path) -> None:
    changed = tmp_path / "damaged"
    changed.mkdir()
    for file in run.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    tiny.edit(changed / "results.json", thresholds={"x": {"same": "high"}})
    with pytest.raises(DamagedError, match=r"results\.json"):
        thresholds_of(changed)


def test_two_pictures_are_compared(run: Path) -> None:
    embed = load_run(run)
    files = sorted((run.parent / "data").rglob("*.png"))[:2]
    cosine, verdict = embed.compare(*files)
    a, b = embed(files)
    assert cosine == pytest.approx(float(a @ b), abs=1e-6)
    assert verdict == embed.thresholds.verdict(cosine)
    assert embed.compare(files[0], files[0]).verdict == "same"


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What evaluate.py prints."""
    capsys.readouterr()
    evaluate.main(options.parse_evaluate([*map(str, words)]))
    return capsys.readouterr().out


def test_evaluate_says_and_writes_what_pairs_say(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = ["--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv", "--latex"]
    plain = said(capsys, "--resume", run, *written, tmp_path / "a.tex")
    assert "TAR@1e-2 " not in plain and "recommended thresholds" in plain and "EER 0." in plain
    (entry,) = json.loads((tmp_path / "a.json").read_text())["results"]
    kept = json.loads((run / "results.json").read_text())
    assert entry["thresholds"] == kept["thresholds"][entry["title"]]
    assert entry["EER"] == kept["verification"][entry["title"]]["EER"]
    assert "same from,different below" in (tmp_path / "a.csv").read_text()
    assert "EER" not in (tmp_path / "a.tex").read_text()
    named = said(capsys, "--resume", run, "--metrics", "verification")
    assert "TAR@1e-2" in named and "MAP@R" not in named and "EER:" in named


def test_thresholds_are_printed_in_short_lines_and_of_several_networks_where_asked_for(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = said(capsys, "--resume", run)
    shown = one[one.rindex("\n\ndata, ") :].strip().splitlines()
    assert re.match(r"data, \d+ same and [\d,]+ different pairs: EER 0\.\d+, AUC", shown[0])
    assert len(shown) >= 9 and all(len(line) <= 80 for line in shown[:9]), shown
    both = ["--resume", run, run / "last.pth", "--metrics"]
    assert "recommended" not in said(capsys, *both, "retrieval")
    assert said(capsys, *both, "retrieval", "verification").count("recommended") == 2


def test_the_edge_of_a_place_is_its_least_cosine() -> None:
    for number in (0, 1, GRID, BINS - 1):
        assert verification.bin_of(edge(number)) == number
        assert verification.bin_of(edge(number) - 1e-9) == number - 1

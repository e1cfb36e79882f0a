"""What is done to embeddings before they are searched, against plain loops over the definitions."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up
import numpy as np
import official_layouts
import pytest
import tiny
import torch
from conftest import refusal

import evaluate
import metrics
import options
import search
from devices import Precision
from evaluation.measuring import How, measure
from evaluation.networks import open_checkpoint
from evaluation.tasks import Task
from index import Index
from metrics import reranking, whitening
from metrics.expansion import expanded
from metrics.neighbours import as_images, nearest
from metrics.reranking import Reranking
from net import load_run
from options.ranking import RERANKING, Expansion, Ranking
from utils import InputError

pytestmark = pytest.mark.usefixtures("one_thread")


def clusters(
    classes: int, images: int, size: int, seed: int = 0, spread: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """As a network makes them: in float32."""
    x, labels = made_up.clusters(classes, images, size, seed, spread)
    return x.astype(np.float32), labels


def unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# --- neighbours, expansion and augmentation -------------------------------------------------------


def expanded_by_loops(
    x: np.ndarray, gallery: np.ndarray | None, k: int, alpha: float
) -> np.ndarray:
    queries, images = unit(x), unit(x if gallery is None else gallery)
    found = []
    for number, query in enumerate(queries):
        others = [
            (float(query @ image), image)
            for place, image in enumerate(images)
            if gallery is not None or place != number
        ]
        others.sort(key=lambda pair: -pair[0])
        total = query + sum(max(cosine, 0.0) ** alpha * image for cosine, image in others[:k])
        found.append(total / np.linalg.norm(total))
    return np.stack(found)


@pytest.mark.parametrize("alpha", [0.0, 3.0])
@pytest.mark.parametrize("apart", [False, True])
def test_expansion_is_its_definition(alpha: float, apart: bool) -> None:
    x, _ = clusters(6, 5, 8)
    gallery = clusters(6, 7, 8, seed=1)[0] if apart else None
    ours = expanded(x, gallery, 4, alpha).numpy()
    np.testing.assert_allclose(ours, expanded_by_loops(x, gallery, 4, alpha), atol=1e-6)


def test_tied_neighbours_count_with_the_mean_over_their_orders() -> None:
    query = np.array([[1.0, 0.0]])
    gallery = np.array([[1.0, 1.0], [3.0, 3.0], [1.0, -1.0], [-1.0, 0.0]])  # three as close
    means = [
        expanded_unnormalised(query[0], unit(gallery[list(chosen)]))
        for chosen in [(0, 1), (0, 2), (1, 2)]
    ]
    mean = np.mean(means, axis=0)
    ours = expanded(query, gallery, 2, alpha=0.0).numpy()[0]
    np.testing.assert_allclose(ours, mean / np.linalg.norm(mean), atol=1e-6)


def expanded_unnormalised(query: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    return query + neighbours.sum(axis=0)


def test_neighbours_do_not_depend_on_the_order_nor_on_the_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, _ = clusters(10, 6, 4, seed=3)
    x[7] = x[8] = x[9] = 2 * x[3]  # exactly as close to everything
    order = np.random.default_rng(0).permutation(len(x))
    whole = expanded(x, None, 5, 3.0).numpy()
    monkeypatch.setattr("metrics.neighbours.HELD", 7 * len(x))
    shuffled = expanded(x[order], None, 5, 3.0).numpy()
    np.testing.assert_allclose(shuffled, whole[order], atol=1e-6)


def test_neighbours_are_those_of_float64() -> None:
    """Cosines that float32 does not tell apart are put in order by float64."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=64)
    gallery = base + 1e-9 * rng.normal(size=(50, 64))
    query = rng.normal(size=(3, 64))
    images = as_images(gallery, "gallery")
    (near,) = nearest(as_images(query), images, 10, own=False)
    expected = np.argsort(-(unit(query) @ unit(gallery).T), axis=1)[:, :10]
    assert (np.sort(near.index.numpy(), axis=1) == np.sort(expected, axis=1)).mean() > 0.9


@pytest.mark.parametrize("k", [0, 30, 31])
def test_too_many_neighbours_are_refused(k: int) -> None:
    x, _ = clusters(6, 5, 8)
    with pytest.raises(ValueError, match="choose a number from 1 to 29"):
        expanded(x, None, k, 3.0)


# --- re-ranking -----------------------------------------------------------------------------------


def reranked_by_loops(
    x: np.ndarray, gallery: np.ndarray | None, k1: int, k2: int, balance: float
) -> np.ndarray:
    """(Q, G) minus the distances of the header of metrics/reranking.py, image by image."""
    images = unit(x if gallery is None else np.concatenate([x, gallery]))
    first, count = (0 if gallery is None else len(x)), len(images)
    cosine = images @ images.T

    def near(p: int, k: int) -> set[int]:
        closer = {
            g: sum(cosine[p, o] > cosine[p, g] + 1e-12 for o in range(count) if o != p)
            for g in range(count)
            if g != p
        }
        return {p} | {g for g, number in closer.items() if number < k}

    neighbours = {k: [near(p, k) for p in range(count)] for k in {k1, round(k1 / 2), k2 - 1}}

    def mutual(p: int, k: int) -> set[int]:
        return {g for g in neighbours[k][p] if p in neighbours[k][g]}

    vectors = np.zeros((count, count))
    for p in range(count):
        wide = set(mutual(p, k1))
        for q in mutual(p, k1):
            half = mutual(q, round(k1 / 2))
            if 3 * len(half & mutual(p, k1)) >= 2 * len(half):
                wide |= half
        for g in wide:
            vectors[p, g] = math.exp(-(1 - cosine[p, g]))
        vectors[p] /= vectors[p].sum()
    smooth = np.stack([vectors[sorted(neighbours[k2 - 1][p])].mean(axis=0) for p in range(count)])
    found = np.zeros((len(x), count - first))
    for p in range(len(x)):
        for g in range(first, count):
            least = np.minimum(smooth[p], smooth[g]).sum()
            jaccard = 1 - least / np.maximum(smooth[p], smooth[g]).sum()
            found[p, g - first] = -((1 - balance) * jaccard + balance * (1 - cosine[p, g]))
    return found


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("k1", "k2", "balance"), [(6, 3, 0.3), (5, 1, 0.0), (8, 4, 0.7)])
@pytest.mark.parametrize("at_once", [reranking.AT_ONCE, 8])
def test_reranking_is_its_definition(
    apart: bool, k1: int, k2: int, balance: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in many parts, as thousands of images are processed."""
    monkeypatch.setattr(reranking, "AT_ONCE", at_once)
    monkeypatch.setattr(reranking, "HELD", at_once)
    x, _ = clusters(4, 5, 6, spread=0.7)
    x[3] = x[11]
    gallery = clusters(4, 6, 6, seed=1, spread=0.7)[0] if apart else None
    ours = Reranking(x, gallery, k1, k2, balance)(torch.arange(len(x))).numpy()
    expected = reranked_by_loops(x, gallery, k1, k2, balance)
    np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_reranking_by_distance_alone_is_the_plain_search() -> None:
    x, labels = clusters(12, 6, 8)
    own = np.arange(len(x))
    plain = metrics.retrieval_per_query(x, labels)
    score = Reranking(x, None, 10, 4, balance=1.0)
    ours = metrics.retrieval_per_query(x, labels, x, labels, exclude=(own, own), score=score)
    for name, values in plain.items():
        torch.testing.assert_close(ours[name], values, rtol=0, atol=1e-12)


def test_reranking_helps_where_neighbourhoods_tell_more_than_distances() -> None:
    x, labels = clusters(20, 12, 16, spread=1.2)
    own = np.arange(len(x))
    plain = metrics.retrieval_metrics(x, labels)["MAP@R"]
    found = metrics.retrieval_per_query(
        x, labels, x, labels, exclude=(own, own), score=Reranking(x, None, *RERANKING)
    )
    assert metrics.summarise(found, [1])["MAP@R"] > plain + 0.05


def test_reranking_embeddings_that_are_all_the_same_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("metrics.reranking.MOST_LINKS", 1000)
    with pytest.raises(ValueError, match="exactly the same"):
        Reranking(np.ones((50, 4)), None, 5, 2, 0.3)


# --- searching by a score -------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True])
def test_a_search_by_scores_has_the_metrics_of_these_scores(apart: bool) -> None:
    """Cosines of whole numbers, with many ties, given as scores: the same answer."""
    rng = np.random.default_rng(0)
    x, labels = rng.integers(-2, 3, size=(60, 4)).astype(np.float32), rng.integers(0, 5, 60)
    y, others = (x[40:], labels[40:]) if apart else (x, labels)
    queries, theirs = (x[:40], labels[:40]) if apart else (x, labels)
    groups = (np.arange(40), np.full(20, -1)) if apart else (np.arange(60), np.arange(60))
    lengths = [np.linalg.norm(side.astype(np.float64), axis=1).clip(1e-9) for side in (queries, y)]
    cosines = torch.from_numpy((queries @ y.T).astype(np.float64) / np.outer(*lengths))
    plain = metrics.retrieval_per_query(queries, theirs, y, others, exclude=groups)
    ours = metrics.retrieval_per_query(
        queries, theirs, y, others, exclude=groups, score=lambda rows: cosines[rows]
    )
    for name, values in plain.items():
        torch.testing.assert_close(ours[name], values, rtol=0, atol=1e-12)


# --- whitening ------------------------------------------------------------------------------------


def test_whitened_embeddings_are_white() -> None:
    x, _ = clusters(40, 10, 12)
    white = whitening.fit(x)
    made = (torch.from_numpy(unit(x)) - white.mean) @ white.projection(12).double().T
    torch.testing.assert_close(made.T @ made / len(x), torch.eye(12).double(), atol=1e-4, rtol=0)
    half = (torch.from_numpy(unit(x)) - white.mean) @ white.projection(5).double().T
    torch.testing.assert_close(half, made[:, :5], atol=1e-6, rtol=1e-6)


def test_directions_without_variance_are_left_out() -> None:
    x, _ = clusters(10, 5, 4)
    x = np.concatenate([x, x[:, :1]], axis=1)  # the fifth number is the first
    white = whitening.fit(x)
    assert len(white.axes) == 4
    with pytest.raises(ValueError, match="choose 1 to "):
        white.projection(5)
    with pytest.raises(ValueError, match="all training embeddings are the same"):
        whitening.fit(np.ones((5, 3)))


# --- the flags ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("postprocessed")
    root = tiny.write_images(folder / "data", eval_images=8)
    return tiny.run(root, folder, "run", "--max-steps 3 --metrics retrieval --amp off")


def evaluated(run: Path, folder: Path, *words: object) -> dict[str, Any]:
    """The numbers of evaluate.py's --json."""
    file = folder / "numbers.json"
    words = ("--resume", run, "--amp", "off", "--metrics", "retrieval", "--json", file, *words)
    evaluate.main(options.parse_evaluate([*map(str, words)]))
    return json.loads(file.read_text())["results"][0]


def held_out(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of the 64 held-out images, and their classes."""
    files = sorted((run.parent / "data" / "eval").rglob("*.png"))
    names = [file.parent.name for file in files]
    return load_run(run, amp="off")(files), np.unique(names, return_inverse=True)[1]


def test_the_flags_do_what_the_functions_do(run: Path, tmp_path: Path) -> None:
    x, labels = held_out(run)
    own = np.arange(len(x))
    augmented = expanded(x, None, 2, 1.0)
    moved = expanded(x, augmented, 4, 3.0, own=True)
    asked = {
        ("--query-expansion", 4, "--database-augmentation", 2, 1): (moved, augmented, None),
        ("--rerank", 10, 3, 0.3): (x, x, Reranking(x, None, 10, 3, 0.3)),
    }
    for words, (queries, gallery, score) in asked.items():
        found = metrics.retrieval_per_query(
            queries, labels, gallery, labels, exclude=(own, own), score=score
        )
        expected = metrics.summarise(found, [1, 8])
        ours = evaluated(run, tmp_path, *words)
        for name in ("R@1", "R@8", "MAP@R", "MRR"):
            assert ours[name] == pytest.approx(expected[name], abs=1e-6)
        assert ours["postprocessing"]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("neighbours", [0, 3])
def test_the_second_recall_is_among_the_images_of_other_groups(
    run: Path, apart: bool, neighbours: int
) -> None:
    """For a data set that names its groups, such as the cameras that took the pictures."""
    opened = open_checkpoint(run, options.parse_evaluate(["--resume", str(run)]))
    images = opened.data.load("eval")
    images = replace(images, groups=np.arange(len(images)) // 4)  # half of a class
    queries, gallery = images, images
    if apart:
        queries, gallery = (images.subset(range(first, len(images), 2)) for first in (0, 1))
    task = Task("seen", queries, gallery if apart else None, (1,), group_name="camera")
    expansion = Expansion(neighbours, 1.0) if neighbours else None
    how = How(chosen=["retrieval"], ranking=Ranking(expansion, None, None))
    precision = Precision("off", torch.device("cpu"))
    result = measure(opened.network, task, precision, opened.viewing, how)

    x = unit(result.embeddings.numpy())
    y = unit(result.gallery.numpy()) if apart else x
    x = expanded_by_loops(x, y if apart else None, neighbours, 1.0)
    own_group = queries.groups[:, None] == gallery.groups
    itself = False if apart else np.eye(len(x), dtype=bool)
    for name, left_out in (("R@1", itself), ("R@1 other cameras", own_group)):
        best = np.where(left_out, -2, x @ y.T).argmax(axis=1)
        assert result.numbers[name] == np.mean(gallery.labels[best] == queries.labels)


def test_a_whitening_is_kept_and_used_without_the_training_images(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluated(run, tmp_path, "--whiten", 4)
    assert (run / "whitening.npz").is_file() and first["postprocessing"] == "whitened to 4"
    (run.parent / "data" / "train").rename(run.parent / "gone")
    try:
        x, labels = load_run(run, amp="off", whiten=4)([]), None
        assert x.shape == (0, 4)
        files = sorted((run.parent / "data" / "eval").rglob("*.png"))
        x = load_run(run, amp="off", whiten=4)(files)
        labels = np.unique([file.parent.name for file in files], return_inverse=True)[1]
        assert metrics.retrieval_metrics(x, labels)["MAP@R"] == pytest.approx(first["MAP@R"])
        assert load_run(run, whiten=4).thresholds is None  # they are of the bare network
        (run / "whitening.npz").rename(run / "elsewhere.npz")
        with pytest.raises(InputError, match=r"^a whitening is fitted on the training images"):
            load_run(run, amp="off", whiten=4)
    finally:
        (run.parent / "gone").rename(run.parent / "data" / "train")
    with pytest.raises(InputError, match=r"^whitening to 99 numbers: .* choose 1 to "):
        evaluated(run, tmp_path, "--whiten", 99)


def test_whitened_embeddings_are_centred_and_scaled_as_the_training_images_say(run: Path) -> None:
    plain, white = load_run(run, amp="off"), load_run(run, amp="off", whiten=4)
    train, held_out = (
        sorted((run.parent / "data" / split).rglob("*.png")) for split in ("train", "eval")
    )
    fitted = whitening.fit(plain(train))
    expected = (plain(held_out) - fitted.mean.numpy()) @ fitted.projection(4).numpy().T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(white(held_out), expected, atol=1e-3)


def test_a_whitening_of_other_weights_is_not_used(run: Path, tmp_path: Path) -> None:
    """Such as that of a run before it went on."""
    expected = evaluated(run, tmp_path, "--whiten", 4)["MAP@R"]
    other = tiny.run(run.parent / "data", tmp_path, "other", "--max-steps 3 --seed 2 --amp off")
    evaluated(other, tmp_path, "--whiten", 4)
    shutil.copy(other / "whitening.npz", run)
    assert evaluated(run, tmp_path, "--whiten", 4)["MAP@R"] == expected


def test_a_whitening_is_of_the_embeddings_that_are_compared(run: Path, tmp_path: Path) -> None:
    """Cut ones, or those of a network that flags have changed, neither use nor replace it."""
    whole, kept = evaluated(run, tmp_path, "--whiten"), run / "whitening.npz"
    content = kept.read_bytes()
    cut = evaluated(run, tmp_path, "--dims", 3, "--whiten")
    assert cut["postprocessing"] == "whitened to 3" and (run / "whitening_3.npz").is_file()
    assert load_run(run, dims=3, whiten=2)([]).shape == (0, 2)
    other = evaluated(run, tmp_path, "--pooling", "max", "--whiten", 4)
    assert kept.read_bytes() == content
    evaluated(run, tmp_path, "--image-size", 24, "--whiten", 4)
    evaluated(run, tmp_path, "--eval-zoom", 0.8, "--whiten", 4)
    assert kept.read_bytes() == content
    kept.unlink()
    assert evaluated(run, tmp_path, "--pooling", "max", "--whiten", 4)["MAP@R"] == other["MAP@R"]
    (run / "whitening_3.npz").rename(kept)  # as older versions left it
    assert evaluated(run, tmp_path, "--whiten")["MAP@R"] == whole["MAP@R"]


def test_a_whitening_is_fitted_on_the_runs_own_images_whatever_is_evaluated(
    run: Path, tmp_path: Path
) -> None:
    (run / "whitening.npz").unlink(missing_ok=True)
    own = evaluated(run, tmp_path, "--whiten")
    with np.load(run / "whitening.npz") as arrays:
        mean = arrays["mean"]
    (run / "whitening.npz").unlink()
    root = tiny.write_images(tmp_path / "others", classes=6, images=3)
    evaluated(run, tmp_path, "--whiten", "--dataset", f"folder:{root}")
    with np.load(run / "whitening.npz") as arrays:
        assert np.allclose(arrays["mean"], mean, atol=1e-6)
    assert evaluated(run, tmp_path, "--whiten")["MAP@R"] == pytest.approx(own["MAP@R"])


def test_the_training_images_of_a_whitening_are_looked_for_under_the_root_that_is_given(
    tmp_path: Path,
) -> None:
    """Also with flags about what is evaluated."""
    old, new = tmp_path / "old", tmp_path / "new"
    official_layouts.write("cub", "official", old, images=6)
    words = f"--dataset cub --data-root {old} --max-steps 2 --metrics retrieval --amp off"
    run = tiny.run(old, tmp_path, "run", words)
    old.rename(new)
    means = []
    for flags in (["--ratio-classes", 0.5], []):
        evaluated(run, tmp_path, "--data-root", new, *flags, "--whiten", 2)
        with np.load(run / "whitening.npz") as arrays:
            means.append(arrays["mean"])
        (run / "whitening.npz").unlink()
    assert np.array_equal(*means)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--rerank --query-expansion 3", "--rerank averages neighbours itself"),
        ("--rerank 20", "--rerank takes nothing, or k1, k2 and lambda"),
        ("--rerank 5 6 0.3", "k2 at most k1"),
        ("--query-expansion 2.5", "--query-expansion takes K, a whole number"),
        ("--database-augmentation 0", "--database-augmentation takes K"),
        ("--query-expansion 3 --neighbours a.png", "would show the neighbours without it"),
        ("--query-expansion 3 --metrics nmi", "belongs to --metrics with retrieval in it"),
        ("--rerank --metrics official retrieval", "--metrics official draws galleries of its own"),
        ("--whiten 0", "below the smallest useful value"),
        ("--whiten --dims 2 4", "--whiten is fitted to one embedding and --dims names 2"),
    ],
)
def test_nonsense_is_refused(words: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, options.parse_evaluate, ["--resume", "run", *words.split()])
    assert sentence in said


def test_more_neighbours_than_images_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an image can find 63"):
        evaluated(run, tmp_path, "--query-expansion", 64)


# --- in search.py ---------------------------------------------------------------------------------


def test_search_expands_reranks_and_whitens(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run.parent / "data" / "eval"
    picture = next(iter(sorted(folder.rglob("*.png"))))
    plain, white = tmp_path / "plain.index", tmp_path / "white.index"
    search.main(["build", str(run), "--images", str(folder), "--index", str(plain)])
    search.main(
        ["build", str(run), "--images", str(folder), "--index", str(white), "--whiten", "4"]
    )
    index = Index.open(plain)
    x = np.stack([index.embedding(row) for row in range(len(index))]).astype(np.float64)
    (query,) = index.embedder()([picture])

    def answer(path: Path, *words: str) -> list[dict[str, Any]]:
        file = tmp_path / "answer.json"
        search.main(["query", str(path), str(picture), "--top", "64", "--json", str(file), *words])
        return json.loads(file.read_text())["answers"][0]["hits"]

    moved = expanded(query[None], x, 5, 3.0).numpy()[0].astype(np.float64)
    ids = [hit["id"] for hit in answer(plain, "--query-expansion", "5")]
    cosines = x @ moved
    assert np.all(np.diff(cosines[[index.row(each) for each in ids]]) <= 1e-6)

    score = Reranking(query[None], x, 10, 3, 0.3)(torch.tensor([0]))[0].numpy()
    hits = answer(plain, "--rerank", "10", "3", "0.3")
    rows = [index.row(hit["id"]) for hit in hits]
    assert np.all(np.diff(score[rows]) <= 1e-6) and sorted(rows) == list(range(64))
    np.testing.assert_allclose([hit["score"] for hit in hits], x[rows] @ query, atol=1e-6)

    whitened = Index.open(white)
    assert whitened.size == 4 and whitened.thresholds is None and index.thresholds is not None
    assert answer(white)[0]["score"] == pytest.approx(1, abs=1e-5)
    for words, sentence in (
        (["--query-expansion", "65"], "choose at most that"),
        (["--rerank", "3"], "--rerank takes nothing, or k1, k2 and lambda"),
        (["--rerank", "--query-expansion", "3"], "--rerank averages neighbours itself"),
    ):
        assert sentence in refusal(capsys, answer, plain, *words)

"""report.py: the page of a run, of several, the table of all runs, and the page in a browser."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
import shlex
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from conftest import counted, refusal, run_python
from PIL import Image

import evaluate
import methods
import metrics
import options
import report
import train
from benchmarks import page as sop
from criteria.amloss import AMLoss
from dataset.base import ImageSet, PathTable
from evaluation import meanings, pictures
from evaluation.embedding import Embedded
from evaluation.measuring import worst_queries
from evaluation.pictures import class_values_picture
from evaluation.tasks import Task
from metrics import comparison
from metrics.correlation import Correlation
from page import (
    counterpart,
    document,
    findings,
    records,
    sections,
    source,
    summary,
    values,
)
from page import learned as learned_module
from page.build import build
from page.explained import explain, look
from page.learned import Learned, nearest_proxy
from page.lines import collect
from page.map import _tsne, embedding_map
from page.pairs import pairs
from page.thumbnails import Thumbnails
from runs import ClassHistory, RunFolder
from utils import InputError

pytestmark = pytest.mark.usefixtures("maps_here")

EVIL = "<script>alert(1)</script>"
DIVIDED = {"masks", "clusters"}


@pytest.fixture(scope="module")
def logs(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two AMLoss runs that differ in the seed, and one of another loss."""
    folder = tmp_path_factory.mktemp("logs")
    tiny.run(images, folder, "first", "--loss AMLoss --epochs 2 --warm 0")
    tiny.run(images, folder, "second", "--loss AMLoss --epochs 2 --warm 0 --seed 2")
    tiny.run(images, folder, "other", "--loss Proxy_Anchor --epochs 1 --warm 0")
    return folder


@pytest.fixture(scope="module")
def page(logs: Path) -> Path:
    return report.make([logs / "first"])


RESULT = {"results": {"emoji": {"R@1": 0.5}}}


def data_of(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    return json.loads(found[1])


# --- the page of a run ----------------------------------------------------------------------------


def test_page_lies_in_the_run_folder_and_loads_nothing(page, logs):
    assert page == logs / "first" / "report.html"
    content = page.read_text()
    assert not re.search(r'(?:src|href)="(?!#|data:)', content)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", content)
    assert "default-src 'none'" in content and "</html>" in content


def test_page_says_what_was_run_and_what_came_out(page, logs):
    content = page.read_text()
    outcome = json.loads((logs / "first" / "results.json").read_text())
    (numbers,) = outcome["results"].values()
    shown = content.split('id="results"')[1]
    for name in ("R@1", "MAP@R", "NMI"):
        assert f">{100 * numbers[name]:.1f}" in shown
    for said in ("AMLoss", "resnet10", "48 images, 8 classes", "24 images, 8 classes", "images/s"):
        assert said in content
    assert f"Best epoch {outcome['best_epoch']} of 2" in content
    assert "Not finished" not in content


def test_every_part_has_its_content(page):
    (run,) = data_of(page)["runs"]
    assert [group["title"] for group in run["galleries"]][:2] == ["Random", "Best"]
    for group in run["galleries"]:
        for row in group["rows"]:
            assert len(row["found"]) == 10
            assert all(cell["right"] == (cell["name"] == row["name"]) for cell in row["found"])
            cosines = [cell["cosine"] for cell in row["found"]]
            assert cosines == sorted(cosines, reverse=True)
    assert len(run["map"]["points"]) == 24 and len(run["map"]["names"]) == 8
    assert [part["kind"] for part in run["sections"]] == ["class-values", "pairs"]
    assert run["columns"]["loss"][0] is not None and len(run["across"]["step"]) == 2


def test_margins_are_ranked_and_their_course_is_that_of_training(page, logs):
    part = data_of(page)["runs"][0]["sections"][0]
    with (logs / "first" / "margins.csv").open() as file:
        learned = {row["class"]: float(row["margin"]) for row in csv.DictReader(file)}
    assert {row[2]: row[1] for row in part["ranked"]} == pytest.approx(learned, abs=1e-4)
    assert part["largest"][0]["value"] == pytest.approx(max(learned.values()), abs=1e-4)
    assert part["smallest"][0]["value"] == pytest.approx(min(learned.values()), abs=1e-4)
    assert part["course"]["epochs"] == [1, 2]
    assert all(row["spread"] > 0 and row["images"] for row in part["largest"])


@pytest.mark.parametrize(
    ("flags", "kinds"),
    [
        ("--introspective paper", {"certainty", "pairs"}),
        ("--disent True --be 1", {"courses", "pairs"}),
        ("--sec_wei 0.5", {"norms", "pairs"}),
        ("--loss MS --IPC 4 --l2reg_wei 0.1", {"norms"}),
        ("--loss PFML", {"pairs"}),  # fifteen proxies to a class
        ("--loss HIST", set()),
        ("--ema 0.9 --micro-batch 6 --loss RecallAtK --IPC 4", set()),
        ("--loss MarginLoss --nb-clusters 2 --hierarchy-method none --batch-size 8", DIVIDED),
    ],
)
def test_each_method_has_its_own_picture(images, tmp_path, flags, kinds):
    folder = tiny.run(images, tmp_path, "run", f"--epochs 2 --warm 0 {flags}")
    (run,) = data_of(report.make([folder]))["runs"]
    parts = {part["kind"]: part for part in run["sections"]}
    assert set(parts) == kinds
    if "certainty" in kinds:
        assert parts["certainty"]["least"][0]["value"] >= parts["certainty"]["most"][0]["value"]
        assert f"<li>{parts['certainty']['said'][0]}" in (folder / "report.html").read_text()
    if "norms" in kinds:
        assert sum(parts["norms"]["histogram"]["counts"]) == 24
        assert ("towards 0 instead" in parts["norms"]["about"]) == ("l2reg" in flags)
        assert "no constraint" not in parts["norms"]["about"]
    if "masks" in kinds:
        assert len(parts["masks"]["rows"]) == 2 and len(parts["masks"]["rows"][0]) == 8
        assert sum(cluster["size"] for cluster in parts["clusters"]["clusters"]) == 48
        assert all(cluster["classes"] for cluster in parts["clusters"]["clusters"])


def test_images_that_sit_out_are_no_cluster():
    learned = SimpleNamespace(state={"routines": [{"clusters": [0, 1, -1, 1, -1, 1]}]}, train=None)
    (section,) = sections.clusters(learned)
    assert [(part["cluster"], part["size"]) for part in section["clusters"]] == [(0, 1), (1, 3)]
    assert "2 clusters" in section["about"] and "2 images, alone" in section["about"]


def test_class_names_are_only_text(tmp_path):
    images = tiny.write_images(tmp_path / "data")
    evil = EVIL.replace("/", "∕")  # a file name has no slash
    (images / "eval" / "eval0").rename(images / "eval" / evil)
    (images / "train" / "train0").rename(images / "train" / evil)
    folder = tiny.run(images, tmp_path, "run", "--loss AMLoss --epochs 1 --warm 0")
    content = report.make([folder]).read_text()
    assert "<script>alert" not in content
    assert evil in data_of(folder / "report.html")["runs"][0]["map"]["names"]


@pytest.mark.parametrize(
    "words", [EVIL, "</script>", "<!--", '" onload="x', "]]>&amp;", "[[data]]"]
)
def test_any_text_is_harmless_in_a_page(words):
    body = document.facts([(words, words)]) + document.bullets([words])
    made = document.document(words, body, {"names": [words], "number": float("nan")})
    assert made.count("<script") == 2
    assert '" onload=' not in made.split('id="data"')[0], "no attribute can be ended"
    found = re.search(r'id="data">(.*?)</script>', made)
    assert json.loads(found[1]) == {"names": [words], "number": None}


def test_queries_can_be_chosen_by_name(logs, tmp_path):
    page = report.make([logs / "first"], tmp_path / "x.html", queries=["EVAL3"])
    chosen = data_of(page)["runs"][0]["galleries"][0]
    assert chosen["title"] == "Chosen" and {row["name"] for row in chosen["rows"]} == {"eval3"}
    with pytest.raises(InputError, match="no class and no file"):
        report.make([logs / "first"], tmp_path / "x.html", queries=["unicorn"])


@pytest.mark.parametrize("word", ["CAFÉ", "café", "cafe\u0301", "STRASSE"])
def test_queries_are_found_however_their_names_are_written(word):
    images = replace(made_up(classes=2).images, class_names=("cafe\u0301", "straße"))
    chosen = images.labels[findings.named_queries(images, [word])]
    assert {*chosen.tolist()} == {word == "STRASSE"}


def test_embeddings_can_come_from_a_file(logs, images, tmp_path):
    judged = source.judge(source.open_best(records.read(logs / "first"), 0))
    unit = torch.nn.functional.normalize(judged.embeddings, dim=1).numpy()
    np.savez(tmp_path / "e.npz", embeddings=unit, labels=judged.images.labels)
    page = report.make([logs / "first"], tmp_path / "x.html", embeddings=str(tmp_path / "e.npz"))
    (run,), (own,) = (data_of(p)["runs"] for p in (page, report.make([logs / "first"])))
    assert run["confusions"] == own["confusions"]
    np.savez(tmp_path / "e.npz", embeddings=unit[:, :3], labels=judged.images.labels)
    with pytest.raises(InputError, match=f"of 3 numbers, .* have {unit.shape[1]}.* --dims"):
        report.make([logs / "first"], tmp_path / "y.html", embeddings=str(tmp_path / "e.npz"))
    assert not (tmp_path / "y.html").exists()
    np.savez(tmp_path / "e.npz", embeddings=unit, labels=judged.images.labels[::-1])
    with pytest.raises(InputError, match="labels differ"):
        report.make([logs / "first"], tmp_path / "x.html", embeddings=str(tmp_path / "e.npz"))


def test_embeddings_of_another_network_are_refused(logs, tmp_path, caplog):
    made = str(tmp_path / "e.npz")
    best = {run: tiny.best_checkpoint(logs / run) for run in ("first", "other")}
    evaluate.main(options.parse_evaluate(["--resume", str(best["first"]), "--export", made]))
    report.make([logs / "first"], tmp_path / "x.html", embeddings=made)
    assert "which network" not in caplog.text
    with pytest.raises(InputError, match="made by another network than the run's best checkpoint"):
        report.make([logs / "other"], tmp_path / "y.html", embeddings=made)
    changed = str(tmp_path / "changed.npz")
    asked = ["--resume", str(best["first"]), "--export", changed, "--metrics", "retrieval"]
    for flags in ("--pooling max", "--image-size 48", "--eval-zoom 0.8", "--exif ignore"):
        evaluate.main(options.parse_evaluate([*asked, *flags.split()]))
        with pytest.raises(InputError, match=r"pixels; .* such as --pooling and --image-size"):
            report.make([logs / "first"], tmp_path / "y.html", embeddings=changed)
    own = vars(records.read(logs / "first").options)
    same = ["--image-size", str(own["image_size"]), "--eval-zoom", str(own["eval_zoom"])]
    evaluate.main(options.parse_evaluate([*asked, *same]))  # what the run does anyway
    report.make([logs / "first"], tmp_path / "x.html", embeddings=changed)
    content = dict(np.load(made))
    del content["network"]  # as an older version wrote it
    np.savez(made, **content)
    report.make([logs / "first"], tmp_path / "x.html", embeddings=made)
    assert "does not say which network made it" in caplog.text


def test_picture_has_the_queries_and_below_them_the_margins(logs, tmp_path):
    drawn = {}
    for run in ("first", "other"):
        report.main(options.parse_report([str(logs / run), "--picture", str(tmp_path / run)]))
        drawn[run] = np.asarray(Image.open(tmp_path / run))
    with_margins, without = drawn["first"], drawn["other"]
    assert len(with_margins) > len(without) + 200
    assert not (logs / "other" / "report.html").exists()  # instead of the page


def test_picture_shows_the_classes_at_both_ends():
    colours = np.arange(30, 230, 10, dtype=np.uint8)
    pixels = np.broadcast_to(colours[:, None, None, None], (20, 8, 8, 3)).copy()
    names, paths = tuple(f"c{c}" for c in range(20)), PathTable(f"{c}.png" for c in range(20))
    train = ImageSet("x", "train", np.arange(20), names, paths, pixels=pixels)
    values = np.random.default_rng(0).permutation(20) / 10
    picture = np.asarray(class_values_picture("margin", values, train, shown=3))
    rows = [[round(float(values[c]), 1) for c in found] for found in _classes_seen(picture)]
    assert rows == [[0.0, 0.1, 0.2], [1.9, 1.8, 1.7]]


def _classes_seen(picture: np.ndarray) -> list[list[int]]:
    """Row by row the classes whose colour fills a cell; the class c is grey 30 + 10c."""
    row, curve = pictures.CELL + pictures.LINE + pictures.GAP, 96
    left = pictures.EDGE + pictures.NAME + pictures.CELL + pictures.AFTER_QUERY
    half, seen = pictures.CELL // 2, []
    for number in range(2):
        y = pictures.LEGEND + curve + number * (row + pictures.GAP) + half
        step = pictures.CELL + pictures.GAP
        greys = [picture[y, left + half + column * step, 0] for column in range(3)]
        seen.append([(int(grey) - 30) // 10 for grey in greys])
    return seen


# --- sentences are computed -----------------------------------------------------------------------


def learned_by_classes(
    margins: np.ndarray, spreads: np.ndarray, proxies: torch.Tensor | None = None
) -> Learned:
    """A run whose history of margins (E, C) is given, and the spread of each class's images (C,).

    Eight images of a class lie around a direction of its own, as far from it as its spread says.
    """
    count, each = len(spreads), 8
    generator = torch.Generator().manual_seed(0)
    labels = np.repeat(np.arange(count), each)
    centres = torch.nn.functional.normalize(torch.randn(count, 16, generator=generator), dim=1)
    noise = torch.randn(count * each, 16, generator=generator)
    rows = centres[labels] + torch.tensor(spreads[labels])[:, None].float() * noise
    pixels = np.zeros((len(labels), 8, 8, 3), np.uint8)
    names, paths = tuple(f"c{c}" for c in range(count)), PathTable(map(str, range(len(labels))))
    train = ImageSet("x", "train", labels, names, paths, pixels=pixels)
    epochs = np.arange(1, len(margins) + 1)
    judged = made_up()
    return Learned(
        record=sop.stand_in(),
        checkpoint={
            "criterion_state_dict": {} if proxies is None else {"proxies": proxies},
            "model_state_dict": {},
        },
        state={},
        history={
            "names": np.array(names),
            "images": np.full(count, each),
            "epoch": epochs,
            "step": epochs,
            "margin": margins,
        },
        judged=judged,
        search=findings.Search(judged),
        train=train,
        embed=lambda images: (images, rows[[int(path) for path in images.paths]]),
        thumbs=Thumbnails(10**6),
        seed=1,
    )


SPREADS = np.random.default_rng(0).uniform(0.05, 0.5, 60)


@pytest.mark.parametrize(("sign", "words"), [(-1, "smaller"), (1, "larger"), (0, None)])
def test_what_goes_with_a_margin_is_said_as_the_run_has_it(sign, words):
    chance = np.random.default_rng(1).normal(size=60)
    last = 0.1 + 0.01 * (sign * SPREADS + 0.02 * chance if sign else chance)
    (part,) = values.class_values(learned_by_classes(np.stack([last - 0.01, last]), SPREADS))
    (scatter,) = part["scatters"]
    assert scatter["low"] < scatter["correlation"] < scatter["high"]
    (said,) = part["said"]
    if words is None:
        assert "neither larger nor smaller" in said
        assert "rank correlation" not in values.in_short(part)
    else:
        assert f"A margin is {words} where the images of a class differ more" in said
        assert f"They are {words} where the images" in values.in_short(part)
    assert f"{scatter['correlation']:.2f}, 95 % interval" in said and "60 classes" in said


def test_a_correlation_that_another_quantity_explains_is_said_to_be_gone():
    # Margins follow the spread; the number of images does too, and nothing else.
    rng = np.random.default_rng(2)
    learned = learned_by_classes(np.stack([SPREADS, SPREADS + 0.02 * rng.normal(size=60)]), SPREADS)
    counts = np.round(100 * (SPREADS + 0.1 * rng.normal(size=60))).astype(int)
    (part,) = values.class_values(replace(learned, history={**learned.history, "images": counts}))
    spread, images = part["said"]
    assert "larger where the images of a class differ more" in spread and "gone" not in spread
    assert "larger where a class has more images" in images and "that is gone" in images


def test_margins_that_still_move_are_said_not_to_have_settled():
    target = 0.08 + 0.01 * SPREADS
    epochs = np.arange(20)[:, None]
    falling = 0.1 - (0.1 - target) * epochs / 19
    settled = target + (0.1 - target) * 0.3**epochs
    for rows, words in ((falling, "have not settled"), (settled, "they have settled")):
        (part,) = values.class_values(learned_by_classes(rows, SPREADS))
        assert words in part["about"], part["about"]
        assert ("not settled" in values.in_short(part)) == (words == "have not settled")
    assert "In the last 4 of 20 epochs all of them were still falling" in values.about_movement(
        values.movement(falling, np.arange(1, 21)), "margin"
    )
    assert values.movement(falling[:2], np.arange(1, 3)) is None  # too early to tell


def test_a_best_epoch_before_the_last_is_not_called_the_end():
    falling = 0.1 - 0.02 * SPREADS * np.arange(20)[:, None] / 19
    learned = learned_by_classes(falling, SPREADS)
    record = replace(learned.record, outcome={"best_epoch": 10})
    (part,) = values.class_values(replace(learned, record=record))
    assert "In the last 2 of the 10 epochs up to the best one all of them" in part["about"]
    assert values.in_short(part).split(". They are")[0].endswith("still moving at the best epoch")


def test_what_few_classes_leave_open_is_not_said_to_be_gone():
    """A correlation of .5 with the others held fixed is not nothing, if it is not sure."""
    related = values.Related(
        values.Quantity("size", "a class has more images", {}),
        [],
        np.zeros(0),
        np.zeros(0),
        Correlation(0.85, 0.23, 0.98, 8),
    )
    for value, words in ((0.49, "no longer sure (0.49)"), (0.05, "gone (0.05)")):
        given = Correlation(value, -0.6, 0.9, 8)
        assert f"held fixed that is {words}" in values.what_goes_with("margin", related, given)


def test_the_third_term_is_said_to_pull_alike_where_it_does():
    generator = torch.Generator().manual_seed(0)
    for count, alike in ((3, False), (300, True)):
        proxies = torch.randn(count, 16, generator=generator)
        proxies[0] = proxies[1]  # two that crowd
        margins = np.full((3, count), 0.1, np.float32)
        learned = learned_by_classes(margins, np.full(count, 0.1), proxies)
        (part,) = values.class_values(learned)
        assert ("pulls at all of them alike" in part["about"]) == alike


def test_how_hard_the_third_term_pulls_is_its_derivative():
    proxies, margins = torch.randn(7, 5), torch.rand(7).requires_grad_()
    unit = torch.nn.functional.normalize(proxies, dim=1)
    others = (unit @ unit.T).masked_fill(torch.eye(7) > 0, -torch.inf)
    terms = torch.log1p((others - margins[:, None] + 0.1).exp().sum(dim=1))
    (wanted,) = torch.autograd.grad(terms.sum(), margins)
    torch.testing.assert_close(AMLoss.raising(proxies, margins.detach(), 0.1), -wanted)


def test_whether_close_proxies_mean_like_images_is_computed():
    learned = learned_by_classes(np.zeros((0, 60)), SPREADS)
    means = torch.stack([mean for _, mean in sorted(learned.drawn.items())])
    strangers = torch.randn(60, 16, generator=torch.Generator().manual_seed(9))
    for proxies, words in ((means, "finds alike"), (strangers, "say little")):
        given = replace(learned, checkpoint={"criterion_state_dict": {"proxies": proxies}})
        (part,) = sections.proxies(given)
        assert words in part["said"][0]


@pytest.mark.parametrize(
    ("hits", "words"), [("110", "errs more"), ("011", "errs less"), ("111", "does not tell")]
)
def test_whether_certainty_tells_errors_is_computed(hits, words):
    # The surest fifth, three between, and the least sure; a class has one query in each.
    shares = {"1": 0.9, "0": 0.2}
    fifths = [np.arange(100) < 100 * shares[hits[at]] for at in (0, 1, 1, 1, 2)]
    places = np.array_split(np.arange(500), 5)
    right = torch.tensor(np.concatenate(fifths), dtype=torch.float64)[:, None]
    scores = comparison.Scores(("R@1",), right, torch.ones_like(right), torch.arange(500) % 100)
    (said,) = sections.whether_it_knows(scores, places)
    assert words in said


def test_copies_of_queries_do_not_make_it_surer_what_certainty_tells():
    rng = np.random.default_rng(0)
    right = torch.tensor(rng.random(100) < 0.5, dtype=torch.float64)[:, None]
    said = []
    for times in (1, 10):
        hits = right.repeat_interleave(times, 0)
        labels = (torch.arange(100) % 20).repeat_interleave(times)
        scores = comparison.Scores(("R@1",), hits, torch.ones_like(hits), labels)
        said += sections.whether_it_knows(scores, np.array_split(np.arange(100 * times), 5))
    assert said[0] == said[1]


def test_the_worst_class_is_named_or_how_many_are_never_found():
    lowest = [{"name": "a", "score": 0.0, "size": 4}]
    (said,) = summary.found_worst({"lowest": lowest, "never": 3, "count": 9})
    assert "Of 9 classes" in said and "3 have no query" in said
    (said,) = summary.found_worst({"lowest": lowest, "never": 1, "count": 9})
    assert said.endswith("(the nearest image is right for 0 of its 4 queries).")
    assert summary.found_worst({"lowest": [], "never": 0, "count": 9}) == []


def test_the_worst_classes_are_those_that_are_not_always_found():
    judged = made_up(count=240)
    search = findings.Search(judged)
    labels = judged.images.labels
    right = labels[search.found[:, 0]] == labels
    recall = {judged.images.class_names[c]: right[labels == c].mean() for c in np.unique(labels)}
    lowest = findings.class_scores(search, Thumbnails(10**6), 1)["lowest"]
    scores = [row["score"] for row in lowest]
    assert scores == sorted(scores) == pytest.approx([recall[row["name"]] for row in lowest])
    assert len(lowest) == min(findings.SHOWN_PAIRS, sum(share < 1 for share in recall.values()))
    perfect = replace(judged, embeddings=torch.eye(labels.max() + 1)[torch.from_numpy(labels)])
    assert findings.class_scores(findings.Search(perfect), Thumbnails(10**6), 1)["lowest"] == []


def test_classes_that_are_never_found_come_by_chance():
    labels = np.repeat(np.arange(40), 2)
    names = tuple(f"class {c}" for c in range(40))
    pixels = np.zeros((80, 4, 4, 3), np.uint8)
    images = ImageSet("x", "eval", labels, names, PathTable(map(str, range(80))), pixels=pixels)
    others = np.roll(labels, 1)  # each is nearest to an image of the class before or after
    task = Task("x", images, None, (1,))
    search = findings.Search(Embedded(task, torch.eye(40)[torch.from_numpy(others)], None, None))
    shown = [
        [row["name"] for row in findings.class_scores(search, Thumbnails(10**6), seed)["lowest"]]
        for seed in (1, 1, 2)
    ]
    assert shown[0] == shown[1] != shown[2] and len(shown[0]) == findings.SHOWN_PAIRS


def test_every_column_of_a_table_is_explained():
    columns = ("R@1", "R@10", "MAP@R", "R@1 other drawing sets", "NMI", "TAR@1e-3")
    said = meanings.in_words(columns)
    for name in ("R@K", "MAP@R", "R@1 other drawing sets", "NMI", "TAR@F"):
        assert f"{name}: " in said


def test_names_in_sentences_are_only_names():
    name = "ספל `x` <b>"
    said = document.bullets([f"Worst: {document.isolated(name)} (3)."])
    assert "<li>Worst: <bdi>ספל `x` &lt;b&gt;</bdi> (3).</li>" in said
    turned = document.bullets([document.isolated("a\u2069 `b`")])
    assert "<code>" not in turned and "\\u2069" in turned
    assert "<code>" in document.bullets(["run `python x.py --seed 1`."])


# --- was it worth it? -----------------------------------------------------------------------------


def test_page_names_the_run_that_says_whether_the_method_was_worth_it(images, tmp_path):
    flags = "--epochs 1 --warm 0 --lr 1e-3"
    folder = tiny.run(images, tmp_path, "margins", f"--loss AMLoss --mrg-lr 1e-3 {flags}")
    command = command_in(counterpart.sentence(records.read(folder)))
    assert "--name margins-plain" in command and "mrg" not in command
    train.main(
        options.parse_train([*shlex.split(command)[2:], *"--wandb disabled --workers 0".split()])
    )

    plain = records.read(tmp_path / "margins-plain")
    ours, theirs = records.read(folder), plain.results[next(iter(plain.results))]["R@1"]
    assert plain.method == "Proxy_Anchor" and plain.args["seed"] == ours.args["seed"]
    words = counterpart.sentence(ours)
    assert f"(margins-plain) has R@1 {document.percent(theirs)} %" in words
    assert command_in(words) == f"python report.py {plain.path} {folder}"
    assert counterpart.sentence(plain) == ""  # nothing was added to it


@pytest.mark.parametrize(
    ("flags", "words", "plain"),
    [
        ("--loss AMLoss --sec_wei 0.5", "SEC", "--loss AMLoss"),
        ("--introspective --sec_wei 1", "IDML and SEC", "--model resnet50 --batch-size 150"),
        (
            "--loss MarginLoss --nb-clusters 2 --batch-sampler adaptbalanced "
            "--small-class-action sample_other",
            "divide and conquer",
            "--loss MarginLoss --IPC 2",
        ),
        ("--loss ms --sec_wei 1 --clip 3", "SEC", "--loss ms --clip 3 --head-norm 1"),
        ("@recipes/emoji_scratch.txt", "learning the margins", "@recipes/emoji_scratch.txt"),
    ],
)
def test_counterpart_is_the_same_without_the_method(flags, words, plain, tmp_path):
    args = vars(options.parse_train(flags.split()))
    record = records.Record(tmp_path / "logs" / "run", args, {}, [], RESULT)
    said, alike = counterpart.without_method(record)
    assert said == words
    again = options.parse_train(shlex.split(command_in(counterpart.sentence(record)))[2:])
    assert not methods.attachments(alike).keys() - {"sec"} and not alike.sec_wei
    asked = options.parse_train([*plain.split(), "--name", "run-plain"])
    if plain.startswith("@"):
        asked.loss = "Proxy_Anchor"
    assert {k: v for k, v in vars(again).items() if k in counterpart_keys(asked)} == {
        k: v for k, v in vars(asked).items() if k in counterpart_keys(asked)
    }


def counterpart_keys(args) -> set[str]:
    heard = {f.dest for f in options.train_flags() if f.need is None or f.need.met(args)}
    matters = options.configuration(vars(args)).keys()
    return (heard & matters) - set(counterpart.RATES)


def command_in(sentence: str) -> str:
    return re.findall("`([^`]+)`", sentence)[0]


def test_a_run_that_keeps_off_the_test_classes_does_so_in_its_page(images, tmp_path):
    run = tiny.run(images, tmp_path, "quiet", "--val-classes 0.3 --no-test --epochs 1 --warm 0")
    outcome = json.loads((run / "results.json").read_text())
    assert list(outcome["results"]) == ["validation"]
    content = report.make([run]).read_text()
    assert "--no-test: its test classes stay unseen" in content
    assert not data_of(run / "report.html")["runs"][0]["galleries"]
    with pytest.raises(InputError, match="--no-test"):
        report.draw(run, tmp_path / "picture.png")


def test_a_run_without_checkpoint_or_data_has_a_page(logs, tmp_path):
    shutil.copytree(logs / "first", tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    next((tmp_path / "run").glob("*_best.pth")).unlink()
    tiny.edit(tmp_path / "run" / "args.json", epochs=60)
    (run,) = data_of(report.make([tmp_path / "run"]))["runs"]
    assert "no best checkpoint" in run["missing"] and run["columns"]["R@1"]
    assert "Not finished: 2 of 60 epochs are done" in (tmp_path / "run/report.html").read_text()
    with pytest.raises(InputError, match=r"no args\.json"):
        report.make([tmp_path])


# --- several runs ---------------------------------------------------------------------------------


def test_runs_lie_over_each_other_and_are_tested_against_the_first(logs, tmp_path):
    page = report.make([logs / "first", logs / "second", logs / "other"], tmp_path / "x.html")
    data, content = data_of(page), page.read_text()
    ours, other = "(loss AMLoss, epochs 2)", "(loss Proxy_Anchor, epochs 1)"
    names = [f"first {ours}", f"second {ours}", f"other {other}"]
    assert [run["name"] for run in data["runs"]] == names
    assert content.count("data-toggle=") == 3 and content.count("points against first") == 2
    seen = [image for image in data["images"] if image]
    assert len(seen) == len(set(seen))


def test_difference_to_the_first_run_is_the_paired_one(logs):
    thumbs = Thumbnails(10**6)
    runs = [explain(records.read(logs / name), thumbs) for name in ("first", "second")]
    test = summary.paired(*runs)
    reached = [next(iter(run.record.results.values()))["R@1"] for run in runs]
    assert test.difference == pytest.approx(reached[1] - reached[0], abs=1e-6)
    assert test.low <= test.difference <= test.high


# --- what is found --------------------------------------------------------------------------------


def made_up(count: int = 60, classes: int = 12, size: int = 8) -> Embedded:
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(count) % classes
    centres = torch.randn(classes, size, generator=generator)
    embeddings = centres[labels] + 0.8 * torch.randn(count, size, generator=generator)
    pixels = np.random.default_rng(0).integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)
    names = tuple(f"class {c}" for c in range(classes))
    paths = PathTable(f"{i}.png" for i in range(count))
    images = ImageSet("x", "eval", labels.astype(np.int64), names, paths, pixels=pixels)
    return Embedded(Task("x", images, None, (1, 2)), embeddings)


def test_search_agrees_with_the_metrics():
    judged = made_up()
    search = findings.Search(judged)
    numbers = metrics.retrieval_metrics(judged.embeddings, judged.images.labels, ks=(1, 2))
    assert search.scores.means()["MAP@R"] == pytest.approx(numbers["MAP@R"])
    right = judged.images.labels[search.found[:, 0]] == judged.images.labels[search.queries]
    assert right.mean() == pytest.approx(numbers["R@1"])
    assert not search.sampled
    intervals = search.intervals(numbers)
    assert intervals["R@1"][0] < numbers["R@1"] < intervals["R@1"][1] and "NMI" not in intervals


def test_one_class_says_nothing_of_others():
    search = findings.Search(made_up(classes=1))
    assert search.scores.means()["R@1"] == 1 and search.intervals({"R@1": 1.0}) == {}
    run = SimpleNamespace(search=search)
    assert summary.paired(run, run) is None
    fifths = np.array_split(np.arange(60), 5)
    assert sections.whether_it_knows(search.scores, fifths) == []


def test_a_part_of_the_queries_stands_for_all(monkeypatch):
    judged = made_up(count=600)
    whole = findings.Search(judged)
    monkeypatch.setattr(findings, "MOST_COMPARISONS", 150 * 600)
    part = findings.Search(judged)
    assert "150 of the 600" in part.sampled
    widths = [
        np.subtract(*reversed(comparison.interval(search.replicates[:, 0], 20)))
        for search in (whole, part)
    ]
    assert widths[1] == pytest.approx(widths[0], rel=0.3)
    assert (part.found != part.queries[:, None]).all(), "an image does not find itself"


def test_best_and_worst_queries_are_of_different_classes_and_in_order():
    search = findings.Search(made_up())
    labels, rank = search.judged.images.labels, search.per_query["rank"].numpy()
    worst = findings.one_per_class(search, worst_queries(search.per_query))
    for chosen in (findings.best_queries(search, 1), worst):
        assert len(set(labels[chosen])) == len(chosen)
    assert rank[worst[0]] == rank.max() and (np.diff(rank[worst]) <= 0).all()
    assert (rank[worst] > 0).all()


def test_a_query_says_at_which_place_the_nearest_right_image_stands():
    search = findings.Search(made_up())
    labels = search.judged.images.labels
    unit = torch.nn.functional.normalize(search.judged.embeddings, dim=1)
    order = (unit @ unit.T).fill_diagonal_(-2).argsort(dim=1, descending=True)
    places = (torch.tensor(labels)[order] == torch.tensor(labels)[:, None]).int().argmax(dim=1) + 1
    groups = findings.galleries(search, (), Thumbnails(10**6), 1)
    assert [group["title"] for group in groups] == ["Random", "Best", "Worst"]
    names = search.judged.images.class_names
    for row in groups[2]["rows"]:
        assert row["rank"] in places[[name == row["name"] for name in np.array(names)[labels]]]
    assert groups[2]["rows"][0]["rank"] == places.max()
    first = [cell["right"] for cell in groups[0]["rows"][0]["found"]]
    rank = groups[0]["rows"][0]["rank"]
    assert (first.index(True) + 1 == rank) if True in first else rank > 10


def test_pairs_have_what_results_json_says_of_them():
    judged = made_up()
    search, record = findings.Search(judged), sop.stand_in()
    assert pairs(record, search) is None  # a run that has compared none
    numbers = {"TAR@1e-2": 0.5, "TAR@1e-3": None, "EER": 0.125, "AUC": 0.93}
    kept = replace(record, outcome={"verification": {"x": numbers}})
    found = pairs(kept, search)
    assert "12.5 %" in found["said"][0] and "1 in 100 pairs" in found["said"][1]
    assert "Too few pairs" in found["said"][-1] and not found["marks"]
    labels = judged.images.labels
    same = int((labels[:, None] == labels).sum()) - len(labels)
    assert found["counts"] == [same, len(labels) ** 2 - len(labels) - same]
    assert sum(found["same"]) == pytest.approx(1, abs=1e-3) == sum(found["different"])
    middle = [np.average(found["cosines"], weights=found[kind]) for kind in ("same", "different")]
    assert middle[0] > middle[1]


def test_a_page_has_the_thresholds_that_its_run_recommends(page, logs):
    outcome = json.loads((logs / "first" / "results.json").read_text())
    (numbers,) = outcome["verification"].values()
    (run,) = data_of(page)["runs"]
    assert f"Equal error rate {document.percent(numbers['EER'])} %" in run["pairs"]["said"][0]
    for kept in outcome["thresholds"].values():
        said = " ".join(run["pairs"]["said"])
        assert f"from a cosine of {kept['same']:.3f}" in said
        assert ("these errors are a rough guess" in said) == (kept["classes"] < 20)
        assert [mark[1] for mark in run["pairs"]["marks"]] == ["different", "same"]


def test_the_map_knows_whose_nearest_image_is_wrong():
    judged = made_up()
    found = embedding_map(judged, Thumbnails(10**6), 1)
    labels, search = judged.images.labels, findings.Search(judged)
    first = labels[search.found[:, 0]]
    assert {place for place, _ in found["wrong"]} == set(np.flatnonzero(first != labels).tolist())
    names = judged.images.class_names
    assert all(name == names[first[place]] for place, name in found["wrong"])
    alone = replace(judged.task, queries=judged.images.subset(np.arange(12)))  # one of each class
    lonely = replace(judged, task=alone, embeddings=judged.embeddings[:12])
    assert embedding_map(lonely, Thumbnails(10**6), 1)["wrong"] == []  # nothing could be right
    places = [point[:2] for point in found["points"]]
    assert 0 < found["neighbours"] <= 1 and len(places) == 60


def test_confusions_count_both_directions():
    search = findings.Search(made_up())
    labels = search.judged.images.labels
    first = labels[search.found[:, 0]]
    found = findings.confusions(search, Thumbnails(10**6))
    for pair in found:
        a, b = (int(name.split()[1]) for name in pair["names"])
        assert pair["counts"] == [
            int(((labels == a) & (first == b)).sum()),
            int(((labels == b) & (first == a)).sum()),
        ]
        assert sum(pair["counts"]) > 0
    totals = [sum(pair["counts"]) for pair in found]
    assert totals == sorted(totals, reverse=True)
    assert len(found) == findings.SHOWN_PAIRS or sum(totals) == (labels != first).sum()


def test_shares_in_words_claim_no_more_than_they_are():
    assert [document.of_100(share) for share in (0, 0.0004, 0.126, 0.9996, 1)] == [
        *("0 of 100", "fewer than 1 of 100", "13 of 100", "more than 99 of 100", "100 of 100")
    ]
    assert document.against(0.5, 0.5) == document.against(0.50001, 0.5) == "level with"
    assert document.against(0.5, 0.52) == "2.0 points below"
    assert document.against(0.523, 0.5) == "2.3 points above"


def test_a_network_that_tells_nothing_apart_confuses_no_pair_more_than_others():
    judged = made_up()
    search = findings.Search(replace(judged, embeddings=torch.ones_like(judged.embeddings)))
    assert findings.confusions(search, Thumbnails(10**6)) == []


@pytest.mark.parametrize("strip", [100, 2**24])  # cosines at once, whatever the number of classes
@pytest.mark.parametrize("count", [2, 3, 40, 1500])
def test_closest_pairs_are_those_of_all_pairs(count, strip, monkeypatch):
    monkeypatch.setattr(learned_module, "STRIP", strip)
    proxies = torch.randn(count, 6, generator=torch.Generator().manual_seed(count))
    unit = torch.nn.functional.normalize(proxies, dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(-2)
    nearest = nearest_proxy(proxies)
    torch.testing.assert_close(nearest, cosines.max(dim=1).values)
    expected = cosines.triu(1).masked_fill(torch.ones_like(cosines).tril() > 0, -2).flatten()
    pairs = sections.closest_pairs(proxies, nearest, 5)
    best = expected.topk(len(pairs)).values
    torch.testing.assert_close(torch.tensor([value for _, _, value in pairs]), best)
    assert all(cosines[a, b] == pytest.approx(value, abs=1e-6) for a, b, value in pairs)


def test_of_more_proxies_than_can_all_be_compared_no_nearest_are_shown():
    count = learned_module.COMPARED + 1
    margins = np.full((2, count), 0.5)
    learned = learned_by_classes(margins, SPREADS, torch.randn(count, 2))
    assert learned.crowding is None and not list(sections.proxies(learned))
    about = values.about_margins(learned, margins[-1])  # which would compare them all as well
    assert "raises it" in about and "it pulls" not in about
    few = learned_by_classes(margins[:, :60], SPREADS, torch.randn(60, 16))
    assert list(sections.proxies(few))


def test_thumbnails_keep_to_their_budget():
    images = made_up(count=300).images
    thumbs = Thumbnails(3000)
    needed = [thumbs.want(images, i) for i in range(3)]
    numbers = [thumbs.want(images, i, needed=False) for i in range(300)]
    assert numbers[:3] == needed == [0, 1, 2] and len(set(numbers)) == 300
    made = thumbs.encode()
    assert all(made[number] for number in needed) and None in made
    assert sum(len(address or "") for address in made) < 3000 + 64 * 400, "64 are made at a time"


def test_pictures_to_be_looked_at_are_as_large_as_half_the_budget_allows():
    pixels = np.random.default_rng(0).integers(0, 255, (30, 400, 300, 3), dtype=np.uint8)
    names, paths = ("a",), PathTable(f"photos/a/{i}.png" for i in range(30))
    images = ImageSet("x", "eval", np.zeros(30, int), names, paths, pixels=pixels)
    sides = []
    for budget in (10**8, 10**5, 10**3):
        thumbs = Thumbnails(budget)
        for i in range(30):
            thumbs.want(images, i, large=i < 10)
        made = [Image.open(io.BytesIO(base64.b64decode(a.split(",")[1]))) for a in thumbs.encode()]
        assert {max(picture.size) for picture in made[10:]} == {64}
        (side,) = {max(picture.size) for picture in made[:10]}
        sides.append(side)
    assert sides[0] == 320 > sides[1] > 64 == sides[2]
    assert thumbs.names()[3] == "a/3.png"


def test_equal_values_have_a_histogram():
    assert findings.histogram(np.ones(7))["counts"] == [7]
    assert sum(findings.histogram(np.arange(50.0))["counts"]) == 50


# --- embeddings that hardly differ ----------------------------------------------------------------


def of(embeddings: torch.Tensor) -> Embedded:
    """An evaluation of these embeddings, a few images in each class."""
    judged = made_up(len(embeddings), classes=1 + len(embeddings) // 4)
    return replace(judged, task=replace(judged.task, ks=(1,)), embeddings=embeddings)


def unlike(count: int, size: int = 8) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(0))


DEGENERATE = {
    "ones": torch.ones(6, 8),
    "zeros": torch.zeros(6, 8),
    "duplicates": unlike(6).repeat(4, 1),
    "two values": unlike(2).repeat(20, 1),
    "almost one": torch.ones(40, 8) + 1e-9 * unlike(40),
    "one dimension": unlike(20, 1),
    "two dimensions": unlike(20, 2),
    "one image": unlike(1),
    "two images": unlike(2),
    "five images": unlike(5),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_a_map_survives_any_embeddings(name):
    embeddings = DEGENERATE[name]
    found = embedding_map(of(embeddings), Thumbnails(10**5), 1)
    if len(embeddings) < 5:
        assert found is None
    elif name in ("ones", "zeros", "almost one"):
        assert "same embedding" in found["note"] and "points" not in found
    else:
        places = np.array([point[:2] for point in found["points"]])
        assert places.shape == (len(embeddings), 2) and ((places >= 0) & (places <= 1)).all()
        on_a_line = name in ("two values", "one dimension")
        assert found.get("principal", False) == on_a_line
        assert ("one direction" in found["note"]) == on_a_line


@pytest.mark.parametrize("name", DEGENERATE)
def test_a_page_survives_any_embeddings(name):
    judged, thumbs = of(DEGENERATE[name]), Thumbnails(10**5)
    learned = Learned(
        record=sop.stand_in(),
        checkpoint={"model_state_dict": {}},
        state={},
        history={},
        judged=judged,
        search=findings.Search(judged),
        train=None,
        embed=None,
        thumbs=thumbs,
        seed=1,
    )
    assert "</html>" in build([look(learned, (), "")], thumbs)


@pytest.fixture
def tsne_apart(monkeypatch):
    """Its own process again, as outside of these tests."""
    monkeypatch.setattr("page.map._tsne", _tsne)


def test_different_embeddings_have_tsne_and_what_is_alike_lies_together(tsne_apart):
    judged = of(unlike(4).repeat_interleave(10, 0) + 0.01 * unlike(40))
    found = embedding_map(judged, Thumbnails(10**5), 1)
    assert found["note"] == "" and "principal" not in found
    places = torch.tensor([point[:2] for point in found["points"]])
    nearest = torch.cdist(places, places).fill_diagonal_(9).argmin(dim=1)
    assert (nearest // 10 == torch.arange(40) // 10).all()


@pytest.mark.parametrize(
    ("child", "words"),
    [
        ("import os; os.kill(os.getpid(), 11)", "t-SNE failed (Segmentation fault)"),
        ("raise ValueError('out of ink')", "t-SNE failed (ValueError: out of ink)"),
        ("import sys; sys.exit(3)", "t-SNE failed (exit status 3)"),
        ("print('hello')", "t-SNE gave no answer"),
        ("import time; time.sleep(60)", "t-SNE took more than 2 seconds"),
        (None, "t-SNE could not be started"),
    ],
)
def test_a_map_survives_the_death_of_tsne(child, words, tsne_apart, monkeypatch):
    command = ["/nowhere/python"] if child is None else [sys.executable, "-c", child]
    monkeypatch.setattr("page.map.COMMAND", command)
    # A busy machine takes a while to start a Python, which is no hanging.
    monkeypatch.setattr("page.map.PATIENCE", 2.0 if "took more" in words else 200.0)
    found = embedding_map(made_up(), Thumbnails(10**5), 1)
    assert found["note"].startswith(words) and "principal components" in found["note"]
    assert found["principal"] and len(found["points"]) == 60


def test_tsne_starts_without_torch():
    check = "import page.tsne, sys; sys.exit('torch' in sys.modules)"
    assert run_python("-c", check).returncode == 0


def test_a_run_of_one_dimension_has_a_page(images, tmp_path):
    flags = "--loss AMLoss --epochs 1 --warm 0 --embedding-size 1"
    folder = tiny.run(images, tmp_path, "run", flags)
    content = report.make([folder]).read_text()
    (run,) = data_of(folder / "report.html")["runs"]
    assert "one direction" in run["map"]["note"] and len(run["map"]["points"]) == 24
    assert "or else the first principal components" in content


# --- numbers that do not say what they seem to ----------------------------------------------------


def run_on_few(root: Path) -> Path:
    """A run that is evaluated on one image of each of eight classes."""
    images = tiny.write_images(root / "data", eval_images=1)
    return tiny.run(images, root, "run", "--loss AMLoss --epochs 2 --warm 0")


def test_a_page_says_that_no_query_has_anything_to_find(tmp_path):
    words = "None of the 8 queries has another image of its class to find"
    folder = run_on_few(tmp_path)
    content = report.make([folder]).read_text()
    (run,) = data_of(folder / "report.html")["runs"]
    short, results = (content.split(f'id="{part}"')[1] for part in ("short", "results"))
    assert short.split("<li>")[1].startswith(words), "at the top"
    assert words in results.split("</section>")[0] and words in run["doubts"][0]
    assert "Most confused" not in content and "R@1 0.0 %" not in content
    assert "100.0" not in results.split("</table>")[0], "NMI is 1 by construction"
    assert not run["confusions"] and run["classes"] is None and "NMI" not in run["columns"]
    assert "loss" in run["columns"] and run["galleries"][0]["title"] == "Random"


def test_a_table_of_runs_says_which_have_nothing_to_find(tmp_path, capsys):
    run_on_few(tmp_path)
    compare(tmp_path, f"--csv {tmp_path / 'r.csv'}")
    said = "run: None of the 8 queries has another image of its class to find"
    assert said in capsys.readouterr().out and said in (tmp_path / "runs.html").read_text()
    with (tmp_path / "r.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert not row.get("R@1") and not row.get("NMI")


def test_queries_without_a_match_are_counted_beside_the_table(tmp_path):
    images = tiny.write_images(tmp_path / "data")
    for file in sorted((images / "eval" / "eval0").iterdir())[1:]:
        file.unlink()
    folder = tiny.run(images, tmp_path, "run", "--loss AMLoss --epochs 1 --warm 0")
    content = report.make([folder]).read_text()
    assert "1 of the 22 queries has no other image of the same class to find" in content
    assert "R@1 " in content.split('id="short"')[1].split("</section>")[0]


def test_metrics_that_are_undefined_are_left_out(logs, tmp_path):
    shutil.copytree(logs / "first", tmp_path / "run")
    outcome = json.loads((tmp_path / "run" / "results.json").read_text())
    (numbers,) = outcome["results"].values()
    numbers |= {"MAP@R": None, "F1": float("nan")}
    tiny.edit(tmp_path / "run" / "results.json", **outcome)
    (shown,) = records.read(tmp_path / "run").results.values()
    assert shown.keys() == numbers.keys() - {"MAP@R", "F1"}
    table = report.make([tmp_path / "run"]).read_text().split('id="results"')[1]
    assert "nan" not in table.split("</table>")[0]


# --- what was trained on --------------------------------------------------------------------------

UNSEEN = "None of its 8 classes was trained on."


def test_a_page_says_that_its_classes_were_not_trained_on(page):
    content = page.read_text()
    assert UNSEEN in content and "of a class the network was never trained on" in content
    assert data_of(page)["runs"][0]["doubts"] == []


def test_a_page_names_the_classes_that_were_trained_on(tmp_path):
    images = tiny.write_images(tmp_path / "data")
    for number in (2, 5):
        (images / "eval" / f"eval{number}").rename(images / "eval" / f"train{number}")
    folder = tiny.run(images, tmp_path, "run", "--loss AMLoss --epochs 1 --warm 0")
    content = report.make([folder]).read_text()
    words = "2 of the 8 evaluation classes have the name of a training class (train2, train5)"
    assert words in content.split('id="short"')[1].split("<li>")[1]
    assert data_of(folder / "report.html")["runs"][0]["doubts"][0].startswith(words)
    assert "trained on." not in content and "never trained on" not in content


def test_a_page_counts_the_files_that_were_trained_on(tmp_path):
    images = tiny.write_images(tmp_path / "data")
    for number in range(4):
        link = images / "eval" / "eval0" / f"again{number}.png"
        link.symlink_to(images / "train" / "train0" / f"{number}.png")
    folder = tiny.run(images, tmp_path, "run", "--loss AMLoss --epochs 1 --warm 0")
    content = report.make([folder]).read_text()
    assert "4 of the 28 evaluation images are training images" in content
    assert UNSEEN not in content and "never trained on" not in content


def test_a_page_claims_nothing_when_the_training_images_are_gone(tmp_path):
    images = tiny.write_images(tmp_path / "data")
    rows = [[str(p), p.parts[-2], p.parts[-3]] for p in sorted(images.glob("*/*/*.png"))]
    table = tmp_path / "table.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "split"], *rows])
    flags = ["--dataset", f"csv:{table}", *tiny.NETWORK, "--loss", "AMLoss", "--epochs", "1"]
    flags += ["--warm", "0", "--LOG_DIR", str(tmp_path), "--name", "run"]
    train.main(options.parse_train(flags))
    assert UNSEEN in report.make([tmp_path / "run"]).read_text()
    shutil.rmtree(images / "train")
    content = report.make([tmp_path / "run"]).read_text()
    assert "R@1 " in content and "trained on" not in content.split('id="setup"')[0]
    assert "never trained on" not in content


# --- what a run leaves for it ---------------------------------------------------------------------


def test_class_history_is_bounded_and_cut_back(tmp_path, monkeypatch):
    history = ClassHistory(tmp_path / "classes.npz")
    monkeypatch.setattr(ClassHistory, "most_rows", 5)
    for step in range(1, 8):
        values = {"margin": np.full(3, step / 10)}
        history.append(step, step, ["a", "b", "c"], np.ones(3, int), values)
    found = history.load()
    assert len(found["step"]) <= 5 and found["step"][-1] == 7
    assert found["margin"][:, 0] == pytest.approx(found["step"] / 10)
    history.keep_before(7)
    assert history.load()["step"][-1] < 7
    (tmp_path / "classes.npz").write_bytes(b"not an archive")
    with pytest.raises(InputError, match="damaged"):
        history.load()


def test_a_continued_run_keeps_the_row_of_classes_that_learn_nothing(tmp_path):
    history = ClassHistory(tmp_path / "classes.npz")
    classes = (["a", "b"], np.ones(2, int))
    for step in (4, 8):
        history.append(step // 4, step, *classes, {})
    assert history.load()["step"].tolist() == [4]
    history.keep_before(4)  # killed after this was written, and before the checkpoint was
    history.append(1, 4, *classes, {})
    assert history.load()["step"].tolist() == [4]


@pytest.mark.parametrize(("classes", "least", "most"), [(10, 40, 40), (150, 10, 20), (900, 5, 10)])
def test_class_history_of_many_classes_has_fewer_rows(classes, least, most, tmp_path, monkeypatch):
    """It is written anew in every epoch, so it may not grow with classes times epochs."""
    monkeypatch.setattr(ClassHistory, "most_values", 3000)
    history = ClassHistory(tmp_path / "classes.npz")
    names = [str(number) for number in range(classes)]
    for step in range(1, 41):
        values = {"margin": np.full(classes, step / 10)}
        history.append(step, step, names, np.ones(classes, int), values)
    found = history.load()
    assert least <= len(found["step"]) <= most and found["step"][-1] == 40
    assert found["margin"][:, -1] == pytest.approx(found["step"] / 10)


def test_class_history_with_a_very_long_name_takes_no_room_for_it_at_the_others(tmp_path):
    """An array of strings would: 180 MB, and seconds in every epoch."""
    names = [f"cup {number}" for number in range(5000)] + ["löng \udcff " * 400]
    ones, file = np.ones(5001, int), tmp_path / "classes.npz"
    history = ClassHistory(file)
    history.append(1, 4, names, ones, {"margin": np.full(5001, 0.1)})
    history.append(2, 8, names, ones, {"margin": np.full(5001, 0.2)})
    history.keep_before(8)
    found = history.load()
    assert found["names"].tolist() == names and found["step"].tolist() == [4]
    with np.load(file) as arrays:
        assert sum(array.nbytes for array in arrays.values()) < 1e6
    history = ClassHistory(tmp_path / "short.npz")
    history.append(1, 4, names[:9], ones[:9], {})
    with np.load(tmp_path / "short.npz") as arrays:  # as other programs have always read them
        assert arrays["names"].tolist() == names[:9]


def test_continued_run_has_every_epoch_of_its_classes_once(images, tmp_path):
    folder = tiny.run(images, tmp_path, "run", "--loss AMLoss --epochs 1 --warm 0")
    tiny.resume(folder, "--epochs 3")
    found = RunFolder(folder).classes.load()
    assert found["epoch"].tolist() == [1, 2, 3] and found["margin"].shape == (3, 8)
    assert not np.array_equal(found["margin"][0], found["margin"][2])


def test_training_ends_with_the_page(images, tmp_path, capsys):
    args = tiny.parse(images, f"--epochs 1 --LOG_DIR {tmp_path} --name run")
    args.no_report = False
    train.main(args)
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert f"report:     {tmp_path / 'run' / 'report.html'}" in capsys.readouterr().out


def test_a_page_that_fails_does_not_fail_the_run(images, tmp_path, monkeypatch, caplog):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of\nink")

    monkeypatch.setattr("page.making.make", broken)
    args = tiny.parse(images, f"--epochs 1 --LOG_DIR {tmp_path} --name run")
    args.no_report = False
    train.main(args)
    (said,) = caplog.messages
    assert "no report page (out of ink)" in said and f"report.py {tmp_path / 'run'}" in said
    assert (tmp_path / "run" / "results.json").is_file()


# --- published numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(records.RECIPES.glob("*.txt")), ids=lambda path: path.stem)
def test_every_recipe_tells_its_published_number_and_no_reference_as_one(path):
    args = {"recipe": f"recipes/{path.name}"}
    known = records.published(records.Record(path.parent, args, {}, [], {}))
    if "\n# Published: " not in path.read_text(encoding="utf-8"):
        assert known is None
        assert path.stem.startswith(("emoji", "dinov2")) or "\n# Reference: " in path.read_text()
    else:
        assert 0.3 < known.numbers["R@1"] < 1 and path.stem == known.recipe


def test_published_number_and_changed_flags_are_on_the_page(logs, tmp_path):
    shutil.copytree(logs / "first", tmp_path / "run")
    tiny.edit(tmp_path / "run" / "args.json", recipe="recipes/amloss_cub_bn_inception.txt")
    content = report.make([tmp_path / "run"]).read_text().replace("<wbr>", "")
    assert (
        "published: amloss_cub_bn_inception" in content and "is published with R@1 69.0" in content
    )
    assert "epochs 2 (recipe: 40)" in content


def test_a_recipe_is_remembered():
    path = str(records.RECIPES / "emoji_scratch.txt")
    assert options.parse_train([f"@{path}", "--seed", "3"]).recipe == path
    assert options.parse_train(["--seed", "3"]).recipe is None


# --- all runs under a folder ----------------------------------------------------------------------


def compare(logs: Path, more: str = "") -> None:
    report.main(options.parse_report(["--compare", str(logs), *more.split()]))


def test_compare_has_a_row_a_run_and_one_over_seeds(logs, capsys):
    compare(logs, f"--csv {logs / 'r.csv'} --latex {logs / 'r.tex'}")
    said = capsys.readouterr().out
    for name in ("first", "second", "other", "mean of 2 seeds"):
        assert name in said
    with (logs / "r.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["first", "other", "second", "mean of 2 seeds"]
    a, b = (float(rows[name]["R@1"]) for name in ("first", "second"))
    mean = rows["mean of 2 seeds"]
    assert float(mean["R@1"]) == pytest.approx((a + b) / 2, abs=1e-5)
    # Student's t with one degree of freedom: 12.706 standard errors.
    assert float(mean["R@1 ±"]) == pytest.approx(12.706 * abs(a - b) / 2, abs=1e-4)
    assert rows["first"]["method"] == "AMLoss" and rows["first"]["seed"] == "1"
    assert r"\begin{tabular}" in (logs / "r.tex").read_text()
    made = (logs / "runs.html").read_text()
    assert made.count("<tr><td>") == 4 and "data-sort" in made


@pytest.mark.parametrize("flag", ["--csv", "--latex", "--out"])
def test_compare_overwrites_no_file_of_a_run(logs, flag):
    file = logs / "first" / "metrics.csv"
    before = file.read_bytes()
    with pytest.raises(InputError, match=f"{flag} would overwrite .*metrics.csv, which is read"):
        compare(logs, f"{flag} {file}")
    assert file.read_bytes() == before


ROW = "epoch,step,R@1,seconds\n1,5,0.9,2.0\n"


def test_compare_keeps_held_out_classes_apart_from_the_test_classes(tmp_path, capsys):
    """A fold has fewer classes than the test, so its numbers are higher."""
    own = "--loss MS --IPC 4 --loss-args base=0.5"
    fold = f"{own} --val-folds 2 --val-fold 0"
    for name, words, results in (
        ("fold", f"{fold} --no-test", {"validation": {"R@1": 0.9}}),
        ("going", fold, None),
        ("ended", fold, {"emoji": {"R@1": 0.5}}),
        ("test", own.replace("0.5", "0.25"), {"emoji": {"R@1": 0.6}}),
    ):
        (tmp_path / name).mkdir()
        asked = options.plain(options.parse_train(words.split()))
        (tmp_path / name / "args.json").write_text(json.dumps(asked))
        (tmp_path / name / "metrics.csv").write_text(ROW)
        if results:
            (tmp_path / name / "results.json").write_text(json.dumps({"results": results}))
    compare(tmp_path, f"--latex {tmp_path / 'r.tex'}")
    lines = {line.name: line for line in collect(tmp_path)}
    data = {name: line.about["data"] for name, line in lines.items()}
    assert data["fold"] == data["going"] == f"{data['test']}, validation"
    assert data["ended"] == data["test"]
    assert [lines[name].final.get("R@1") for name in ("fold", "ended", "test")] == [0.9, None, 0.9]
    assert r"\textbf{60.0}" in (tmp_path / "r.tex").read_text(), "the best of the test classes"
    assert lines["test"].about["differs"] == "no val-fold, loss-args base=0.25"
    assert lines["ended"].about["differs"] == "val-fold 0, val-folds 2, loss-args base=0.5"
    assert "('base'" not in capsys.readouterr().out


def test_compare_counts_a_seed_once_and_a_run_that_has_ended(logs, tmp_path):
    for name, run in (("a", "first"), ("b", "first"), ("c", "second"), ("d", "other")):
        shutil.copytree(logs / run, tmp_path / name)
    (tmp_path / "a" / "results.json").unlink()  # stopped, and then made again
    shutil.copytree(logs / "other", tmp_path / "e")  # the same run twice is no second seed
    (mean,) = [line for line in collect(tmp_path) if line.members]
    assert (mean.name, mean.members) == ("mean of 2 seeds", ("b", "c"))


def test_numbers_that_differ_between_runs_are_charted(tmp_path, capsys):
    for lr, seed in (("1e-4", 1), ("1e-3", 1), ("1e-3", 2)):
        folder = tmp_path / f"{lr}-{seed}"
        folder.mkdir()
        asked = options.parse_train(["--lr", lr, "--seed", str(seed)])
        (folder / "args.json").write_text(json.dumps(vars(asked)))
        (folder / "results.json").write_text(json.dumps(RESULT))
    compare(tmp_path)
    made = (tmp_path / "runs.html").read_text()
    (chart,) = re.findall(r'<svg[^>]*aria-label="lr: [^"]*">.*?</svg>', made)
    assert chart.count("<circle") == 3 and "1e-3-2" in chart
    seeds = re.findall(r'<svg[^>]*aria-label="R@1, percent: each seed[^"]*">.*?</svg>', made)
    assert len(seeds) == 1 and seeds[0].count('class="one"') == 2
    # A part of the runs leaves the page of all as it is.
    compare(tmp_path, "--grep 1e-4")
    assert (tmp_path / "runs.html").read_text() == made
    assert "1e-4" in (tmp_path / "runs-1e-4.html").read_text()
    assert "runs-1e-4.html" in capsys.readouterr().out


def test_compare_tells_groups_of_one_method_apart_and_leaves_out_the_unfinished(tmp_path):
    for pooling, seed in (("avg", 1), ("avg", 2), ("max", 1), ("max", 2), ("max", 3)):
        folder = tmp_path / f"{pooling}{seed}"
        folder.mkdir()
        asked = options.parse_train(["--pooling", pooling, "--seed", str(seed)])
        (folder / "args.json").write_text(json.dumps(vars(asked)))
        if seed < 3:
            (folder / "results.json").write_text(json.dumps(RESULT))
    groups = [line for line in collect(tmp_path) if line.members]
    assert [(line.about["differs"], line.about["seed"], line.members) for line in groups] == [
        ("pooling avg", "1, 2", ("avg1", "avg2")),
        ("pooling max", "1, 2", ("max1", "max2")),
    ]
    single = [line for line in collect(tmp_path) if not line.members]
    assert {line.name: line.about["differs"] for line in single}["max3"] == "pooling max"


def test_compare_costs_what_its_runs_are_and_not_their_square(tmp_path):
    counts = []
    for runs in (10, 20):
        logs = tmp_path / str(runs)
        for seed in range(runs):
            folder = logs / f"{seed:02d}"
            folder.mkdir(parents=True)
            options_ = options.parse_train(["--seed", str(seed), "--lr", str(0.1 + seed % 2)])
            (folder / "args.json").write_text(json.dumps(vars(options_)))
        lines, calls = counted(partial(collect, logs))
        assert [line.about["differs"] for line in lines] == ["lr 0.1", "lr 1.1"] * (runs // 2)
        counts.append(calls)
    assert counts[1] < 2.5 * counts[0]


def test_compare_filters_and_says_what_is_wrong(logs, capsys, tmp_path):
    compare(logs, f"--grep proxy_anchor --out {tmp_path / 'x.html'}")
    said = capsys.readouterr().out
    assert "other" in said and "first" not in said
    for name, asked in (("cafe\u0301", "CAFÉ"), ("café", "cafe\u0301")):  # as Macs put it, or not
        shutil.copytree(logs / "first", tmp_path / name / name)
        compare(tmp_path / name, f"--grep {asked} --out {tmp_path / 'x.html'}")
        assert "caf" in capsys.readouterr().out
    for more, words in (("--grep unicorn", "no run"), ("--grep [", "not a regular expression")):
        with pytest.raises(InputError, match=words):
            compare(logs, more)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no run"):
        collect(tmp_path / "empty")
    with pytest.raises(InputError, match=r"run folder .*gone does not exist"):
        report.main(options.parse_report([str(tmp_path / "gone")]))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", "--compare DIR"),
        ("logs/a --compare logs", "name the run folders"),
        ("logs/a --grep x", "--grep has no effect"),
        ("--compare logs --queries x", "--queries has no effect"),
        ("a b --embeddings e.npz", "of one run"),
        ("a b --picture p.png", "of one run"),
        ("--compare logs --picture p.png", "--picture has no effect"),
    ],
)
def test_commands_that_make_no_sense_are_refused(command, words, capsys):
    assert words in refusal(capsys, options.parse_report, command.split())


# --- in a browser ---------------------------------------------------------------------------------


def opened(browser, file: Path, **context: object) -> tuple[object, list[str]]:
    """The page in a window of its own, and what its console says from now on."""
    window = browser.new_context(**context).new_page()
    said: list[str] = []
    window.on("console", lambda message: said.append(message.text))
    window.on("pageerror", lambda error: said.append(str(error)))
    window.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
    window.on("request", lambda r: r.url.startswith(("file:", "data:")) or said.append(r.url))
    window.goto(file.resolve().as_uri())
    window.wait_for_selector("html[data-ready]", state="attached", timeout=10_000)
    return window, said


@pytest.fixture(scope="module")
def two(logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "two.html"
    return report.make([logs / "first", logs / "second"], out)


@pytest.mark.slow
def test_hover_tabs_and_map_work(browser, page):
    window, said = opened(browser, page, viewport={"width": 1280, "height": 900})
    tip = window.locator("#tip")
    assert tip.is_hidden()
    chart = window.locator("#curves-here .chart .pad").first
    chart.scroll_into_view_if_needed()
    chart.hover()
    assert "epoch" in tip.inner_text() and "R@1" in tip.inner_text()
    rows = window.locator("#galleries-here .row")
    before = rows.first.inner_text()
    worst = window.get_by_role("button", name="Worst", exact=True)
    worst.click()
    assert worst.get_attribute("aria-pressed") == "true"
    assert rows.count() and rows.first.inner_text() != before
    rows.first.locator(".cell").first.hover()
    assert "cosine" in tip.inner_text() and tip.locator("img").count() == 1
    window.locator("#map-here .point").nth(3).scroll_into_view_if_needed()
    box = window.locator("#map-here .point").nth(3).bounding_box()
    window.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert tip.locator("img").count() == 1 and "eval" in tip.inner_text()
    window.mouse.move(2, 2)
    window.get_by_label("find a class").fill("eval1")
    assert window.locator("#map-here .point.on").count() == 3
    first = window.locator("#curves-here svg text").all_inner_texts()
    window.get_by_role("button", name="step", exact=True).click()
    assert window.locator("#curves-here svg text").all_inner_texts() != first
    assert window.locator("img.thumb").first.evaluate("image => image.naturalWidth") > 0
    assert said == []


@pytest.mark.slow
def test_the_tab_key_stops_once_at_a_row_of_pictures(browser, page):
    window, said = opened(browser, page, viewport={"width": 1280, "height": 900})
    rows = window.locator("#galleries-here .row")
    stops = 'row => [...row.querySelectorAll("button.look")].filter(b => b.tabIndex === 0).length'
    assert rows.count() > 1 and all(row.evaluate(stops) == 1 for row in rows.all())
    place = '() => [...document.activeElement.closest(".row").querySelectorAll("button.look")]'
    place += ".indexOf(document.activeElement)"
    pictures = rows.first.locator("button.look")
    pictures.first.focus()
    for key, at in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("Home", 0)):
        window.keyboard.press(key)
        assert window.evaluate(place) == at
    window.keyboard.press("ArrowLeft")  # nothing is before it
    assert window.evaluate(place) == 0
    window.keyboard.press("End")
    assert window.evaluate(place) == pictures.count() - 1
    assert rows.first.evaluate(stops) == 1
    window.keyboard.press("Tab")
    assert rows.first.locator("button.look:focus").count() == 0
    assert said == []


@pytest.mark.slow
def test_runs_are_switched_on_and_off(browser, two):
    window, said = opened(browser, two, viewport={"width": 1280, "height": 900})
    lines = window.locator("#curves-here .chart").first.locator(".series")
    assert lines.count() == 2
    window.locator("[data-toggle='1']").click()
    assert lines.count() == 1
    window.locator("[data-toggle='1']").click()
    assert lines.count() == 2
    before = window.locator("#galleries-here").inner_text()
    window.locator("[data-choose='1']").click()
    assert window.locator("#galleries-here").inner_text() != before
    assert said == []


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_page_fits_the_screen_in_light_and_dark(browser, two, page, width, scheme):
    for file in (page, two):
        size = {"width": width, "height": 800}
        window, said = opened(browser, file, viewport=size, color_scheme=scheme)
        assert window.evaluate("document.documentElement.scrollWidth") <= width
        paper = window.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper))) < 200) == (scheme == "dark")
        window.get_by_role("button", name="light / dark").click()
        assert window.evaluate("getComputedStyle(document.body).backgroundColor") != paper
        assert said == []


@pytest.mark.slow
def test_pages_can_be_printed(browser, page, logs):
    """On A4, from a browser that shows them dark."""
    compare(logs)
    for file in (page, logs / "runs.html"):
        size = {"width": 718, "height": 1000}
        window, said = opened(browser, file, viewport=size, color_scheme="dark")
        window.emulate_media(media="print", color_scheme="dark")
        ink = window.evaluate("getComputedStyle(document.body).color")
        assert sum(map(int, re.findall(r"\d+", ink))) < 200
        assert window.locator("nav, input").locator("visible=true").count() == 0
        assert said == []
        window.context.close()
    window, _ = opened(browser, page, viewport=size)
    window.emulate_media(media="print")
    assert window.locator(".tabs button").locator("visible=true").all_inner_texts() == [
        "epoch",
        "Random",
    ]
    ends = window.locator(".found .cell").evaluate_all(
        "cells => cells.map(cell => cell.getBoundingClientRect().right)"
    )
    assert len(ends) == 80 and max(ends) <= 718, "all ten neighbours are on the paper"


@pytest.mark.slow
def test_the_links_of_a_page_lead_to_its_parts(browser, page, two, logs):
    compare(logs)
    for file, parts in ((page, {"pairs", "map"}), (two, {"pairs"}), (logs / "runs.html", set())):
        window, _ = opened(browser, file)
        links = window.locator("nav a").evaluate_all("links => links.map((a) => a.hash.slice(1))")
        for name in links:
            target = window.locator(f"#{name}")
            assert target.count() == 1 and target.inner_text().strip(), name
        sections = window.locator("main > section[id]").evaluate_all("all => all.map((s) => s.id)")
        assert set(sections) - {"choose"} <= set(links) and parts <= set(links)


@pytest.mark.slow
def test_a_class_called_script_runs_nothing(browser, tmp_path):
    images = tiny.write_images(tmp_path / "data")
    rows = []
    for file in sorted(images.glob("*/*/*.png")):
        split, name = file.parts[-3], file.parts[-2]
        rows.append([str(file), EVIL if name.endswith("0") else f"{name}<b>&", split])
    with (tmp_path / "evil.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "split"], *rows])
    command = ["--dataset", f"csv:{tmp_path / 'evil.csv'}", *tiny.NETWORK, "--loss", "AMLoss"]
    command += ["--epochs", "2", "--warm", "0", "--LOG_DIR", str(tmp_path), "--name", EVIL]
    train.main(options.parse_train(command))
    (folder,) = (path.parent for path in tmp_path.glob("**/args.json"))
    window, said = opened(browser, report.make([folder]))
    assert EVIL in window.locator("body").inner_text()
    assert (
        window.locator("script").count() == 2 and window.locator("#galleries-here b b").count() == 0
    )
    assert said == []


@pytest.mark.slow
def test_table_of_runs_is_sorted_by_a_click(browser, logs, tmp_path):
    for name, copy in (("first", "first"), ("second", "second"), ("other", "other")):
        shutil.copytree(logs / name, tmp_path / copy)
    for name in ("run9", "run10"):
        shutil.copytree(logs / "first", tmp_path / name)
    compare(tmp_path)
    window, said = opened(browser, tmp_path / "runs.html")
    head = window.locator("#runs th", has_text="R@1").first
    button = head.get_by_role("button")
    for order, act in ((True, head.click), (False, lambda: button.press("Enter"))):
        act()
        column = head.evaluate("head => head.cellIndex") + 1
        cells = window.locator(f"#runs td:nth-child({column})").evaluate_all(
            "cells => cells.map(cell => Number(cell.dataset.value))"
        )
        assert cells == sorted(cells, reverse=order)
    names = window.locator("#runs tbody td:first-child")
    for step in (1, -1):
        window.locator("#runs th").first.click()
        assert names.all_inner_texts() == ["first", "other", "run9", "run10", "second"][::step]
    assert said == []


COPIED = """where => {
  const range = document.createRange(), chosen = getSelection();
  range.selectNode(document.querySelector(where));
  chosen.removeAllRanges();
  chosen.addRange(range);
  return chosen.toString();
}"""


@pytest.mark.slow
def test_tables_are_copied_as_numbers_in_rows(browser, page, logs):
    """As a spreadsheet takes them: a head, and one number in a cell."""
    compare(logs)
    for file, where, runs in ((page, "#results", 1), (logs / "runs.html", "#runs", 3)):
        window, _ = opened(browser, file)
        found = window.evaluate(COPIED, f"{where} table").strip("\n").split("\n")
        head, *rows = [line.split("\t") for line in found]
        assert len(rows) == runs and {len(row) for row in rows} == {len(head)}
        for name in ("R@1", "MAP@R", "NMI"):
            assert all(0 <= float(row[head.index(name)]) <= 100 for row in rows)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run whose classes have names as CUB's, and one that never ends."""
    folder = tmp_path_factory.mktemp("odd")
    images = tiny.write_images(folder / "data")
    for split, names in (("train", ""), ("eval", "e")):
        for c in range(8):
            name = "x" * 200 if c == 7 else f"{names}{c}01.Black_throated_Blue_Warbler_in_winter"
            (images / split / f"{split}{c}").rename(images / split / f"{names}{name}")
    return report.make([tiny.run(images, folder, "run", "--loss AMLoss --epochs 2 --warm 0")])


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_long_names_push_no_number_out_of_sight(browser, odd, width):
    window, said = opened(browser, odd, viewport={"width": width, "height": 900})
    assert window.evaluate("document.documentElement.scrollWidth") <= width
    ranked = window.locator("#confusions .scroll, [data-kind='class-values'] .scroll")
    hidden = ranked.evaluate_all("all => all.map((box) => box.scrollWidth - box.clientWidth)")
    assert len(hidden) == 3 and max(hidden) <= (0 if width == 1280 else 140)
    assert hidden[0] == 0
    rows = window.locator(".row").evaluate_all("rows => rows.map((row) => row.offsetHeight)")
    assert max(rows) < 300
    name = window.locator(".row .name bdi[title]").first
    assert name.get_attribute("title") == "e" + "x" * 200 and len(name.inner_text()) < 70
    name.locator("xpath=../..").locator("button").click()
    assert "e" + "x" * 200 in window.locator("#large").inner_text() and said == []


@pytest.mark.slow
def test_colours_of_the_readers_own_show_what_is_chosen(browser, two):
    window, _ = opened(browser, two, forced_colors="active")
    colour = "button => getComputedStyle(button).backgroundColor"
    for where in (".tabs:has([data-across])", "#choose .tabs", "#galleries-here .tabs"):
        buttons = window.locator(f"{where} button")
        colours = [button.evaluate(colour) for button in buttons.all()]
        assert colours[0] not in colours[1:], where
    stroke = "lines => lines.map((line) => getComputedStyle(line).stroke)"
    told = window.locator(".runs line").evaluate_all(stroke)
    lines = window.locator("#curves-here .chart").first.locator(".series")
    assert lines.evaluate_all(stroke) == told and len(set(told)) == 2, "each run has its own"


@pytest.mark.slow
def test_without_javascript_a_page_says_what_is_missing_and_shows_the_rest(browser, page, logs):
    compare(logs)
    for file, missing in ((page, True), (logs / "runs.html", False)):
        window = browser.new_context(java_script_enabled=False).new_page()
        window.goto(file.resolve().as_uri())
        assert ("JavaScript, which is off" in window.locator("header").inner_text()) == missing
        assert window.locator("section").locator("visible=true").count() == (3 if missing else 2)
        assert window.locator("button").locator("visible=true").count() == 0
        window.context.close()


@pytest.mark.slow
def test_keys_and_screen_readers_reach_what_is_seen(browser, page, logs):
    compare(logs)
    for file in (page, logs / "runs.html"):
        window, said = opened(browser, file, viewport={"width": 390, "height": 800})
        heads = window.locator("th")
        assert all(heads.evaluate_all("all => all.map((th) => th.scope && th.innerText.trim())"))
        wide = window.locator(".scroll:not(:has(button))").evaluate_all(
            "all => all.filter((box) => box.scrollWidth > box.clientWidth)"
            ".map((box) => [box.tabIndex, box.role, box.ariaLabel])"
        )
        assert wide and all(found[:2] == [0, "region"] and found[2] for found in wide)
        links = window.locator("nav a").evaluate_all("all => all.map((a) => a.offsetHeight)")
        assert min(links) >= 24 and said == []
        box = window.locator(".scroll:not(:has(button))").last
        box.evaluate("box => { box.scrollLeft = 500; }")
        first = box.locator("tbody td").first
        assert first.bounding_box()["x"] == pytest.approx(box.bounding_box()["x"] + 14, abs=1)
    window, _ = opened(browser, page)
    chart = window.locator("#curves-here svg").first.get_attribute("aria-label")
    assert re.fullmatch(r"R@1, %\. from [\d.]+ at epoch 1 to [\d.]+ at epoch 2", chart)
    courses = window.locator(".chart", has_text="how the margins moved")
    legend = courses.locator(".legend").inner_text()
    assert {"median", "smallest", "largest"} <= set(legend.split()) and "train0" in legend


@pytest.fixture(scope="module")
def long(logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose metrics.csv says that it had 36 epochs and a cosine that ends at nothing."""
    folder = tmp_path_factory.mktemp("long") / "run"
    shutil.copytree(logs / "first", folder)
    (folder / "checksums.json").unlink(missing_ok=True)
    rows = []
    for epoch in range(1, 37):
        rate = 5e-4 * (1 + math.cos(math.pi * epoch / 36)) + 1e-12
        row = {"epoch": epoch, "loss": 20 / epoch, "margin": 6.3 + epoch / 1e4, "step": 4 * epoch}
        rows.append({**row, "seconds": epoch, "lr head": rate, "R@1": 0.29812 + epoch / 4e5})
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return report.make([folder])


def chart(window, title: str):
    return window.locator(".chart", has=window.locator("figcaption b", has_text=title)).first


@pytest.mark.slow
def test_axes_have_round_numbers_that_tell_values_apart(browser, long):
    window, said = opened(browser, long, viewport={"width": 1280, "height": 900})
    for title in ("R@1, %", "loss", "proxy-proxy term"):
        for axis in ("x", "y"):
            texts = chart(window, title).locator(f".tick.{axis}").all_text_contents()
            marks = [float(text.replace(",", "")) for text in texts]
            assert 3 <= len(marks) == len(set(texts)), (title, axis, texts)
            steps = np.diff(marks)
            assert steps == pytest.approx([steps[0]] * len(steps))
            assert abs(steps[0]) / 10 ** math.floor(math.log10(abs(steps[0]) * 1.0001)) == (
                pytest.approx(1) if f"{abs(steps[0]):e}"[0] == "1" else pytest.approx(2, abs=3.01)
            )
            if axis == "x":
                assert all(mark == int(mark) for mark in marks)
    titles = window.locator("#curves-here figcaption b").all_inner_texts()
    assert "margin" not in titles, "the term of the loss is not called what the classes learn"
    assert said == []


@pytest.mark.slow
def test_the_last_point_does_not_ruin_a_logarithmic_axis(browser, long):
    window, said = opened(browser, long, viewport={"width": 1280, "height": 900})
    window.locator("summary", has_text="Learning rates").click()
    rates = chart(window, "lr head")
    heights = [
        float(place.split(",")[1])
        for place in rates.locator(".series").get_attribute("points").split()
    ]
    whole = max(heights) - min(heights)
    assert heights[17] - heights[0] > 0.05 * whole, "half of the way down is seen"
    assert heights[-1] == max(heights) and rates.locator(".beneath").count() == 1
    assert len(rates.locator(".tick.y").all_text_contents()) >= 3
    assert said == []


@pytest.mark.slow
def test_pictures_open_large_by_click_and_keyboard(browser, page):
    window, said = opened(browser, page, viewport={"width": 1280, "height": 900})
    box, first = window.locator("#large"), window.locator("#galleries-here .look").first
    first.click()
    assert box.evaluate("box => box.open") and "the query" in box.inner_text()
    assert "1 of 11" in box.inner_text() and "eval/" not in box.inner_text().split()[0]
    assert box.locator("img").bounding_box()["width"] > 300
    window.keyboard.press("ArrowRight")
    assert "2 of 11" in box.inner_text() and "cosine" in box.inner_text()
    window.keyboard.press("ArrowLeft")
    window.keyboard.press("ArrowLeft")
    assert "11 of 11" in box.inner_text()
    window.keyboard.press("Escape")
    assert not box.evaluate("box => box.open")
    assert first.evaluate("button => button === document.activeElement"), "one is where one was"
    window.keyboard.press("Enter")
    assert box.evaluate("box => box.open")
    box.get_by_role("button", name="close", exact=True).click()
    window.locator("#confusions-here .look").first.click()
    window.mouse.click(5, 5)  # beside it
    assert not box.evaluate("box => box.open") and said == []


@pytest.mark.slow
def test_a_picture_opens_and_closes_on_a_phone(browser, page):
    window, said = opened(
        browser, page, viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True
    )
    window.locator("#galleries-here .look").first.tap()
    box = window.locator("#large")
    place = box.bounding_box()
    assert place["x"] >= 0 and place["x"] + place["width"] <= 390 and place["height"] <= 800
    box.get_by_role("button", name="next picture").tap()
    assert "2 of 11" in box.inner_text()
    box.get_by_role("button", name="close", exact=True).tap()
    assert not box.evaluate("box => box.open") and said == []


def spread(window) -> float:
    """How far the points of the map lie apart, in pixels."""
    return window.locator("#map-here .point").evaluate_all(
        "dots => { const x = dots.map((d) => Number(d.getAttribute('cx')));"
        " return Math.max(...x) - Math.min(...x); }"
    )


@pytest.mark.slow
def test_the_map_zooms_moves_and_shows_pictures(browser, page):
    window, said = opened(browser, page, viewport={"width": 1280, "height": 900})
    area = window.locator("#map-here svg.map")
    area.scroll_into_view_if_needed()
    before, box = spread(window), area.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    window.mouse.move(*middle)
    window.mouse.move(middle[0] + 3, middle[1])
    window.mouse.wheel(0, -200)
    window.wait_for_function("document.querySelectorAll('#map-here .card-of').length > 0")
    assert spread(window) > 1.2 * before
    dot = window.locator("#map-here .point").first
    at = float(dot.get_attribute("cx"))
    window.mouse.down()
    window.mouse.move(middle[0] + 53, middle[1], steps=5)
    window.mouse.up()
    assert float(dot.get_attribute("cx")) == pytest.approx(at + 50, abs=8)
    assert not window.locator("#large").evaluate("box => box.open"), "a drag is no click"
    window.get_by_role("button", name="the whole map").click()
    assert spread(window) == pytest.approx(before)
    for act in ("zoom in", "zoom out"):
        window.get_by_role("button", name=act, exact=True).click()
        assert (spread(window) > 1.2 * before) == (act == "zoom in")
    area.focus()
    window.keyboard.press("+")
    zoomed = spread(window)
    assert zoomed > 1.2 * before
    at = float(dot.get_attribute("cx"))
    window.keyboard.press("ArrowRight")
    assert float(dot.get_attribute("cx")) != at
    window.keyboard.press("0")
    assert spread(window) == pytest.approx(before) and said == []


@pytest.mark.slow
def test_the_map_shows_errors_and_finds_parts_of_names(browser, page):
    window, said = opened(browser, page, viewport={"width": 1280, "height": 900})
    (run,) = data_of(page)["runs"]
    errors = window.locator("#map-here [data-errors]")
    assert f"({len(run['map']['wrong'])})" in errors.inner_text() and run["map"]["wrong"]
    errors.click()
    assert window.locator("#map-here .point.on.bad").count() == len(run["map"]["wrong"])
    errors.click()
    window.get_by_label("find a class").fill("VAL")
    assert "8 of 8 classes, 24 images" in window.locator("#map-here").inner_text()
    points = np.array([point[:3] for point in run["map"]["points"]])
    extents = [np.ptp(points[points[:, 2] == label, :2], axis=0).max() for label in range(8)]
    near = run["map"]["names"][int(np.argmin(extents))]
    window.get_by_label("find a class").fill(near[1:].upper())
    own = window.locator("#map-here .point.on")
    assert own.count() == 3
    before = spread(window)
    window.keyboard.press("Enter")
    assert spread(window) > before, "goes there"
    inside = own.evaluate_all(
        "dots => dots.every((d) => { const box = d.ownerSVGElement.viewBox.baseVal,"
        " x = Number(d.getAttribute('cx')), y = Number(d.getAttribute('cy'));"
        " return x > 0 && y > 0 && x < box.width && y < box.height; })"
    )
    assert inside
    window.get_by_label("find a class").fill("unicorn")
    assert "no class on the map" in window.locator("#map-here").inner_text() and said == []


@pytest.mark.slow
def test_the_map_is_pinched_on_a_phone(browser, page):
    window, said = opened(
        browser, page, viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True
    )
    area = window.locator("#map-here svg.map")
    area.scroll_into_view_if_needed()
    before, box = spread(window), area.bounding_box()
    touch = window.context.new_cdp_session(window)
    x, y = box["x"] + box["width"] / 2, box["y"] + min(150, box["height"] / 2)
    for kind, apart in (("Start", 40), ("Move", 60), ("Move", 90), ("Move", 120), ("End", None)):
        fingers = [] if apart is None else [(x - apart / 2, y, 0), (x + apart / 2, y, 1)]
        points = [{"x": px, "y": py, "id": name} for px, py, name in fingers]
        touch.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})
    assert spread(window) > 1.5 * before and said == []


BROKEN_WORDS = """() => {
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walk.nextNode());) {
    const around = node.parentElement;
    if (!around.getClientRects().length || around.closest("script, pre")) continue;
    for (const word of node.data.matchAll(/[^\\s\\/_-]{2,24}/g)) {
      const range = document.createRange();
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      const tops = new Set([...range.getClientRects()].map((r) => Math.round(r.top)));
      if (tops.size > 1) found.push(word[0]);
    }
  }
  return found;
}"""


@pytest.mark.slow
def test_no_word_and_no_flag_is_broken_at_390_pixels(browser, page, two, logs, tmp_path):
    compare(logs, f"--out {tmp_path / 'runs.html'}")
    for file in (page, two, tmp_path / "runs.html"):
        window, _ = opened(browser, file, viewport={"width": 390, "height": 800})
        assert window.evaluate("document.documentElement.scrollWidth") <= 390
        folder = str(logs)  # a path of pytest's own may be longer than a line
        assert [w for w in window.evaluate(BROKEN_WORDS) if w not in folder] == []
        lines = window.locator(".flag").evaluate_all("f => f.map((e) => e.getClientRects().length)")
        assert set(lines) <= {1}


# --- size -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_page_of_sop_size_stays_small():
    content = sop.synthetic_page(sop.stand_in(), queries=60502, classes=11316, epochs=60)
    assert len(content.encode()) < 5_000_000
    assert "of the 60,502 queries" in content and "of the 60,502 images" in content


def test_compare_lists_runs_of_another_version_and_leaves_out_damaged_ones(
    logs, tmp_path, capsys, caplog
):
    shutil.copytree(logs / "first", tmp_path / "first")
    shutil.copytree(logs / "other", tmp_path / "later")
    later = {"loss": "OfAnotherVersion", "dataset": "moon", "model": "net9", "its_weight": 3.0}
    tiny.edit(tmp_path / "later" / "args.json", **later)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "args.json").write_text("{")
    compare(tmp_path)
    shown = capsys.readouterr().out
    assert "first" in shown and "OfAnotherVersion" in shown and "net9" in shown
    assert "damaged is left out" in caplog.text


def test_a_seed_with_tensorboard_is_averaged_with_one_without(logs, tmp_path, capsys):
    for name, seed, tensorboard in (("a", 1, False), ("b", 2, True)):
        shutil.copytree(logs / "first", tmp_path / name)
        changed = {"seed": seed, "tensorboard": tensorboard, "name": name}
        tiny.edit(tmp_path / name / "args.json", **changed)
    compare(tmp_path)
    assert "mean of 2 seeds" in capsys.readouterr().out

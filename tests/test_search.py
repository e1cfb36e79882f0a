"""search.py and index/: what is nearest, what an index keeps, and what it survives."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, BinaryIO

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, counted, refusal, run_cli, run_code
from PIL import Image

import search
from dataset.files import composed
from evaluation.inference import load_run
from evaluation.thresholds import Found, Rate, Thresholds
from index import (
    Entry,
    Index,
    adding,
    codes,
    graph,
    journal,
    making,
    pictures,
    sources,
)
from index.asking import Answer, Hit, ask
from index.duplicates import pairs_above
from index.entries import entry_arrays
from index.known import File, Known
from index.reordering import best
from net import hub
from options import searching
from options.ranking import Ranking
from utils import DamagedError, InputError

pytestmark = pytest.mark.usefixtures("one_thread")


# --- indexes without a network --------------------------------------------------------------------


def unit(count: int, size: int = 16, seed: int = 0) -> np.ndarray:
    """Random unit vectors (count, size)."""
    vectors = np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def begin(path: Path, size: int = 16, kind: str = "none") -> Path:
    """An index of no network's."""
    journal.create(path)
    about = {"kind": "network", "made": path.name, "size": size, "codes": kind, "folder": "/"}
    with journal.writing(path) as writer:
        writer.add({**about, "run": "r", "model": "m", "fingerprint": "f", "weights": None}, {})
    return path


def put(writer: journal.Writer, vectors: np.ndarray, first: int = 0, **more: np.ndarray) -> None:
    """Adds vectors as images that are called by their numbers, from `first` on."""
    folder = str(writer.path.parent)
    entries = [
        SimpleNamespace(id=str(n), path=f"{folder}/{n}.png", label=str(n % 3) if n % 4 else None)
        for n in range(first, first + len(vectors))
    ]
    index = Index.open(writer.path)
    arrays = {
        "vectors": vectors,
        **entry_arrays(entries, folder),
        "contents": np.zeros((len(vectors), 16), np.uint8),
        "stamps": np.zeros((len(vectors), 2), np.int64),
        **more,
    }
    if (kind := index.about["codes"]) != "none":
        centre = vectors.mean(axis=0) if index.centre is None else index.centre
        arrays |= {**codes.as_arrays(kind, vectors, centre), "centre": centre}
    writer.add({"folder": folder}, arrays)


def filled(path: Path, vectors: np.ndarray, parts: int = 1, kind: str = "none") -> Path:
    """An index of some vectors, added in so many parts."""
    begin(path, vectors.shape[1], kind)
    with journal.writing(path) as writer:
        first = 0
        for part in np.array_split(vectors, parts):
            put(writer, part, first)
            first += len(part)
    return path


def removed(path: Path, numbers: list[int]) -> None:
    with journal.writing(path) as writer:
        writer.add({}, {"removed": np.array(numbers, np.int64)})


def plain_search(
    vectors: np.ndarray, queries: np.ndarray, top: int, live: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and cosines by sorting all of them in float64; of equal ones the first row first."""
    cosines = (queries.astype(np.float64) @ vectors.T.astype(np.float64)).astype(np.float32)
    if live is not None:
        cosines[:, ~live] = -np.inf
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :top]
    return order, np.take_along_axis(cosines, order, axis=1)


# --- what is nearest ------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 7])
def test_an_exact_search_is_a_sort(tmp_path: Path, parts: int) -> None:
    vectors, queries = unit(3000), unit(70, seed=1)
    index = Index.open(filled(tmp_path / "i", vectors, parts))
    rows, cosines = plain_search(vectors, queries, 12)
    found = index.search(3 * queries, 12)
    assert (found.rows == rows).all() and np.allclose(found.scores, cosines, atol=1e-6)
    assert (len(index), index.size) == (3000, 16)
    assert (index.embedding(2999) == vectors[2999]).all()


def test_equal_images_come_by_row_however_many_are_asked_at_once(tmp_path: Path) -> None:
    vectors = unit(400)
    vectors[5:390:3] = vectors[5]  # more of them than are kept as candidates
    index = Index.open(filled(tmp_path / "i", vectors, 5))
    alone = index.search(vectors[5:6], 40)
    together = index.search(np.concatenate([unit(99, seed=2), vectors[5:6]]), 40)
    assert alone.rows[0].tolist() == list(range(5, 125, 3)) == together.rows[-1].tolist()
    assert np.unique(alone.scores).size == 1


def test_no_cosine_is_beyond_one(tmp_path: Path) -> None:
    vectors = unit(300, 16)
    path = filled(tmp_path / "i.index", np.concatenate([vectors, vectors]))
    index = Index.open(path)
    scores = index.search(vectors, 2).scores
    products = np.einsum("nd,nd->n", vectors.astype(np.float64), vectors).astype(np.float32)
    assert products.max() > 1 and scores.max() == 1
    assert pairs_above(index, 0.9).cosines.max() <= 1
    found = best(index, vectors[products.argmax()], 1, (), Ranking(None, None, None))
    assert found[0][1] <= 1


def test_a_search_for_more_than_there_is_says_nothing_of_the_rest(tmp_path: Path) -> None:
    index = Index.open(filled(tmp_path / "i", unit(3)))
    found = index.search(unit(2, seed=1), 5)
    assert (found.rows[:, 3:] == -1).all() and (found.rows[:, :3] >= 0).all()
    assert np.isneginf(found.scores[:, 3:]).all()
    removed(tmp_path / "i", [0, 1, 2])
    assert (Index.open(tmp_path / "i").search(unit(2), 5).rows == -1).all()
    with pytest.raises(InputError, match="holds embeddings of 16 numbers"):
        index.search(unit(2, 8))


def test_what_was_removed_is_not_found_and_leaves_no_gap(tmp_path: Path) -> None:
    vectors, queries = unit(900), unit(9, seed=1)
    gone = list(range(0, 900, 4))
    path = filled(tmp_path / "i", vectors, 3)
    before = Index.open(path)
    removed(path, gone)
    live = np.ones(900, bool)
    live[gone] = False
    index = Index.open(path)
    rows, _ = plain_search(vectors[live], queries, 10)
    assert (index.search(queries, 10).rows == rows).all()
    assert [index.id(row) for row in range(4)] == ["1", "2", "3", "5"] and index.row("5") == 3
    with pytest.raises(InputError, match="no image with the id 4"):
        index.row("4")
    # One that was open sees what it saw, until it is asked to look again.
    assert len(before) == 900 and not before.is_current
    before.refresh()
    assert len(before) == 675 and before.is_current


@pytest.mark.parametrize(("kind", "share"), [("int8", 1.0), ("binary", 0.98)])
def test_codes_find_what_an_exact_search_finds(tmp_path: Path, kind: str, share: float) -> None:
    centres = unit(100, 64)
    vectors = (centres.repeat(30, 0) + 0.4 * unit(3000, 64, 1)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = (centres + 0.4 * unit(100, 64, 2)).astype(np.float32)
    path = filled(tmp_path / "i", vectors, 3, kind)
    with journal.writing(path) as writer:  # small records are put together in memory
        put(writer, vectors[:5], 3000)
        put(writer, vectors[5:9], 3005)
    removed(path, [7, 2999])
    coded, exact = Index.open(path), Index.open(path, exact=True)
    assert (coded.codes, exact.codes) == (kind, "none")
    found, wanted = coded.search(queries, 10), exact.search(queries, 10)
    agree = [len(set(a) & set(b)) / 10 for a, b in zip(found.rows, wanted.rows, strict=True)]
    assert np.mean(agree) >= share
    same = found.rows == wanted.rows
    assert (found.scores[same] == wanted.scores[same]).all()  # scored exactly
    few = np.array([0, 999, 7])  # read from the file, as they are scored
    assert (coded.blocks()[0].taken(few) == vectors[few]).all()
    size = {"int8": 64, "binary": 8}[kind]
    assert coded.segments[0].record.arrays["codes"].nbytes == size * 1000


@pytest.mark.parametrize("kind", ["none", *codes.CODINGS])
def test_a_program_hears_no_remarks_on_arrays_that_lie_in_a_file(tmp_path: Path, kind: str) -> None:
    index = Index.open(filled(tmp_path / "i", unit(3000, 64), 1, kind))
    before = list(warnings.filters)
    torch.set_warn_always(True)  # or torch says it once in a process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            index.search(unit(3, 64), 10)
            pairs_above(index, 0.9)
    finally:
        torch.set_warn_always(False)
    assert warnings.filters == before


def test_bits_are_counted_alike_by_an_old_numpy() -> None:
    words = np.random.default_rng(0).integers(0, 2**64, 500, np.uint64)
    counted = [bin(word).count("1") for word in words.tolist()]
    assert codes.bits_by_table(words).tolist() == counted == codes.bits_in(words).tolist()


def test_rows_are_found_by_the_content_of_their_files(tmp_path: Path) -> None:
    contents = np.random.default_rng(0).integers(2, size=(300, 16), dtype=np.uint8)
    contents[:, 1:-2] = 0  # alike in most
    with journal.writing(begin(tmp_path / "i")) as writer:
        put(writer, unit(200), contents=contents[:200])
        put(writer, unit(100), 200, contents=contents[200:])
    for gone in ([], [3, 50, 299]):
        removed(tmp_path / "i", gone)
        index, live = Index.open(tmp_path / "i"), np.delete(contents, gone, axis=0)
        for content in np.unique(contents, axis=0):
            rows = set(np.flatnonzero((live == content).all(axis=1)).tolist())
            assert index.rows_with(content.tobytes()) == rows != set()
        assert index.rows_with(bytes([2] * 16)) == index.rows_with(bytes([0] * 15 + [9])) == set()


def known_by(index: Index) -> Iterator[tuple[int, str, str, bytes]]:
    """Number, id, path and checksum of each image."""
    for number in index.numbers().tolist():
        entry = index.entry_of(number)
        yield number, entry.id, entry.path, index.contents()[number].tobytes()


@pytest.mark.parametrize("moved", [False, True])
def test_images_are_known_by_id_path_and_content(moved: bool, tmp_path: Path) -> None:
    """Whatever they are called, from wherever they were added, and after some have gone."""
    folder = tmp_path / "elsewhere" if moved else tmp_path
    names = ["a.jpg", "a.jpg.jpg", "ä/ö.jpg", "a\u0308.jpg", "日本.jpg", "x" * 200, "../b.jpg", "b"]
    names += [f"class/{number}.jpg" for number in range(40)] + ["\udcff.jpg"]
    photos = [
        sources.Photo(str((folder / name).resolve()), composed(f"id {name}")) for name in names
    ]
    rng = np.random.default_rng(0)
    begin(tmp_path / "i")
    with journal.writing(tmp_path / "i") as writer:
        for part in (photos[:9], photos[9:]):
            arrays = {
                "vectors": unit(len(part)),
                **entry_arrays(part, str(folder)),
                "contents": rng.integers(0, 256, (len(part), 16)).astype(np.uint8),
                "stamps": rng.integers(1, 99, (len(part), 2)),
            }
            writer.add({"folder": str(folder)}, arrays)
    removed(tmp_path / "i", [3, 20])
    index = Index.open(tmp_path / "i")
    known = Known(index)
    assert len(index) == len(names) - 2
    for number, id, path, content in known_by(index):
        assert known.with_id(id) == known.at(path) == number
        assert known.with_content(content) == [number]
        assert known.file(number) == File(tuple(index.stamps()[number].tolist()), content)
    for gone in (3, 20):
        assert known.with_id(photos[gone].id) is known.at(photos[gone].path) is None
    assert known.with_id("id c") is known.at("/nowhere") is None and not known.with_content(
        b"0" * 16
    )
    number, id, path, content = next(known_by(index))
    file = known.drop(number)
    assert known.with_id(id) is known.at(path) is None and not known.with_content(content)
    known.take(number, file)
    assert known.with_id(id) == known.at(path) == number and known.file(number) == file
    assert known.with_content(content) == [number]


def test_who_adds_one_image_does_not_look_at_each_that_is_there(tmp_path: Path) -> None:
    """With a million it took nine seconds, and a gigabyte."""
    index = Index.open(filled(tmp_path / "i", unit(20_000, 4)))
    known, calls = counted(lambda: Known(index))
    assert known.with_id(index.id(19_999)) == 19_999 and calls < 2_000


def test_many_images_are_removed_by_name_at_once(tmp_path: Path) -> None:
    with journal.writing(begin(tmp_path / "i", 1)) as writer:
        put(writer, np.ones((20_000, 1), np.float32))
    names = [str(n) for n in range(0, 20_000, 5)] + [f"{tmp_path}/{n}.png" for n in range(99)]
    began = time.process_time()
    gone = making.remove(tmp_path / "i", names)
    assert len(gone) == 4000 + 99 - 20
    assert time.process_time() - began < 4  # and not the time of comparing each with each
    assert len(making.remove(tmp_path / "i", [str(tmp_path)])) == 20_000 - len(gone)


def test_pairs_of_an_index(tmp_path: Path) -> None:
    vectors = unit(300, 64)
    vectors[200] = vectors[20]
    vectors[299] = vectors[20]
    vectors[7] = vectors[100]
    path = filled(tmp_path / "i", vectors, 2)
    pairs = pairs_above(Index.open(path), 0.9)
    assert list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)) == [
        (7, 100), (20, 200), (20, 299), (200, 299),
    ]  # fmt: skip
    assert pairs.groups(300) == [[20, 200, 299], [7, 100]]
    cosines = (vectors @ vectors.T)[np.triu_indices(300, 1)]
    assert len(pairs_above(Index.open(path), 0.2).cosines) == (cosines >= 0.2).sum()


def test_pairs_that_are_equal_reach_a_cosine_of_one(tmp_path: Path) -> None:
    vectors = unit(300, 64)
    path = filled(tmp_path / "i", np.concatenate([vectors, vectors]))
    own = np.einsum("nd,nd->n", vectors.astype(np.float64), vectors)
    assert (own < 1).sum() > 50  # by rounding
    pairs = pairs_above(Index.open(path), 1.0)
    assert sorted(pairs.first.tolist()) == list(range(300))
    assert (pairs.second - pairs.first == 300).all()


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_an_index_without_images_is_no_trouble(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = filled(tmp_path / "i", unit(3), kind=kind)
    removed(path, [0, 1, 2])
    for _ in range(2):
        assert "0 pairs among 0 images" in said_by(f"duplicates {path} --json {path}.json", capsys)
        assert "holds no images to make a graph of" in refusal_of(f"approximate {path}", capsys)
        said = said_by(f"info {path} --json {path}.json", capsys)
        assert "0 images" not in said and "worth it" not in said
        assert json.loads(Path(f"{path}.json").read_text())["approximate_from"] is None
        command(f"compact {path}")
    assert Index.open(path).added == 0


@pytest.mark.parametrize("name", ["-", "stdout", "pipe"])
def test_answers_take_the_place_of_no_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    filled(tmp_path / "i", unit(3))
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("stdout").symlink_to("/proc/self/fd/1")  # as /dev/stdout is
    before = sorted(Path().iterdir())
    assert f"--json: {name} is not a regular file" in refusal_of(f"info i --json {name}", capsys)
    assert sorted(Path().iterdir()) == before and Path("stdout").is_symlink()


def test_a_sheet_is_not_called_what_it_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = filled(tmp_path / "i", unit(3))
    said = refusal_of(f"query {path} {tmp_path}/0.png --picture {tmp_path}/o.pdf", capsys)
    assert "o.pdf is drawn as PNG; give it the ending .png" in said


def test_an_index_is_not_written_over_by_what_is_said_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = filled(tmp_path / "i", unit(3))
    before = path.read_bytes()
    (tmp_path / "a.png").write_bytes(b"a picture")
    asked = f"query {path} {tmp_path}/a.png"
    for words in (
        f"info {path} --json {path}",
        f"duplicates {path} --json {tmp_path}/../{tmp_path.name}/i",
        f"{asked} --json {path}",
        f"{asked} --picture {path}",
        f"{asked} --picture {tmp_path}/a.png",
    ):
        assert "would overwrite" in refusal_of(words, capsys), words
    said = refusal_of(f"{asked} --picture {tmp_path}/x --json {tmp_path}/x", capsys)
    assert "--json and --picture both name" in said
    assert path.read_bytes() == before and (tmp_path / "a.png").read_bytes() == b"a picture"


def test_a_graph_is_not_written_over_by_what_is_said_of_its_index(
    graphed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = searching.graph_of(graphed)
    before = file.read_bytes()
    assert "would overwrite" in refusal_of(f"info {graphed} --json {file}", capsys)
    said = refusal_of(f"build run --images {graphed.parent} --index {file} --overwrite", capsys)
    assert "is the graph of an index, not an index" in said
    assert file.read_bytes() == before


def test_what_is_no_graph_stays_where_one_would_stand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("usearch")
    index = filled(tmp_path / "i", unit(30))
    place = searching.graph_of(index)
    for make in (place.mkdir, lambda: filled(place, unit(5)), lambda: place.write_text("words")):
        make()
        before = place.is_file() and place.read_bytes()
        for words in (
            f"approximate {index}",
            f"compact {index}",
            f"build run --images {tmp_path} --index {index} --overwrite",
        ):
            assert "is not a graph that can be read here" in refusal_of(words, capsys), words
        caplog.clear()
        assert Index.open(index).search(unit(1), 1).rows[0, 0] == 0
        assert "the search is exact" in caplog.text and "move it away" in caplog.text
        assert (place.is_file() and place.read_bytes()) == before
        shutil.rmtree(place) if place.is_dir() else place.unlink()


def test_a_sheet_tells_a_damaged_file_from_one_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    damaged, gone = (
        pictures.sheet([Answer("", [Hit(Entry("1", str(tmp_path / name), None), 0.5, False)])])
        for name in ("a.png", "b.png")
    )
    assert damaged.tobytes() != gone.tobytes()


def sheet_of(label: str) -> bytes:
    hit = Hit(Entry("1", "nowhere.png", label), 0.5, False)
    return pictures.sheet([Answer("", [hit])]).tobytes()


def test_a_sheet_writes_labels_of_any_script() -> None:
    for one, other in (("日本", "本日"), ("зелёный", "красный"), ("résumé", "rèsùmè")):
        assert sheet_of(one) != sheet_of(other), one


def test_a_sheet_that_nothing_opens_is_refused() -> None:
    hits = [Hit(Entry("1", "nowhere.png", None), 0.5, False)] * 200
    with pytest.raises(InputError, match=r"600 queries with 200 images each .* fewer of either"):
        pictures.sheet([Answer("", hits)] * 600)


# --- the graph ------------------------------------------------------------------------------------


@pytest.fixture
def graphed(tmp_path: Path) -> Path:
    pytest.importorskip("usearch")
    path = filled(tmp_path / "i", unit(2000), 2)
    making.approximate(path)
    return path


def test_a_graph_finds_what_an_exact_search_finds(graphed: Path) -> None:
    with journal.writing(graphed) as writer:
        put(writer, unit(40, seed=5), 2000)  # not in the graph, and found all the same
    removed(graphed, list(range(0, 2000, 2)))
    index, exact = Index.open(graphed), Index.open(graphed, exact=True)
    assert index.graph.covers == 2000 and exact.graph is None
    queries = unit(60, seed=1)
    found, wanted = index.search(queries, 10), exact.search(queries, 10)
    agree = [len(set(a) & set(b)) / 10 for a, b in zip(found.rows, wanted.rows, strict=True)]
    assert np.mean(agree) > 0.95
    mine = index.search(unit(40, seed=5), 1)
    assert mine.rows[:, 0].tolist() == list(range(1000, 1040))
    making.approximate(graphed)
    assert Index.open(graphed).graph.covers == 2040


def test_many_hits_do_not_have_a_graph_look_at_everything() -> None:
    class Found:  # as usearch's, of a million images
        def search(self, queries: np.ndarray, count: int, threads: int) -> SimpleNamespace:
            return SimpleNamespace(keys=np.zeros((len(queries), count), np.uint64))

    found = Found()
    for asked, nodes in ((64, 1024), (800, 12_800), (4000, 16_384), (40_000, 40_000)):
        numbers = graph.Graph(found, 1_000_000).candidates(unit(1), asked)
        assert numbers.shape == (1, asked) and found.expansion_search == nodes


def test_a_graph_that_comes_or_goes_meanwhile_is_noticed(graphed: Path) -> None:
    file = searching.graph_of(graphed)
    kept = file.rename(file.with_name("kept"))
    index = Index.open(graphed)
    assert index.graph is None and index.is_current
    kept.rename(file)
    assert not index.is_current
    index.refresh()
    assert index.graph is not None and index.is_current
    file.unlink()
    assert not index.is_current


def test_a_graph_is_not_taken_for_its_index(graphed: Path) -> None:
    with pytest.raises(InputError, match=r"graph of an index.*give the index itself"):
        Index.open(searching.graph_of(graphed))


def test_a_graph_finds_enough_where_a_whole_neighbourhood_was_removed(tmp_path: Path) -> None:
    pytest.importorskip("usearch")
    vectors = unit(600)
    near = vectors[:1] + 0.01 * unit(300, seed=1)  # as in a folder of one thing
    vectors[:300] = near / np.linalg.norm(near, axis=1, keepdims=True)
    path = filled(tmp_path / "i", vectors)
    making.approximate(path)
    removed(path, list(range(300)))
    index, exact = Index.open(path), Index.open(path, exact=True)
    assert index.graph is not None
    for top in (10, 400):
        for found, wanted in zip(
            index.search(vectors[:3], top), exact.search(vectors[:3], top), strict=True
        ):
            assert (found == wanted).all()


def test_a_graph_that_cannot_be_used_is_left_aside_and_named(
    graphed: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = filled(graphed.with_name("other"), unit(30))
    assert Index.open(other).graph is None  # it has none, and nothing is said
    assert not caplog.records
    file = searching.graph_of(graphed)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert Index.open(graphed).graph is None and "the search is exact" in caplog.text
    assert f"is damaged; make it again with python search.py approximate {graphed}" in caplog.text
    assert Index.open(graphed).search(unit(1), 1).rows[0, 0] == 0
    caplog.clear()
    making.approximate(graphed)
    assert Index.open(graphed).graph.covers == 2000 and not caplog.records
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    with pytest.raises(InputError, match="needs the package usearch"):
        making.approximate(graphed)


# --- what the file survives -----------------------------------------------------------------------


class Recorder:
    """A file that notes everything that is done to it."""

    def __init__(self, file: BinaryIO, done: list[tuple]) -> None:
        self.file, self.done = file, done

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def seek(self, place: int) -> None:
        self.place = place

    def write(self, content: memoryview) -> int:
        self.done.append(("write", self.place, bytes(content)))
        self.place += len(content)
        self.file.seek(self.place - len(content))
        return self.file.write(content)

    def truncate(self, size: int) -> None:
        self.done.append(("truncate", size))
        self.file.truncate(size)

    def fileno(self) -> int:
        return self.file.fileno()


def replayed(start: bytes, steps: list[tuple]) -> bytes:
    """A file after some of what was done to it."""
    content = bytearray(start)
    for step in steps:
        if step[0] == "write":
            content.extend(bytes(max(0, step[1] - len(content))))
            content[step[1] : step[1] + len(step[2])] = step[2]
        elif step[0] == "truncate":
            del content[step[1] :]
            content.extend(bytes(step[1] - len(content)))
    return bytes(content)


def halves(step: tuple) -> Iterator[list[tuple]]:
    """A step, not done, half done and done; the mark is one sector, which is done or not."""
    yield []
    if step[0] == "write" and step[1] > 0:
        yield [("write", step[1], step[2][: len(step[2]) // 2])]
    yield [step]


def test_cut_off_at_any_step_an_index_is_as_before_or_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filled(tmp_path / "i", unit(20), kind="int8")
    before, done = path.read_bytes(), []
    opened, sync = Path.open, os.fsync

    def recorded(place: Path, mode: str = "r", *given: Any, **more: Any) -> Any:
        file = opened(place, mode, *given, **more)
        return Recorder(file, done) if place == path and "+" in mode else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", recorded)
        patch.setattr(os, "fsync", lambda file: done.append(("sync",)) or sync(file))
        with journal.writing(path) as writer:
            put(writer, unit(5, seed=3), 20, removed=np.array([3, 4], np.int64))
    assert len(Index.open(path)) == 23
    # The disk has the record before the mark counts it.
    kinds = [step[0] if step[:2] != ("write", 0) else "mark" for step in done]
    assert kinds.index("sync") < kinds.index("mark") < len(kinds) - 1 and kinds[-1] == "sync"
    seen = set()
    for count, step in enumerate(done):
        for part in halves(step):
            path.write_bytes(replayed(before, done[:count] + part))
            index = Index.open(path)
            index.check()
            seen.add(len(index))
            assert len(index) == (23 if "mark" in kinds[:count] or (part == [step] and
                                  kinds[count] == "mark") else 20)  # fmt: skip
            with journal.writing(path) as writer:  # what nobody counts takes no room
                assert path.stat().st_size == writer.mark.end
                put(writer, unit(2, seed=4), 100)
            assert len(Index.open(path)) == len(index) + 2
    assert seen == {20, 23}


def test_any_damage_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "READINGS", 1)
    path = filled(tmp_path / "i", unit(6), 2, "int8")
    removed(path, [2])
    whole = path.read_bytes()

    def used() -> list[float]:
        index = Index.open(path)
        index.check()
        return index.search(unit(3, seed=1), 3).scores.tolist()

    expected, found = used(), 0
    for place in range(0, len(whole), 7):
        content = bytearray(whole)
        content[place] ^= 16
        path.write_bytes(content)
        try:
            assert used() == expected, place  # between records, where nothing is read
        except InputError as error:
            found += 1
            assert str(path) in str(error) and str(error).count("\n") == 0
    assert found > 0.6 * len(whole) / 7
    for size in (*range(0, len(whole), 97), len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError):
            used()


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("vectors", ["O", [6, 2], 0, ""]),  # would be addresses in memory
        ("vectors", ["<f4", [2**40, 16], 0, ""]),
        ("vectors", ["<f4", [6, "16"], 0, ""]),
        ("vectors", ["<f4", [6, 1e308], 0, ""]),
        ("vectors", ["no type", [6, 16], 0, ""]),
        ("vectors", ["<f4", [6, 16], None, ""]),
        ("vectors", "<f4"),
        ("ids_ends", ["<U2", [6], 0, ""]),
        ("labels", None),
    ],
)
def test_what_makes_no_sense_is_refused_though_its_checksums_agree(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    entry: str,
    value: object,
) -> None:
    """Whoever means harm makes the checksums too."""
    dumps, path = json.dumps, begin(tmp_path / "i")

    def hostile(content: dict) -> str:
        return dumps({**content, "arrays": {**content["arrays"], entry: value}})

    with monkeypatch.context() as patch, journal.writing(path) as writer:
        patch.setattr(journal.json, "dumps", hostile)
        put(writer, unit(6))
    said = refusal_of(f"info {path}", capsys)
    assert str(path) in said and "build it again" in " ".join(said.split())


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("vectors", lambda x: x.astype(np.float64)),
        ("vectors", lambda x: x[:, :3]),
        ("ids_ends", lambda x: x + 1),
        ("ids_ends", lambda x: x[::-1]),
        ("paths_ends", lambda x: x[1:]),
        ("paths", lambda x: x.view(np.int8)),
        ("label_of", lambda x: x + 3),
        ("label_of", lambda x: x.astype(np.float64)),
        ("contents", lambda x: x[:, :8]),
        ("stamps", lambda x: x.astype(np.float64)),
        ("codes", lambda x: x.astype(np.float32)),
        ("codes", lambda x: x[:, :4]),
        ("step", lambda x: np.array([1.0, 2.0], np.float32)),
        ("centre", lambda x: x[:2]),
        ("removed", lambda x: np.array([6])),
        ("removed", lambda x: np.array([1.0])),
        ("touched", lambda x: np.array([-1])),
        ("touched", lambda x: np.array([0])),  # without their stamps
        *((name, None) for name in ("codes", "contents", "label_of", "labels", "stamps")),
    ],
)
@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_arrays_of_another_form_are_refused_though_their_checksums_agree(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    name: str,
    changed: Callable[[np.ndarray], np.ndarray] | None,
) -> None:
    """As another tool, or a newer version, may write them."""
    path, add = begin(tmp_path / "i", kind=kind), journal.Writer.add

    def other(writer: journal.Writer, content: dict, arrays: dict[str, np.ndarray]) -> None:
        values = {**arrays, name: changed(arrays.get(name))} if changed else arrays
        add(writer, content, {n: v for n, v in values.items() if changed or n != name})

    with monkeypatch.context() as patch, journal.writing(path) as writer:
        patch.setattr(journal.Writer, "add", other)
        put(writer, unit(6))
    said = " ".join(refusal_of(f"info {path}", capsys).split())
    assert str(path) in said and name.removesuffix("_ends") in said and "build it again" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", "16"),
        ("size", None),
        ("size", True),
        ("codes", "pq"),
        ("codes", ["int8"]),
        ("made", 3),
        ("folder", None),
        ("run", {}),
        ("model", ["m"]),
        ("fingerprint", 1.5),
        ("weights", 1),
        ("whiten", "4"),
        ("thresholds", [0.5]),
    ],
)
def test_values_of_another_type_are_refused_though_their_checksums_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: object
) -> None:
    about = Index.open(begin(tmp_path / "right")).about
    journal.create(path := tmp_path / "i")
    with journal.writing(path) as writer:
        writer.add({**about, name: value}, {})
    said = " ".join(refusal_of(f"info {path}", capsys).split())
    assert f"its {name} " in said.replace("are", "is") and "build it again" in said


def test_a_pipe_is_no_index_and_is_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "i")
    assert "a named pipe (FIFO), not a file" in refusal_of(f"info {tmp_path}/i", capsys)


def test_an_index_that_is_private_stays_private(tmp_path: Path) -> None:
    path = filled(tmp_path / "i", unit(8), 2)
    path.chmod(0o600)
    removed(path, [1])
    command(f"compact {path}")
    assert path.stat().st_mode & 0o777 == 0o600
    with journal.writing_anew(path):
        assert journal.part_of(path).stat().st_mode & 0o777 == 0o600, "while it grows, too"


def test_a_lock_empties_no_file_that_it_leads_to(tmp_path: Path) -> None:
    path, other = filled(tmp_path / "i", unit(3)), tmp_path / "other"
    other.write_text("mine")
    (tmp_path / ".i.lock").symlink_to(other)
    removed(path, [0])
    assert other.read_text() == "mine" and len(Index.open(path)) == 2


def test_damaged_vectors_are_found_by_the_search_that_reads_them(tmp_path: Path) -> None:
    vectors = unit(40)
    path = filled(tmp_path / "i", vectors)
    content = path.read_bytes()
    place = content.index(vectors[17].tobytes())
    path.write_bytes(content[: place + 1] + bytes([content[place + 1] ^ 1]) + content[place + 2 :])
    with pytest.raises(DamagedError, match="checksum of some of its vectors differs"):
        Index.open(path).search(unit(1), 1)


def test_what_is_written_over_an_index_is_noticed(tmp_path: Path) -> None:
    path, other = filled(tmp_path / "i", unit(700)), filled(tmp_path / "j", unit(700, seed=1))
    assert path.stat().st_size == other.stat().st_size
    index, backup = Index.open(path), path.read_bytes()
    path.write_bytes(other.read_bytes())  # as cp does
    assert not index.is_current
    with pytest.raises(DamagedError, match="overwritten"):
        index.check_there()
    index.refresh()
    index.check_there()
    assert np.array_equal(index.rows(slice(None)), unit(700, seed=1))
    with journal.writing(path) as writer:
        put(writer, unit(600, seed=2), 700)
    index.refresh()
    path.write_bytes(other.read_bytes())  # an older copy
    index.refresh()
    assert len(index) == 700
    os.truncate(path, 5000)
    for look in (lambda: index.is_current, index.check_there, lambda: Index.open(path)):
        with pytest.raises(DamagedError, match="its end is missing"):
            look()
    path.unlink()
    path.write_bytes(backup)
    index.refresh()
    path.unlink()  # what a reader has open stays
    index.check_there()
    assert len(index.search(unit(1), 3).rows) == 1


def test_files_that_are_no_index_are_named_in_a_sentence(tmp_path: Path) -> None:
    path = filled(tmp_path / "i", unit(4))
    content = path.read_bytes()
    with pytest.raises(InputError, match="does not exist"):
        Index.open(tmp_path / "none")
    with pytest.raises(InputError, match="is a folder"):
        Index.open(tmp_path)
    (tmp_path / "photo").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(InputError, match="is not an index of ours"):
        Index.open(tmp_path / "photo")
    path.write_bytes(
        journal.packed(journal.Mark(len(content), 2), 2).ljust(64, b"\0") + content[64:]
    )
    with pytest.raises(InputError, match="a newer version of this program"):
        Index.open(path)


def child(work: Callable[[], None]) -> int:
    """A process that does the work; returns its id."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(0)
    return process


def forever(path: Path) -> None:
    """Adds and removes images, in records of very different sizes."""
    with journal.writing(path) as writer:
        while True:
            first = Index.open(path).added
            count = 1 + 61 * first % 700
            put(writer, unit(count, seed=first), first)
            if first % 3 == 0:
                writer.add({}, {"removed": np.array([first], np.int64)})


def killed_again_and_again(path: Path, times: int, seed: int) -> None:
    """Every time the index must be whole, and hold what was added in order."""
    rng, seen = random.Random(seed), 0
    for _ in range(times):
        process = child(lambda: forever(path))
        time.sleep(rng.uniform(0.005, 0.06))
        during = Index.open(path)  # a reader meanwhile
        during.check()
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        index = Index.open(path)
        index.check()
        assert index.added >= during.added >= seen
        seen = index.added
        for segment in index.segments:
            assert (segment.vectors == unit(len(segment), seed=segment.first)).all()
            assert segment.ids[0] == str(segment.first)
    assert seen > 0


def test_an_index_survives_kill_9(tmp_path: Path) -> None:
    killed_again_and_again(begin(tmp_path / "i"), 15, seed=1)


@pytest.mark.slow
def test_an_index_survives_kill_9_many_times(tmp_path: Path) -> None:
    for seed in range(12):
        killed_again_and_again(begin(tmp_path / str(seed)), 25, seed)


def test_two_writers_are_refused_and_readers_are_not(tmp_path: Path) -> None:
    path = filled(tmp_path / "i", unit(10))
    ready, go = os.pipe()

    def hold() -> None:
        with journal.writing(path):
            os.write(go, b"1")
            time.sleep(60)

    process = child(hold)
    os.read(ready, 1)
    try:
        with pytest.raises(InputError, match="another process is changing"), journal.writing(path):
            pass
        assert len(Index.open(path)) == 10
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    with journal.writing(path) as writer:
        # Readers come and go in the writer's own process, and it stays the only one.
        assert len(Index.open(path)) == 10
        process = child(lambda: os._exit(refused(path)))
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 3
        put(writer, unit(1), 10)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["i"]


def test_where_files_cannot_be_locked_an_index_changes_and_says_so(
    tmp_path: Path, no_locks: None, caplog: pytest.LogCaptureFixture
) -> None:
    path = filled(tmp_path / "i", unit(3))
    assert len(Index.open(path)) == 3
    assert f"nothing keeps other processes out of {path}" in caplog.text
    assert [each.name for each in tmp_path.iterdir()] == ["i"]


@pytest.mark.parametrize("refusal", [BlockingIOError, PermissionError])  # by the system
def test_a_lock_that_is_refused_is_another_process(
    refusal: type[OSError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise refusal

    path = filled(tmp_path / "i", unit(3))
    monkeypatch.setattr(fcntl, "lockf", refused)
    with pytest.raises(InputError, match="another process is changing"):
        removed(path, [0])


def test_a_lock_that_was_taken_away_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lock, locked = filled(tmp_path / "i", unit(3)), fcntl.lockf, []

    def slowly(file: IO, how: int) -> None:  # whoever had it ends just before
        if not locked:
            (tmp_path / ".i.lock").unlink()
        locked.append(file.fileno())
        lock(file, how)

    monkeypatch.setattr(fcntl, "lockf", slowly)
    with journal.writing(path):
        process = child(lambda: os._exit(refused(path)))
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 3
    assert len(locked) == 2


def test_a_link_to_an_index_is_that_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "real").mkdir()
    index = filled(tmp_path / "real/i", unit(10))
    link = tmp_path / "link"
    link.symlink_to("real/i")
    (tmp_path / "0.png").write_bytes(b"beside the link, another picture")
    assert Index.open(link).entry(0).path == str(tmp_path / "real/0.png")
    with journal.writing(index):  # is one by either name
        process = child(lambda: removed_or_exit(link))
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 3
    command(f"remove {link} 3")
    made = searching.graph_of(index)
    if graph.is_installed():
        command(f"approximate {link}")
        assert made.exists()
    said = said_by(f"compact {link}", capsys)
    assert link.is_symlink() and len(Index.open(index)) == 9 and not made.exists()
    # A graph takes long to make, so nobody is left to find out that it is gone.
    assert (f"python search.py approximate {link}" in said) == graph.is_installed()


def removed_or_exit(path: Path) -> None:
    try:
        making.remove(path, ["1"])
    except InputError:
        os._exit(3)


def refused(path: Path) -> int:
    try:
        with journal.writing(path):
            return 0
    except InputError:
        return 3


def test_a_full_disk_leaves_the_index_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filled(tmp_path / "i", unit(10))
    before = path.read_bytes()
    with journal.writing(path) as writer:

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="free some space"):
            put(writer, unit(10), 10)
        monkeypatch.undo()
        assert path.read_bytes() == before
        put(writer, unit(5), 10)
    assert len(Index.open(path)) == 15


@pytest.mark.parametrize("kept", [True, False])
def test_a_disk_that_fails_at_the_mark_leaves_the_index_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """The mark may have arrived all the same, and can perhaps not be put back."""
    path = filled(tmp_path / "i", unit(10))
    before, sync, calls = path.read_bytes(), os.fsync, []

    def failing(number: int) -> None:
        calls.append(number)
        if len(calls) == 2 or (len(calls) > 2 and not kept):
            raise OSError(5, "Input/output error")
        sync(number)

    monkeypatch.setattr(os, "fsync", failing)
    failed = pytest.raises(InputError, match="Input/output error; check its disk")
    with journal.writing(path) as writer, failed:
        put(writer, unit(10), 10)
    monkeypatch.undo()
    Index.open(path).check()
    assert path.read_bytes()[: len(before)] == before
    assert len(Index.open(path)) == 10 and (not kept or path.read_bytes() == before)
    with journal.writing(path) as writer:
        put(writer, unit(5), 10)
    assert len(Index.open(path)) == 15


def test_an_index_that_cannot_take_its_place_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filled(tmp_path / "i", unit(10))
    removed(path, [1])
    before, replace = path.read_bytes(), Path.replace

    def failing(this: Path, other: Path) -> None:
        if other == path:
            raise OSError(5, "Input/output error")
        replace(this, other)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(InputError, match="what it held before is unharmed"):
        making.compact(path)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["i"]


def test_an_index_that_is_not_written_anew_leaves_nothing_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filled(tmp_path / "i", unit(10))
    removed(path, [1])
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="free some space"):
        making.compact(path)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["i"]


# --- which images are meant -----------------------------------------------------------------------


def test_folders_tables_and_files_name_images(tmp_path: Path) -> None:
    for name in ("a.png", "mug/b.png", "kitchen/mug/c.png", "mug/notes.txt", "mug/.d.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"")
    table = tmp_path / "more.csv"
    table.write_text("label;id;path;price\nRed mug;17;photos/a.png;3\n;;photos/mug/b.png;4\n")

    def found(*given: str) -> list[tuple]:
        photos = sources.photos_of(str(tmp_path / each) for each in given)
        return [(os.path.relpath(p.path, tmp_path), p.id, p.label) for p in photos]

    assert found("photos") == [
        ("photos/a.png", None, None),
        ("photos/kitchen/mug/c.png", None, "kitchen/mug"),
        ("photos/mug/b.png", None, "mug"),
    ]
    assert found("more.csv", "photos/mug/b.png") == [
        ("photos/a.png", "17", "Red mug"), ("photos/mug/b.png", None, None),
    ]  # fmt: skip
    for content, said in {
        "image,label\na,b\n": "has no column path; .* it names image and label",
        "path\n": "has no rows",
        "path,id\n,3\n": "line 2: the path is empty",
        "path\nnowhere.png\n": "line 2 names nowhere.png",
    }.items():
        table.write_text(content)
        with pytest.raises(InputError, match=said):
            found("more.csv")
    # As spreadsheets write tables.
    table.write_text("sep=;\n\npath; id\nphotos/a.png; 5\n", encoding="utf-16")
    assert found("more.csv") == [("photos/a.png", "5", None)]
    # What names an image again adds what is not known of it; it has one id.
    table.write_text("path,id,label\nphotos/mug/b.png,3,Cup\nphotos/a.png,4,\n")
    assert found("photos", "more.csv")[::2] == [
        ("photos/a.png", "4", None), ("photos/mug/b.png", "3", "mug"),
    ]  # fmt: skip
    table.write_text("path,id\nphotos/a.png,3\nphotos/../photos/a.png,4\n")
    with pytest.raises(InputError, match=r"photos/a.png is given two ids, 3 and 4"):
        found("more.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no picture"):
        found("empty")
    with pytest.raises(InputError, match="none does not exist"):
        found("none")


def test_tables_are_read_as_for_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "gru\u0308n").mkdir()  # as a Mac spells it
    (tmp_path / "gru\u0308n/a.png").write_bytes(b"")
    for written in ("gru\u0308n/a.png", "gr\u00fcn\\a.png", "gr\u00fcn/a.png"):
        (tmp_path / "t.csv").write_text(f"path,label,x_1,y1\n{written},Cup,3,4\n", encoding="utf-8")
        (photo,) = sources.photos_of([tmp_path / "t.csv"])
        assert photo.path == str(tmp_path / "gru\u0308n/a.png")
    assert "t.csv: x_1 and y1 are not used; pictures are looked at whole" in caplog.text
    (tmp_path / "t.csv").rename(tmp_path / "t.txt")  # a table is one by what it is called here
    assert sources.photos_of([f"csv:{tmp_path / 't.txt'}"])[0].label == "Cup"
    (tmp_path / "t.jsonl").write_text('{"path": "a.png"}\n')
    (tmp_path / "t.csv").write_text("path\nhttps://shop.example/a.png\n")
    for given, said in {
        f"csv:{tmp_path / 't.jsonl'}": "is JSON, and images are listed in CSV",
        f"{tmp_path / 't.csv'}": "line 2: https://shop.example/a.png is an address; .*download it",
        "s3://shop/photos": "^s3://shop/photos is an address; .*download it",
    }.items():
        with pytest.raises(InputError, match=said):
            sources.photos_of([given])


# --- what becomes of images, without a network ----------------------------------------------------


def vector_of(content: bytes) -> np.ndarray:
    """What the network of these tests makes of a file."""
    return unit(1, seed=int.from_bytes(content[:4], "big"))[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files are embedded by `vector_of`; those that begin with "bad" cannot be read."""

    def embedded(_: object, paths: list[str], *__: object) -> tuple[np.ndarray, np.ndarray]:
        contents = [Path(path).read_bytes() for path in paths]
        readable = np.array([not content.startswith(b"bad") for content in contents])
        return np.stack(list(map(vector_of, contents))), readable

    monkeypatch.setattr(adding, "embedded", embedded)
    return tmp_path


def lay(folder: Path, files: dict[str, str]) -> None:
    """Makes a folder hold these files, by name and content, and no others."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        file = folder / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        os.utime(file, ns=(0, 10**9 * int.from_bytes(content.encode()[:2], "big")))


def taken_in(path: Path, *given: Path, **how: object) -> adding.Outcome:
    if not path.exists():
        begin(path)
    with journal.writing(path) as writer:
        return adding.Adding(writer, None, adding.How(**how)).run(sources.photos_of(given))


def holds(path: Path) -> dict[str, str]:
    """Which files an index holds, by id; each with the embedding of what is in it."""
    index, found = Index.open(path), {}
    for row, entry in enumerate(index.entries()):
        content = Path(entry.path).read_bytes()
        assert (index.embedding(row) == vector_of(content)).all(), entry
        found[entry.id] = os.path.relpath(entry.path, path.parent)
    assert len(found) == len(index)
    return found


@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize(
    "files",
    [
        {"1": "z", "2": "a", "3": "b", "4": "c"},  # renumbered upwards
        {"0": "a", "1": "b", "2": "c", "3": "z"},  # and downwards
        {"0": "a", "1": "z", "2": "b", "3": "c"},
        {"1": "c", "2": "a", "3": "b"},
        {"1": "b", "2": "z", "4": "c", "5": "a"},
    ],
)
def test_renumbered_files_lose_no_picture(
    folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], size: int
) -> None:
    monkeypatch.setattr(adding, "CHUNKS", (size, size))
    lay(folder / "p", {"1": "a", "2": "b", "3": "c"})
    taken_in(folder / "i", folder / "p")
    lay(folder / "p", files)
    outcome = taken_in(folder / "i", folder / "p")
    assert outcome.copies == [] and outcome.added + outcome.moved + outcome.replaced > 0
    command(f"remove {folder}/i --missing")
    names = [f"p/{name}.png" for name in files]
    assert holds(folder / "i") == dict(zip(names, names, strict=True))
    assert taken_in(folder / "i", folder / "p").there == len(files)


def test_a_copy_of_a_file_that_was_only_touched_is_a_copy(folder: Path) -> None:
    lay(folder / "p", {"1": "a"})
    taken_in(folder / "i", folder / "p")
    (folder / "p/0.png").write_text("a")
    os.utime(folder / "p/1.png")
    assert taken_in(folder / "i", folder / "p").copies == [(str(folder / "p/0.png"), "p/1.png")]
    assert holds(folder / "i") == {"p/1.png": "p/1.png"}


def test_a_file_of_a_broken_clock_is_known_by_its_time(folder: Path) -> None:
    lay(folder / "p", {"1": "a", "2": "b"})
    first, second = 10 * 10**18, 12 * 10**18  # ns: after the year 2262, which int64 does not hold
    os.utime(folder / "p/1.png", ns=(0, first))
    assert taken_in(folder / "i", folder / "p").added == 2
    assert taken_in(folder / "i", folder / "p").there == 2
    (folder / "p/1.png").write_text("c")
    os.utime(folder / "p/1.png", ns=(0, second))
    assert taken_in(folder / "i", folder / "p").replaced == 1
    assert holds(folder / "i") == {"p/1.png": "p/1.png", "p/2.png": "p/2.png"}


def test_of_copies_that_come_together_one_is_taken(folder: Path) -> None:
    lay(folder / "p", {"1": "a", "2": "a", "3": "bad", "4": "bad", "5": "b", "6": "c"})
    table = folder / "photos.csv"
    names = [f"p/{number}.png" for number in range(1, 8)]
    table.write_text("\n".join(["path", *names]))  # the last one is not there
    outcome = taken_in(folder / "i", table, max_bad_images=3)
    assert outcome.copies == [(str(folder / names[1]), names[0])]
    assert sorted(outcome.bad) == [str(folder / name) for name in (names[2], names[3], names[6])]
    assert (outcome.added, outcome.embedded) == (3, 4)
    assert holds(folder / "i") == {name: name for name in (names[0], names[4], names[5])}


@pytest.mark.parametrize("kind", codes.CODINGS)
def test_codes_are_about_the_first_centre_for_good(folder: Path, kind: str) -> None:
    path = begin(folder / "i", kind=kind)
    for count in (6, 9):
        lay(folder / "p", {str(number): chr(97 + number) for number in range(count)})
        taken_in(path, folder / "p")
    centre = np.stack([vector_of(bytes([97 + number])) for number in range(6)]).mean(axis=0)
    queries = unit(4, seed=1)
    for gone in ([], [1, 7]):
        if gone:
            removed(path, gone)
            making.compact(path)
        index = Index.open(path)
        assert np.allclose(index.centre, centre, atol=1e-7) and len(index) == 9 - len(gone)
        for segment in index.segments:
            expected = codes.as_arrays(kind, segment.vectors, index.centre)
            assert (segment.record.arrays["codes"] == expected["codes"]).all()
        rows, _ = plain_search(index.rows(slice(None)), queries, 5)
        assert (index.search(queries, 5).rows == rows).all()


@pytest.mark.parametrize(("seconds", "sizes"), [(1e9, [2, 5, 5, 3]), (0.0, 7 * [2] + [1])])
def test_slow_embedding_is_added_in_smaller_parts(
    seconds: float, sizes: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adding, "CHUNKS", (2, 5))
    monkeypatch.setattr(adding, "SECONDS", seconds)
    lay(folder / "p", {str(number): chr(97 + number) for number in range(15)})
    assert taken_in(folder / "i", folder / "p").added == 15
    assert [len(segment) for segment in Index.open(folder / "i").segments] == sizes


def test_a_file_that_was_only_touched_is_read_once(folder: Path) -> None:
    lay(folder / "p", {"1": "a", "2": "b"})
    taken_in(folder / "i", folder / "p")
    os.utime(folder / "p/1.png", ns=(0, 7))
    assert taken_in(folder / "i", folder / "p").there == 2
    # Known by its new time: a picture that is given the same time is not looked at.
    (folder / "p/1.png").write_text("z")
    os.utime(folder / "p/1.png", ns=(0, 7))
    size = (folder / "i").stat().st_size
    assert taken_in(folder / "i", folder / "p").there == 2
    assert (folder / "i").stat().st_size == size
    making.compact(folder / "i")
    assert Index.open(folder / "i").stamps()[0].tolist() == [1, 7]


@pytest.mark.parametrize("size", [1, 100])
@pytest.mark.parametrize("reverse", [False, True])
def test_ids_pass_from_images_that_moved_to_new_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch, reverse: bool, size: int
) -> None:
    monkeypatch.setattr(adding, "CHUNKS", (size, size))
    table = folder / "t.csv"
    lay(folder / "p", {"0": "a", "1": "b"})
    table.write_text("path,id\np/0.png,A\np/1.png,B\n")
    taken_in(folder / "i", table)
    lay(folder / "p", {"1": "b"})
    lay(folder / "r", {"moved": "a", "newA": "n"})
    rows = ["r/moved.png,C", "r/newA.png,A", "p/1.png,B"]
    table.write_text("\n".join(["path,id", *(reversed(rows) if reverse else rows)]))
    taken_in(folder / "i", table)
    assert holds(folder / "i") == {"A": "r/newA.png", "B": "p/1.png", "C": "r/moved.png"}


def test_labels_that_look_alike_are_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forms = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    photos = folder / "photos"
    lay(photos, {f"{form}/{n}": n + form for form in forms for n in "01"})
    table = photos / "t.csv"
    table.write_text("path,label\n" + "".join(f"{form}/0.png,{form}\n" for form in forms))
    with monkeypatch.context() as older:  # which kept both forms
        older.setattr(sources, "composed", lambda name: name)
        taken_in(folder / "old", photos)
    taken_in(folder / "new", photos)
    taken_in(folder / "tabled", table)
    for name in ("old", "new", "tabled"):
        assert {entry.label for entry in Index.open(folder / name).entries()} == {"café"}
    again = taken_in(folder / "old", photos)
    assert (again.there, again.moved, again.added) == (4, 0, 0)


NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def test_a_file_whose_name_is_put_together_otherwise_is_the_same_image(folder: Path) -> None:
    lay(folder / "p", {f"{NFC}/{NFC}": "a", "other": "b"})
    taken_in(folder / "i", folder / "p")
    ids = [f"p/{NFC}/{NFC}.png", "p/other.png"]
    for content in ("a", "c"):  # copied from a Mac; and changed there
        lay(folder / "p", {f"{NFD}/{NFD}": content, "other": "b"})
        taken_in(folder / "i", folder / "p")
        assert holds(folder / "i") == {ids[0]: f"p/{NFD}/{NFD}.png", ids[1]: ids[1]}
        assert taken_in(folder / "i", folder / "p").there == 2
    # Where both spellings lead to one file, as on a Mac.
    (folder / "p" / NFC).mkdir()
    (folder / f"p/{NFC}/{NFC}.png").hardlink_to(folder / f"p/{NFD}/{NFD}.png")
    assert taken_in(folder / "i", folder / f"p/{NFC}/{NFC}.png").copies == []
    # Two files are two images, and both keep the ids that they have.
    lay(folder / "p", {f"{NFD}/{NFD}": "c", f"{NFC}/{NFC}": "d", "other": "b"})
    taken_in(folder / "i", folder / "p")
    assert len(holds(folder / "i")) == 3
    assert taken_in(folder / "i", folder / "p").there == 3


def test_ids_that_look_alike_are_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = folder / "t.csv"
    lay(folder / "p", {"0": "a", "1": "b", "2": "c"})
    table.write_text(f"path,id\np/0.png,{NFC}\np/1.png,{NFD}\n", "utf-8")
    with pytest.raises(InputError, match="give every image an id of its own"):
        taken_in(folder / "i", table)
    table.write_text(f"path,id\np/0.png,{NFD}\n", "utf-8")
    taken_in(folder / "i", table)
    assert Index.open(folder / "i").row(NFC) == Index.open(folder / "i").row(NFD) == 0
    table.write_text(f"path,id\np/0.png,{NFC}\n", "utf-8")
    assert taken_in(folder / "i", table).there == 1
    assert "1 image removed" in said_by(f"remove {folder}/i {NFD}", capsys)


def test_images_are_removed_however_their_names_are_put_together(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {f"{NFD}/{NFD}": "a", f"{NFD}/1": "b", f"{NFC}/2": "c", f"{NFC}/3": "d"}
    lay(folder / "p", files)
    taken_in(folder / "i", folder / "p")
    assert "1 image removed" in said_by(f"remove {folder}/i {folder}/p/{NFC}/{NFC}.png", capsys)
    assert "2 images removed" in said_by(f"remove {folder}/i {folder}/p/{NFC}", capsys)
    assert "1 image removed" in said_by(f"remove {folder}/i {folder}/p/{NFC}", capsys)


def test_adding_again_changes_nothing_where_copies_were_kept(folder: Path) -> None:
    lay(folder / "p", {"1": "a", "2": "a"})
    taken_in(folder / "i", folder / "p", keep_copies=True)
    (folder / "p/2.png").rename(folder / "p/3.png")
    table = folder / "t.csv"
    table.write_text("path,id\np/1.png,A\np/3.png,B\n")
    assert (taken_in(folder / "i", table).moved, taken_in(folder / "i", table).there) == (2, 2)
    assert holds(folder / "i") == {"A": "p/1.png", "B": "p/3.png"}
    # Where one of them is another picture now, the other is still known.
    (folder / "p/1.png").write_text("b")
    lay(folder / "q", {"4": "a"})
    outcome = taken_in(folder / "i", folder / "p", folder / "q")
    assert outcome.copies == [(str(folder / "q/4.png"), "B")]


def test_an_id_is_never_that_of_two_images(folder: Path) -> None:
    table = folder / "t.csv"
    lay(folder / "s", {"1": "a", "2": "b"})
    table.write_text("path,id\ns/1.png,A\ns/2.png,B\n")
    taken_in(folder / "i", table)
    lay(folder / "s", {"1": "a"})
    table.write_text("path,id\ns/1.png,B\n")
    taken_in(folder / "i", table)
    assert holds(folder / "i") == {"B": "s/1.png"}
    # Nor where one that moves keeps an id that is the path of a new one.
    table.write_text("path,id\ns/1.png,s/2.png\n")
    taken_in(folder / "i", table)
    lay(folder / "s", {"0": "a", "2": "n"})
    taken_in(folder / "i", folder / "s")
    assert holds(folder / "i") == {"s/2.png": "s/0.png", str(folder / "s/2.png"): "s/2.png"}


def test_what_an_unreadable_image_was_to_replace_stays(folder: Path) -> None:
    table = folder / "t.csv"
    lay(folder / "p", {"0": "a", "1": "b"})
    table.write_text("path,id\np/0.png,A\np/1.png,B\n")
    taken_in(folder / "i", table)
    lay(folder / "p", {"1": "b", "2": "bad"})
    table.write_text("path,id\np/2.png,A\n")
    assert taken_in(folder / "i", table).bad == [str(folder / "p/2.png")]
    assert [entry.id for entry in Index.open(folder / "i").entries()] == ["A", "B"]
    table.write_text("path,id\np/1.png,C\n")
    taken_in(folder / "i", table)
    assert {entry.id for entry in Index.open(folder / "i").entries()} == {"A", "C"}


ABOUT = {"kind": "network", "made": "1", "size": 16, "codes": "none", "folder": "/", "run": "r"}
ABOUT |= {"model": "m", "fingerprint": "f"}


def made(path: Path, *given: Path) -> adding.Outcome:
    return making.build(path, sources.photos_of(given), None, ABOUT, adding.How(max_bad_images=0.1))


def test_a_build_does_not_replace_an_index_that_another_has_just_made(folder: Path) -> None:
    """It may have been made while this one's network was loaded."""
    lay(folder / "p", {"1": "a", "2": "b"})
    made(folder / "i", folder / "p/1.png")
    before = (folder / "i").read_bytes()
    with pytest.raises(InputError, match="is there already"):
        made(folder / "i", folder / "p/2.png")
    assert (folder / "i").read_bytes() == before


def test_a_build_keeps_nothing_of_an_unfinished_one_that_is_not_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {str(number): f"{number} picture" for number in range(8)}
    lay(folder / "shop", {**good, "8": "bad 8", "9": "bad 9"})
    with pytest.raises(InputError, match="2 of 10 images cannot be read"):
        made(folder / "i", folder / "shop")
    lay(folder / "clean", good)
    outcome = made(folder / "i", folder / "clean")
    assert (outcome.added, outcome.copies) == (8, [])
    assert holds(folder / "i").keys() == {f"clean/{name}.png" for name in good}
    assert "going on" not in capsys.readouterr().out


def test_what_is_no_unfinished_index_stays_where_one_would_grow(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay(folder / "p", {"1": "a"})
    index = filled(folder / "old", unit(3))
    parts = [path.with_name(f"{path.name}.part") for path in (folder / "i", index)]
    for part in parts:
        part.write_text("my notes, part 1")
    with pytest.raises(InputError, match="part is in the way of an index that is being made"):
        made(folder / "i", folder / "p")
    assert "and is not one; move it away" in refusal_of(f"compact {index}", capsys)
    assert [part.read_text() for part in parts] == 2 * ["my notes, part 1"]
    assert len(Index.open(index)) == 3 and not (folder / "i").exists()
    for content in (
        index.read_bytes(),
        index.read_bytes()[:-9],
    ):  # another network's; a damaged one
        parts[0].write_bytes(content)
        (folder / "i").unlink(missing_ok=True)
        assert made(folder / "i", folder / "p").added == len(Index.open(folder / "i")) == 1


def test_a_build_goes_on_with_other_ids_and_labels(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = folder / "t.csv"
    lay(folder / "p", {"0": "a", "1": "b", "2": "c", "8": "bad", "9": "bad too"})
    table.write_text("path,id,label\np/0.png,A,x\np/1.png,B,\np/2.png,,\np/8.png,,\np/9.png,,\n")
    for rows, expected, kept in (
        ("p/3.png,A\n", {"A": "p/3.png"}, 0),
        ("p/0.png,Z\np/1.png,A\n", {"Z": "p/0.png", "A": "p/1.png"}, 1),
        ("p/0.png,\np/2.png,\n", {"p/0.png": "p/0.png", "p/2.png": "p/2.png"}, 1),
    ):
        again = folder / "again.csv"
        (folder / "p/3.png").write_text("d")
        again.write_text(f"path,id\n{rows}")
        (folder / "i").unlink(missing_ok=True)
        with pytest.raises(InputError, match="cannot be read"):
            made(folder / "i", table)
        capsys.readouterr()
        made(folder / "i", again)
        assert holds(folder / "i") == expected
        assert {entry.label for entry in Index.open(folder / "i").entries()} == {None}
        said = capsys.readouterr().out
        assert ("going on with the 1 images" in said) == bool(kept)


def test_info_says_how_often_a_threshold_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = ((0.5, 0.6, 0.4, 0.6), (0.2, 0.98, 0.1, 0.3))  # all that 80 queries carry
    found = Found(images=80, queries=80, same=rates, different=0.5, missed=0.04, right=(0.9, 0.4))
    known = Thresholds(0.9, 0.5, *[Rate(0.1)] * 4, classes=8, found=found)
    path = filled(tmp_path / "i", unit(80))
    with journal.writing(path) as writer:
        writer.add({"thresholds": known.as_dict()}, {})
    said = " ".join(said_by(f"info {path}", capsys).split())
    assert "same from 0.980, different below 0.500" in said
    assert "wrong for 20 % of the queries with nothing of their kind" in said
    assert "Measured on 8 classes alone, these errors are a rough guess" in said
    with journal.writing(path) as writer:
        put(writer, unit(48, seed=1), 80)
    said = " ".join(said_by(f"info {path} --json {path}.json", capsys).split())
    assert (
        "nothing but the same file is called the same" in said
        and "different below 0.500, wrong for 4 %" in said
        and "a rough guess" in said
    )
    kept = json.loads(path.with_name("i.json").read_text())["thresholds"]
    assert kept["same"] is None and Thresholds.of_dict(kept).verdict(1.0) == "unsure"


# --- with a network -------------------------------------------------------------------------------

ONE = "--epochs 1 --warm 0 --nb-clusters 2 --IPC 2"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A run folder, of a network that has hardly learned anything."""
    return tiny.run(images, tmp_path_factory.mktemp("logs"), "run", ONE)


@pytest.fixture
def shop(tmp_path: Path, run: Path, images: Path) -> Path:
    """A folder with photos, a run, and an index of the photos."""
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(images / "eval", tmp_path / "photos")
    command(f"build {tmp_path}/run --images {tmp_path}/photos --index {tmp_path}/shop.index")
    return tmp_path


def command(words: str) -> None:
    """A command of search.py, in this process."""
    added = ["--workers", "0"] if words.startswith(("build ", "add ")) else []
    search.main([*words.split(), *added])


def said_by(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    command(words)
    return capsys.readouterr().out


def refusal_of(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    return refusal(capsys, command, words)


def test_an_index_holds_what_load_run_says_of_every_photo(shop: Path) -> None:
    index = Index.open(shop / "shop.index")
    paths = sorted(map(str, (shop / "photos").rglob("*.png")))
    assert [entry.path for entry in index.entries()] == paths and len(paths) == 24
    assert index.entry(0) == ("photos/eval0/0.png", paths[0], "eval0")
    embed = load_run(shop / "run")
    assert np.allclose(index.rows(slice(None)), embed(paths), atol=1e-5)
    assert np.allclose(index.embedder()(paths[:3]), embed(paths[:3]))
    found = index.search(index.embedder()(paths[5]), 1)
    assert found.rows[0, 0] == 5 and found.scores[0, 0] > 0.999


def test_a_run_on_drawings_sees_photos_whole_on_white_and_without_a_warning(shop: Path) -> None:
    code = """
from dataclasses import replace
from pathlib import Path
import numpy as np
from index import files
from net import load_run

paths = sorted(map(str, Path("photos").rglob("*.png")))
embed = load_run("run")
for square in (48, embed.model.viewing.image_size):  # resized, and just as it is
    embed.model = replace(embed.model, square=square)
    vectors, readable = files.embedded(embed, paths, workers=0)
    assert readable.all() and np.allclose(vectors, embed(paths), atol=1e-5)
"""
    done = run_code(code, cwd=shop)  # torch warns once per process
    assert (done.returncode, done.stderr) == (0, "")


def test_a_network_that_gives_no_numbers_makes_no_index(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    embed = load_run(shop / "run")
    with torch.no_grad():  # as of a training that has diverged
        next(embed.model.network.parameters()).fill_(float("nan"))
    monkeypatch.setattr("evaluation.inference.load_run", lambda *_, **__: embed)
    said = refusal_of(f"build run --images {shop}/photos --index {shop}/x.index", capsys)
    assert "makes NaN or infinity of 24 of 24 images" in said
    assert not (shop / "x.index").exists()
    with pytest.raises(InputError, match="its training may have diverged"):
        embed(shop / "photos/eval0/0.png")


def test_the_commands_one_after_the_other(workdir: Path, run: Path, images: Path) -> None:
    """As they are pasted into a shell, the printed ones too."""
    shutil.copytree(run, workdir / "run")
    shutil.copytree(images / "eval", workdir / "my photos")
    built = run_cli(
        "search.py", "build", "run", "--images", "my photos", "--index", "shop.index", cwd=workdir
    )
    assert (built.returncode, built.stderr) == (0, "")
    assert "24 images added in" in built.stdout and "images/s)" in built.stdout
    printed = built.stdout.splitlines()[-1]
    assert printed.endswith("search.py query shop.index 'my photos/eval0/0.png'")
    asked = run_cli(
        "search.py", "query", "shop.index", "my photos/eval0/0.png", "--top", 3, "--json",
        "answers.json", "--picture", "answers.png", cwd=workdir,
    )  # fmt: skip
    assert (asked.returncode, asked.stderr) == (0, "")
    first = asked.stdout.splitlines()[1]
    assert first == "   1  1.0000  eval0  my photos/eval0/0.png  the same file"
    assert max(map(len, asked.stdout.splitlines())) <= 80
    (answer,) = json.loads((workdir / "answers.json").read_text())["answers"]
    assert [hit["same_file"] for hit in answer["hits"]] == [True, False, False]
    assert answer["hits"][0]["path"] == str(workdir / "my photos/eval0/0.png")
    assert Image.open(workdir / "answers.png").width > 4 * 140


def test_the_very_file_is_called_the_same_whatever_the_thresholds(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = ((0.5, 0.6, 0.4, 0.6),)  # too high to call anything the same
    found = Found(images=24, queries=24, same=rates, different=-1.0, missed=0.04, right=(0.9,))
    known = Thresholds(0.9, -1.0, *[Rate(0.1)] * 4, found=found)
    path = shop / "shop.index"
    with journal.writing(path) as writer:
        writer.add({"thresholds": known.as_dict()}, {})
    asked = f"query {path} {shop}/photos/eval2/1.png --top 3 --json {shop}/a.json"
    lines = said_by(asked, capsys).splitlines()
    assert [line.split()[2] for line in lines[1:4]] == ["same", "unsure", "unsure"]
    assert "nothing but the same file is called the same" in " ".join(" ".join(lines).split())
    (answer,) = json.loads((shop / "a.json").read_text())["answers"]
    assert [hit["verdict"] for hit in answer["hits"]] == ["same", "unsure", "unsure"]


def test_adding_what_is_there_says_so(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index, photos = shop / "shop.index", shop / "photos"
    size = index.stat().st_size
    assert "24 images there already, unchanged" in said_by(f"add {index} {photos}", capsys)
    assert index.stat().st_size == size
    os.utime(photos / "eval0/0.png")  # touched, and the same
    assert "24 images there already" in said_by(f"add {index} {photos}", capsys)
    assert len(Index.open(index)) == Index.open(index).added == 24
    # The same file under another name is left out, and named; unless it is wanted.
    shutil.copy(photos / "eval0/0.png", shop / "copy.png")
    said = said_by(f"add {index} {shop}/copy.png", capsys)
    assert "0 images added" in said and "copy.png is photos/eval0/0.png" in said
    assert "1 image added" in said_by(f"add {index} {shop}/copy.png --keep-copies", capsys)
    # A file that has changed is looked at again.
    shutil.copy(photos / "eval7/2.png", photos / "eval0/1.png")
    assert "1 image whose files have changed" in said_by(f"add {index} {photos}", capsys)
    now = Index.open(index)
    assert len(now) == 25
    assert (now.embedding(now.row("photos/eval0/1.png")) @ now.embedding(
        now.row("photos/eval7/2.png")) > 0.999)  # fmt: skip
    # One that was moved keeps its embedding, and one that has another label now gets it.
    (photos / "eval3").rename(photos / "red mug")
    assert "3 images there under another path" in said_by(f"add {index} {photos}", capsys)
    now = Index.open(index)
    moved = now.entry(now.row("photos/red mug/1.png"))
    assert (len(now), moved.label) == (25, "red mug") and Path(moved.path).is_file()


def test_images_are_removed_by_id_file_and_folder(
    shop: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, photos = shop / "shop.index", shop / "photos"
    said = said_by(f"remove {index} photos/eval0/0.png {photos}/eval0/1.png {photos}/eval5", capsys)
    assert "5 images removed" in said and "holds 19 images" in said
    said = refusal_of(f"remove {index} photos/eval1/0.png photos/eval1/9.png", capsys)
    assert "no image photos/eval1/9.png; did you mean photos/eval1/" in said
    assert "did you mean photos/eval1" in refusal_of(f"remove {index} photos/evil1", capsys)
    assert len(Index.open(index)) == 19
    assert "nothing to remove" in refusal_of(f"remove {index}", capsys)
    monkeypatch.chdir(photos)  # an empty name is not that of all that lies here
    for words in (["remove", index, ""], ["add", index, ""], ["add", index, "folder:"]):
        assert "an empty name is given" in refusal(capsys, search.main, list(map(str, words)))
    assert len(Index.open(index)) == 19
    (photos / "eval7/1.png").unlink()
    assert "2 images removed" in said_by(f"remove {index} --missing photos/eval7/0.png", capsys)
    before, size = Index.open(index), index.stat().st_size
    command(f"compact {index}")
    after = Index.open(index)
    assert list(before.entries()) == list(after.entries()) and len(after) == 17
    assert (before.rows(slice(None)) == after.rows(slice(None))).all()
    assert index.stat().st_size < size and after.added == 17
    before.refresh()  # another file stands there now
    assert before.added == 17 and "17 images" in repr(before)


def test_ids_and_labels_of_a_table(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = shop / "more.csv"
    table.write_text("path,id,label\nphotos/eval0/0.png,17,Red mug\nphotos/eval0/1.png,18,\n")
    command(f"add {shop}/shop.index {table}")
    index = Index.open(shop / "shop.index")
    path = str(shop / "photos/eval0/0.png")
    assert len(index) == 24 and index.entry(index.row("17")) == ("17", path, "Red mug")
    assert index.entry(index.row("18")).label == "eval0"  # it stays where none is given
    table.write_text("path,id\nphotos/eval0/2.png,17\n")
    said = refusal_of(f"add {shop}/shop.index {table}", capsys)
    assert "the id 17 is given to" in said and "eval0/0.png has it" in said


def test_a_disk_that_is_not_connected_empties_no_index(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay(folder / "p", {"1": "a", "2": "b", "3": "c"})
    taken_in(folder / "i", folder / "p")
    (folder / "p").rename(folder / "away")
    said = refusal_of(f"remove {folder}/i --missing", capsys)
    assert "is there, so --missing would remove all 3 images" in said and "p/1.png" in said
    assert len(Index.open(folder / "i")) == 3
    (folder / "away").rename(folder / "p")
    (folder / "p/1.png").unlink()
    assert "1 image removed" in said_by(f"remove {folder}/i --missing", capsys)
    assert "0 images removed" in said_by(f"remove {folder}/i --missing", capsys)


def test_a_graph_that_cannot_be_made_is_told_of_before_the_work(
    shop: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    words = f"build {shop}/run --images {shop}/photos --index {shop}/other --approximate yes"
    assert "needs the package usearch" in refusal_of(words, capsys)
    assert not (shop / "other").exists()
    words = f"add {shop}/shop.index {shop}/photos --approximate yes"
    assert "needs the package usearch" in refusal_of(words, capsys)


def test_new_images_without_a_label_are_told_of(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        Image.new("RGB", (40, 40), (90 * number, 30, 60)).save(shop / f"photos/eval0/n{number}.png")
    said = said_by(f"add {shop}/shop.index {shop}/photos/eval0/n0.png", capsys)
    assert "it has no label" in said
    said = said_by(f"add {shop}/shop.index {shop}/photos/eval0", capsys)
    assert "2 of them have no label" in said and "give the folder above" in said
    said = said_by(f"add {shop}/shop.index {shop}/photos", capsys)
    assert "3 images there under another path, id or label" in said and "no label" not in said
    index = Index.open(shop / "shop.index")
    assert {index.entry(row).label for row in range(24, 27)} == {"eval0"}
    # Nobody misses labels where there are none.
    said = said_by(f"build {shop}/run --images {shop}/photos/eval0 --index {shop}/flat", capsys)
    assert "6 images added" in said and "no label" not in said


def test_unreadable_images_are_named_and_left_out(
    shop: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("bad0.png", "bad1.png"):
        (shop / "photos" / name).write_bytes(b"no picture " + name.encode())
    index = shop / "shop.index"
    said = refusal_of(f"add {index} {shop}/photos --max-bad-images 0.04", capsys)
    assert "2 of 26 images cannot be read" in said and "bad1.png" in said
    said = said_by(f"add {index} {shop}/photos", capsys)
    assert "2 images left out, not readable" in said
    assert "bad0.png cannot be read" in caplog.text and len(Index.open(index)) == 24


def test_photos_and_index_move_together_and_apart(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shop.parent / f"{shop.name} moved"
    shop.rename(moved)
    index = Index.open(moved / "shop.index")
    assert index.entry(0).path == str(moved / "photos/eval0/0.png")
    assert index.embedder().model.network.test_size == index.size  # the run came along
    # The index alone elsewhere: what lay absolutely is still found.
    moved.rename(shop)
    (shop.parent / "elsewhere").mkdir(exist_ok=True)
    alone = shop.parent / "elsewhere" / f"{shop.name}.index"
    shutil.copy(shop / "shop.index", alone)
    assert Index.open(alone).entry(0).path == str(shop / "photos/eval0/0.png")
    # Photos that are gone are counted and named, and an image can still be asked about.
    shutil.rmtree(shop / "photos/eval0")
    assert "files gone  3:" in said_by(f"info {alone}", capsys)
    said = said_by(f"query {alone} {shop}/photos/eval1/0.png --top 24", capsys)
    assert said.count("(file gone)") == 3
    (shop / "run").rename(shop / "other")
    asked = f"query {alone} {shop}/photos/eval1/0.png"
    assert "say where it is now (--run FOLDER, in Python run=)" in refusal_of(asked, capsys)
    command(f"{asked} --run {shop}/other")
    assert "say where it is now (--run FOLDER, in Python run=)" in refusal_of(asked, capsys)
    command(f"add {alone} {shop}/photos --run {shop}/other")  # which the index notes
    command(asked)
    command(f"compact {alone}")
    command(asked)


def test_a_network_of_the_hub_is_found_again(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    query = f"query {shop}/hub.index {shop}/photos/eval0/0.png"
    monkeypatch.setattr(hub, "download", lambda name: {"hf:me/x": shop / "run"}[name])
    command(f"build hf:me/x --images {shop}/photos --index {shop}/hub.index")
    monkeypatch.setattr(hub, "download", None)
    found = said_by(query, capsys)
    assert "eval0/0.png" in found
    (shop / "run").rename(shop / "moved")
    monkeypatch.setattr(hub, "download", lambda name: {"hf:me/x": shop / "moved"}[name])
    assert said_by(f"{query} --run hf:me/x", capsys) == found


def test_another_networks_embeddings_are_refused(
    shop: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny.run(images, shop, "other", f"{ONE} --seed 2")
    index = shop / "shop.index"
    said = refusal_of(f"add {index} {shop}/photos --run {other}", capsys)
    assert "holds another network than the one that made" in said
    shutil.rmtree(shop / "run")
    other.rename(shop / "run")  # as if it had been trained again in the same place
    photo = shop / "photos/eval0/0.png"
    assert "holds another network" in refusal_of(f"query {index} {photo}", capsys)


def test_a_build_goes_on_where_it_was_interrupted(
    shop: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Index.open(shop / "shop.index")
    monkeypatch.setattr(adding, "CHUNKS", (10, 10))
    (shop / "extra.png").write_bytes((shop / "photos/eval0/0.png").read_bytes() + b" ")
    again = f"build {shop}/run --images {shop}/photos --index {shop}/again.index"
    looked = adding.embedded

    def stops(embedder: object, paths: list[str], *more: object) -> tuple:
        if any("eval4" in path for path in paths):
            raise KeyboardInterrupt
        return looked(embedder, paths, *more)

    monkeypatch.setattr(adding, "embedded", stops)
    with pytest.raises(SystemExit, match="130"):
        command(again.replace("--images", f"--images {shop}/extra.png"))
    assert not (shop / "again.index").exists() and (shop / "again.index.part").exists()
    monkeypatch.setattr(adding, "embedded", looked)
    (shop / "run").rename(shop / "kept")  # the run has moved meanwhile
    again = again.replace(f"{shop}/run ", f"{shop}/kept ")
    said = said_by(again, capsys)
    command(f"query {shop}/again.index {shop}/photos/eval0/0.png")
    # Without the image that is no longer asked for.
    assert "going on with the 9 images of an interrupted build" in said
    index = Index.open(shop / "again.index")
    assert list(index.entries()) == sorted(whole.entries(), key=lambda entry: index.row(entry.id))
    assert not (shop / "again.index.part").exists()
    assert "is there already" in refusal_of(again, capsys)
    command(f"{again} --overwrite")
    (shop / "photo").write_bytes(b"\xff\xd8\xff")
    said = refusal_of(again.replace("again.index", "photo") + " --overwrite", capsys)
    assert "is not an index of ours" in said  # what is no index is not written over


def test_queries_find_themselves_unless_told_otherwise(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = f"query {shop}/shop.index {shop}/photos/eval2/1.png --top 4"
    lines = said_by(asked, capsys).splitlines()
    assert len(lines) == 5 and lines[1].endswith("the same file")
    assert (
        said_by(f"{asked} --without-self", capsys).splitlines()[1].split()[1]
        == (lines[2].split()[1])
    )
    (shop / "run").rename(shop / "away")  # a typing error is told of before a network is opened
    for name in ("nothing.png", "photos"):
        said = refusal_of(
            f"query {shop}/shop.index {shop}/photos/eval2/1.png {shop}/{name}", capsys
        )
        assert f"{name} cannot be read" in said and said.endswith("give another image file\n")


def test_a_query_has_one_line_whatever_it_is_called(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = shutil.copy(shop / "photos/eval2/1.png", shop / "two\nlines.png")
    search.main(["query", str(shop / "shop.index"), str(odd), "--top", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(r"two\x0alines.png of 24 images:") and lines[1].startswith("   1")


def test_many_queries_at_once_find_what_each_finds(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = Index.open(shop / "shop.index")
    photos = [str(path) for path in sorted((shop / "photos").glob("*/*.png"))]
    embedder = index.embedder()
    viewing = replace(embedder.model.viewing, batch_size=7)  # so that they are several batches
    embedder.model = replace(embedder.model, viewing=viewing)
    for answer in ask(index, embedder, photos, 3):
        (alone,) = ask(index, embedder, [answer.query], 3)
        assert [hit.entry for hit in answer.hits] == [hit.entry for hit in alone.hits]
        assert [hit.score for hit in answer.hits] == pytest.approx(
            [hit.score for hit in alone.hits], abs=1e-5
        )
        assert answer.hits[0].same_file and answer.hits[0].entry.path == answer.query
    bad = shop / "bad.png"
    bad.write_bytes(b"\x89PNG broken")
    answers = ask(index, embedder, [*photos[:9], str(bad), *photos[9:]], 3)
    assert answers.pop(9) == Answer(str(bad), [], readable=False)
    assert [answer.hits[0].entry.path for answer in answers] == photos
    with pytest.raises(InputError, match="none of 8 images can be read"):
        ask(index, embedder, [str(bad)] * 8, 3)


def test_a_broken_picture_among_others_keeps_no_answer_back(
    shop: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = shop / "bad.png", f"{shop}/photos/eval2/1.png"
    bad.write_bytes(b"\x89PNG broken")
    asked = f"query {shop}/shop.index {good} {bad} {good} --top 3"
    plain = said_by(f"query {shop}/shop.index {good} --top 3", capsys).splitlines()[1:4]
    with pytest.raises(SystemExit) as stop:
        command(f"{asked} --json {shop}/a.json --picture {shop}/a.png")
    said = capsys.readouterr()
    assert stop.value.code == 2 and "bad.png cannot be read" in caplog.text
    assert said.err.startswith("error: 1 of 3 images cannot be read") and str(bad) in said.err
    lines = said.out.splitlines()
    assert lines[1:4] == plain and lines[7:10] == plain and "cannot be read" in lines[5]
    answers = json.loads((shop / "a.json").read_text())["answers"]
    assert [(a["readable"], len(a["hits"])) for a in answers] == [(True, 3), (False, 0), (True, 3)]
    assert (shop / "a.png").is_file()
    assert "(no picture, or its beginning is damaged)" in refusal_of(
        f"query {shop}/shop.index {bad}", capsys
    )


def test_more_answers_than_images_are_all_images(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"query {shop}/shop.index {shop}/photos/eval0/0.png --top {10**12}"
    assert len(said_by(words, capsys).splitlines()) == 1 + 24
    assert len(said_by(f"{words} --without-self", capsys).splitlines()) == 1 + 23


def test_duplicates_and_info(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(shop / "photos/eval6/0.png", shop / "twin.png")
    index = shop / "shop.index"
    command(f"add {index} {shop}/twin.png --keep-copies")
    said = said_by(f"duplicates {index} --above 0.9999 --json {shop}/pairs.json", capsys)
    assert "1 pair among 25 images has a cosine of 0.9999 or more, in 1 group" in said
    pairs = json.loads((shop / "pairs.json").read_text())
    assert pairs["groups"] == [["photos/eval6/0.png", "twin.png"]]
    said = said_by(f"info {index} --json {shop}/info.json", capsys)
    assert "25; 8 labels" in said and "all checksums agree" in said
    facts = json.loads((shop / "info.json").read_text())
    assert facts["images"] == 25 and facts["run_is_there"] and facts["missing"] == []
    assert facts["approximate_from"] > 1000
    vector = Index.open(index).embedding(24).tobytes()
    content = index.read_bytes()
    index.write_bytes(content.replace(vector, bytes(len(vector))))
    assert "damaged" in refusal_of(f"info {index}", capsys)


def test_who_waits_for_a_large_index_is_told_so(
    shop: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = shop / "shop.index"
    words = {f"remove {index} --missing": "looking", f"info {index}": "checking"}
    words[f"compact {index}"] = "copying"
    for width, least, told in ((80, 0, True), (80, 10**8, False), (None, 0, False)):
        monkeypatch.setattr(search, "terminal_width", lambda width=width: width)
        monkeypatch.setattr(search, "LARGE", least)
        for asked, word in words.items():
            assert said_by(asked, capsys).startswith(word) == told
        said = said_by(f"add {index} {shop / 'photos'}", capsys)
        assert ("looking through" in said) == told


def test_thresholds_of_the_run_come_with_the_index(
    shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from evaluation.networks import fingerprint_of

    index = shop / "shop.index"
    photo = shop / "photos/eval0/0.png"
    assert Index.open(index).thresholds is None
    network = load_run(shop / "run").model.network
    known = Thresholds(0.999, 0.95, *[Rate(0.1)] * 4, network=fingerprint_of(network))
    tiny.edit(shop / "run/results.json", thresholds={"eval": known.as_dict()})
    command(f"add {index} {shop}/photos")  # nothing new but these
    assert (Index.open(index).thresholds.same, len(Index.open(index))) == (0.999, 24)
    lines = said_by(f"query {index} {photo} --top 24", capsys).splitlines()
    assert lines[1].split()[2] == "same" and lines[24].split()[2] == "different"
    told = " ".join(" ".join(lines[25:]).split())
    assert told.startswith("verdicts same from 0.999, different below 0.950; the first is wrong")
    assert max(map(len, lines[1:])) <= 80
    assert "same from 0.999, different below 0.950" in said_by(f"info {index}", capsys)


def test_a_graph_is_made_where_it_is_worth_it(
    shop: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("usearch")
    index = shop / "shop.index"
    monkeypatch.setattr(graph, "worth_from", lambda _: 10)
    (shop / "photos/eval0/0.png").rename(shop / "photos/eval0/9.png")
    assert "making a graph" in said_by(f"add {index} {shop}/photos", capsys)
    assert Index.open(index).graph.covers == 25
    assert "by a graph of 25 images" in said_by(f"info {index}", capsys)
    plain = said_by(f"query {index} {shop}/photos/eval1/0.png --exact", capsys)
    assert said_by(f"query {index} {shop}/photos/eval1/0.png", capsys) == plain
    searching.graph_of(index).unlink()
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    said = said_by(f"add {index} {shop}/photos", capsys)
    assert "pip install usearch" in said and "python search.py approximate" in said
    assert "needs the package usearch" in refusal_of(f"approximate {index}", capsys)


SMALL_CHUNKS = (
    "import sys, search; from index import adding; adding.CHUNKS = (16, 16); search.main()"
)


def in_small_chunks(folder: Path, *words: str) -> subprocess.Popen[str]:
    """search.py with these words, started."""
    return subprocess.Popen(
        [sys.executable, "-c", SMALL_CHUNKS, *words],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def until_done(folder: Path, rng: random.Random, *words: str) -> int:
    """Runs a command again and again until it ends; how often it was killed before that.

    Each time it is killed when it has written a few times.
    """
    files, kills = (folder / "shop.index", folder / "shop.index.part"), 0

    def size() -> int:
        return sum(file.stat().st_size for file in files if file.exists())

    while True:
        sizes, most = {size()}, rng.randint(2, 8)
        process = in_small_chunks(folder, *words)
        while process.poll() is None and len(sizes) <= most:
            time.sleep(rng.uniform(0.0005, 0.002))
            with contextlib.suppress(FileNotFoundError):  # renamed at this moment
                sizes.add(size())
        ended = process.poll() is not None
        process.kill()
        said, _ = process.communicate()
        if not ended:
            kills += 1
            for file in files:
                if file.exists() and file.stat().st_size > 64:
                    Index.open(file).check()
            continue
        # It may have been killed when its work was done: then it is told so.
        done = kills and ("shop.index is there already" in said or "holds no image" in said)
        assert process.returncode == 0 or done, said
        return kills


@pytest.mark.slow
def test_the_commands_survive_kill_9(workdir: Path, run: Path) -> None:
    """build, add and remove, each killed again and again, end as if nothing had happened."""
    shutil.copytree(run, workdir / "run")
    photos = tiny.write_images(workdir / "photos", images=60, eval_images=60)
    rng, how = random.Random(0), ("--workers", "1")
    build = ("build", "run", "--images", "photos/train", *how, "--index")
    kills = [
        until_done(workdir, rng, *build, "shop.index"),
        until_done(workdir, rng, "add", "shop.index", "photos/eval", *how),
        until_done(workdir, rng, "remove", "shop.index", "photos/eval/eval1"),
    ]
    assert min(kills[:2]) > 1, kills
    whole = workdir / "whole.index"
    command(f"build {workdir}/run --images {photos}/train {photos}/eval --index {whole}")
    command(f"remove {whole} {photos}/eval/eval1")
    one, other = Index.open(workdir / "shop.index"), Index.open(whole)
    ids = sorted(one.id(row) for row in range(len(one)))
    assert len(ids) == 900 == len(other)
    for id in ids:
        entry, same = one.entry(one.row(id)), other.entry(other.row(id))
        assert (entry.id, entry.path) == (same.id, same.path)
        assert np.allclose(one.embedding(one.row(id)), other.embedding(other.row(id)), atol=1e-4)


def test_typing_errors_are_sentences(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = refusal_of("query x.index a.png --tpo 3", capsys)
    assert "unknown argument --tpo; did you mean --top" in said
    said = refusal_of("query x.index a.png --top 3 b.png", capsys)
    assert "unknown argument b.png; give it beside the others, not behind a flag" in said
    said = refusal_of("query x.index --rerank a.png", capsys)
    assert "'a.png' is not a number" in said and "give INDEX and IMAGE before it" in said
    said = refusal_of(f"build --images {tmp_path} run --index {tmp_path}/x", capsys)
    assert "required: RUN; --images takes the words that follow it, so give RUN before it" in said
    assert "required: --images" in refusal_of(f"build run --index {tmp_path}/x", capsys)
    said = refusal_of(f"build run --images {tmp_path} --index {tmp_path}", capsys)
    assert "is a folder; name a file" in said
    said = refusal_of(f"build run --images {tmp_path} --index {tmp_path}/x", capsys)
    assert "holds no picture" in said
    assert "does not exist" in refusal_of(f"info {tmp_path}/none.index", capsys)

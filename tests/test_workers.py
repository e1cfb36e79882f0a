"""Processes that read images: however they are started, the same batches, and never a hang."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from dataset import workers
from dataset.base import ImageSet, PathTable
from dataset.loader import Batch, eval_loader
from net import INPUTS
from utils import InputError

CPU = torch.device("cpu")


def pictures(folder: Path, count: int, seed: int) -> ImageSet:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    paths = PathTable([f"{number}.png" for number in range(count)], f"{folder}{os.sep}")
    return ImageSet("own", "eval", np.arange(count) % 3, tuple("abc"), paths)


def evaluation(images: ImageSet, count: int):
    spec = INPUTS["imagenet"]
    return eval_loader(images, spec=spec, batch_size=4, device=CPU, workers=count, image_size=32)


def same(some: list[Batch], others: list[Batch]) -> bool:
    return all(
        torch.equal(one.images, other.images) and torch.equal(one.index, other.index)
        for one, other in zip(some, others, strict=True)
    )


def test_all_evaluations_have_the_same_workers(tmp_path):
    sets = [pictures(tmp_path / str(seed), 10 + seed, seed) for seed in (1, 2)]
    alone = [list(evaluation(images, 0)) for images in sets]
    before = {process.pid for process in multiprocessing.active_children()}
    assert same(list(evaluation(sets[0], 2)), alone[0])
    started = {process.pid for process in multiprocessing.active_children()} - before
    assert len(started) <= 2
    left = iter(evaluation(sets[0], 2))
    next(left)  # and nobody wants the rest
    for images, expected in zip(sets, alone, strict=True):
        assert same(list(evaluation(images, 2)), expected)
    now = {process.pid for process in multiprocessing.active_children()} - before
    assert now == started


def test_an_unreadable_image_is_named_by_its_place_in_the_whole_set(tmp_path):
    images = pictures(tmp_path / "some", 10, 1)
    (tmp_path / "some" / "9.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"9\.png cannot be read"):
        list(evaluation(images, 1))
    loader = eval_loader(
        images,
        spec=INPUTS["imagenet"],
        batch_size=4,
        device=CPU,
        workers=1,
        image_size=32,
        max_bad_images=0.2,
    )
    assert len(list(loader)) == 3 and list(loader.bad_images) == [9]


@pytest.mark.parametrize(
    ("chosen", "system", "expected"),
    [(None, "linux", "fork"), ("spawn", "linux", "spawn"), ("forkserver", "linux", "forkserver")],
)
def test_workers_are_forked_unless_the_program_has_chosen(chosen, system, expected, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none=False: chosen)
    monkeypatch.setattr(sys, "platform", system)
    assert workers.start_context().get_start_method() == expected


FORCED = """
import multiprocessing, sys
if __name__ == "__main__":
    sys.path[:0] = {paths!r}
    from pathlib import Path
    import test_workers
    if {method!r}:
        multiprocessing.set_start_method({method!r})
    images = test_workers.pictures(Path({folder!r}), 9, 1)
    alone = list(test_workers.evaluation(images, 0))
    for _ in range(2):
        assert test_workers.same(list(test_workers.evaluation(images, 1)), alone)
    print(multiprocessing.get_start_method(allow_none=True) or "fork")
"""


def read_in_another_process(tmp_path: Path, method: str, **environment: str) -> str:
    script = tmp_path / "forced.py"
    paths = [str(ROOT), str(ROOT / "tests")]
    script.write_text(FORCED.format(paths=paths, method=method, folder=str(tmp_path / "images")))
    return subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": ":".join(paths), **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    ).stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_every_start_method_gives_the_same_batches(method, tmp_path):
    assert read_in_another_process(tmp_path, method) == method


def test_a_long_name_of_the_temporary_folder_is_no_hang(tmp_path):
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    assert read_in_another_process(tmp_path, "", TMPDIR=str(folder)) == "fork"


def test_without_any_folder_for_sockets_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "SHORT_FOLDERS", ())
    monkeypatch.setattr(workers.tempfile, "tempdir", str(tmp_path / ("x" * 120)))
    monkeypatch.setitem(multiprocessing.process.current_process()._config, "tempdir", None)
    with pytest.raises(InputError, match="TMPDIR to a shorter one, or use --workers 0"):
        workers.item_loader(torch.utils.data.TensorDataset(), 1)


@pytest.mark.parametrize(("megabytes", "said"), [(64, "has 64 MB here"), (8192, "(/dev/shm)")])
def test_too_little_shared_memory_is_named(megabytes, said, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: usage(megabytes << 20, 0, 0))
    with pytest.raises(InputError) as raised, workers.worker_deaths_in_words():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error.")
    assert said in str(raised.value)
    assert ("--shm-size" in str(raised.value)) == (megabytes == 64)

"""Seconds and size of the page of one run at the size of Stanford Online Products.

    python benchmarks/page.py [--queries 60502] [--classes 11316] [--epochs 60]

The embeddings are random around class centres, the photographs JPEGs of 500 × 375 in memory, and
the run one with AMLoss, with a margin per class and epoch. The time is that of report.py once it
has the embeddings: neighbours, intervals, confusions, map, margins, proxies, thumbnails, HTML. With
--out the page is kept.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import heads, line
from dataset.base import ImageSet, PathTable, decode
from devices import device_name, pick_device
from evaluation.embedding import Embedded
from evaluation.tasks import Task
from page import findings
from page.build import build, thumbnails
from page.explained import look
from page.learned import Learned
from page.records import Record

TRAINED = 11_318  # training classes of SOP
SIZE = 512


def photographs(count: int = 20) -> list[bytes]:
    """JPEG files of coarse noise, with about the detail and the size of photographs."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (94, 125, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


class Photographs(ImageSet):
    """Images that are decoded when they are read."""

    files = photographs()

    def read(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        return decode(io.BytesIO(self.files[index % len(self.files)]))


def images(split: str, count: int, classes: int) -> Photographs:
    """`count` images of `classes` classes."""
    labels = np.sort(np.arange(count) % classes).astype(np.int64)
    names = tuple(f"{split} class {c}" for c in range(classes))
    paths = PathTable(f"{split}{i}" for i in range(count))
    return Photographs("sop", split, labels, names, paths)


def synthetic_page(record: Record, queries: int, classes: int, epochs: int) -> str:
    """The page of a run of that size; `record` replaces the files of a run folder."""
    rng = np.random.default_rng(0)
    judged_images, trained = images("eval", queries, classes), images("train", 59_551, TRAINED)
    centres, noise = torch.randn(classes, SIZE), torch.randn(queries, SIZE)
    task = Task("SOP", judged_images, None, (1, 10, 100, 1000))
    judged = Embedded(task, centres[judged_images.labels] + noise)
    thumbs = thumbnails(1)
    margins = rng.normal(0.1, 0.02, (epochs, TRAINED)).astype(np.float32)
    learned = Learned(
        record=record,
        checkpoint={
            "criterion_state_dict": {"parts.metric.proxies": torch.randn(TRAINED, SIZE)},
            "model_state_dict": {},
        },
        state={},
        history={
            "names": np.array(trained.class_names),
            "images": np.bincount(trained.labels),
            "epoch": np.arange(1, epochs + 1),
            "step": np.arange(epochs),
            "margin": margins,
        },
        judged=judged,
        search=findings.Search(judged),
        train=trained,
        embed=lambda found: (found, torch.randn(len(found), SIZE)),
        thumbs=thumbs,
        seed=1,
    )
    return build([look(learned, (), f"{queries:,} images")], thumbs)


def stand_in() -> Record:
    """A record with the contents of a run folder."""
    args = {"loss": "AMLoss", "dataset": "SOP", "model": "bn_inception", "given": []}
    return Record(Path("logs") / "synthetic", args, environment={}, rows=[], outcome={})


def main() -> None:
    """Prints seconds and megabytes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=60_502)
    parser.add_argument("--classes", type=int, default=11_316)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", help="where the page is kept")
    given = parser.parse_args()
    before = time.perf_counter()
    content = synthetic_page(stand_in(), given.queries, given.classes, given.epochs)
    seconds = time.perf_counter() - before
    if given.out:
        Path(given.out).write_text(content)
    print(f"{device_name(pick_device(0))}, torch {torch.__version__}\n")
    size = len(content.encode()) / 1e6
    print(heads(("queries", "classes", "seconds", "MB")))
    print(line((f"{given.queries:,}", f"{given.classes:,}", f"{seconds:.1f}", f"{size:.2f}")))


if __name__ == "__main__":
    main()

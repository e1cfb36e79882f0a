"""The effect of post-processing on a run: a table of R@1, MAP@R and seconds.

    python benchmarks/postprocessing.py logs/demo

The evaluation images search among themselves, as in `evaluate.py --metrics retrieval` with the
flags of the row; then half of each class searches in the other half, so that the augmentation of
the gallery does not use the queries. Seconds are of the first search, without whitening and
embedding.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import door

door.settle_threads(os.environ)  # as every command does, before torch is loaded

import numpy as np
import torch

import metrics
from devices import Precision, pick_device
from evaluation.embedding import embed
from evaluation.networks import open_checkpoint
from evaluation.postprocessing import Searched, postprocessed
from evaluation.tasks import tasks_of
from evaluation.whitening import Origin, whitened
from options.ranking import RERANKING, Expansion, Ranking, Reranking

NOTHING = Ranking(None, None, None)


class Setting(NamedTuple):
    """A row: the dimensions after whitening (None: not whitened), and the ranking's settings."""

    flags: str
    whiten: int | None
    ranking: Ranking


def expansion(k: int | None) -> Expansion | None:
    """Expansion with evaluate.py's default alpha, 3."""
    return None if k is None else Expansion(k, 3.0)


def settings() -> list[Setting]:
    """The rows."""
    found = [Setting("(none)", None, NOTHING)]
    for size in (0, 256, 128):
        found.append(Setting(f"--whiten {size or ''}".strip(), size, NOTHING))
    for k in (1, 3, 5):
        found.append(Setting(f"--query-expansion {k}", None, Ranking(expansion(k), None, None)))
    for k in (1, 3, 5):
        ranking = Ranking(None, expansion(k), None)
        found.append(Setting(f"--database-augmentation {k}", None, ranking))
    both = Ranking(expansion(3), expansion(3), None)
    found.append(Setting("--query-expansion 3 --database-augmentation 3", None, both))
    rerank = Ranking(None, None, Reranking(*RERANKING))
    found.append(Setting("--rerank", None, rerank))
    small = Ranking(None, None, Reranking(8, 3, 0.3))
    found.append(Setting("--rerank 8 3 0.3", None, small))
    found.append(Setting("--whiten --rerank 8 3 0.3", 0, small))
    return found


def searched(
    x: torch.Tensor, labels: np.ndarray, y: torch.Tensor | None, others: np.ndarray, how: Ranking
) -> dict[str, float]:
    """The retrieval metrics of a search with a setting."""
    made = postprocessed(x, y, how) if how else Searched(x, x if y is None else y)
    own = np.arange(len(x))
    found = metrics.retrieval_per_query(
        made.queries,
        labels,
        made.gallery,
        others,
        exclude=(own, own) if y is None else None,
        score=made.score,
    )
    return metrics.summarise(found, [1])


def halves(labels: np.ndarray) -> np.ndarray:
    """(N,) bool: every second image of each class."""
    order = np.argsort(labels, kind="stable")
    first = np.zeros(len(labels), bool)
    starts = np.searchsorted(labels[order], labels[order])
    first[order] = (np.arange(len(labels)) - starts) % 2 == 0
    return first


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run folder or a checkpoint")
    opened = open_checkpoint(parser.parse_args().run)
    precision = Precision("auto", pick_device(0))
    network = opened.network.to(precision.device, memory_format=precision.memory_format)
    images = tasks_of(opened.data)[0].queries
    origin = Origin.of(opened)
    print(f"{'':46} {'R@1':>6} {'MAP@R':>6} {'s':>6}   {'R@1':>6} {'MAP@R':>6} (halves)")
    kept: dict[int | None, torch.Tensor] = {}
    for setting in settings():
        if setting.whiten not in kept:
            chosen = network
            if setting.whiten is not None:
                how = (origin, opened.viewing, precision, setting.whiten)
                chosen = whitened(network, *how)
            kept[setting.whiten] = embed(chosen, images, precision, opened.viewing)[0]
        x, labels = kept[setting.whiten], images.labels
        start = time.perf_counter()
        whole = searched(x, labels, None, labels, setting.ranking)
        seconds = time.perf_counter() - start
        half = halves(labels)
        where = torch.from_numpy(half)
        parts = (x[where], labels[half], x[~where], labels[~half])
        apart = searched(*parts, setting.ranking)
        print(
            f"{setting.flags:46} {whole['R@1']:6.4f} {whole['MAP@R']:6.4f} {seconds:6.1f}   "
            f"{apart['R@1']:6.4f} {apart['MAP@R']:6.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

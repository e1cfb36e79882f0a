"""Makes the page of one run, or of several, from their folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from page import records
from page.build import build, thumbnails
from page.explained import explain
from storage import write_content

LONGEST_NAME = 60


def make(
    paths: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    queries: Sequence[str] = (),
    embeddings: str | None = None,
    seed: int = 1,
    gpu_id: int = 0,
) -> Path:
    """Writes the page of one run, or of several; returns its path.

    Args:
        paths: run folders. out: default report.html in the folder of one run, or beside several.
        queries: parts of the names of classes or files whose neighbours are shown.
        embeddings: a file of `evaluate.py --export`, to be used instead of the network.

    Raises:
        InputError: a folder is not a run's, a name in `queries` does not exist, or the disk is
            full.
    """
    runs = [records.read(path) for path in paths]
    # The differing options become a part of the names, unless there are too many.
    differing = records.differing(runs)
    differ = [records.apart(run, differing) for run in runs]
    if max(map(len, differ)) <= LONGEST_NAME:
        runs = [replace(run, differs=words) for run, words in zip(runs, differ, strict=True)]
    thumbs = thumbnails(len(runs))
    asked = {"queries": queries, "embeddings": embeddings, "seed": seed, "gpu_id": gpu_id}
    content = build([explain(run, thumbs, **asked) for run in runs], thumbs)
    if out is None:
        out = (runs[0].path if len(runs) == 1 else runs[0].path.resolve().parent) / "report.html"
    write_content(Path(out), content)
    return Path(out)

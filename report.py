"""Write an HTML page that explains a run, or compares several.

    python report.py logs/demo
    python report.py logs/first logs/second --out both.html
    python report.py --compare logs --grep AMLoss --latex runs.tex

The page is one file and loads nothing else. Embeddings are computed again with the best checkpoint,
or read from a file of `evaluate.py --export`. Training calls `make` when it ends.
"""

from __future__ import annotations

import door

if __name__ == "__main__":
    door.enter(loads_torch=True)

import options

ARGS = options.parse_report() if __name__ == "__main__" else None

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from evaluation.pictures import below, class_values_picture, save_picture
from page import lines, overview, records, values
from page.making import make
from page.source import neighbours_picture, open_best, without_images
from runs import files_of
from storage import check_outputs, in_bytes
from terminal import hear, say
from utils import InputError, sentence_errors


def draw(path: str | Path, out: str | Path, *, seed: int = 1, gpu_id: int = 0) -> Path:
    """Writes a picture of a run: random queries, and the values learned for each class.

    Raises:
        InputError: the folder is not a run's, has no checkpoint, its data are missing, or the
            picture cannot be written.
    """
    record = records.read(path)
    source = open_best(record, gpu_id)
    parts = [neighbours_picture(source, seed)]
    history = record.folder.classes.load()
    train = source.training_images(history["names"].tolist()) if history else None
    if train is not None:
        learned = values.values_by_name(record, history)
        parts += [class_values_picture(name, values, train) for name, values in learned.items()]
    save_picture(below(parts), Path(out))
    return Path(out)


def keep_pictures(args: argparse.Namespace, without: Sequence[str]) -> None:
    """Warns that the page will have no pictures, because images are missing.

    Args:
        without: for each run without images, a sentence that says why.

    Raises:
        InputError: the page would replace an older one, which may have pictures.
    """
    kept = Path(args.runs[0], "report.html")
    if without and args.out is None and len(args.runs) == 1 and kept.is_file():
        raise InputError(
            f"{without[0]}. A new page would have no pictures, so {kept} stays as it is; --out "
            "FILE writes one without them"
        )
    for why in without:
        logging.getLogger("report").warning("%s; the page has no pictures of it", why)


def main(args: argparse.Namespace) -> None:
    """Runs report.py with parsed options."""
    hear(logging.WARNING)
    asked = {f"--{name}": getattr(args, name) for name in ("out", "picture", "csv", "latex")}
    compared = lines.run_folders(Path(args.compare)) if args.compare else []
    kept = [file for folder in (*args.runs, *compared) for file in files_of(folder)]
    check_outputs(asked, [*kept, *([args.embeddings] if args.embeddings else [])])
    if args.compare:
        overview.compare(args)
    elif args.picture:
        out = draw(args.runs[0], args.picture, seed=args.seed, gpu_id=args.gpu_id)
        say(f"picture written to {out}")
    else:
        without = [why for path in args.runs if (why := without_images(path))]
        keep_pictures(args, without)
        out = make(
            args.runs,
            args.out,
            queries=args.queries,
            embeddings=args.embeddings,
            seed=args.seed,
            gpu_id=args.gpu_id,
        )
        say(f"report written to {out} ({in_bytes(out.stat().st_size)})")


if __name__ == "__main__":
    door.loaded()
    with sentence_errors(), door.answering():
        main(ARGS)

"""`train.py --folds K`: one training for each fold of the training classes, and their mean.

Each fold is a run of its own in a common folder, so that a command that was stopped continues where
it was when it is given again. The test classes are not used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import options
import processes
from evaluation import meanings, tables
from evaluation.tables import Row
from flags import Options
from metrics.comparison import mean_and_deviation
from page.records import metrics_in, read
from runs import RunFolder, data_name
from storage import write_json, write_table
from terminal import as_shell, paragraph, say
from utils import InputError, program

Numbers = Mapping[str, float]


def train_each(args: Options, words: Sequence[str]) -> int:
    """Trains the folds one after the other, each in a process of its own, and prints their mean.

    Args:
        words: of the command line of this training, without the flags for a fold.

    Returns:
        The exit status: that of the first training which did not come to its end, else 0.

    Raises:
        InputError: the folder holds folds of another command.
    """
    folder = folder_of(args)
    _check_same(args, words, folder)
    command = [sys.executable, *sys.orig_argv[1:]]
    ended: list[Path] = []
    for fold in range(args.folds):
        path = folder / f"fold{fold}"
        say(f"\nfold {fold} of {args.folds}: {path}", flush=True)
        if not (path / "results.json").is_file():
            status = processes.run([*command, *_of_fold(args, folder, fold)], _environment())
            if status:
                return _print_unfinished(status, fold, args)
        ended.append(path)
    if not args.dry_run:
        conclude(folder, ended)
    return 0


def folder_of(args: Options) -> Path:
    """The folder of the folds of a command, always the same for the same command."""
    name = args.name or f"{data_name(args.dataset)}_{args.model}_{args.loss}"
    return Path(args.LOG_DIR) / f"{name.replace(os.sep, '-')}-folds{args.folds}"


def _check_same(args: Options, words: Sequence[str], folder: Path) -> None:
    """Raises InputError if a fold was trained, or begun, by another command."""
    for fold in range(args.folds):
        path = folder / f"fold{fold}"
        if not (path / "args.json").is_file():
            continue
        asked = options.parse_train([*words, *_of_fold(args, folder, fold)])
        if not options.is_of(RunFolder(path).read_args(), asked):
            raise InputError(
                f"{path} is of a command with other flags; give this one another --name, or "
                f"remove {folder}"
            )


def _of_fold(args: Options, folder: Path, fold: int) -> list[str]:
    """The flags that make the command train one fold; later flags win."""
    words = f"--val-folds {args.folds} --folds 0 --val-fold {fold} --no-test --resume auto"
    return [*words.split(), "--LOG_DIR", str(folder), "--name", f"fold{fold}"]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1"}  # so that lines come in their order


def _print_unfinished(status: int, fold: int, args: Options) -> int:
    """Prints how to continue; returns the exit status (a training killed by signal N has -N)."""
    say(f"fold {fold} of {args.folds} has not ended; the same command goes on there", flush=True)
    return status if status > 0 else 128 - status


def conclude(folder: Path, runs: Sequence[Path]) -> None:
    """Prints the table of the folds with their mean, and writes folds.csv and folds.json."""
    found = [read(path) for path in runs]
    last = [metrics_in(record.evaluated[-1]) for record in found]
    rows = [Row(meanings.VALIDATION, path.name, n) for path, n in zip(runs, last, strict=True)]
    if len(last) > 1:
        means, deviation = mean_and_deviation(last)
        deviation = meanings.without_counts(deviation)
        rows.append(
            Row(meanings.VALIDATION, "mean", means, deviation, repeats=len(last), repeated="folds")
        )
    say("\nClasses that took no part in the training, after the last epoch:")
    say(tables.text(rows))
    say(tables.footnote(rows))
    best = [(record.best_epoch, record.results[meanings.VALIDATION]["R@1"]) for record in found]
    words = ", ".join(f"{value:.4f} after epoch {epoch}" for epoch, value in best)
    say(paragraph(f"Highest R@1 of each fold, picked on itself: {words}."))
    write_table(folder / "folds.csv", *tables.csv_table(rows))
    content = {
        "folds": [dict(numbers) for numbers in last],
        "best": [{"epoch": epoch, "R@1": value} for epoch, value in best],
    }
    if len(last) > 1:
        content |= {"mean": rows[-1].numbers, "half_width_95": rows[-1].spread}
    write_json(folder / "folds.json", content)
    say(f"written to {folder / 'folds.json'} and folds.csv")
    say(f"page of all: {program('report')} --compare {as_shell(folder)}")


def start(args: Options) -> None:
    """Trains the folds of this process's own command, and ends the process.

    Raises:
        InputError: this is one of several processes, which would meet once, and not for each fold.
    """
    if os.environ.get("WORLD_SIZE"):
        if (os.environ.get("RANK") or "0") != "0":
            sys.exit(2)  # process 0 prints the reason
        raise InputError(
            "--folds starts the processes of each fold itself, so start it without torchrun (unset "
            "RANK and WORLD_SIZE); --gpu-id -1 takes all GPUs of this machine"
        )
    sys.exit(train_each(args, sys.argv[1:]))

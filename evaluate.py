"""Checkpoint → embeddings → metrics on classes that were never trained on.

    python evaluate.py --resume logs/RUN
    python evaluate.py --resume logs/*/emoji_resnet18_best.pth --bootstrap 1000 --latex table.tex
    python evaluate.py --model resnet50 --pooling avg --dataset cub

Options → checkpoints are opened → each is measured → the numbers are concluded from, printed and
written. A checkpoint of ours knows its own data set and network; a released one needs the flags of
both.
"""

from __future__ import annotations

import door

if __name__ == "__main__":
    door.enter(loads_torch=True)

import options

ARGS = options.parse_evaluate() if __name__ == "__main__" else None

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import dataset
import processes
from dataset.overlap import shared_names
from devices import Precision, pick_device
from evaluation import files, tables
from evaluation.candidates import (
    Candidate,
    averages,
    bootstrapped,
    caption,
    doubts,
    fingerprints,
    labels_of,
    paired_tests,
)
from evaluation.embedding import Embedded
from evaluation.measuring import How, measure_all, print_thresholds
from evaluation.networks import Opened, all_checkpoint_files, open_checkpoint, open_untrained
from evaluation.tables import Row
from evaluation.tasks import Task, images_of, on_the_same_images
from evaluation.whitening import whitened
from metrics.comparison import Test
from options.ranking import ranking_of
from runs import files_of
from storage import check_outputs, write_content, write_json, write_table
from terminal import fitted, hear, notice_if_slow, paragraph, say
from utils import ROOM_ON_A_GPU, InputError, full_gpu_in_words, human_seconds, sentence_errors

logger = logging.getLogger("evaluate")


def run(args: argparse.Namespace) -> None:
    """Evaluates the checkpoints of `args.resume`; prints, and where asked writes, the results."""
    processes.check_alike(partial(options.of_all_processes, args), "give all of them the same")
    checkpoints = all_checkpoint_files(args.resume or ())
    processes.from_main(partial(check_files, args, checkpoints))
    device = pick_device(processes.gpu(args.gpu_id))
    precision = Precision(args.amp, device)
    processes.check_alike(precision.shared, "give all the same --amp, and machines that are alike")
    candidates = open_candidates(args, checkpoints)
    processes.check_alike(partial(fingerprints, candidates), "give all of them the same files")
    check_requests(args, candidates)
    for position, candidate in enumerate(candidates):
        candidates[position] = measured(candidate, args, precision)
        if len(candidates) > 1:
            candidates[position] = without_images(candidates[position])
    conclude(args, candidates)
    if len(candidates) == 1:
        write_single_images(args, candidates[0], precision)


# --- open -----------------------------------------------------------------------------------------


def open_candidates(args: argparse.Namespace, checkpoints: Sequence[Path]) -> list[Candidate]:
    """Opens these checkpoints, or --model as it starts, before the first is evaluated.

    A data set is read once.

    Raises:
        InputError: a checkpoint cannot be used, or the data are not there.
    """
    paths = [str(file) for file in checkpoints]
    openers = [partial(open_checkpoint, path, args, weights=args.weights) for path in paths]
    if not paths:
        paths, openers = [args.model], [partial(open_untrained, args)]
    loaded: dict[tuple[dataset.Choice, frozenset[str]], list[Task]] = {}
    candidates = []
    for path, label, open_network in zip(paths, labels_of(paths), openers, strict=True):
        with notice_if_slow(f"loading {path}"):
            opened = open_network()
        images = opened.data, opened.data.never_held_out
        if images not in loaded:
            tasks = opened.tasks(args.ks)
            dataset.require_files(None, images_of(tasks), opened.viewing.max_bad_images)
            loaded[images] = [task for one in tasks for task in one.at(args.dims)]
        warn_of_trained(path, opened, loaded[images])
        if opened.other_pixels:
            logger.warning("%s: %s", path, opened.other_pixels)
        try:
            opened.network.keep(max(args.dims, default=None))
        except InputError as error:
            raise InputError(f"--dims: {path}: {error}") from None
        candidates.append(Candidate.of(opened, path, label, loaded[images], args.kmeans_restarts))
    return candidates


def warn_of_trained(path: str, opened: Opened, tasks: Sequence[Task]) -> None:
    """Warns of classes of the user's own images with the name of a class that was trained on."""
    if opened.trained_on is None or dataset.find(opened.data.name).place is None:
        return
    shared = shared_names(opened.trained_on.class_names, *images_of(tasks))
    if said := shared.warning():
        logger.warning("%s: %s", path, said)


def check_files(args: argparse.Namespace, checkpoints: Sequence[Path]) -> None:
    """Raises InputError, before the work begins, if an output file cannot be written."""
    names = ("json", "csv", "latex", "per_class", "export", "uncertain", "neighbours")
    asked = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    kept = [own for folder in {file.parent for file in checkpoints} for own in files_of(folder)]
    folders = [Path(args.out)] if args.out else [file.parent for file in checkpoints]
    for option, written in files.WRITTEN.items():
        if getattr(args, option):
            asked |= {f"--{option}'s {n}": folder / n for folder in folders for n in written}
    kind, _, table = args.dataset.partition(":")
    listed = [table] if kind.lower() == "csv" else []
    check_outputs(asked, [*checkpoints, *kept, *listed, *(args.query or ())])


def check_requests(args: argparse.Namespace, candidates: Sequence[Candidate]) -> None:
    """Raises InputError if a checkpoint lacks what a flag needs, or a query is not an image.

    So it does where something is asked about one checkpoint, and there are several.
    """
    options.check_one_checkpoint(args, len(candidates))
    if args.uncertain and "uncertainty" not in candidates[0].network.heads:
        raise InputError(
            f"--uncertain: {candidates[0].path} has no uncertainty head; evaluate a checkpoint "
            "that was trained with --introspective"
        )
    options.check_metrics(args, [dataset.find(candidate.data.name) for candidate in candidates])
    if args.query:
        files.own_images(args.query, like=candidates[0].tasks[0].queries)


# --- measure --------------------------------------------------------------------------------------


def measured(candidate: Candidate, args: argparse.Namespace, precision: Precision) -> Candidate:
    """Evaluates a checkpoint, and prints what it is evaluated on."""
    network, ranking = candidate.network, ranking_of(args)
    network.to(precision.device, memory_format=precision.memory_format)
    done = ranking.in_words()
    if args.whiten is not None:
        network = whitened(network, candidate.origin, candidate.viewing, precision, args.whiten)
        done = f"whitened to {network.test_size}{', ' if done else ''}{done}"
    how = How(args.metrics, args.seed, args.kmeans_restarts, args.block_size, ranking or None)
    results = []
    for tasks in on_the_same_images(candidate.tasks):
        found = measure_all(network, tasks, precision, candidate.viewing, how)
        results += found
        kept = {"ema": ", running mean of the weights", "raw": ", raw weights"}
        about = f"{tasks[0].name}: {found[0].task.describe()}{kept.get(candidate.weights, '')}"
        about += f", {done}" if done else ""
        about += f", {human_seconds(sum(result.seconds for result in found))}"
        about = f"{candidate.label}, {about}" if candidate.label else about
        say(fitted(about, "  "), flush=True)
    # Candidates on the same data share this list, so that all are reduced to readable images.
    candidate.tasks[:] = [result.task for result in results]
    return replace(candidate, network=network, results=results, postprocessing=done)


def without_images(candidate: Candidate) -> Candidate:
    """Frees what only single images need: embeddings, and the network's place on the GPU."""
    candidate.network.cpu()
    results = [replace(r, embeddings=torch.empty(0), gallery=None) for r in candidate.results]
    return replace(candidate, results=results)


# --- conclude -------------------------------------------------------------------------------------


@processes.main_only
def conclude(args: argparse.Namespace, candidates: list[Candidate]) -> None:
    """Prints tables and tests, and writes them to files."""
    if args.bootstrap:
        with notice_if_slow(f"drawing {args.bootstrap:,} resamples"):
            candidates = bootstrapped(candidates, args.bootstrap, args.seed)
    tests = paired_tests(candidates)
    rows = [row for candidate in candidates for row in candidate.rows()] + averages(candidates)
    named = "metrics" in args.given and "verification" in args.metrics
    shown = rows if named else tables.without_verification(rows)
    print_results(candidates, shown, tests, args.bootstrap, args.remark)
    write_tables(args, candidates, rows, shown, tests)


def print_results(
    candidates: Sequence[Candidate],
    rows: Sequence[Row],
    tests: Sequence[Test],
    resamples: int | None,
    remark: str = "",
) -> None:
    """Prints the table, the meanings of its columns, and how sure the numbers are."""
    if remark:
        say(remark)
    say(tables.text(rows))
    say(tables.footnote(rows))
    for about in doubts(candidates):
        say(fitted(about, "  "))
    if len(candidates) == 1 or "EER" in tables.columns(rows):  # of several, only where asked for
        for candidate in candidates:
            print_thresholds(candidate.results, candidate.label)
    if resamples:
        about = "95 % intervals over the classes, the network as it is"
        say(fitted(f"\n{about} ({resamples:,} bootstrap resamples):"))
        say(tables.interval_text([row for row in rows if row.intervals]))
    for test in tests:
        say(fitted(f"\nB = {test.b} less A = {test.a} on {test.task}"))
        say(tables.difference_text(test.differences, test.corrected))
    if tests:
        say(paragraph(tables.about_tests(tests, resamples)))


def write_tables(
    args: argparse.Namespace,
    candidates: Sequence[Candidate],
    rows: Sequence[Row],
    shown: Sequence[Row],
    tests: Sequence[Test],
) -> None:
    """Writes --json and --csv, with all numbers, and --latex, with those that are printed."""
    if args.json:
        content = tables.json_content(rows, tests, seed=args.seed, bootstrap=args.bootstrap)
        content |= {"remark": args.remark} if args.remark else {}
        write_json(Path(args.json), content)
        say(f"numbers written to {args.json}")
    if args.csv:
        write_table(Path(args.csv), *tables.csv_table(rows))
        say(f"table written to {args.csv}")
    if args.latex:
        write_content(Path(args.latex), tables.latex(shown, caption(candidates, shown), args.latex))
        say(f"table for a paper written to {args.latex}")


def write_single_images(
    args: argparse.Namespace, candidate: Candidate, precision: Precision
) -> None:
    """Writes the files about single images, for the first task."""
    task, result = candidate.tasks[0], candidate.results[0]
    subject = files.Subject(
        candidate.network,
        precision,
        candidate.viewing,
        Embedded(task, result.embeddings, result.gallery),
        result.per_query,
        Path(args.out) if args.out else Path(candidate.path).parent,
        args.seed,
        args.top,
    )
    for option, write in files.WRITERS.items():
        if asked := getattr(args, option):
            with notice_if_slow(f"working on --{option.replace('_', '-')}"):
                written = write(subject, asked)
            say(fitted(written, "  "))


# --- the command ----------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    """Runs evaluate.py with parsed options, in one process or, for `--gpu-id -1`, several."""
    if (count := processes.wanted(args.gpu_id)) > 1:
        sys.exit(processes.launch([sys.executable, *sys.orig_argv[1:]], count))
    full = f"the GPU's memory is full; lower --batch-size, {ROOM_ON_A_GPU}"
    with processes.joined(), full_gpu_in_words(full):
        hear(logging.WARNING if processes.is_main() else logging.ERROR)
        run(args)


if __name__ == "__main__":
    door.loaded()
    with processes.ended_at_once(), sentence_errors(), door.answering():
        main(ARGS)

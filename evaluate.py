"""Checkpoint → embeddings → metrics on classes that were never trained on.

    python evaluate.py --resume logs/RUN/emoji_resnet18_best.pth
    python evaluate.py --resume logs/*/emoji_resnet18_best.pth --bootstrap 1000 --latex table.tex

A checkpoint of ours knows its own data set and network; a released one needs the flags of both.
"""

from __future__ import annotations

import options

ARGS = options.parse_evaluate() if __name__ == "__main__" else None

import argparse
import contextlib
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import dataset
import inspection
import metrics
import net
import processes
import tables
from candidates import (
    DRAWS,
    OFFICIAL,
    Candidate,
    Test,
    averages,
    bootstrapped,
    caption,
    json_content,
    labels_of,
    paired_tests,
    rows_of,
)
from dataset.base import ImageSet
from dataset.loader import eval_loader
from devices import Precision, pick_device
from runs import load_checkpoint
from tables import Row
from utils import (
    InputError,
    human_seconds,
    sentence_errors,
    write_atomically,
    write_json,
    write_table,
)

KEPT_FLAGS = ("dataset", "data_root", "eval_classes", "split_seed", "ratio_classes")
KEPT_FLAGS += ("image_size", "eval_zoom", "eval_resize", "batch_size")
"""What an evaluation takes over from the run that made the checkpoint, unless it is given."""
READING = ("decode", "data_device", "cache_dir", "cache_size")

# --- what is evaluated ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """One retrieval task: queries against themselves, or against a gallery.

    `ks` are the K of R@K; `group_name` says what `queries.groups` are, where a query's own group is
    also left out of the gallery for a second R@1; `official` asks for the protocol of VehicleID's
    authors too: one image of each class, drawn at random, is the gallery of all the others.
    """

    title: str
    queries: ImageSet
    gallery: ImageSet | None
    ks: tuple[int, ...]
    group_name: str | None = None
    official: bool = False

    @classmethod
    def published(
        cls,
        title: str,
        queries: ImageSet,
        gallery: ImageSet | None,
        protocol: dataset.Protocol,
        ks: Sequence[int] | None = None,
    ) -> Evaluation:
        """With the K asked for, or else those of the papers that the gallery has images for.

        Raises:
            InputError: a K asked for exceeds the gallery.
        """
        size = len(queries if gallery is None else gallery)
        wanted = ks or [k for k in protocol.ks if k <= size]
        try:
            metrics.check_ks(wanted, size)
        except ValueError as error:
            raise InputError(f"{title}: {error}") from error
        # The data sets that come in several lists are VehicleID's.
        official = bool(protocol.sizes)
        return cls(title, queries, gallery, tuple(wanted), protocol.group_name, official)

    def describe(self) -> str:
        """Counts, in words."""
        text = f"{len(self.queries):,} images, {self.queries.num_classes:,} classes"
        return f"{text}, gallery {len(self.gallery):,} images" if self.gallery else text


def data_choice(args: argparse.Namespace) -> dataset.Choice:
    """The data that the options ask for."""
    return dataset.Choice(
        args.dataset, args.data_root, args.eval_classes, args.split_seed, args.ratio_classes
    )


def evaluations(data: dataset.Choice, ks: Sequence[int] | None = None) -> list[Evaluation]:
    """The published evaluation of a data set; VehicleID has three, the large one first.

    Raises:
        InputError: the data set is unknown or not there.
    """
    name, protocol = data.name, data.protocol
    if protocol.query_gallery:
        query, gallery = (data.load(split) for split in ("query", "gallery"))
        return [Evaluation.published(name, query, gallery, protocol, ks)]
    if protocol.sizes:
        lists = {size: data.load("eval", size=size) for size in protocol.sizes}
        return [
            Evaluation.published(f"{name} {size}", queries, None, protocol, ks)
            for size, queries in lists.items()
        ]
    queries = data.load("eval")
    return [Evaluation.published(name, queries, None, protocol, ks)]


# --- networks -------------------------------------------------------------------------------------


def resolve_data_defaults(args: argparse.Namespace) -> None:
    """Fills in what the data set decides: image size, pretrained weights, stem, BatchNorm.

    Raises:
        InputError: an unknown data set, or evaluation is to cut more out of an image than it has.
    """
    protocol = dataset.protocol(args.dataset)
    if args.image_size is None:
        args.image_size = protocol.image_size
    if args.eval_resize is not None and args.eval_resize < args.image_size:
        raise InputError(
            f"--eval-resize {args.eval_resize} is less than the {args.image_size} pixels that are "
            f"cut out of the image; choose at least {args.image_size}"
        )
    if args.pretrained is None:
        args.pretrained = protocol.pretrained
    if args.stem is None:
        args.stem = net.find_backbone(args.model).default_stem(args.image_size)
    if args.bn_freeze is None:
        args.bn_freeze = "0" if args.pretrained == "none" else "1"


def load_network(checkpoint: dict, args: argparse.Namespace) -> net.EmbeddingNet:
    """The network that a checkpoint holds, with what the flags given say otherwise.

    Raises:
        InputError: the flags, or the file, describe another network.
    """
    held = net.architecture_of(checkpoint, args.resume, image_size=args.image_size)
    given = {name: value for name, value in vars(args).items() if name in args.given}
    network = net.build(replace(held, **net.Architecture.entries(given)))
    net.load_checkpoint(network, checkpoint, source=args.resume)
    return network


# --- embedding ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Viewing:
    """How evaluation looks at images: see the flags of the same names."""

    batch_size: int
    workers: int
    image_size: int
    zoom: float = 1.0
    resize: int | None = None
    decode: str = "exact"
    data_device: str | None = None
    cache_dir: str | None = None
    cache_size: int = 256

    @classmethod
    def of(cls, args: argparse.Namespace) -> Viewing:
        """From the options."""
        return cls(
            args.batch_size,
            args.workers,
            args.image_size,
            args.eval_zoom,
            args.eval_resize,
            **reading(args),
        )


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """Where loaders take their pixels from: see `dataset.loader`."""
    return {name: getattr(args, name) for name in READING}


@torch.inference_mode()
def embed(
    network: net.EmbeddingNet,
    images: ImageSet,
    precision: Precision,
    viewing: Viewing,
    *,
    title: str = "embedding",
    represent: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Test-time embeddings of all images, in their order; several processes share the batches.

    Args:
        represent: what else a batch of images (B, 3, S, S) becomes; None is `network.embed`.

    Returns:
        (N, d) float32 on the network's device, raw (the metrics normalise).
    """
    network.eval()
    represent = represent or network.embed
    size = viewing.batch_size
    count = math.ceil(len(images) / size)
    own = processes.shard(count)
    loader = eval_loader(
        images,
        spec=network.input,
        device=precision.device,
        batches=slice(own.start, max(own.stop, own.start + 1)),  # never nothing
        **vars(viewing),
    )
    parts, total = [], min(len(loader) * size, len(images))
    with tqdm(total=total, desc=title, unit="img", leave=False, disable=_no_bars()) as bar:
        for batch in loader:
            with precision.autocast():
                parts.append(represent(batch.images).float())
            bar.update(len(batch.labels))
    return _gathered(torch.cat(parts), own, size, len(images))


def _gathered(rows: torch.Tensor, own: slice, size: int, total: int) -> torch.Tensor:
    """The rows of all processes, each of which has made the batches `own` of `size` rows."""
    if processes.world() == 1:
        return rows
    batches = rows.new_zeros((own.stop - own.start) * size, *rows.shape[1:])
    whole = rows[: len(batches)]
    batches[: len(whole)] = whole
    batches = batches.view(-1, size, *rows.shape[1:])
    return processes.gather_rows(batches, math.ceil(total / size)).flatten(0, 1)[:total]


def _no_bars() -> bool | None:
    """What tqdm's `disable` is: off a terminal, and in all processes but the main one."""
    return None if processes.is_main() else True


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[metrics.Progress]:
    """A bar for work that tells its share done, in 0..1; nothing off a terminal."""
    look = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=1.0, desc=title, bar_format=look, leave=False, disable=_no_bars()) as bar:
        yield lambda share: bar.update(share - bar.n)


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """The numbers of one evaluation, and the embeddings they were computed from.

    `per_query` is what retrieval gave each query (`metrics.retrieval_per_query`), and the second
    R@1 where the task has one; None where retrieval was not computed.
    """

    title: str
    numbers: dict[str, float]
    embeddings: torch.Tensor
    gallery: torch.Tensor | None
    seconds: float
    per_query: dict[str, torch.Tensor] | None = None


def evaluate(
    network: net.EmbeddingNet,
    task: Evaluation,
    precision: Precision,
    viewing: Viewing,
    *,
    seed: int = 1,
    kmeans_restarts: int = 1,
    chosen: Sequence[str] = options.METRICS,
    block_size: int | None = None,
) -> Result:
    """Embeds and measures one evaluation; `chosen` are those of `options.METRICS` to compute.

    Raises:
        InputError: the embeddings are not finite, or K exceeds the gallery.
    """
    start = time.perf_counter()
    x = embed(network, task.queries, precision, viewing, title=task.title)
    y = None
    if task.gallery is not None:
        y = embed(network, task.gallery, precision, viewing, title=f"{task.title} gallery")
    numbers: dict[str, float] = {}
    per_query = None
    try:
        if "retrieval" in chosen:
            per_query = _retrieval(task, x, y, block_size)
            numbers |= metrics.summarise(per_query, task.ks)
            extra = [name for name in per_query if name.startswith("R@")]
            numbers |= {name: float(per_query[name].mean()) for name in extra}
        if "official" in chosen and task.official:
            numbers |= _official(task, x, seed, block_size)
        if {"nmi", "f1", "ami"} & set(chosen):
            cluster = partial(_agreement, task, x, y, seed, kmeans_restarts, "ami" in chosen)
            found = processes.from_main(cluster)
            numbers |= {name: value for name, value in found.items() if name.lower() in chosen}
    except ValueError as error:
        raise InputError(f"{task.title}: {error}") from error
    return Result(task.title, numbers, x, y, time.perf_counter() - start, per_query)


def _retrieval(
    task: Evaluation, x: torch.Tensor, y: torch.Tensor | None, block_size: int | None
) -> dict[str, torch.Tensor]:
    gallery_labels = None if task.gallery is None else task.gallery.labels
    search = {"block_size": block_size, "share": _share()}
    with progress_bar(f"{task.title} search") as bar:
        found = metrics.retrieval_per_query(
            x, task.queries.labels, y, gallery_labels, progress=bar, **search
        )
    groups = task.queries.groups
    if task.group_name and groups is not None:
        with progress_bar(f"{task.title} other {task.group_name}s") as bar:
            others = metrics.retrieval_per_query(
                x, task.queries.labels, exclude=groups, progress=bar, **search
            )
        hits = (others["rank"] < 1) & (others["relevant"] > 0)
        found[f"R@1 other {task.group_name}s"] = hits.double()
    return found


def _share() -> metrics.Share:
    return metrics.Share(processes.rank(), processes.world(), processes.sum_over)


def _official(
    task: Evaluation, x: torch.Tensor, seed: int, block_size: int | None
) -> dict[str, float]:
    ks = [k for k in task.ks if k <= len(set(task.queries.labels.tolist()))]
    found = metrics.one_per_class_gallery(
        x, task.queries.labels, DRAWS, seed, ks, block_size=block_size, share=_share()
    )
    return {OFFICIAL + name: value for name, value in found.items()}


def _agreement(
    task: Evaluation,
    x: torch.Tensor,
    y: torch.Tensor | None,
    seed: int,
    restarts: int,
    ami: bool,
) -> dict[str, float]:
    labels = torch.from_numpy(task.queries.labels)
    if task.gallery is not None and y is not None:
        x = torch.cat([x, y])
        labels = torch.cat([labels, torch.from_numpy(task.gallery.labels)])
    with progress_bar(f"{task.title} k-means") as bar:
        return metrics.clustering_metrics(
            x, labels, seed=seed, restarts=restarts, ami=ami, progress=bar
        )


# --- tables ---------------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> str:
    """The metrics as an aligned table, one row an evaluation."""
    return tables.text([row for result in results for row in rows_of(result)])


# --- checkpoints ----------------------------------------------------------------------------------


def data_options(checkpoint: dict, args: argparse.Namespace) -> argparse.Namespace:
    """The options with the checkpoint's own data set and image size, where none are given."""
    stored = checkpoint.get("args", {})
    spec = net.architecture_of(checkpoint, args.resume).input_spec
    if spec is not None:
        stored = {"image_size": net.INPUTS[spec].size, **stored}
    # A flag that the run left open, or did not have yet, is None: the default.
    kept = [name for name in KEPT_FLAGS if stored.get(name) is not None]
    own = {name: stored[name] for name in kept if name not in args.given}
    return argparse.Namespace(**{**vars(args), **own})


def open_candidates(args: argparse.Namespace) -> list[Candidate]:
    """Reads all checkpoints of --resume, before the first is evaluated; a data set is read once.

    Raises:
        InputError: a checkpoint cannot be used, or the data are not there.
    """
    loaded: dict[dataset.Choice, list[Evaluation]] = {}
    candidates = []
    for path, label in zip(args.resume, labels_of(args.resume), strict=True):
        checkpoint = load_checkpoint(path)
        own = argparse.Namespace(**{**vars(args), "resume": path})
        own = data_options(checkpoint, own)
        resolve_data_defaults(own)
        data = data_choice(own)
        if data not in loaded:
            loaded[data] = evaluations(data, own.ks)
        network = load_network(checkpoint, own)
        trained = checkpoint.get("args", {})
        candidates.append(Candidate(path, label, own, trained, network, loaded[data]))
    return candidates


def measure(candidate: Candidate, precision: Precision) -> Candidate:
    """Evaluates a checkpoint, and says what it was evaluated on."""
    args, network = candidate.args, candidate.network
    network.to(precision.device, memory_format=precision.memory_format)
    results = []
    for task in candidate.tasks:
        result = evaluate(
            network,
            task,
            precision,
            Viewing.of(args),
            seed=args.seed,
            kmeans_restarts=args.kmeans_restarts,
            chosen=args.metrics,
            block_size=args.block_size,
        )
        results.append(result)
        about = f"{task.title}: {task.describe()}, {human_seconds(result.seconds)}"
        print(f"{candidate.label}, {about}" if candidate.label else about, flush=True)
    return replace(candidate, results=results)


def without_images(candidate: Candidate) -> Candidate:
    """The candidate with its numbers alone, which is all that a comparison needs."""
    candidate.network.cpu()
    results = [replace(r, embeddings=torch.empty(0), gallery=None) for r in candidate.results]
    return replace(candidate, results=results)


# --- the command ----------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Evaluates the checkpoints of `args.resume`; prints, and where asked writes, the results."""
    check_outputs(args)
    device = pick_device(processes.local_rank() if processes.is_group() else args.gpu_id)
    precision = Precision(args.amp, device)
    candidates = open_candidates(args)
    check_requests(args, candidates)
    for position, candidate in enumerate(candidates):
        candidates[position] = measure(candidate, precision)
        if len(candidates) > 1:
            candidates[position] = without_images(candidates[position])
    conclude(args, candidates)
    if len(candidates) == 1:
        write_single_images(candidates[0], precision)


@processes.main_only
def conclude(args: argparse.Namespace, candidates: list[Candidate]) -> None:
    """Tables and tests, on the screen and in files."""
    tests = []
    if args.bootstrap:
        candidates = bootstrapped(candidates, args.bootstrap, args.seed)
        tests = paired_tests(candidates)
    rows = [row for candidate in candidates for row in candidate.rows()] + averages(candidates)
    print_results(args, candidates, rows, tests)
    write_tables(args, candidates, rows, tests)


def check_outputs(args: argparse.Namespace) -> None:
    """Raises InputError when a file that is asked for cannot be written: before the work."""
    names = ("json", "csv", "latex", "per_class", "export", "uncertain", "neighbours")
    asked = {name: Path(getattr(args, name)) for name in names if getattr(args, name)}
    owner: dict[Path, str] = {}
    for name, path in asked.items():
        flag = f"--{name.replace('_', '-')}"
        other = owner.setdefault(path.resolve(), flag)
        if other != flag:
            raise InputError(f"{other} and {flag} both name {path}; name two files")
        if path.is_dir():
            raise InputError(f"{flag}: {path} is a folder; name a file")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise InputError(
                f"{flag}: {path} cannot be written ({error.strerror}); choose another folder"
            ) from error


def check_requests(args: argparse.Namespace, candidates: Sequence[Candidate]) -> None:
    """Raises InputError when a checkpoint lacks what is asked about it, or a query is no image."""
    if args.uncertain and "uncertainty" not in candidates[0].network.heads:
        raise InputError(
            f"--uncertain: {args.resume[0]} has no uncertainty head; evaluate a checkpoint that "
            "was trained with --introspective"
        )
    if args.query:
        inspection.own_images(args.query, like=candidates[0].tasks[0].queries)


def print_results(
    args: argparse.Namespace,
    candidates: Sequence[Candidate],
    rows: Sequence[Row],
    tests: Sequence[Test],
) -> None:
    """The table, what its columns mean, and how sure the numbers are."""
    print(tables.text(rows))
    print(tables.footnote(rows))
    for result in candidates[0].results:
        if alone := result.numbers.get("queries_without_match"):
            print(
                f"{result.title}: {alone:,} queries have no other image of their class; they are "
                "misses in R@K and MRR, and are left out of RP, MAP@R and mARP."
            )
    if args.bootstrap:
        print(
            f"\n95 % intervals over the queries, the network as it is ({args.bootstrap:,} "
            "bootstrap resamples):"
        )
        print(tables.interval_text([row for row in rows if row.intervals]))
    for test in tests:
        print(f"\nIs B = {test.b} better than A = {test.a} on {test.task}? (paired bootstrap;")
        print("p: share of the resamples in which it is not)")
        print(tables.difference_text(test.differences))


def write_tables(
    args: argparse.Namespace,
    candidates: Sequence[Candidate],
    rows: Sequence[Row],
    tests: Sequence[Test],
) -> None:
    """--json, --csv and --latex."""
    if args.json:
        write_json(Path(args.json), json_content(args, rows, tests))
        print(f"numbers written to {args.json}")
    if args.csv:
        write_table(Path(args.csv), *tables.csv_table(rows))
        print(f"table written to {args.csv}")
    if args.latex:
        content = tables.latex(rows, caption(candidates, rows))
        write_atomically(Path(args.latex), lambda file: file.write(content.encode()))
        print(f"table for a paper written to {args.latex}")


def write_single_images(candidate: Candidate, precision: Precision) -> None:
    """What is asked for about single images, of the first evaluation."""
    args, network = candidate.args, candidate.network
    task, result = candidate.tasks[0], candidate.results[0]
    shown = inspection.Embedded(task.queries, result.embeddings, task.gallery, result.gallery)
    viewing = Viewing.of(args)
    folder = Path(args.out) if args.out else Path(candidate.path).parent

    def uncertainty(images: ImageSet | None) -> torch.Tensor | None:
        if images is None or "uncertainty" not in network.heads:
            return None
        return embed(
            network,
            images,
            precision,
            viewing,
            title="uncertainty",
            represent=lambda batch: network(batch).uncertainty,
        )

    def write(function: Callable, *arguments: Any) -> Any:
        """Calls in the main process what all processes have made the arguments for."""
        return processes.from_main(partial(function, *arguments))

    if args.per_class:
        write(inspection.write_classes, Path(args.per_class), task.queries, candidate.scores())
        print(f"metrics of each class written to {args.per_class}")
    if args.export:
        uncertain = [uncertainty(images) for images in (task.queries, task.gallery)]
        write(inspection.export, Path(args.export), shown, uncertain)
        print(f"embeddings written to {args.export}")
    if args.uncertain:
        norms = uncertainty(task.queries).norm(dim=1)
        write(inspection.write_uncertain, Path(args.uncertain), task.queries, norms)
        print(f"images by uncertainty written to {args.uncertain}")
    if args.neighbours:
        write(inspection.draw_neighbours, Path(args.neighbours), shown, args.seed, args.top)
        print(f"queries and their neighbours drawn to {args.neighbours}")
    if args.failures:
        wanted = (folder, shown, result.per_query, args.failures, args.top)
        files = write(inspection.write_failures, *wanted)
        listed = " and ".join(map(str, files))
        print(f"worst queries written to {listed}" if files else "no query failed")
    if args.query:
        queries = inspection.own_images(args.query, like=task.queries)
        once = replace(viewing, decode="exact", data_device=None)
        embeddings = embed(network, queries, precision, once, title="queries")
        files, answer = write(
            inspection.write_answers, folder, queries, embeddings, shown, args.top
        )
        print(answer)
        print(f"answers written to {' and '.join(map(str, files))}")


def main(args: argparse.Namespace) -> None:
    """Runs evaluate.py with parsed options, in one process or, for `--gpu-id -1`, several."""
    if (count := processes.wanted(args.gpu_id)) > 1:
        sys.exit(processes.launch([sys.executable, *sys.orig_argv[1:]], count))
    with processes.joined():
        if not processes.is_main():
            logging.disable(logging.WARNING)  # what the main process says is enough
        run(args)


if __name__ == "__main__":
    with sentence_errors():
        main(ARGS)

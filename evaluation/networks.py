"""A run, a folder or a file → the trained network, ready to look at images as its run did.

This is the one way in: evaluate.py, `load_run`, `python -m net export` and report.py open networks
here, and the run's own options decide whatever the caller leaves open.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import dataset
import net
import options
from dataset.files import is_gone
from evaluation.embedding import Viewing
from evaluation.tasks import Task, tasks_of
from machine import expanded
from net import hub
from net.building import whole
from net.peft import fingerprint
from runs import RunFolder, load_checkpoint
from utils import InputError, damage_in_words

logger = logging.getLogger("evaluate")

KEPT_FLAGS = ("dataset", "data_root", "eval_classes", "split_seed", "ratio_classes")
KEPT_FLAGS += ("image_size", "eval_zoom", "eval_resize", "batch_size", "max_bad_images", "exif")
"""What an evaluation takes over from the run that made the checkpoint, unless it is given."""
WEIGHTS_FILE = "model.safetensors"
"""The weights in a folder that was made to be shared: `python -m net export --push-to-hub`."""
LISTED = 5  # files or runs of a folder that an error names


@dataclass(frozen=True)
class Opened:
    """A trained network and what its run says of it.

    Attributes:
        path: the file that was read. content: all that is in it, with the weights that are used as
            its `model_state_dict`.
        weights: which they are, where a run has kept a running mean of them: `ema`, the mean, or
            `raw`; else empty.
        trained: the options of its training; empty for a released file.
        data, viewing: what it is evaluated on, and how images are looked at.
        network: on the CPU.
    """

    path: Path
    content: dict[str, Any]
    trained: dict[str, Any]
    data: dataset.Choice
    viewing: Viewing
    network: net.EmbeddingNet
    weights: str = ""

    @property
    def trained_on(self) -> dataset.TrainedOn | None:
        """Its training data; None where the file does not say: of an older version, or released."""
        entry = self.content.get("data")
        return None if entry is None else dataset.TrainedOn.of_entry(entry)

    @property
    def other_pixels(self) -> str | None:
        """In words, where the run's own evaluation saw its images in slightly other pixels.

        A cache of the size that evaluation wants has the pixels of the files, any other not.
        """
        size = self.trained.get("cache_size")
        same_images = self.data.name == self.trained.get("dataset")
        if self.trained.get("decode") != "cache" or not same_images:
            return None
        wanted = self.viewing.short_side(self.network.input)
        if self.viewing.reading.decode == "cache" or size == wanted:
            return None
        return (
            f"the run evaluated images of its cache, which were brought to {size} pixels first; "
            "here files are decoded, so the numbers may differ a little from the run's own, which "
            "--decode cache gives"
        )

    def tasks(self, ks: Sequence[int] | None = None) -> list[Task]:
        """What it is evaluated on; see `tasks_of`.

        Raises:
            InputError: the images are not there, or cannot be used.
        """
        if self.data.is_gone:
            raise InputError(
                f"{self.path}: the images that its run was judged on are not there any more "
                f"({looked_for(self.data, self.path.parent)}); name their new place, or other "
                "images: --dataset folder:PATH or csv:FILE"
            )
        return tasks_of(self.data, ks)


def found_again(choice: dataset.Choice, folder: Path) -> dataset.Choice:
    """The data of the run in `folder`, found from whatever folder this process works in.

    Own images that are not where their name says, read from here, are taken where the run noted
    that they lay.
    """
    if choice.is_gone and (place := RunFolder(folder).noted_place) is not None:
        return replace(choice, place=None if is_gone(place) else place)
    return choice


def looked_for(choice: dataset.Choice, folder: Path) -> str:
    """Where own images were looked for by `found_again`, in words."""
    places = dict.fromkeys([dataset.find(choice.name).place, RunFolder(folder).noted_place])
    places.pop(None, None)
    return f"{choice.name} was looked for in {' and in '.join(map(str, places))}"


def open_checkpoint(
    path: str | Path, asked: argparse.Namespace | None = None, *, weights: str | None = None
) -> Opened:
    """The network at `path`, built as its run built it.

    Args:
        path: see `checkpoint_file`.
        asked: the options of evaluate.py; those that were given go over the run's own. Without any,
            a released network sees images of the size that it was made for.
        weights: see `net.with_weights`.

    Raises:
        InputError: there is no such network, it cannot be read, or the options describe another.
    """
    path = checkpoint_file(path)
    content = load_checkpoint(path)
    chosen = net.with_weights(content, weights, path)
    with damage_in_words(f"checkpoint {path}", "use another copy of it, or another checkpoint"):
        opened = _opened(path, chosen, asked)
    return replace(opened, weights=(weights or "ema") if "ema_state_dict" in content else "")


def _opened(path: Path, content: dict[str, Any], asked: argparse.Namespace | None) -> Opened:
    """What a checkpoint holds, opened; see `open_checkpoint`."""
    content = whole(content, path)
    trained = content.get("args", {})
    if trained:
        options.kept(trained)  # its values are what such options can be
    held = net.architecture_of(content, path)
    own = {name: trained[name] for name in KEPT_FLAGS if trained.get(name) is not None}
    # A released file says at most what its input is, and published commands say the rest.
    if not trained and (asked is None or held.input_spec is not None):
        own["image_size"] = held.input.size
    asked = asked or _nothing_asked()
    given = {name: getattr(asked, name) for name in asked.given}
    chosen = argparse.Namespace(**{**vars(asked), **own, **given})
    chosen = options.resolved(chosen)
    try:
        options.check_read(chosen)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    network = _network(content, path, chosen.image_size, given)
    if chosen.image_size != trained.get("image_size"):  # of which training has made sure
        network.check_image_size(chosen.image_size)
    data = _data(chosen, given)
    if "dataset" not in given:
        data = found_again(data, path.parent)
    opened = Opened(path, content, trained, data, Viewing.of(chosen), network)
    known = opened.trained_on  # a damaged entry is met here
    if known is None or given.get("dataset", trained.get("dataset")) != trained.get("dataset"):
        return opened
    return replace(opened, data=replace(data, trained=frozenset(known.class_names)))


def open_untrained(asked: argparse.Namespace) -> Opened:
    """The network that the flags describe, at its start; its embeddings are its pooled features.

    Raises:
        InputError: the flags do not go together, or the weights cannot be had.
    """
    chosen = options.resolved(asked)
    options.check_read(chosen)
    torch.manual_seed(chosen.seed)  # for what starts at random
    entries = net.Architecture.entries(vars(chosen)) | {"head": "training"}
    network = net.build(net.Architecture(**entries), pretrained=chosen.pretrained)
    network.check_image_size(chosen.image_size)
    given = {name: getattr(asked, name) for name in asked.given}
    return Opened(Path(chosen.model), {}, {}, _data(chosen, given), Viewing.of(chosen), network)


def _data(chosen: argparse.Namespace, given: Mapping[str, Any]) -> dataset.Choice:
    """The data of the options; to other data than the run's the run's split need not apply."""
    choice = dataset.Choice.of(chosen)
    if "dataset" not in given:
        return choice
    split = {name: given[name] for name in ("eval_classes", "split_seed") if name in given}
    return replace(choice.of_other_data(choice.name, choice.root), **split)


def _nothing_asked() -> argparse.Namespace:
    """The options of evaluate.py at their defaults."""
    return argparse.Namespace(**options.defaults(options.EVALUATE_GROUPS), given=[])


def _network(
    content: dict[str, Any], path: Path, image_size: int, given: Mapping[str, Any]
) -> net.EmbeddingNet:
    """The network that a checkpoint holds, with what the flags `given` say otherwise."""
    held = net.architecture_of(content, path, image_size=image_size)
    chosen = net.Architecture.entries(given)
    if chosen.get("head") == "none" and held.head != "none":
        chosen["head"] = "training"  # the head that there is is left aside
    network = net.build(replace(held, **chosen))
    net.load_checkpoint(network, content, source=path)
    return network


def fingerprint_of(network: net.EmbeddingNet) -> str:
    """32 hexadecimal digits that tell this network's weights from any others."""
    return fingerprint(network.state_dict())


def checkpoint_file(path: str | Path) -> Path:
    """The checkpoint that `path` means: a file itself, of a run folder the best one.

    - A folder without args.json counts as a run's where it holds a single `*_best.pth`.
    - Of a folder that was made to be shared it is the weights, and of `hf:USER/NAME` those of that
      model on the Hub, which are fetched where they are not here yet.

    Raises:
        InputError: a folder that holds none, or several; the sentence says what to give.
    """
    name = str(path)
    path = hub.download(name) if name.startswith(hub.PREFIX) else Path(expanded(name))
    if not path.is_dir():
        return path
    if (path / WEIGHTS_FILE).is_file():
        return path / WEIGHTS_FILE
    if _counts_as_run(path):
        if best := RunFolder(path).best_checkpoint():
            return best
        raise InputError(
            f"the run in {path} has no best checkpoint, because it has not been evaluated yet; "
            f"give {path / 'last.pth'}, or wait for its first evaluation"
        )
    if models := sorted(file.name for file in path.glob("*.pth")):
        raise InputError(
            f"{path} is not a run folder (no args.json), and holds {_some(models)}; "
            f"give one of these files"
        )
    if runs := sorted(file.parent.name for file in path.glob("*/args.json")):
        raise InputError(
            f"{path} is not a run folder (no args.json), and holds the runs {_some(runs)}; "
            "give one of these folders"
        )
    raise InputError(
        f"{path} holds no checkpoint (*.pth) and no run; give a run folder, or a checkpoint itself"
    )


def checkpoint_files(path: str | Path) -> list[Path]:
    """All checkpoints that `path` means: as `checkpoint_file`, and of any other folder each one.

    In a folder that is no run's, these are its files of weights, and the best checkpoints of the
    runs in it; a run that was not evaluated yet is left out with a warning.

    Raises:
        InputError: as `checkpoint_file`, for a run, and for a folder that holds none.
    """
    path = str(path)
    if path.startswith(hub.PREFIX) or _counts_as_run(Path(path)) or not Path(path).is_dir():
        return [checkpoint_file(path)]
    path = Path(path)
    found = sorted(path.glob("*.pth"))
    for run in sorted(file.parent for file in path.glob("*/args.json")):
        best = RunFolder(run).best_checkpoint()
        if best is None:
            logger.warning("%s has no best checkpoint yet and is left out", run)
        else:
            found.append(best)
    return found or [checkpoint_file(path)]


def all_checkpoint_files(paths: Iterable[str | Path]) -> list[Path]:
    """What each of `paths` means, as `checkpoint_files`: asked once, since it warns and fetches."""
    return [file for path in paths for file in checkpoint_files(path)]


def _counts_as_run(folder: Path) -> bool:
    return (folder / "args.json").is_file() or len(list(folder.glob("*_best.pth"))) == 1


def _some(names: Sequence[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")

"""Opens the trained network of a run, a folder or a file, to be used as its run used it.

evaluate.py, `load_run`, `python -m net export` and report.py all open networks here. Options that
the caller does not give are those of the run.
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
from storage import digest
from utils import InputError, damage_in_words

logger = logging.getLogger("evaluate")

SPLIT_FLAGS = ("dataset", "eval_classes", "split_seed", "ratio_classes")
"""The flags that decide which images are trained on, and which are held out."""
LOOK_FLAGS = ("image_size", "eval_zoom", "eval_resize", "exif")
"""The flags that decide how an image becomes the pixels that the network sees."""
KEPT_FLAGS = (*SPLIT_FLAGS, *LOOK_FLAGS, "data_root", "batch_size", "max_bad_images")
"""Flags that an evaluation takes over from the run, unless they are given."""
WEIGHTS_FILE = "model.safetensors"
"""The weights in a folder made for sharing: `python -m net export --push-to-hub`."""
LISTED = 5  # files or runs that an error names


@dataclass(frozen=True)
class Opened:
    """A trained network, and what its checkpoint says about it.

    Attributes:
        path: the file that was read. content: its entries, with the chosen weights as
            `model_state_dict`.
        weights: which weights these are, if the run kept a running mean of them: `ema` (the mean)
            or `raw`; otherwise "".
        trained: the options of its training; empty for a released file.
        data, viewing: the data it is evaluated on, and how evaluation looks at images.
        network: on the CPU.
        training_data: the run's own data, whatever it is evaluated on; `data` for a released file.
    """

    path: Path
    content: dict[str, Any]
    trained: dict[str, Any]
    data: dataset.Choice
    viewing: Viewing
    network: net.EmbeddingNet
    training_data: dataset.Choice
    weights: str = ""

    @property
    def trained_on(self) -> dataset.TrainedOn | None:
        """Its training data; None if the file, released or of an older version, does not say."""
        entry = self.content.get("data")
        return None if entry is None else dataset.TrainedOn.of_entry(entry)

    @property
    def other_pixels(self) -> str | None:
        """A sentence if the run's own evaluation saw slightly different pixels; else None.

        Only a cache of the size that evaluation uses gives the same pixels as decoding the files.
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
        """The tasks to evaluate it on; see `tasks_of`.

        Raises:
            InputError: the images are missing, or cannot be used.
        """
        if self.data.is_gone:
            raise InputError(
                f"{self.path}: the images that its run was evaluated on are not there any more "
                f"({looked_for(self.data, self.path.parent)}); name their new place, or other "
                "images: --dataset folder:PATH or csv:FILE"
            )
        return tasks_of(self.data, ks)


def found_again(choice: dataset.Choice, folder: Path) -> dataset.Choice:
    """The data of the run in `folder`, whatever the current folder is.

    The user's own images are looked for under their name, relative to the current folder, and then
    where the run noted that they were.
    """
    if choice.is_gone and (place := RunFolder(folder).noted_place) is not None:
        return replace(choice, place=None if is_gone(place) else place)
    return choice


def looked_for(choice: dataset.Choice, folder: Path) -> str:
    """Where `found_again` has looked for the user's own images, in words."""
    places = dict.fromkeys([dataset.find(choice.name).place, RunFolder(folder).noted_place])
    places.pop(None, None)
    return f"{choice.name} was looked for in {' and in '.join(map(str, places))}"


def open_checkpoint(
    path: str | Path, asked: argparse.Namespace | None = None, *, weights: str | None = None
) -> Opened:
    """The network at `path`, built as its run built it.

    Args:
        path: see `checkpoint_file`.
        asked: the options of evaluate.py; those that were given replace the run's own. If None, a
            released network is given images of the size that it was made for.
        weights: see `net.with_weights`.

    Raises:
        InputError: there is no such network, it cannot be read, or the options contradict it.
    """
    path = checkpoint_file(path)
    content = load_checkpoint(path)
    chosen = net.with_weights(content, weights, path)
    with damage_in_words(f"checkpoint {path}", "use another copy of it, or another checkpoint"):
        opened = _opened(path, chosen, asked)
    return replace(opened, weights=(weights or "ema") if "ema_state_dict" in content else "")


def _opened(path: Path, content: dict[str, Any], asked: argparse.Namespace | None) -> Opened:
    """Builds what a checkpoint holds; see `open_checkpoint`."""
    content = whole(content, path)
    trained = content.get("args", {})
    if trained:
        options.kept(trained)  # raises for values that no run can have
        if names := options.unknown(trained):
            logger.warning(
                "%s was trained with %s, which this version of the code does not know; if that "
                "changes how images are prepared, the numbers are not its run's",
                path,
                options.in_words(names),
            )
    held = net.architecture_of(content, path)
    own = {name: trained[name] for name in KEPT_FLAGS if trained.get(name) is not None}
    # A released file tells at most its input; published commands give everything else.
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
    if trained:
        network.changed |= _looks_changed(chosen, own)
    if chosen.image_size != trained.get("image_size"):  # which training has checked already
        network.check_image_size(chosen.image_size)
    data = _data(chosen, given)
    if "dataset" not in given:
        data = found_again(data, path.parent)
    opened = Opened(path, content, trained, data, Viewing.of(chosen), network, data)
    known = opened.trained_on  # raises for a damaged entry
    same_set = given.get("dataset", trained.get("dataset")) == trained.get("dataset")
    if known is not None and same_set:
        data = replace(data, trained=frozenset(known.class_names))
    training_data = data
    if trained and not given.keys().isdisjoint(SPLIT_FLAGS):
        moved = {"data_root": chosen.data_root} if same_set else {}
        training_data = _training_data(own | {"exif": chosen.exif} | moved, path.parent, known)
    return replace(opened, data=data, training_data=training_data)


def open_untrained(asked: argparse.Namespace) -> Opened:
    """The untrained network that the flags describe; its embeddings are its pooled features.

    Raises:
        InputError: the flags clash, or the weights cannot be found or loaded.
    """
    chosen = options.resolved(asked)
    options.check_read(chosen)
    torch.manual_seed(chosen.seed)  # for random initial weights
    entries = net.Architecture.entries(vars(chosen)) | {"head": "training"}
    network = net.build(net.Architecture(**entries), pretrained=chosen.pretrained)
    network.check_image_size(chosen.image_size)
    given = {name: getattr(asked, name) for name in asked.given}
    data = _data(chosen, given)
    return Opened(Path(chosen.model), {}, {}, data, Viewing.of(chosen), network, data)


def _data(chosen: argparse.Namespace, given: Mapping[str, Any]) -> dataset.Choice:
    """The data to evaluate on; the run's split does not apply to data other than the run's."""
    choice = dataset.Choice.of(chosen)
    if "dataset" not in given:
        return choice
    split = {name: given[name] for name in ("eval_classes", "split_seed") if name in given}
    return replace(choice.of_other_data(choice.name, choice.root), **split)


def _training_data(
    own: Mapping[str, Any], folder: Path, known: dataset.TrainedOn | None
) -> dataset.Choice:
    """The data of the run in `folder`, from its `own` options."""
    found = found_again(dataset.Choice.of(_resolved(own)), folder)
    return found if known is None else replace(found, trained=frozenset(known.class_names))


def _looks_changed(chosen: argparse.Namespace, own: Mapping[str, Any]) -> dict[str, Any]:
    """Those of LOOK_FLAGS that are not what the run's `own` options say."""
    kept = _resolved(own)
    looks = {name: getattr(chosen, name) for name in LOOK_FLAGS}
    return {name: value for name, value in looks.items() if value != getattr(kept, name)}


def _resolved(own: Mapping[str, Any]) -> argparse.Namespace:
    """The options of an evaluation for which a run's `own` options are all that is asked."""
    return options.resolved(argparse.Namespace(**{**vars(_nothing_asked()), **own}))


def _nothing_asked() -> argparse.Namespace:
    """The options of evaluate.py at their defaults."""
    return argparse.Namespace(**options.defaults(options.EVALUATE_GROUPS), given=[])


def _network(
    content: dict[str, Any], path: Path, image_size: int, given: Mapping[str, Any]
) -> net.EmbeddingNet:
    """The network that a checkpoint holds, with changes by the flags `given`."""
    held = net.architecture_of(content, path, image_size=image_size)
    chosen = net.Architecture.entries(given)
    if chosen.get("head") == "none" and held.head != "none":
        chosen["head"] = "training"  # the checkpoint's head is not used
    network = net.build(replace(held, **chosen))
    chosen.pop("image_size", None)  # which only says how images are prepared
    network.changed = {name: v for name, v in chosen.items() if v != getattr(held, name)}
    net.load_checkpoint(network, content, source=path)
    return network


def fingerprint_of(network: net.EmbeddingNet) -> str:
    """32 hexadecimal digits that identify this network.

    They are those of its weights, unless flags change what is computed with them (--pooling,
    --head) or how it looks at images (--image-size, --eval-zoom, --eval-resize, --exif).
    """
    weights = fingerprint(network.state_dict())
    if not network.changed:
        return weights
    changes = f"{weights} {sorted(network.changed.items())}"
    return digest(changes.encode())


def checkpoint_file(path: str | Path) -> Path:
    """The checkpoint that `path` means: the file itself, or the best one of a run folder.

    - A folder without args.json counts as a run's if it holds a single `*_best.pth`.
    - A folder made for sharing means its weights, and `hf:USER/NAME` means those of that model on
      the Hub, which are downloaded if they are not here yet.

    Raises:
        InputError: the folder holds no checkpoint, or several; the sentence says what to give.
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
    """All checkpoints that `path` means: one, as `checkpoint_file`, or all in any other folder.

    A folder that is not a run's means its files of weights and the best checkpoints of the runs in
    it; runs that have not been evaluated yet are left out with a warning.

    Raises:
        InputError: as `checkpoint_file`, or the folder holds no checkpoint.
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
    """The `checkpoint_files` of each path; call it once, because it may warn and download."""
    return [file for path in paths for file in checkpoint_files(path)]


def _counts_as_run(folder: Path) -> bool:
    return (folder / "args.json").is_file() or len(list(folder.glob("*_best.pth"))) == 1


def _some(names: Sequence[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")

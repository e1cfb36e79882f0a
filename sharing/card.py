"""The model card of a run: Markdown, with a header for the Hub.

It claims nothing that is not in the run's files: no numbers that were not measured, and no licence
that nobody gave.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import dataset
import methods
import net
from dataset.own import OwnData
from evaluation import meanings
from evaluation.inference import Model
from evaluation.networks import Opened
from evaluation.thresholds import Thresholds
from net.export import describe_input
from page import records
from page.records import Numbers, Record
from runs import RunFolder
from sharing import references
from sharing.naming import LOCAL, data_in_words, without_folders
from utils import InputError, damage_in_words, plain_number, program

ROUNDED = 4  # decimals, as in the tables of evaluate.py


@dataclass(frozen=True)
class Card:
    """The contents of a card.

    Attributes:
        name: of the model. record: the run. model: its network.
        source: the argument of `load_run` that loads the model, such as `hf:USER/NAME`.
        licence: of the weights, given by the person who shares them; None if it is not given.
        intervals: evaluation → metric → [low, high], if evaluate.py has measured them.
    """

    name: str
    record: Record
    model: Model
    source: str
    licence: str | None = None
    intervals: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)

    @property
    def data(self) -> str:
        """The data set's name, without folders of this machine."""
        return data_in_words(str(self.record.args["dataset"]))

    def text(self) -> str:
        """The whole card."""
        parts = [
            f"---\n{self._header_text()}---",
            f"# {self.name}",
            self._what(),
            "## How to load",
            self._loading(),
            "## How good it is",
            self._results(),
            "## What it was trained on",
            self._training(),
            "## What it is for, and its limits",
            self._limits(),
            "## Licence",
            self._licence(),
            "## Citation",
            self._citation(),
        ]
        return "\n\n".join(parts) + "\n"

    # -- the header

    def _header_text(self) -> str:
        return yaml.safe_dump(self.header(), sort_keys=False, allow_unicode=True, width=1000)

    def header(self) -> dict[str, Any]:
        """The header's entries, by the Hub's names."""
        backbone = net.find_backbone(self.record.options.model)
        started = self.record.options.pretrained == "imagenet"
        found: dict[str, Any] = {"license": self.licence} if self.licence else {}
        found |= {"base_model": backbone.hub} if started and backbone.hub else {}
        return {
            **found,
            "library_name": "anchorage",
            "pipeline_tag": "image-feature-extraction",
            "tags": ["deep-metric-learning", "image-retrieval", "embeddings"],
            "model-index": [{"name": self.name, "results": self._index()}],
        }

    def _index(self) -> list[dict[str, Any]]:
        return [
            {
                "task": {"type": "image-retrieval", "name": "image retrieval"},
                "dataset": {"type": self.data, "name": self._split(title, brief=True)},
                "metrics": [
                    {"type": _kind(name), "name": name, "value": round(value, ROUNDED)}
                    for name, value in numbers.items()
                    if meanings.is_metric(name)
                ],
            }
            for title, numbers in self.record.results.items()
        ]

    def _split(self, title: str, brief: bool = False) -> str:
        """The images of an evaluation, as part of a sentence, or in brief."""
        if title.removesuffix(meanings.RAW) == meanings.VALIDATION:
            held_out = "classes held out of the training split"
            return f"{self.data}, {held_out}" if brief else f"{held_out} of {self.data}"
        name = data_in_words(title)
        return f"{name}, evaluation split" if brief else f"the evaluation split of {name}"

    # -- description and use

    def _what(self) -> str:
        network, size = self.model.network, self.model.viewing.image_size
        return (
            f"{network.architecture.model}, a network that maps a picture of {size} × {size} "
            f"pixels to {network.test_size} numbers of unit length. It was trained to put "
            "pictures of one class close together, so that their cosine is high, with "
            f"{methods.title(self.record.options)}, by Anchorage."
        )

    def _loading(self) -> str:
        wanted = self.model.network.input
        size, resize, upright = self.model.viewing.image_size, self.model.resize, self.model.upright
        fed = describe_input(size, resize, cubic=wanted.cubic, upright=upright)
        code = [
            "from anchorage import load_run  # in the repository: from net import load_run",
            "",
            f"embed = load_run({self.source!r})",
            'one, two = embed(["one.jpg", "two.jpg"])',
            "print(one @ two)  # their cosine",
        ]
        return "\n".join(
            [
                "```python",
                *code,
                "```",
                "",
                "`load_run` prepares pictures as the run's evaluation did. Code of your own that "
                f"runs these weights starts from {fed}. It then brings the values to the order "
                f"{wanted.color} and to 0..{wanted.scale:g}, subtracts the mean "
                f"{_listed(wanted.mean)} and divides by the deviation {_listed(wanted.std)}.",
                *self._thresholds(),
            ]
        )

    def _thresholds(self) -> list[str]:
        found = self.record.outcome.get("thresholds") or {}
        lines = []
        for title, kept in found.items():
            entry = Thresholds.of_dict(kept)
            said = [
                f"**Same or different?** {_verdicts(entry)} This was measured on "
                f"{self._split(title)}.",
                entry.doubt,
                f"`load_run({self.source!r}).thresholds` gives these cosines if the run's "
                "results.json lies beside the weights.",
            ]
            lines += ["", " ".join(words for words in said if words)]
        return lines

    # -- numbers

    def _results(self) -> str:
        parts, names = [], []
        for title, numbers in self.record.results.items():
            shown = {name: value for name, value in numbers.items() if meanings.is_metric(name)}
            pairs = self.record.outcome.get("verification", {}).get(title, {})
            shown |= {name: value for name, value in pairs.items() if value is not None}
            known = self.intervals.get(title, {})
            rows = [
                [name, f"{value:.{ROUNDED}f}", *([_interval(known.get(name))] if known else [])]
                for name, value in shown.items()
            ]
            head = ["metric", "value", *(["95 % interval"] if known else [])]
            table = [head, ["---"] * len(head), *rows]
            queries = numbers.get("queries")
            of = f", {int(queries):,} queries" if queries else ""
            names += shown
            parts += [
                f"On {self._split(title)}{of}:\n",
                "\n".join(f"| {' | '.join(cells)} |" for cells in table) + "\n",
            ]
        parts.append(meanings.in_words(names) + "\n")
        unsure = "" if self.intervals else " No confidence intervals were measured."
        return "\n".join([*parts, self._picked() + unsure])

    def _picked(self) -> str:
        epoch, picked = self.record.best_epoch, self.record.outcome.get("picked_on", "")
        if sum("R@1" in row for row in self.record.rows) == 1:
            return (
                f"These are the weights after epoch {epoch}, the only ones that were evaluated, so "
                "that no epoch was picked."
            )
        words = f"These are the weights after epoch {epoch}, which was picked on the {picked}."
        if "test" in picked or self.record.is_of_held_out:
            words += (
                " The numbers above are of the same classes, so they are a little better than "
                "those of classes that nothing was picked on."
            )
        return words

    # -- training

    def _training(self) -> str:
        lines = [f"- **Data**: {self._data_in_words()}"]
        lines.append(f"- **Starting weights**: {self._start()}")
        lines.append(f"- **Loss**: {methods.title(self.record.options)}")
        if recipe := self.record.args.get("recipe"):
            lines.append(f"- **Recipe**: `{Path(str(recipe)).name}`")
        lines.append(f"- **Options that were given**: {self._given()}")
        made = self.record.environment
        if made.get("device"):
            versions = ", ".join(f"{name} {v}" for name, v in made.get("packages", {}).items())
            lines.append(f"- **Made with**: {made['device']}; {versions}")
        if made.get("git_commit"):
            lines.append(f"- **Code**: commit {made['git_commit']}")
        return "\n".join(lines)

    def _data_in_words(self) -> str:
        known = dataset.find(str(self.record.args["dataset"]))
        history = self.record.folder.classes.load()
        counts = ""
        if history:
            images, classes = int(history["images"].sum()), len(history["names"])
            counts = f", {images:,} images of {classes:,} classes"
        own = "Where these pictures come from, and under which licence, is not recorded."
        origin = own if isinstance(known, OwnData) or not known.origin else known.origin
        return f"the training split of {self.data}{counts}. {origin}"

    def _start(self) -> str:
        options = self.record.options
        if options.checkpoint:
            return f"the checkpoint {Path(options.checkpoint).name} of an earlier training"
        if options.pretrained == "none":
            return "random"
        if options.pretrained != "imagenet":
            return f"the file {Path(options.pretrained).name}, whose licence is not recorded"
        backbone = net.find_backbone(options.model)
        if package := backbone.imagenet_package:
            source = f"the package {package.requirement}"
        else:
            source = f"{backbone.hub} on the Hub" if backbone.hub else str(backbone.imagenet_url)
        licence = backbone.licence or "not stated by their source"
        return f"the pretrained {options.model} from {source} (licence: {licence})"

    def _given(self) -> str:
        stored = without_folders(self.record.args)
        told = [
            f"`{name.replace('_', '-')}` {records.in_brief(stored[name])}"
            for name in self.record.args.get("given", ())
            if name in stored and name not in LOCAL
        ]
        return ", ".join(told) or "none; all had their defaults"

    # -- limits, licence, citation

    def _limits(self) -> str:
        first = next(iter(self.record.results.values()))
        lines = [
            "It ranks pictures by similarity, for searching among pictures of the kind that it "
            f"was trained on ({self.data}); their classes may be new to it.",
            "",
            "- It always finds a nearest picture, even if nothing in the collection is right.",
            f"- In its evaluation, the nearest picture was of another class for "
            f"{100 * (1 - first['R@1']):.0f} of 100 queries."
            if "R@1" in first
            else "- How often the nearest picture is of another class was not measured.",
            "- A collection larger than that of the evaluation holds more pictures that look "
            "alike, so fewer queries will be right there.",
            "- It was not tried on other kinds of pictures (other cameras, light, backgrounds), "
            "nor was it measured how it treats pictures of people.",
        ]
        lines += [f"- {doubt}" for doubt in meanings.doubts(first)]
        if concern := self.record.environment.get("concern"):
            lines.append(f"- About the pictures of {self.data}: {concern}.")
        return "\n".join(lines)

    def _licence(self) -> str:
        given = (
            f"These weights are shared under {self.licence}."
            if self.licence
            else "No licence was given for these weights; ask whoever shared them before you use "
            "them."
        )
        return (
            f"{given} The licences of the starting weights and of the pictures that are named "
            "above may apply too. The code that trained them is under Apache-2.0."
        )

    def _citation(self) -> str:
        papers = references.of_run(self.record.options)
        if not papers:
            return "No paper is known for what was used here."
        return "\n\n".join(
            ["What was used here:", "```bibtex\n" + "\n\n".join(p.bibtex for p in papers) + "\n```"]
        )


# --- making one -----------------------------------------------------------------------------------


def card_of(
    folder: Path,
    model: Model,
    source: str,
    *,
    name: str | None = None,
    licence: str | None = None,
    numbers: Path | None = None,
) -> Card:
    """The card of a run.

    Args:
        folder: of the run. numbers: a file of `evaluate.py --bootstrap N --json FILE`.

    Raises:
        InputError: the folder is not a run's, or the run was not evaluated; or `numbers` is not
            such a file, or is about another network.
    """
    record = records.read(folder)
    if not record.results:
        raise InputError(
            f"{folder} has no results yet, so there is nothing for a card to say; wait for the "
            "run's first evaluation"
        )
    intervals = {} if numbers is None else read_intervals(numbers, record.results)
    return Card(name or record.name, record, model, source, licence, intervals)


def check_measured(opened: Opened) -> None:
    """Raises InputError if the metrics of its run were measured with other weights than these."""
    best = RunFolder(opened.path.parent).best_checkpoint()
    if opened.weights == "raw":
        which, other, remedy = "the mean of its weights", "the raw ones", "leave out --weights raw"
    elif best is not None and not best.samefile(opened.path):
        which, other, remedy = best.name, opened.path.name, f"give {best.parent}"
    else:
        return
    raise InputError(
        f"the numbers on a card are those that the run measured with {which}, not with {other}; "
        f"{remedy}"
    )


def read_intervals(
    file: Path, results: Mapping[str, Numbers]
) -> dict[str, Mapping[str, Sequence[float]]]:
    """The 95 % intervals in a file of evaluate.py, by evaluation and metric.

    Raises:
        InputError: it cannot be read, has none, or its metrics are not the run's.
    """
    advice = f"give a file that {program('evaluate')} --bootstrap 1000 --json FILE has written"
    if not file.is_file():
        raise InputError(f"--numbers {file} does not exist; {advice}")
    with damage_in_words(str(file), advice):
        content = json.loads(file.read_text(encoding="utf-8"))
        entries = [entry for entry in content["results"] if "interval_95" in entry]
        found = {entry["title"]: entry["interval_95"] for entry in entries}
        for entry in entries:
            _check_numbers(entry, results.get(entry["title"], {}), file)
    if not found:
        raise InputError(f"{file} holds no intervals; {advice}")
    return found


def _check_numbers(entry: Mapping[str, Any], own: Numbers, file: Path) -> None:
    """Raises InputError if an evaluation's metrics differ from the run's."""
    for name in sorted({"R@1", *entry["interval_95"]} & {"R@1", *own}):
        there, here = entry[name], own.get(name, math.nan)
        if not math.isclose(there, here, abs_tol=1e-3):
            reached = "unknown" if math.isnan(here) else f"{here:.4f}"
            raise InputError(
                f"{file} is not about this run: {name} of {entry['title']} is {there:.4f} there "
                f"and {reached} in results.json; evaluate this run, without whitening, expansion "
                "and the like"
            )


# --- words ----------------------------------------------------------------------------------------


def _kind(name: str) -> str:
    return name.lower().replace("@", "_at_").replace(" ", "_")


def _listed(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _verdicts(found: Thresholds) -> str:
    """Which pairs of pictures the thresholds call the same or different, and how often wrongly."""
    if math.isinf(found.same):
        return (
            "No cosine is high enough to call two pictures the same; below "
            f"{found.different:.3f} they are called different, wrongly for "
            f"{_percent(found.false_different.expected)} of the pairs of one class."
        )
    return (
        f"Two pictures with a cosine of {found.same:.3f} or more are called the same, which is "
        f"wrong for {_percent(found.false_same.expected)} of the pairs of two classes. Below "
        f"{found.different:.3f} they are called different, which is wrong for "
        f"{_percent(found.false_different.expected)} of the pairs of one class. Between the two it "
        "is unsure."
    )


def _percent(share: float) -> str:
    return "an unknown share" if math.isnan(share) else f"{plain_number(100 * share, 2)} %"


def _interval(values: Sequence[float | None] | None) -> str:
    if not values or None in values:  # with one class there is no interval
        return "not measured"
    return f"{values[0]:.{ROUNDED}f} to {values[1]:.{ROUNDED}f}"

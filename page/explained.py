"""A run with the contents of its page: embeds its images, searches, and calls the other modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dataset.overlap import Shared, shared_names, shared_with_training
from evaluation import meanings
from evaluation.tasks import images_of
from page import findings, records, sections, source
from page.findings import Search
from page.learned import Learned
from page.map import embedding_map
from page.pairs import pairs
from page.records import Numbers, Published, Record
from page.thumbnails import Thumbnails
from runs import load_checkpoint
from utils import DamagedError, InputError


@dataclass(frozen=True)
class Explained:
    """A run with the contents of its page.

    Attributes:
        search: None without embeddings. missing: the reason why there are none; else "".
        galleries, confusions, classes, map, sections, pairs: results of the modules of these names
            and of findings.py, as plain values for page.js.
        counts: the number of images that it was judged on, in words.
        shared: classes and images that they share with the training set; None if unknown.
    """

    record: Record
    published: Published | None
    search: Search | None = None
    missing: str = ""
    galleries: Sequence[dict] = ()
    confusions: Sequence[dict] = ()
    classes: dict | None = None
    map: dict | None = None
    sections: Sequence[dict] = ()
    pairs: dict | None = None
    counts: str = ""
    shared: Shared | None = None

    @property
    def numbers(self) -> Numbers:
        """The metrics of the first evaluation, which most of the page is about; {} before it."""
        return next(iter(self.record.results.values()), {})

    @property
    def doubts(self) -> list[str]:
        """Warnings about the metrics of the first evaluation."""
        said = [self._concern]
        said += [self.shared.warning()] if self.shared is not None else []
        said += [*meanings.doubts(self.numbers), self._gone]
        if self.search is not None and self.search.found.size:
            judged = self.search.judged
            if len(np.union1d(judged.images.labels, judged.searched[0].labels)) == 1:
                said.append("All images are of one class: whatever is found is right.")
        return [sentence for sentence in said if sentence]

    @property
    def _gone(self) -> str:
        """A warning if some of the evaluated images can no longer be read."""
        if self.search is None:
            return ""
        shown = len(self.search.judged.images)
        gone = int(self.numbers.get("queries", shown)) - shown
        if gone <= 0:
            return ""
        images = "images that were evaluated" if gone > 1 else "image that was evaluated"
        return f"{gone:,} {images} cannot be read any more; what is drawn below is without them."

    @property
    def _concern(self) -> str:
        """A known concern about the pictures of the data set."""
        concern, data = self.record.environment.get("concern"), self.record.args.get("dataset")
        return f"About the pictures of {data}: {concern}." if concern else ""

    def intervals(self, title: str) -> dict[str, list[float]]:
        """95 % intervals of the metrics of an evaluation; {} if its queries were not searched."""
        if self.search is None or title != self.search.judged.task.title:
            return {}
        return self.search.intervals(self.record.results.get(title, {}))


def explain(
    record: Record,
    thumbs: Thumbnails,
    *,
    queries: Sequence[str] = (),
    seed: int = 1,
    embeddings: str | None = None,
    gpu_id: int = 0,
) -> Explained:
    """Embeds the evaluation of a run, searches, and makes the contents of its page.

    Args:
        thumbs: collects the pictures. queries: parts of the names of classes or files to show.
        embeddings: a file of `evaluate.py --export`, to be used instead of the network.

    Raises:
        InputError: no class or file has one of these names, or a file of the run is damaged.
    """
    try:
        best = source.open_best(record, gpu_id)
        search = Search(source.judge(best, embeddings), seed)
    except DamagedError:
        raise
    except InputError as error:
        if embeddings is not None:
            raise
        return Explained(record, records.published(record), missing=str(error))
    state = record.path / "last.pth"
    history = record.folder.classes.load()
    learned = Learned(
        record=record,
        checkpoint=best.checkpoint,
        state=load_checkpoint(state) if state.is_file() else {},
        history=history,
        judged=search.judged,
        search=search,
        train=best.training_images(history["names"].tolist()) if history else None,
        embed=best.embed,
        thumbs=thumbs,
        seed=seed,
    )
    return look(learned, queries, search.judged.task.describe())


def look(learned: Learned, chosen: Sequence[str], counts: str) -> Explained:
    """The contents of the page, from the embeddings and the checkpoint of a run.

    Args:
        chosen: parts of the names of classes or files to show. counts: see `Explained`.

    Raises:
        InputError: no class or file has one of the names in `chosen`.
    """
    search, thumbs, seed = learned.search, learned.thumbs, learned.seed
    matched = bool(search.per_query["relevant"].any())
    return Explained(
        learned.record,
        records.published(learned.record),
        search,
        galleries=findings.galleries(search, chosen, thumbs, seed),
        confusions=findings.confusions(search, thumbs) if matched else (),
        classes=findings.class_scores(search, thumbs, seed) if matched else None,
        sections=sections.made(learned),
        pairs=pairs(learned.record, search) if matched else None,
        map=embedding_map(learned.judged, thumbs, seed),
        counts=counts,
        shared=_shared(learned),
    )


def _shared(learned: Learned) -> Shared | None:
    judged, names = learned.judged, learned.history.get("names")
    parts = images_of([judged.task])
    if learned.train is not None:
        return shared_with_training(learned.train, *parts)
    return None if names is None else shared_names(names.tolist(), *parts)

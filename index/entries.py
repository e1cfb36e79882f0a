"""The images of a record: ids, paths and labels, as arrays and back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np

from dataset.files import composed
from index.journal import Record
from index.keys import encoded, key_of, keys_of


class Entry(NamedTuple):
    """An image of an index.

    Attributes:
        id: its unique name in the index. path: of its file, as it is found now.
        label: what it shows; None if it is not known.
    """

    id: str
    path: str
    label: str | None


def _text_arrays(name: str, texts: Iterable[str]) -> dict[str, np.ndarray]:
    """Texts as arrays for a record: their bytes, and the end of each."""
    parts = [encoded(text) for text in texts]
    return {
        name: np.frombuffer(b"".join(parts), np.uint8),
        f"{name}_ends": np.cumsum([len(part) for part in parts], dtype=np.int64),
    }


def entry_arrays(entries: Iterable[Any], folder: str) -> dict[str, np.ndarray]:
    """Ids, paths and labels as arrays for a record.

    Args:
        entries: `Entry`s or `Photo`s, with absolute paths. folder: of the index; the paths in the
            record are relative to it.
    """
    entries = list(entries)
    labels = dict.fromkeys(entry.label for entry in entries if entry.label is not None)
    number = {label: place for place, label in enumerate(labels)}
    paths = (PurePath(os.path.relpath(entry.path, folder)).as_posix() for entry in entries)
    return {
        **_text_arrays("ids", (entry.id for entry in entries)),
        **_text_arrays("paths", paths),
        **_text_arrays("labels", labels),
        "label_of": np.array([number.get(entry.label, -1) for entry in entries], np.int32),
    }


class Texts(Sequence[str]):
    """The texts of `_text_arrays` in a record; each is read from the file when it is needed."""

    def __init__(self, record: Record, name: str) -> None:
        self._blob = record.arrays[name]
        self._ends = record.arrays[f"{name}_ends"]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> str:  # type: ignore[override]
        start = int(self._ends[row - 1]) if row else 0
        return self._blob[start : int(self._ends[row])].tobytes().decode("utf-8", "surrogateescape")

    def keys(self) -> np.ndarray:
        """(n,) uint64: the key of each text, see keys.py."""
        return keys_of(self._blob, self._ends)

    def are_ascii(self) -> np.ndarray:
        """(n,) bool: whether a text has ASCII letters alone."""
        others = np.concatenate([[0], np.cumsum(self._blob > 127, dtype=np.int64)])
        return np.diff(others[np.concatenate([[0], self._ends])]) == 0


@dataclass(frozen=True)
class Segment:
    """The images of one record.

    Attributes:
        first: the number of its first image, among all that were ever added.
    """

    first: int
    record: Record
    ids: Texts
    paths: Texts
    labels: Texts

    @classmethod
    def of(cls, first: int, record: Record) -> Segment:
        """The images that a record adds."""
        return cls(first, record, *(Texts(record, name) for name in ("ids", "paths", "labels")))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def vectors(self) -> np.ndarray:
        """(n, d) float32, unit length."""
        return self.record.arrays["vectors"]

    def id(self, place: int) -> str:
        """The id of its image `place`, composed (older versions did not compose it)."""
        return composed(self.ids[place])

    def id_keys(self) -> np.ndarray:
        """(n,) uint64: the keys of its images' ids, see keys.py."""
        keys = self.ids.keys()
        for place in np.flatnonzero(~self.ids.are_ascii()).tolist():
            keys[place] = key_of(self.id(place))
        return keys

    def label(self, place: int) -> str | None:
        """The label of its image `place`, composed; None if it has none."""
        number = int(self.record.arrays["label_of"][place])
        return None if number < 0 else composed(self.labels[number])

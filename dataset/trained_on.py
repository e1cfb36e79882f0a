"""The description of training data in a checkpoint, so that it can be used without the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dataset.base import ImageSet


@dataclass(frozen=True)
class TrainedOn:
    """The training images of a network, without the images.

    Attributes:
        name: the name of the data set for `dataset.find`.
        images: their number. class_names: in the order of the criterion's classes.
        square: side in pixels of drawings, which are in memory and not cropped; None: pictures are
            files, which are resized and cropped.
    """

    name: str
    images: int
    class_names: tuple[str, ...]
    square: int | None = None

    @classmethod
    def of(cls, train: ImageSet) -> TrainedOn:
        """The description of these images."""
        square = None if train.pixels is None else int(train.pixels.shape[1])
        return cls(train.given or train.name, len(train), train.class_names, square)

    def as_entry(self) -> dict[str, Any]:
        """The entry of a checkpoint, in plain values."""
        return {**vars(self), "class_names": list(self.class_names)}

    @classmethod
    def of_entry(cls, entry: Mapping[str, Any]) -> TrainedOn:
        """From an entry made by `as_entry`.

        Raises:
            ValueError: the entry has other values.
        """
        made = cls(**{**entry, "class_names": tuple(entry["class_names"])})
        fine = isinstance(made.name, str) and isinstance(made.images, int)
        fine = fine and all(isinstance(name, str) for name in made.class_names)
        if not (fine and isinstance(made.square, int | None)):
            raise ValueError("its description of the training data is invalid")
        return made

    def __str__(self) -> str:
        return f"{self.name}: {self.images:,} images, {len(self.class_names):,} classes"

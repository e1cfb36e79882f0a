"""What a checkpoint keeps of its training data, so that it can be used where the data are gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dataset.base import ImageSet


@dataclass(frozen=True)
class TrainedOn:
    """The training images of a network, without the images.

    Attributes:
        name: the data set, as `dataset.find` knows it.
        images: how many there were. class_names: in the order of the criterion's classes.
        square: side in pixels of drawings that are kept in memory and seen whole; None: pictures
            are files, which are resized and cut.
    """

    name: str
    images: int
    class_names: tuple[str, ...]
    square: int | None = None

    @classmethod
    def of(cls, train: ImageSet) -> TrainedOn:
        """What is to be kept of these images."""
        square = None if train.pixels is None else int(train.pixels.shape[1])
        return cls(train.given or train.name, len(train), train.class_names, square)

    def as_entry(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return {**asdict(self), "class_names": list(self.class_names)}

    @classmethod
    def of_entry(cls, entry: Mapping[str, Any]) -> TrainedOn:
        """From `as_entry`.

        Raises:
            ValueError: the entry is another.
        """
        made = cls(**{**entry, "class_names": tuple(entry["class_names"])})
        fine = isinstance(made.name, str) and isinstance(made.images, int)
        fine = fine and all(isinstance(name, str) for name in made.class_names)
        if not (fine and isinstance(made.square, int | None)):
            raise ValueError("what it says of its training data cannot be")
        return made

    def __str__(self) -> str:
        return f"{self.name}: {self.images:,} images, {len(self.class_names):,} classes"

"""The thumbnails of a page."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath

from PIL import Image

from dataset.base import ImageSet


class Thumbnails:
    """Thumbnails for an HTML page, each of them once, within a budget of bytes.

    `want` returns the number of a picture at once; `encode` makes all pictures at the end. Needed
    ones are always made, and of the others as many as fit into the budget. Large ones all have the
    largest size with which they take at most half of the budget.
    """

    side, quality = 64, 72
    sides, large_quality = (320, 256, 192, 128, 96), 60
    probed = 24  # pictures from which the bytes of all large ones are estimated

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._numbers: dict[tuple[str, str, str], int] = {}
        self._sources: list[tuple[ImageSet, int]] = []
        self._needed: set[int] = set()
        self._large: set[int] = set()

    def want(
        self, images: ImageSet, index: int, *, needed: bool = True, large: bool = False
    ) -> int:
        """The number of an image's picture.

        Args:
            needed: whether to make it even if the budget is spent. large: whether to show it large.
        """
        key = (images.name, images.split, images.paths[int(index)])
        number = self._numbers.setdefault(key, len(self._numbers))
        if number == len(self._sources):
            self._sources.append((images, int(index)))
        if needed:
            self._needed.add(number)
        if large:
            self._large.add(number)
        return number

    def names(self) -> list[str]:
        """The folder and the file of each picture, by number."""
        paths = (images.paths[index] for images, index in self._sources)
        return ["/".join(PurePath(path).parts[-2:]) for path in paths]

    def encode(self) -> list[str | None]:
        """Data URLs by number; None if an image cannot be read, or the budget is spent."""
        found: list[str | None] = [None] * len(self._sources)
        rest = [number for number in range(len(found)) if number not in self._needed]
        left = self.budget
        with ThreadPoolExecutor(4) as threads:
            side = self._large_side(threads)
            for numbers in (sorted(self._needed), rest):
                for start in range(0, len(numbers), 64):
                    if left <= 0 and numbers is rest:
                        return found
                    part = numbers[start : start + 64]
                    made = threads.map(lambda number: self._sized(number, side), part)
                    for number, address in zip(part, made, strict=True):
                        found[number] = address
                        left -= len(address or "")
        return found

    def _large_side(self, threads: ThreadPoolExecutor) -> int:
        """The longest side with which the large pictures take at most half of the budget."""
        large = sorted(self._large)
        step = max(1, len(large) // self.probed)
        probe = large[::step][: self.probed]
        for side in self.sides if large else ():
            made = threads.map(lambda number, s=side: self._address(number, s), probe)
            bytes_each = sum(len(address or "") for address in made) / len(probe)
            if bytes_each * len(large) <= self.budget / 2:
                return side
        return self.side

    def _sized(self, number: int, large_side: int) -> str | None:
        return self._address(number, large_side if number in self._large else self.side)

    def _address(self, number: int, side: int) -> str | None:
        images, index = self._sources[number]
        try:
            picture = Image.fromarray(images.read(index))
        except OSError:
            return None
        picture.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
        buffer = io.BytesIO()
        quality = self.quality if side == self.side else self.large_quality
        picture.save(buffer, "WEBP", quality=quality, method=2)
        return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()

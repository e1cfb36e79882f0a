"""How the files of a run are read: decoded whenever they are needed, or once for a cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flags import Options
from utils import InputError, nearest_names

DECODE = ("exact", "cache")


@dataclass(frozen=True)
class Reading:
    """Where pixels come from; see the flags of the same names.

    Attributes:
        decode: "exact" decodes a file whenever it is needed; "cache" stores the pixels of all files
            on disk (cache.py).
        cache_size: short side of the images in the cache, in pixels.
        cache_dir: the folder of caches; None is the user's cache folder.
        data_device: "cuda" keeps the cache's pixels in the GPU's memory. Pictures that are always
            in memory go to the device, unless this is "cpu".

    Raises:
        InputError: an unknown value.
    """

    decode: str = "exact"
    cache_size: int = 256
    cache_dir: str | Path | None = None
    data_device: str | None = None

    def __post_init__(self) -> None:
        if self.decode not in DECODE:
            raise InputError(
                f"--decode {self.decode} does not exist; {nearest_names(self.decode, DECODE)}"
            )
        if self.data_device not in (None, "cpu", "cuda"):
            raise InputError(f"--data-device {self.data_device} does not exist; choose cpu or cuda")

    @classmethod
    def of(cls, options: Options) -> Reading:
        """The reading of a run with these resolved options."""
        return cls(options.decode, options.cache_size, options.cache_dir, options.data_device)


FROM_FILES = Reading()
"""The default: every file is decoded whenever it is needed."""

"""Caltech-UCSD Birds 200, the 2011 edition: 11,788 photographs of 200 species.

Classes 1 to 100 are for training, 101 to 200 are held out. Images are listed by `images.txt`, or by
the class folders if that is missing. The 2010 edition (6,033 other photographs of the same species,
in folders of the same names) is recognised and refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dataset.base import Protocol
from dataset.files import find, need, read_rows, safe_name, subfolders
from dataset.layouts import (
    Benchmark,
    Layout,
    Listing,
    from_rows,
    half_of_classes,
    list_class_folders,
)
from utils import InputError

_IMAGES_2010 = 6033
# Names of the 2010 edition end in the picture's number on Flickr; those of 2011 in few digits.
_NAME_2010 = re.compile(r"_[0-9]{7,}\.jpe?g$", re.IGNORECASE)


def _has_numbered_folders(folder: Path) -> bool:
    images = find(folder, "images")
    return images is not None and any(re.match("[0-9]+[.]", name) for name in subfolders(images))


def _read_folders(folder: Path) -> Listing:
    images = need(folder, "images")
    listed = find(folder, "images.txt")
    if listed is None:
        return list_class_folders(images)
    names = [safe_name(name, listed) for _, name in read_rows(listed, columns=2)]
    return from_rows(images, names, [name.split("/")[0] for name in names])


def _is_2010_edition(names: Sequence[str]) -> bool:
    old = sum(bool(_NAME_2010.search(name)) for name in names)
    return len(names) == _IMAGES_2010 or 2 * old > len(names)


class CUB(Benchmark):
    """CUB-200-2011 in the folders that Proxy-Anchor, SEC, divide and conquer and others use."""

    name = "cub"
    aliases = ("cub200", "cub2002011")
    protocol = Protocol(ks=(1, 2, 4, 8, 16, 32))
    folders = (
        "CUB_200_2011",
        "CUB-200-2011",
        "CUB200_2011",
        "CUB200",
        "CUB",
        "CUB/CUB_200_2011",
        "CUB_200",
        "CUB-200",
    )
    layouts = (Layout("images/001.Black_footed_Albatross/…", _has_numbered_folders, _read_folders),)
    published = MappingProxyType({"train": (5864, 100), "eval": (5924, 100)})
    origin = (
        "CUB-200-2011 is public at https://data.caltech.edu/records/65de6-vp158 "
        "(CUB_200_2011.tgz, 1.15 GB). The photographs belong to their authors; the collection is "
        "for non-commercial research and education. "
        "Take the 2011 edition, not the one of 2010."
    )
    tree = """CUB_200_2011/
  images.txt            (optional)
  images/
    001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.jpg
    …
    200.Common_Yellowthroat/…"""

    def list_split(self, layout: Layout, folder: Path, split: str, **options: Any) -> Listing:
        """The images of the first or the second half of the classes; refuses the 2010 edition."""
        listing = layout.read(folder)
        if _is_2010_edition(listing.names):
            raise InputError(
                f"cub: {folder} is the 2010 edition of CUB-200 ({len(listing.names):,} images, "
                "6,033 in full), on which no published result was measured; move it away and "
                f"get the 2011 edition, or name this one folder:{listing.folder}"
            )
        return half_of_classes(listing, split, self.name)


DATA_SET = CUB()

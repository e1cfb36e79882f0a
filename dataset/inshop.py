"""In-Shop Clothes Retrieval (DeepFashion): 52,712 photographs of 7,982 items of clothing.

One partition file lists training, query and gallery images; "eval" is the queries followed by the
gallery, for metrics over all held-out images. Bounding boxes are not used.

The authors provide the photographs twice, with the same names: `img`, centred and resized to
256 x 256 pixels, is for retrieval, and `img_highres` for parsing and segmentation
(docs/dataset/IN_SHOP_DATASET.md in their laboratory's mmfashion).
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dataset.base import Protocol
from dataset.decoding import reason
from dataset.files import find, need, read_rows, read_text, safe_name, warn_once
from dataset.layouts import Benchmark, Layout, Listing, folder_with, from_rows
from dataset.own import notes_logger
from utils import InputError

_PARTITIONS = (
    "Eval/list_eval_partition.txt",
    "list_eval_partition.txt",
    "Anno/list_eval_partition.txt",
)
_HELD_OUT = ("query", "gallery")


def _images(folder: Path, kind: str) -> Path | None:
    """The folder that the list calls "img", also inside the archive's Img/; None if not there."""
    inside = find(folder, f"Img/{kind}")
    if inside is not None:
        return inside
    images = find(folder, kind)
    is_archive = images is not None and find(images, "img", "img_highres") is not None
    return None if is_archive else images


def _matches(folder: Path, kind: str) -> bool:
    return find(folder, *_PARTITIONS) is not None and _images(folder, kind) is not None


def _partition(path: Path) -> list[list[str]]:
    rows = read_rows(path, columns=3, skip=2)
    try:
        announced = int(read_text(path).partition("\n")[0])
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} does not begin with its number of rows ({reason(error)}); "
            "get the file again from its source"
        ) from error
    if announced != len(rows):
        raise InputError(
            f"{path} announces {announced:,} rows and has {len(rows):,}; it was cut short or "
            "changed, get it again from its source"
        )
    return rows


def _read(folder: Path, split: str, kind: str) -> Listing:
    path = need(folder, *_PARTITIONS)
    # Labels are numbered over queries and gallery together, even if only one of them is loaded.
    side = ("train",) if split == "train" else _HELD_OUT
    rows = [row for row in _partition(path) if row[2] in side]
    rows.sort(key=lambda row: side.index(row[2]))
    names = [safe_name(name, path).removeprefix("img/") for name, _, _ in rows]
    images = _images(folder, kind) or folder
    base = folder_with(names[0], images, find(images, kind)) if names else images
    listing = from_rows(base, names, [item for _, item, _ in rows])
    wanted = side if split == "eval" else (split,)
    chosen = [index for index, row in enumerate(rows) if row[2] in wanted]
    return listing._replace(
        names=[names[index] for index in chosen],
        labels=listing.labels[np.array(chosen, np.int64)],
    )


def _layout(kind: str, concern: str = "") -> Layout:
    return Layout(
        f"list_eval_partition.txt with {kind}/",
        lambda folder: _matches(folder, kind),
        lambda folder, split: _read(folder, split, kind),
        concern,
    )


_HIGHRES = (
    "these are the pictures of img_highres, and published results are on those of img "
    "(Img/img.zip, 256 x 256 pixels): R@1 has been seen to differ by -1 to +1.3 points; put img "
    "next to it, and it is used"
)


class InShop(Benchmark):
    """In-Shop by its partition file; `img` is preferred to `img_highres` if both are there."""

    name = "inshop"
    aliases = ("inshopclothes", "inshopclothesretrieval", "deepfashion")
    protocol = Protocol(ks=(1, 10, 20, 30, 40, 50))
    query_gallery = True
    folders = (
        "Inshop_Clothes",
        "in-shop",
        "Inshop",
        "In_shop",
        "In-shop Clothes Retrieval Benchmark",
        "DeepFashion/In-shop Clothes Retrieval Benchmark",
        "DeepFashion_InShop",
        "DeepFashion",
    )
    layouts = (_layout("img"), _layout("img_highres", _HIGHRES))
    published = MappingProxyType(
        {"train": (25882, 3997), "query": (14218, 3985), "gallery": (12612, 3985)}
    )
    longest_side = 256  # of img
    origin = (
        "The In-shop Clothes Retrieval Benchmark of DeepFashion is on the authors' drive, linked "
        "from mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html, and opens with a "
        "password they send to people who sign their agreement: non-commercial research only, no "
        "passing on. There is no public link to download from. Take Img/img.zip and "
        "Eval/list_eval_partition.txt."
    )
    tree = """Inshop_Clothes/
  Eval/list_eval_partition.txt
  Img/img/WOMEN/Dresses/id_00000002/02_1_front.jpg …"""

    def list_split(self, layout: Layout, folder: Path, split: str, **options: Any) -> Listing:
        """The images of one part of the partition."""
        if not layout.concern and _matches(folder, "img_highres"):
            warn_once(
                "img and img_highres are both there; img is used, as in published results",
                notes_logger,
                logging.INFO,
            )
        return layout.read(folder, split=split)


DATA_SET = InShop()

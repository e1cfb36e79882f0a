"""Stanford Online Products: 120,053 photographs of 22,634 products, from an auction house.

The classes of Ebay_train.txt are for training, those of Ebay_test.txt are held out.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dataset.base import Protocol
from dataset.files import find, need, read_rows, safe_name, whole_numbers
from dataset.layouts import Benchmark, Layout, Listing, folder_with, from_rows, has

_LISTS = {"train": "Ebay_train.txt", "eval": "Ebay_test.txt"}


def _read(folder: Path, split: str, lists: str) -> Listing:
    path = need(folder, lists + _LISTS[split])
    rows = [row for row in read_rows(path, columns=4) if row[0] != "image_id"]  # the heading
    names = [safe_name(name, path) for _, _, _, name in rows]
    base = folder_with(names[0], folder, find(folder, "images")) if names else folder
    return from_rows(base, names, whole_numbers([number for _, number, _, _ in rows], path))


def _layout(lists: str) -> Layout:
    title = f"{lists}Ebay_train.txt and {lists}Ebay_test.txt"
    matches = has(f"{lists}Ebay_train.txt", f"{lists}Ebay_test.txt")
    return Layout(title, matches, partial(_read, lists=lists))


class SOP(Benchmark):
    """Stanford Online Products by its two lists."""

    name = "sop"
    aliases = ("stanfordonlineproducts", "standfordonlineproducts", "onlineproducts")
    protocol = Protocol(ks=(1, 10, 100, 1000))
    folders = (
        "Stanford_Online_Products",
        "Standford_Online_Products",  # as IDML's code spells it
        "SOP",
        "SOP/Stanford_Online_Products",
        "online_products",
    )
    layouts = (_layout(""), _layout("Info_Files/"))
    published = MappingProxyType({"train": (59551, 11318), "eval": (60502, 11316)})
    origin = (
        "Stanford_Online_Products.zip (3 GB) of cvgl.stanford.edu/projects/lifted_struct is on "
        "that laboratory's server, which people have found unreachable at times; its project page "
        "names other copies. For research; the photographs belong to the sellers who took them."
    )
    tree = """Stanford_Online_Products/
  Ebay_train.txt
  Ebay_test.txt
  bicycle_final/111085122871_0.JPG …
  … (12 folders)"""

    def list_split(self, layout: Layout, folder: Path, split: str, **options: Any) -> Listing:
        """The images of one list."""
        return layout.read(folder, split=split)


DATA_SET = SOP()

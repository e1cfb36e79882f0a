"""PKU VehicleID: photographs of 26,267 vehicles from road cameras.

train_list.txt is for training; the held-out lists are small, medium and large (800, 1600 and 2400
vehicles). As in papers on metric learning, each image of a list searches among the others. The
protocol for re-identification is different: one random gallery image per vehicle.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

from dataset.base import ImageSet, Protocol
from dataset.files import is_image, need, read_rows, safe_name, whole_numbers
from dataset.layouts import Benchmark, Layout, Listing, from_rows, has
from utils import InputError

_VEHICLES = {"large": 2400, "medium": 1600, "small": 800}


def _read(folder: Path, split: str, size: str) -> Listing:
    title = "train_list.txt" if split == "train" else f"test_list_{_VEHICLES[size]}.txt"
    path, images = need(folder, f"train_test_split/{title}"), need(folder, "image")
    rows = read_rows(path, columns=2)
    names = [_file_name(safe_name(name, path)) for name, _ in rows]
    return from_rows(images, names, whole_numbers([vehicle for _, vehicle in rows], path))


def _file_name(name: str) -> str:
    return name if is_image(name) else f"{name}.jpg"


class VehicleID(Benchmark):
    """VehicleID by its lists."""

    name = "vid"
    aliases = ("vehicleid", "pkuvehicleid", "pkuvid")
    protocol = Protocol(ks=(1, 5), sizes=tuple(_VEHICLES))
    options = ("size",)
    folders = (
        "vehicle-id/VehicleID_V1.0",
        "VehicleID_V1.0",
        "VehicleID/VehicleID_V1.0",
        "VehicleID",
        "vehicle-id",
        "vehicle_id",
        "vid",
        "vid/VehicleID_V1.0",
    )
    layouts = (Layout("image/ with train_test_split/", has("image", "train_test_split"), _read),)
    # The papers give vehicles for every list, and images for these two only.
    published = MappingProxyType(
        {
            "train": (113346, 13164),
            "eval large": (None, 2400),
            "eval medium": (None, 1600),
            "eval small": (6493, 800),
        }
    )
    origin = (
        "PKU VehicleID (VehicleID_V1.0) is given by Peking University to people who sign and send "
        "its form, see pkuml.org/resources/pku-vehicleid.html: research only, no passing on. There "
        "is no public link to download from."
    )
    tree = """vehicle-id/VehicleID_V1.0/
  image/0000001.jpg …
  train_test_split/
    train_list.txt
    test_list_800.txt
    test_list_1600.txt
    test_list_2400.txt"""

    def load(self, root: Path, split: str, size: str = "large", **options: Any) -> ImageSet:
        """`Benchmark.load`; `size` chooses the held-out list ("small", "medium", "large")."""
        if size not in _VEHICLES:
            raise InputError(f"vid has no test list {size!r}; choose one of {', '.join(_VEHICLES)}")
        return super().load(root, split, size=size, **options)

    def title(self, split: str, size: str = "large", **options: Any) -> str:
        """The split, with the size for held-out lists."""
        return split if split == "train" else f"{split} {size}"

    def variants(self) -> list[dict[str, Any]]:
        """Training and the three held-out lists."""
        return [{"split": "train"}, *({"split": "eval", "size": size} for size in _VEHICLES)]

    def list_split(self, layout: Layout, folder: Path, split: str, **options: Any) -> Listing:
        """The images of one list."""
        return layout.read(folder, split, options["size"])


DATA_SET = VehicleID()

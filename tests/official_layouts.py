"""Small copies of the published data sets, with real files in every layout that is in use.

`write("cars", "devkit", root, classes=6, images=3)` makes one under `root`. Image k of class number
c (from 0, training classes first) is a plain JPEG of `colour(c, k)`, so that a test can tell from
the pixels alone which image it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

SIZE = (24, 16)  # width, height
TEST_LISTS = {"small": 800, "medium": 1600, "large": 2400}


def colour(class_number: int, image: int) -> tuple[int, int, int]:
    """The colour of an image; classes up to 15 and images up to 11 stay apart through JPEG."""
    return 16 * class_number + 8, 20 * image + 8, 128


def class_of(pixels: np.ndarray) -> int:
    """The class number that an image (H, W, 3) shows."""
    return round((float(pixels[..., 0].mean()) - 8) / 16)


def image_of(pixels: np.ndarray) -> int:
    """Which image of its class an image (H, W, 3) shows."""
    return round((float(pixels[..., 1].mean()) - 8) / 20)


def save_image(path: Path, class_number: int, image: int, size: tuple[int, int] = SIZE) -> None:
    """Writes one JPEG of a plain colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour(class_number, image)).save(path, "JPEG", quality=95)


def _half(classes: int) -> int:
    return classes // 2


# --- CUB-200-2011 ---------------------------------------------------------------------------------

_BIRDS = ("Black_footed_Albatross", "Laysan_Albatross", "Sooty_Albatross", "Groove_billed_Ani")


def bird(class_number: int) -> str:
    """The folder of a class: numbered from 1, not in alphabetical order of the birds."""
    return f"{class_number + 1:03d}.{_BIRDS[class_number % len(_BIRDS)]}"


def _cub_images(folder: Path, classes: int, images: int) -> list[str]:
    names = [
        f"{bird(c)}/{_BIRDS[c % 4]}_{k + 1:04d}_{796000 + 10 * c + k}.jpg"
        for c in range(classes)
        for k in range(images)
    ]
    for index, name in enumerate(names):
        save_image(folder / name, index // images, index % images)
    return names


def _cub_official(root: Path, classes: int, images: int) -> None:
    home = root / "CUB_200_2011"
    names = _cub_images(home / "images", classes, images)
    listed = [f"{number} {name}\n" for number, name in enumerate(names, 1)]
    (home / "images.txt").write_text("".join(listed))


def _cub_2010(root: Path, classes: int, images: int) -> None:
    for c in range(classes):
        for k in range(images):
            name = f"{_BIRDS[c % 4]}_{k + 1:04d}_{2731401028 + 100 * c + k}.jpg"
            save_image(root / "CUB_200" / "images" / bird(c) / name, c, k)


# --- Cars196 --------------------------------------------------------------------------------------

_CARS = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Audi S4 Sedan 2007", "BMW M3 2012")


def car(class_number: int) -> str:
    """The name of a class; by character code they are in class order."""
    return f"{chr(ord('A') + class_number)} {_CARS[class_number % len(_CARS)]}"


def _annotations(names: list[str], numbers: list[int], name_field: str) -> np.ndarray:
    fields = [
        (name_field, object),
        *((f"bbox_{side}", object) for side in ("x1", "y1", "x2", "y2")),
    ]
    rows = np.zeros((1, len(names)), [*fields, ("class", object)])
    for index, (name, number) in enumerate(zip(names, numbers, strict=True)):
        rows[0, index] = (name, 1, 1, SIZE[0], SIZE[1], number)
    return rows


def _car_names(classes: int) -> np.ndarray:
    return np.array([[car(c) for c in range(classes)]], object)


def _cars_annos(folder: str, root: Path, classes: int, images: int) -> None:
    home = root / folder
    names = [f"car_ims/{index + 1:06d}.jpg" for index in range(classes * images)]
    for index, name in enumerate(names):
        save_image(home / name, index // images, index % images)
    numbers = [index // images + 1 for index in range(len(names))]
    content = {
        "annotations": _annotations(names, numbers, "relative_im_path"),
        "class_names": _car_names(classes),
    }
    savemat(home / "cars_annos.mat", content)


def _cars_devkit(root: Path, classes: int, images: int) -> None:
    home = root / "stanford_cars"
    (home / "devkit").mkdir(parents=True)
    savemat(home / "devkit" / "cars_meta.mat", {"class_names": _car_names(classes)})
    # As in the original, classes are mixed over both folders: images are dealt alternately.
    places = {
        "cars_train": (0, home / "devkit" / "cars_train_annos.mat"),
        "cars_test": (1, home / "cars_test_annos_withlabels.mat"),
    }
    for folder, (parity, path) in places.items():
        pairs = [(c, k) for k in range(images) for c in range(classes) if k % 2 == parity]
        names = [f"{index + 1:05d}.jpg" for index in range(len(pairs))]
        for name, (c, k) in zip(names, pairs, strict=True):
            save_image(home / folder / name, c, k)
        numbers = [c + 1 for c, _ in pairs]
        savemat(path, {"annotations": _annotations(names, numbers, "fname")})


def _cars_kaggle(root: Path, classes: int, images: int) -> None:
    for c in range(classes):
        for k in range(images):
            side = ("train", "test")[k % 2]
            home = root / "car_data" / "car_data"
            save_image(home / side / car(c) / f"{k * classes + c:05d}.jpg", c, k)
    (root / "names.csv").write_text("".join(f"{car(c)}\n" for c in range(classes)))


def _cars_class_folders(root: Path, classes: int, images: int) -> None:
    for c in range(classes):
        for k in range(images):
            save_image(root / "cars196" / "images" / car(c) / f"{k:05d}.jpg", c, k)


# --- Stanford Online Products ---------------------------------------------------------------------


def _sop(folder: str, lists: str, images_in: str, root: Path, classes: int, images: int) -> None:
    home = root / folder
    (home / lists).mkdir(parents=True)
    number = 1
    for title, span in (
        ("train", range(_half(classes))),
        ("test", range(_half(classes), classes)),
    ):
        lines = ["image_id class_id super_class_id path\n"]
        for c in span:
            for k in range(images):
                name = f"{('bicycle', 'chair')[c % 2]}_final/{111000000 + c}_{k}.JPG"
                save_image(home / images_in / name, c, k)
                lines.append(f"{number} {c + 1} {c % 2 + 1} {name}\n")
                number += 1
        (home / lists / f"Ebay_{title}.txt").write_text("".join(lines))


# --- In-Shop --------------------------------------------------------------------------------------


def inshop_status(class_number: int, classes: int, image: int) -> str:
    """The second half of the classes is held out; their first image is the query."""
    if class_number < _half(classes):
        return "train"
    return "query" if image == 0 else "gallery"


def _inshop(
    folder: str, partition: str, images_in: str, root: Path, classes: int, images: int
) -> None:
    home = root / folder
    rows = []
    for c in range(classes):
        for k in range(images):
            # The training classes have the larger numbers: labels must not depend on that.
            item = f"id_{(c + _half(classes)) % classes + 1:08d}"
            inside = f"{('WOMEN', 'MEN')[c % 2]}/Dresses/{item}/{k + 1:02d}_1_front.jpg"
            save_image(home / images_in / inside, c, k)
            # The published file pads its columns with blanks, also at the end of the line.
            name = f"img/{inside}"
            rows.append(f"{name:<70} {item}  {inshop_status(c, classes, k)}   \n")
    path = home / partition
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{len(rows)}\nimage_name item_id evaluation_status\n{''.join(rows)}")


# --- VehicleID ------------------------------------------------------------------------------------


def vehicles(size: str, classes: int) -> range:
    """The class numbers of a held-out list: each list holds the smaller ones."""
    held_out = classes - _half(classes)
    count = {"small": max(1, held_out - 2), "medium": max(1, held_out - 1), "large": held_out}[size]
    return range(_half(classes), _half(classes) + count)


def _vid(folder: str, root: Path, classes: int, images: int) -> None:
    home = root / folder
    lists = home / "train_test_split"
    lists.mkdir(parents=True)

    def lines(span: range) -> str:
        # Vehicle numbers of different lengths: 9 comes before 10, whatever letters say.
        return "".join(f"{c:04d}{k:03d} {c + 7}\n" for c in span for k in range(images))

    for c in range(classes):
        for k in range(images):
            save_image(home / "image" / f"{c:04d}{k:03d}.jpg", c, k)
    (lists / "train_list.txt").write_text(lines(range(_half(classes))))
    for size, number in TEST_LISTS.items():
        (lists / f"test_list_{number}.txt").write_text(lines(vehicles(size, classes)))


# --- all of them ----------------------------------------------------------------------------------

Writer = Callable[[Path, int, int], object]


def _cub_at(folder: str) -> Writer:
    return lambda root, classes, images: _cub_images(root / folder / "images", classes, images)


def _cars_at(folder: str) -> Writer:
    return lambda root, classes, images: _cars_annos(folder, root, classes, images)


def _sop_at(folder: str, lists: str = "", images_in: str = "") -> Writer:
    return lambda root, classes, images: _sop(folder, lists, images_in, root, classes, images)


def _inshop_at(folder: str, partition: str, images_in: str) -> Writer:
    return lambda root, classes, images: _inshop(
        folder, partition, images_in, root, classes, images
    )


def _vid_at(folder: str) -> Writer:
    return lambda root, classes, images: _vid(folder, root, classes, images)


LAYOUTS: dict[tuple[str, str], Writer] = {
    ("cub", "official"): _cub_official,
    ("cub", "cub-200-2011"): _cub_at("cub-200-2011"),
    ("cub", "cub200"): _cub_at("cub200"),
    ("cars", "official"): _cars_at("cars196"),
    ("cars", "CARS196"): _cars_at("CARS196"),
    ("cars", "class folders"): _cars_class_folders,
    ("cars", "kaggle"): _cars_kaggle,
    ("cars", "devkit"): _cars_devkit,
    ("sop", "official"): _sop_at("Stanford_Online_Products"),
    ("sop", "sop"): _sop_at("sop"),
    ("sop", "nested"): _sop_at("SOP/Stanford_Online_Products"),
    ("sop", "online_products"): _sop_at("online_products", "Info_Files", "images"),
    ("inshop", "official"): _inshop_at("Inshop_Clothes", "Eval/list_eval_partition.txt", "Img/img"),
    ("inshop", "in-shop"): _inshop_at("in-shop", "Eval/list_eval_partition.txt", "img"),
    ("inshop", "flat"): _inshop_at("Inshop", "list_eval_partition.txt", "img"),
    ("inshop", "highres"): _inshop_at("Inshop", "list_eval_partition.txt", "img_highres"),
    ("inshop", "highres in Img"): _inshop_at(
        "Inshop_Clothes", "Eval/list_eval_partition.txt", "Img/img_highres"
    ),
    ("vid", "official"): _vid_at("vehicle-id/VehicleID_V1.0"),
    ("vid", "VehicleID"): _vid_at("VehicleID"),
}


def write(name: str, layout: str, root: Path, classes: int = 6, images: int = 3) -> None:
    """Makes a small copy of a data set.

    Args:
        name: "cub", "cars", "sop", "inshop" or "vid". layout: one of its entries in LAYOUTS.
        root: the data root. classes: in all, at most 16. images: of each class, at most 12.
    """
    LAYOUTS[name, layout](root, classes, images)


def write_cub_2010(root: Path, classes: int = 4, images: int = 3) -> None:
    """Makes a small copy of the edition of CUB that is not the benchmark."""
    _cub_2010(root, classes, images)

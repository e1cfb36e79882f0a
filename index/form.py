"""What the records of an index must hold: plain values of the first, and the arrays of each.

Checksums say that a file is as it was written. They do not say that we wrote it: another program,
or a newer version of this one, may mean something else by the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from index.codes import CODINGS

if TYPE_CHECKING:
    from index.journal import Record

CONTENT_SIZE = 16  # bytes of the checksum of an image's file
SEARCHED = ("vectors", "codes", "step")
"""The large arrays, which are compared with their checksums when they are searched."""

NETWORK: dict[str, tuple[type, ...]] = {
    "made": (str,),
    "size": (int,),
    "fingerprint": (str,),
    "run": (str,),
    "folder": (str,),
    "weights": (str, type(None)),
    "whiten": (int, type(None)),
    "model": (str,),
    "codes": (str,),
    "thresholds": (dict, type(None)),
}
"""The values of an index's first record. Those that may be None may be missing, too."""
GRAPH: dict[str, tuple[type, ...]] = {"made": (str,), "size": (int,), "covers": (int,)}
"""The values of a graph's record."""

Form = tuple[str, tuple[int | None, ...]]
"""A type of numpy's, and a length for each axis; None: any length."""


def check_values(values: Mapping[str, Any], types: Mapping[str, tuple[type, ...]]) -> None:
    """Raises ValueError where plain values are missing, or of another type than these."""
    for name, known in types.items():
        value = values.get(name)
        if not isinstance(value, known) or isinstance(value, bool):
            raise ValueError(f"its {name} is {value!r:.80}")


def check_network(values: Mapping[str, Any]) -> None:
    """Raises ValueError where plain values do not describe the network of an index."""
    check_values(values, NETWORK)
    if values["codes"] not in ("none", *CODINGS):
        raise ValueError(f"its codes are {values['codes']!r:.80}")


def check_arrays(record: Record, about: Mapping[str, Any], added: int) -> None:
    """Raises ValueError where the arrays of a record are not as an index of `about` has them.

    Args:
        added: how many images the records before it have added.
    """
    arrays = record.arrays
    size, kind = about["size"], about["codes"]
    if "vectors" in arrays:
        count = len(arrays["vectors"])
        added += count
        check_values(record.content, {"folder": (str,)})
        _check_forms(arrays, _of_images(count, size, kind))
        for name in ("ids", "paths", "labels"):
            _check_ends(name, arrays)
        _check_range("label_of", arrays["label_of"], -1, len(arrays["labels_ends"]))
    if "centre" in arrays:
        _check_forms(arrays, {"centre": ("f4", (size,))})
    for name in ("removed", "touched"):
        if name in arrays:
            _check_forms(arrays, {name: ("i8", (None,))})
            _check_range(name, arrays[name], 0, added)
    if "touched" in arrays:
        _check_forms(arrays, {"touched_stamps": ("i8", (len(arrays["touched"]), 2))})


def check_graph(record: Record) -> None:
    """Raises ValueError where a record is not a graph's."""
    check_values(record.content, GRAPH)
    _check_forms(record.arrays, {"graph": ("u1", (None,))})


def _of_images(count: int, size: int, kind: str) -> dict[str, Form]:
    """The arrays of a record that adds `count` images, with embeddings of `size` numbers."""
    coded: dict[str, dict[str, Form]] = {
        "int8": {"codes": ("i1", (count, size)), "step": ("f4", ())},
        "binary": {"codes": ("u8", (-(-size // 64), count)), "step": ("f4", ())},
    }
    return {
        "vectors": ("f4", (count, size)),
        "ids": ("u1", (None,)),
        "ids_ends": ("i8", (count,)),
        "paths": ("u1", (None,)),
        "paths_ends": ("i8", (count,)),
        "labels": ("u1", (None,)),
        "labels_ends": ("i8", (None,)),
        "label_of": ("i4", (count,)),
        "contents": ("u1", (count, CONTENT_SIZE)),
        "stamps": ("i8", (count, 2)),
        **coded.get(kind, {}),
    }


def _check_forms(arrays: Mapping[str, np.ndarray], forms: Mapping[str, Form]) -> None:
    for name, (kind, shape) in forms.items():
        if name not in arrays:
            raise ValueError(f"it has no {name}")
        array = arrays[name]
        fits = array.ndim == len(shape) and all(
            length in (None, found) for length, found in zip(shape, array.shape, strict=True)
        )
        if array.dtype != np.dtype(kind) or not fits:
            raise ValueError(f"its {name} are {array.dtype} of shape {array.shape}")


def _check_ends(name: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError where texts do not follow each other to the end of their bytes."""
    ends = arrays[f"{name}_ends"]
    last = int(ends[-1]) if len(ends) else 0
    if last != len(arrays[name]) or (np.diff(ends, prepend=0) < 0).any():
        raise ValueError(f"its {name} do not end where it says")


def _check_range(name: str, numbers: np.ndarray, least: int, stop: int) -> None:
    if len(numbers) and not least <= numbers.min() <= numbers.max() < stop:
        raise ValueError(f"its {name} name what is not there")

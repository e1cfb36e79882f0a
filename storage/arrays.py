"""Arrays as .npz files with a checksum."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from storage.archives import opened, write_archive
from utils import damage_in_words

if TYPE_CHECKING:
    import numpy as np


def save_arrays(path: Path, content: dict[str, np.ndarray], *, small: bool = False) -> None:
    """Saves arrays as .npz, atomically and with a checksum; `small` compresses them."""
    import numpy as np

    save = np.savez_compressed if small else np.savez
    write_archive(path, lambda file: save(file, **content))


def load_arrays(path: Path, what: str) -> dict[str, np.ndarray]:
    """All arrays of a .npz file; never runs code from it.

    Raises:
        InputError: the file is missing, differs from its checksum, or does not contain arrays.
    """
    import numpy as np

    advice = "use another copy of it, or make it again"
    with opened(path, what) as file, damage_in_words(f"{what} {path}", advice):
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                _check_size(archive, member)
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)


def _check_size(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Raises ValueError, before memory is allocated, if an array claims to exceed its file."""
    from numpy.lib import format as npy

    with archive.open(member) as file:
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        shape, _, kind = read[npy.read_magic(file)](file)
        claimed = file.tell() + math.prod(shape) * kind.itemsize
    # Deflate never makes one byte of more than 1,032.
    if claimed != member.file_size or claimed > 1100 * member.compress_size + 1024:
        raise ValueError(f"{member.filename} claims to be of shape {shape}, and is not")

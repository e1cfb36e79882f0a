"""Files that are given as a folder or a table of images, but are neither: what to do with them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from dataset.decoding import need_file

HEAD = 512  # first bytes by which they are recognised

ADDRESS = "is an address; images are read from files: download it, and name that"

_UNPACK = "an archive; unpack it, and name the folder that comes out of it: folder:PATH"
_SHEET = "a spreadsheet; save it as CSV there"
_COLUMNS = "and images are listed in CSV, with the columns path and label; write it as that"

# Offset, the bytes there, and what the file is. Spreadsheets (_SHEETS) are zip archives too.
_BEGINNINGS = (
    (0, b"PK\3\4", _UNPACK),
    (0, b"\x1f\x8b", _UNPACK),
    (0, b"BZh", _UNPACK),
    (0, b"\xfd7zXZ", _UNPACK),
    (0, b"(\xb5/\xfd", _UNPACK),
    (0, b"7z\xbc\xaf", _UNPACK),
    (0, b"Rar!", _UNPACK),
    (257, b"ustar", _UNPACK),
    (0, b"\xd0\xcf\x11\xe0", _SHEET),
    (0, b"PAR1", f"a Parquet file, {_COLUMNS}"),
    (0, b"ARROW1", f"an Arrow file, {_COLUMNS}"),
    (0, b"SQLite format 3", f"a database, {_COLUMNS}"),
    (0, b"\x89HDF", f"an HDF5 file, {_COLUMNS}"),
    (0, b"\x93NUMPY", f"a NumPy array, {_COLUMNS}"),
)
_SHEETS = (".xlsx", ".xlsm", ".ods")
_PACKED = frozenset(".zip .tar .tgz .gz .bz2 .xz .zst .7z .rar .parquet .arrow .h5 .hdf5".split())


def what_it_is(path: Path | str) -> str:
    """What kind of file this is, and what to do, in words; "" for a file that may be a table."""
    try:
        need_file(path)
        with Path(path).open("rb") as file:
            return what_begins_with(file.read(HEAD), path)
    except (OSError, ValueError):
        return ""


def what_begins_with(head: bytes, path: Path | str) -> str:
    """`what_it_is`, given the first `HEAD` bytes of the file."""
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
        return f"JSON, {_COLUMNS}"
    for place, beginning, words in _BEGINNINGS:
        if head.startswith(beginning, place):
            return _SHEET if Path(path).suffix.lower() in _SHEETS else words
    return ""


def packed_suffixes(suffixes: Iterable[str]) -> list[str]:
    """Those of the suffixes whose files may contain pictures, which are not searched there."""
    return sorted(_PACKED.intersection(suffixes))


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address on the web or in an object store: https://…, s3://…"""
    kind, _, rest = os.fspath(path).partition("://")
    return bool(rest) and kind.isalnum()

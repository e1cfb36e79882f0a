"""Reads MATLAB's label files (.mat) in a separate process.

    python dataset/mat.py FILE > file.json

scipy reads them in compiled code, which a damaged file can crash, together with its process.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

PATIENCE = 120  # seconds for a file of a few megabytes


class MatError(Exception):
    """A file that could not be read, and why."""


def read(path: Path) -> dict[str, Any]:
    """The variables of a .mat file as plain values: lists of numbers and words, structs by field.

    Raises:
        OSError: the file is not there. MatError: it cannot be read.
    """
    status = path.stat()
    return _read(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _read(path: Path, modified: int, size: int) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), str(path)]
    try:
        ended = subprocess.run(command, capture_output=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise MatError(f"it took more than {PATIENCE} seconds") from None
    if ended.returncode < 0:
        raise MatError(f"its reader died: {signal.strsignal(-ended.returncode)}")
    if ended.returncode:
        last = ended.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise MatError(last[0] if last else "its reader failed")
    return json.loads(ended.stdout)


# --- in the other process -------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """A variable read by scipy as a value for JSON; other types as their text."""
    if isinstance(value, np.ndarray) and value.dtype.names:
        rows = np.atleast_1d(value)
        return {name: [_plain(item) for item in rows[name]] for name in value.dtype.names}
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value] if value.ndim else _plain(value.item())
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, bool | int | float | str | list) else str(value)


def _main(path: str) -> None:
    from scipy.io import loadmat

    found = loadmat(path, squeeze_me=True, chars_as_strings=True)
    content = {k: _plain(value) for k, value in found.items() if not k.startswith("__")}
    print(json.dumps(content))


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose files must not hide modules that scipy imports
    _main(sys.argv[1])

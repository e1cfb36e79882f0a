"""Keys of 64 bits for texts, by which a few of a million are found without a dictionary of all.

Different texts may have one key, so whoever finds a text by its key compares the text itself.
"""

from __future__ import annotations

import numpy as np

CHUNK = 2**13  # texts whose keys are computed at once
_POWERS = np.cumprod(np.full(2**12, 0x9E3779B97F4A7C15, np.uint64))


def encoded(text: str) -> bytes:
    """A text as an index stores it; a file's name need not be valid UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def key_of(text: str) -> np.uint64:
    """The key of a text: Σ (bᵢ + 1) pⁱ⁺¹ modulo 2⁶⁴ over its bytes bᵢ."""
    return _values(np.frombuffer(encoded(text), np.uint8)) @ np.resize(_POWERS, len(encoded(text)))


def keys_of(blob: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(n,) uint64: the keys of texts.

    Args:
        blob: their bytes, one text after the other. ends: (n,) the end of each.
    """
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    return np.concatenate(
        [np.empty(0, np.uint64)]
        + [
            _keys(blob, starts[at : at + CHUNK], ends[at : at + CHUNK])
            for at in range(0, len(ends), CHUNK)
        ]
    )


def _keys(blob: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    first, last = starts[0], ends[-1]
    places = np.arange(first, last) - np.repeat(starts, ends - starts)
    weighted = _values(blob[first:last]) * _POWERS[places % len(_POWERS)]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(weighted, dtype=np.uint64)])
    return sums[ends - first] - sums[starts - first]


def _values(letters: np.ndarray) -> np.ndarray:
    return letters.astype(np.uint64) + np.uint64(1)


class Column:
    """Numbers by key.

    Args:
        keys: (N,) uint64. numbers: (N,), ascending.
    """

    def __init__(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        order = np.argsort(keys, kind="stable")
        self._keys, self._numbers = keys[order], numbers[order]

    def numbers(self, key: np.uint64) -> list[int]:
        """Those with this key, ascending."""
        start, stop = (self._keys.searchsorted(key, side) for side in ("left", "right"))
        return self._numbers[start:stop].tolist()

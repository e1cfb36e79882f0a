"""Short codes of embeddings, which choose candidates; exact vectors then decide which are nearest.

int8     one byte per number: a quarter of the memory. All numbers of a record share one step, the
         largest magnitude / 127.
binary   one bit per number, which says whether it is above the mean of the first images: 1/32 of
         the memory. Codes are compared by the number of bits in which they differ.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from machine import cores


class Coded(NamedTuple):
    """Codes of n vectors.

    Attributes:
        codes: int8 (n, d), or binary (words, n) uint64, with each word of all vectors contiguous.
        step: of int8, (n,) or one number; else 1.
    """

    codes: np.ndarray
    step: np.ndarray | float = 1.0


class Coding(NamedTuple):
    """A kind of code.

    Attributes:
        encode: unit vectors (n, d) and the centre → codes.
        compare: queries (Q, d), codes, which of them, the centre → (Q, n), larger is nearer.
        axis: the axis of `codes` along which the vectors are.
        depth, least: `depth` candidates per wanted hit are scored exactly, and at least `least`.
    """

    encode: Callable[[np.ndarray, np.ndarray], Coded]
    compare: Callable[[np.ndarray, Coded, slice, np.ndarray], torch.Tensor]
    axis: int
    depth: int
    least: int


def tensor_of(array: np.ndarray) -> torch.Tensor:
    """An array as a tensor to be read, without torch's warning if the array is a read-only file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array)


# --- int8 -----------------------------------------------------------------------------------------


def _to_int8(vectors: np.ndarray, _: np.ndarray) -> Coded:
    step = max(float(np.abs(vectors).max(initial=0.0)) / 127, 1e-12)
    return Coded(np.rint(vectors / step).astype(np.int8), step)


def _compare_int8(queries: np.ndarray, coded: Coded, part: slice, _: np.ndarray) -> torch.Tensor:
    codes = tensor_of(coded.codes[part]).float()
    step = coded.step[part] if isinstance(coded.step, np.ndarray) else coded.step
    return (torch.from_numpy(queries) @ codes.T).mul_(torch.as_tensor(step, dtype=torch.float32))


# --- binary ---------------------------------------------------------------------------------------


def _to_bits(vectors: np.ndarray, centre: np.ndarray) -> Coded:
    bits = np.packbits(vectors > centre, axis=1)
    words = np.zeros((len(vectors), -(-bits.shape[1] // 8) * 8), np.uint8)
    words[:, : bits.shape[1]] = bits
    return Coded(np.ascontiguousarray(words.view(np.uint64).T))


def _compare_bits(
    queries: np.ndarray, coded: Coded, part: slice, centre: np.ndarray
) -> torch.Tensor:
    words = coded.codes[:, part]
    coded_queries = _to_bits(queries, centre).codes

    def agreement(query: int) -> np.ndarray:
        differing = np.zeros(words.shape[1], np.uint16)
        for word, own in zip(words, coded_queries[:, query], strict=True):
            differing += bits_in(word ^ own)
        return -differing.astype(np.float32)

    with ThreadPoolExecutor(cores()) as threads:  # NumPy releases the interpreter's lock
        return torch.from_numpy(np.stack(list(threads.map(agreement, range(len(queries))))))


def bits_by_table(words: np.ndarray) -> np.ndarray:
    """The number of bits that are set in each 64-bit word, for NumPy before 2.0."""
    pieces = np.ascontiguousarray(words).view(np.uint16).reshape(len(words), 4)
    return _BITS_OF_16[pieces].sum(axis=1, dtype=np.uint8)


_BITS_OF_16 = np.unpackbits(
    np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1
)
_BITS_OF_16 = _BITS_OF_16.sum(axis=1, dtype=np.uint8)

bits_in: Callable[[np.ndarray], np.ndarray] = getattr(np, "bitwise_count", bits_by_table)

CODINGS = {
    "int8": Coding(_to_int8, _compare_int8, axis=0, depth=4, least=64),
    "binary": Coding(_to_bits, _compare_bits, axis=1, depth=40, least=400),
}


# --- in a record ----------------------------------------------------------------------------------


def as_arrays(name: str, vectors: np.ndarray, centre: np.ndarray) -> dict[str, np.ndarray]:
    """The codes of some vectors as arrays for a record; {} if `name` is "none"."""
    if name == "none":
        return {}
    coded = CODINGS[name].encode(vectors, centre)
    return {"codes": coded.codes, "step": np.array(coded.step, np.float32)}


def of_arrays(arrays: dict[str, np.ndarray]) -> Coded:
    """The codes of a record."""
    return Coded(arrays["codes"], float(arrays["step"]))


def together(name: str, parts: Sequence[Coded]) -> Coded:
    """Concatenates the codes of several records."""
    axis = CODINGS[name].axis
    steps: list[Any] = [np.full(part.codes.shape[axis], part.step, np.float32) for part in parts]
    return Coded(np.concatenate([part.codes for part in parts], axis=axis), np.concatenate(steps))

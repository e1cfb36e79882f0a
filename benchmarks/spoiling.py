"""Ways to spoil a file: damage that a checksum reveals, and hostile contents without a checksum.

Each takes the content of a file and a random generator, and returns another content. damage.py
tries them on a run.
"""

from __future__ import annotations

import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

# --- damage to a file with a checksum -------------------------------------------------------------


def flip_a_bit(content: bytes, rng: random.Random) -> bytes:
    """Changes one bit."""
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(content: bytes, rng: random.Random) -> bytes:
    """Replaces some consecutive bytes by noise, or zeros."""
    start, length = rng.randrange(len(content)), rng.choice([4, 64, 512])
    noise = rng.choice([b"\0", b"\xff", rng.randbytes(1)]) * length
    return (content[:start] + noise + content[start + length :])[: len(content)]


def cut(content: bytes, rng: random.Random) -> bytes:
    """Cuts off the end, or nearly all."""
    return content[: rng.choice([0, 1, rng.randrange(len(content)), len(content) - 1])]


def append(content: bytes, rng: random.Random) -> bytes:
    """Appends bytes."""
    return content + rng.choice([b"\0", b"\n", rng.randbytes(200), content])


def exchange_parts(content: bytes, rng: random.Random) -> bytes:
    """Exchanges two pieces of equal length."""
    length = max(1, min(256, len(content) // 4))
    first = rng.randrange(len(content) - 2 * length + 1)
    second = rng.randrange(first + length, len(content) - length + 1)
    a, b = content[first : first + length], content[second : second + length]
    between = content[first + length : second]
    return content[:first] + b + between + a + content[second + length :]


def change_a_digit(content: bytes, rng: random.Random) -> bytes:
    """Changes a digit."""
    digits = [place for place, byte in enumerate(content) if chr(byte).isdigit()]
    place = rng.choice(digits or [0])
    return content[:place] + str(rng.randrange(10)).encode() + content[place + 1 :]


def exchange_members(content: bytes, rng: random.Random) -> bytes:
    """Exchanges the names of two members of an archive, whose own checksums remain right."""
    archive = zipfile.ZipFile(io.BytesIO(content))
    names = archive.namelist()
    a, b = rng.sample(names, 2)
    other = {a: b, b: a}
    return _archive({other.get(n, n): archive.read(n) for n in names}, archive.comment)


def _archive(members: dict[str, bytes], comment: bytes = b"") -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.comment = comment
    return made.getvalue()


DAMAGES = (flip_a_bit, flip_a_bit, overwrite, cut, append, exchange_parts, change_a_digit)


# --- hostile contents without a checksum ----------------------------------------------------------

VALUES = (
    *(None, True, -1, 0, 10**30, 1e308, float("nan"), float("inf"), "", "x", "\0", "\ud800"),
    *("9" * 5000, [], {}, [[]], {"a": 1}, ["x"] * 9, "nan", "/dev/zero", "folder:/nowhere"),
)


def spoil_value(content: Any, rng: random.Random) -> Any:
    """Changes, removes or moves one entry of a nested plain value."""
    if isinstance(content, dict) and content and rng.random() < 0.9:
        key = rng.choice(list(content))
        match rng.randrange(6):
            case 0:
                return {k: v for k, v in content.items() if k != key}
            case 1:
                return {**content, f"{key}!": content[key]}
            case _:
                return {**content, key: spoil_value(content[key], rng)}
    return rng.choice(VALUES)


def spoil_json(content: bytes, rng: random.Random) -> bytes:
    """Changes the shape, encoding or depth of JSON."""
    match rng.randrange(8):
        case 0:
            return rng.choice([b"[" * 100_000, b"{}", b"[]", b"3", b"null", b"\xff\xfe{}", b"NaN"])
        case 1:
            return content.decode().encode(rng.choice(["utf-16", "utf-8-sig", "utf-32"]))
        case 2:
            return flip_a_bit(content, rng)
    return json.dumps(spoil_value(json.loads(content), rng)).encode()


CELLS = ("", "x", "-1", "nan", "inf", "1e999", "9" * 400, "1.5", '"', "\udcff", "\0", "٣", "²")


def spoil_csv(content: bytes, rng: random.Random) -> bytes:
    """Makes cells that are not numbers, and lines that are not rows."""
    lines = [line.split(",") for line in content.decode().splitlines()]
    match rng.randrange(7):
        case 0:
            return flip_a_bit(content, rng)
        case 1:
            return cut(content, rng)
        case 2:
            return rng.choice([b"\n" * 9, b'"' + content, b"a" * 10**6, b"epoch,step\n1,1,1\n"])
        case 3:
            lines[0][rng.randrange(len(lines[0]))] = rng.choice(lines[0])
        case 4:
            lines[rng.randrange(len(lines))].append("1")
        case _:
            line = rng.choice(lines)
            line[rng.choice([0, rng.randrange(len(line))])] = rng.choice(CELLS)
    text = "\n".join(map(",".join, lines)) + "\n"
    return text.encode(errors="surrogateescape")


def spoil_npz(content: bytes, rng: random.Random) -> bytes:
    """Changes the type, shape or size of arrays, or removes them."""
    archive = zipfile.ZipFile(io.BytesIO(content))
    members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    array = np.load(io.BytesIO(members[name]), allow_pickle=False)
    match rng.randrange(9):
        case 0:
            del members[name]
        case 1:
            members[name] = members[name].replace(b"'shape': (", b"'shape': (1000000000000, ", 1)
        case 2:
            members[name] = _npy(np.array([{"a": 1}], dtype=object))
        case 3:
            members[name] = _npy(array.astype("U") if array.dtype.kind != "U" else np.arange(3))
        case 4:
            members[name] = _npy(array[:-1] if array.ndim else array[None])
        case 5:
            members[name] = _npy(np.full(array.shape, rng.choice([np.nan, np.inf, -1, 1e300])))
        case 6:
            members[name] = rng.choice([b"", b"no array", members[name][:-1]])
        case 7:
            return flip_a_bit(content, rng)
        case 8:
            members[rng.choice(["extra.npy", "notes.txt", "../../x.npy"])] = _npy(np.zeros(2))
    return _archive(members)


def _npy(array: np.ndarray) -> bytes:
    made = io.BytesIO()
    np.save(made, array, allow_pickle=True)
    return made.getvalue()


def spoil_pth(content: bytes, rng: random.Random) -> bytes:
    """Changes an entry or a tensor of a checkpoint."""
    if rng.random() < 0.2:
        return flip_a_bit(content, rng)
    stored = torch.load(io.BytesIO(content), weights_only=True)
    made = io.BytesIO()
    torch.save(_spoilt_tensors(stored, rng), made)
    return made.getvalue()


def _spoilt_tensors(content: Any, rng: random.Random) -> Any:
    if isinstance(content, dict) and content:
        key = rng.choice(list(content))
        if rng.randrange(8) == 0:
            return {k: v for k, v in content.items() if k != key}
        return {**content, key: _spoilt_tensors(content[key], rng)}
    if isinstance(content, list) and content:
        place = rng.randrange(len(content))
        return [*content[:place], _spoilt_tensors(content[place], rng), *content[place + 1 :]]
    if isinstance(content, torch.Tensor) and rng.random() < 0.7:
        choice = [content[..., None], content.flatten()[:1], content.double() * float("nan")]
        return rng.choice([*choice, content.to(torch.complex64), content.to_sparse()])
    return rng.choice(VALUES)


def spoil_pixels(content: bytes, rng: random.Random) -> bytes:
    """Damages pixels, which cannot be hostile, like a file with a checksum."""
    return rng.choice(DAMAGES)(content, rng)


HOSTILE = {
    ".pth": spoil_pth,
    ".npz": spoil_npz,
    ".json": spoil_json,
    ".csv": spoil_csv,
    ".pixels": spoil_pixels,
}


def without_checksum(file: Path, run: Path, content: bytes) -> bytes:
    """Removes the checksum of a file; returns the content as an older version wrote it."""
    (run / "checksums.json").unlink(missing_ok=True)
    if file.suffix not in (".pth", ".npz"):
        return content
    end = content.rindex(b"PK\x05\x06")
    return content[: end + 20] + b"\0\0"

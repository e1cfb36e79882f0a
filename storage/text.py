"""JSON and CSV as bytes, the encodings of text files, and checksums of bytes."""

from __future__ import annotations

import codecs
import csv
import errno
import hashlib
import io
import json
import math
import re
from pathlib import Path

from storage.space import in_bytes
from storage.writing import write_content
from terminal import printable


def as_json(content: object) -> bytes:
    """Indented JSON; numbers that are not finite become null."""
    text = json.dumps(_plain(content), indent=2, default=str, allow_nan=False)
    return f"{text}\n".encode()


def write_json(path: Path, content: object) -> None:
    """Writes `as_json(content)`, atomically."""
    write_content(path, as_json(content))


def _plain(content: object) -> object:
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def as_table(header: list[str], rows: list[list]) -> bytes:
    """CSV, in which control characters and formulas that call something are escaped.

    File names that are not UTF-8 keep their bytes, and harmless formulas (`=1+2`) stay as they are.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_cell, header))
    writer.writerows(map(_cell, row) for row in rows)
    return text.getvalue().encode(errors="surrogateescape")


def write_table(path: Path, header: list[str], rows: list[list]) -> None:
    """Writes `as_table(header, rows)`, atomically."""
    write_content(path, as_table(header, rows))


_CALLS = r"(?:\w\(|[|!])"
_CALLING = re.compile(f"[=+@-](?=.*{_CALLS})")
"""The beginning of a formula that calls a function, another program or another file. Names that
merely begin like a formula are not escaped, because people look them up in the table."""
_CALLING_AFTER = re.compile(f'(;"*)([=+@-])(?=[^;]*{_CALLS})')
"""The same where a spreadsheet splits at semicolons, as in much of Europe: it looks for quotation
marks at the beginning of its own cells, so those around ours do not hold one together."""


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    shown = printable(value, keep_bytes=True)
    if _CALLING.match(shown):
        shown = _harmless(shown[0]) + shown[1:]
    return _CALLING_AFTER.sub(lambda found: found[1] + _harmless(found[2]), shown)


def _harmless(sign: str) -> str:
    return f"\\x{ord(sign):02x}"


def decoded(content: bytes) -> str:
    """Text in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Raises:
        UnicodeDecodeError: the text has another encoding.
    """
    return content.decode(encoding_of(content))


def read_text(path: Path, most: int) -> str:
    """The text in a file of at most `most` bytes, as `decoded`.

    Raises:
        OSError: it cannot be read, or is larger. UnicodeDecodeError: as `decoded`.
    """
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {in_bytes(most)}")
    return decoded(content)


def encoding_of(start: bytes) -> str:
    """The encoding of a text, one of those of `decoded`, by its first bytes (two at least)."""
    is_utf_16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return "utf-16" if is_utf_16 else "utf-8-sig"


def digest(content: bytes) -> str:
    """The checksum of bytes: 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()

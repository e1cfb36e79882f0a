"""Reads the rows of CSV files as people and spreadsheet programs write them.

They may be in UTF-8, with or without a byte order mark, or in UTF-16 with one; fields may be
separated by commas, semicolons or tabs; there may be a first line "sep=;".
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from dataset.decoding import need_file, reason
from dataset.foreign import HEAD, what_begins_with
from storage import encoding_of
from utils import InputError

_DELIMITERS = ",;\t"
_LONGEST = 1_000_000  # characters in a line: what is longer is no table, and may fill the memory


def read_rows(path: Path, given: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that are not empty, the heading first, with the numbers of their first lines.

    Args:
        given: the name of the file in messages.

    Raises:
        InputError: it cannot be read, is no table, or a quotation mark is opened and not closed.
    """
    try:
        need_file(path)
        with path.open("rb") as file:
            head = file.read(HEAD)
        if other := what_begins_with(head, path):
            raise InputError(f"{given} is {other}")
        encoding = encoding_of(head[:2])
        with path.open(encoding=encoding, newline="") as file:
            delimiter, spoken = _delimiter(_lines(file))
            file.seek(0)
            for line, row in _parsed(_lines(file), delimiter, given):
                if spoken and row and row[0].lower().startswith("sep="):
                    spoken = False
                elif any(map(str.strip, row)):
                    yield line, row
    except (OSError, UnicodeError, csv.Error) as error:
        raise InputError(
            f"{given} cannot be read ({reason(error)}); it must be a CSV file in UTF-8"
        ) from error


def _lines(file: TextIO) -> Iterator[str]:
    """The lines of a file; raises csv.Error for one that is too long to be a table's."""
    while line := file.readline(_LONGEST):
        if len(line) == _LONGEST:
            raise csv.Error(f"it has a line of {_LONGEST:,} characters or more")
        yield line


def _parsed(lines: Iterable[str], delimiter: str, given: str) -> Iterator[tuple[int, list[str]]]:
    kept: list[str] = []  # the lines of one row

    def keeping() -> Iterator[str]:
        for line in lines:
            kept.append(line)
            yield line

    reader = csv.reader(keeping(), delimiter=delimiter, skipinitialspace=True)
    first = 1
    try:
        for row in reader:
            if len(kept) > 1:
                _check_closed(kept, delimiter)
            yield first, row
            kept.clear()
            first = reader.line_num + 1
    except csv.Error as error:
        if len(kept) <= 1:
            raise
        raise InputError(
            f"{given} line {first}: a quotation mark is opened and not closed; close it, or "
            'write "" for a quotation mark inside a field'
        ) from error


def _check_closed(lines: list[str], delimiter: str) -> None:
    """Raise csv.Error if a field over several lines does not end with its quotation mark.

    Such a field would include the rows below it, up to the next mark or the end of the file.
    """
    list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True))


def _delimiter(lines: Iterable[str]) -> tuple[str, bool]:
    """The delimiter of the heading, and whether a line "sep=;" names it.

    Spreadsheet programs of many countries write ";".
    """
    for line in lines:
        spoken = re.fullmatch("sep=(.)", line.strip(), re.IGNORECASE)
        if spoken:
            return spoken[1], True
        if line.strip(_DELIMITERS + '" \r\n'):
            return max(_DELIMITERS, key=line.count), False
    return _DELIMITERS[0], False

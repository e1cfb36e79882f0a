"""The data that the page requests, as plain values: facts, entries, and search results."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from dataset.files import folded
from index.asking import verdict_of
from index.files import content_of
from index.keys import key_of
from serving.gallery import Gallery, Query, State
from serving.guards import MOST_BYTES, Refused
from serving.pictures import SIDES, Crop, Shown
from storage import digest
from terminal import printable

if TYPE_CHECKING:
    from evaluation.thresholds import Thresholds
    from index import Entry, Index

MOST_RESULTS = 200
LONGEST_LABEL = 200


@dataclass(frozen=True)
class Picture:
    """An entry's picture: a tag that changes with its file, and a function that makes the JPEG."""

    tag: str
    jpeg: Callable[[], bytes]


class Api:
    """The functions behind the addresses; `query` contains the parameters of the address.

    They raise InputError or `Refused` if they cannot answer.
    """

    def __init__(self, gallery: Gallery) -> None:
        self.gallery = gallery
        self.shown = Shown()

    def info(self) -> dict[str, Any]:
        """Facts about the index, and the limits of requests."""
        state = self.gallery.now()
        return {
            "name": printable(self.gallery.path.name),
            "entries": len(state.index),
            "dimensions": state.index.size,
            "thresholds": _limits(state.index.thresholds),
            "upright": state.upright,
            "most_results": MOST_RESULTS,
            "most_bytes": MOST_BYTES,
        }

    def entries(self, query: Mapping[str, str]) -> dict[str, Any]:
        """Some entries, spread evenly over the index, or over those that match `label`."""
        state = self.gallery.now()
        count = _count(query.get("count", "12"), "count")
        rows, looked_at = self.gallery.spread(state, count, _wanted(query))
        found = [_described(state.index.entry(row), row) for row in rows]
        return {"entries": found, "of": len(state.index), "looked_at": looked_at}

    def entry(self, row: str, query: Mapping[str, str]) -> dict[str, Any]:
        """One entry."""
        return _described(*self._entry(self.gallery.now(), row, query))

    def picture(self, row: str, kind: str, query: Mapping[str, str]) -> Picture:
        """The picture of an entry, as a `thumbnail` or an `image`."""
        state = self.gallery.now()
        entry, _ = self._entry(state, row, query)
        stamp = Shown.stamp(entry.path)
        if stamp is None:
            raise Refused(HTTPStatus.NOT_FOUND, f"the file of {_name(entry)} is gone")
        tag = digest(f"{stamp} {state.upright} {kind} {entry.path!r}".encode())
        return Picture(tag, lambda: self.shown.jpeg(entry.path, stamp, SIDES[kind], state.upright))

    def search(self, query: Mapping[str, str], body: bytes) -> dict[str, Any]:
        """Entries nearest to the picture in `body` or to an entry (`entry`), or to a part of it.

        Parameters: `top`, the number of results; `crop`, left,top,right,bottom as shares; `label`,
        text that the label or the name of each result contains.
        """
        start = time.perf_counter()
        state = self.gallery.now()
        top = _count(query.get("top", "20"), "top")
        crop = Crop.of(query["crop"]) if query.get("crop") else None
        own = None
        if "entry" in query and body:
            raise Refused(HTTPStatus.BAD_REQUEST, "send a picture or name an entry, not both")
        if "entry" in query:
            entry, own = self._entry(state, query["entry"], query)
            source: str | bytes | int = own if crop is None else entry.path
        elif body:
            source = body
        else:
            raise Refused(HTTPStatus.BAD_REQUEST, "the picture has no bytes; send one, or an entry")
        wanted = Query(source, top, crop, _wanted(query), without=own)
        hits, looked_at = self.gallery.nearest(state, wanted)
        limits, same = state.index.thresholds, _same_files(state.index, own, body, crop)
        found = []
        for row, cosine in hits:
            verdict = verdict_of(limits, cosine, row in same)
            described = _described(state.index.entry(row), row)
            about = {"cosine": cosine, "verdict": verdict, "same_file": row in same}
            found.append({**described, **about})
        return {
            "query": None if own is None else _described(entry, own),
            "neighbours": found,
            "entries": len(state.index),
            "looked_at": looked_at,
            "thresholds": _limits(limits),
            "seconds": round(time.perf_counter() - start, 4),
        }

    def _entry(self, state: State, row: str, query: Mapping[str, str]) -> tuple[Entry, int]:
        """The entry in a row, or that with `check`, wherever it is by now.

        An entry gets another row when others are removed, or its own file or label has changed.
        Refuses a row that does not exist, and a `check` that no entry has.
        """
        number = int(row) if row.isascii() and row.isdigit() and len(row) <= 12 else -1
        there = 0 <= number < len(state.index)
        check = query.get("check")
        if check is not None and not (there and _check(state.index.entry(number)) == check):
            number = self._moved_to(state, check)
        elif not there:
            rows = f"give 0 to {len(state.index) - 1}" if len(state.index) else "it is empty"
            raise Refused(HTTPStatus.NOT_FOUND, f"the index has no such row; {rows}")
        return state.index.entry(number), number

    def _moved_to(self, state: State, check: str) -> int:
        """The row that the entry with this `check` has got."""
        if _CHECK.fullmatch(check):
            for row in self.gallery.rows_keyed(state, int(check, 16)):
                return row
        raise Refused(HTTPStatus.NOT_FOUND, "this picture is no longer in the index; search again")


def _same_files(index: Index, own: int | None, body: bytes, crop: Crop | None) -> set[int]:
    """The rows whose files have the same bytes as the query; none if it is a part of a picture.

    Args:
        own: the row of the query; None if it is the picture in the body.
    """
    if crop is not None:
        return set()
    if own is None:
        return index.rows_with(content_of(body))
    return index.rows_with(index.contents()[index.number(own)].tobytes())


# --- plain values ---------------------------------------------------------------------------------


def _described(entry: Entry, row: int) -> dict[str, Any]:
    check = _check(entry)
    return {
        "row": row,
        "id": printable(entry.id),
        "label": None if entry.label is None else printable(entry.label),
        "name": _name(entry),
        "gone": Shown.stamp(entry.path) is None,
        "check": check,
        "thumbnail": f"/api/entries/{row}/thumbnail?check={check}",
        "image": f"/api/entries/{row}/image?check={check}",
    }


def _name(entry: Entry) -> str:
    return printable(PurePath(entry.path).name)


_CHECK = re.compile("[0-9a-f]{16}")


def _check(entry: Entry) -> str:
    """The key of an entry's id, by which it is found when it has got another row."""
    return f"{key_of(entry.id):016x}"


def _limits(found: Thresholds | None) -> dict[str, Any] | None:
    """The two thresholds, and their error rates: of queries in an index of `searched` images.

    If `searched` is None, the rates are of pairs. `same` is None if nothing is called so. `doubt`
    is a sentence if few classes were measured.
    """
    if found is None:
        return None
    return {
        "same": _finite(found.same),
        "different": found.different,
        "false_same": _finite(found.false_same.expected),
        "false_different": _finite(found.false_different.expected),
        "searched": found.index_size,
        "measured_on": printable(found.title),
        "doubt": found.doubt or None,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _count(text: str, name: str) -> int:
    plain = text.isascii() and text.isdigit() and len(text) <= len(str(MOST_RESULTS))
    if not plain or not 1 <= int(text) <= MOST_RESULTS:
        raise Refused(
            HTTPStatus.BAD_REQUEST, f"{name} is not a number of entries; give 1 to {MOST_RESULTS}"
        )
    return int(text)


def _wanted(query: Mapping[str, str]) -> Callable[[Entry], bool] | None:
    """A test whether an entry's label or name contains the parameter `label`; None without one."""
    text = folded(query.get("label", "").strip())
    if len(text) > LONGEST_LABEL:
        raise Refused(
            HTTPStatus.BAD_REQUEST, f"label is longer than {LONGEST_LABEL} letters; shorten it"
        )
    if not text:
        return None
    return lambda entry: text in folded(f"{entry.label or ''}\n{_name(entry)}")

"""HTTP: a request is read within bounds of size and time, and answered once.

    GET  /                       the page, and /page.css, /page.js, /icon.svg
    GET  /api/info               what is searched
    GET  /api/entries?count=12   some entries; &label=TEXT those with TEXT in their label or name
    GET  /api/entries/ROW        one; /thumbnail and /image give its picture as JPEG
    POST /api/search             the body is a picture, or ?entry=ROW names an entry

Paths lead to functions and rows, never to files.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from serving import guards
from serving.api import Api, Picture
from serving.guards import Refused
from terminal import printable
from utils import InputError, nearest_names

logger = logging.getLogger("serving")

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""Of every answer. The browser loads nothing from elsewhere, and no other site loads us."""

HEAD_SECONDS = 15  # for a request's head, waiting for it included
BODY_SECONDS = 60
ANSWER_SECONDS = 60
DRAINED_BYTES, DRAINED_SECONDS = 2 * guards.MOST_BYTES, 3
MOST_SEARCHES = 8  # at once; one is worked on, the others wait for it

_HERE = Path(__file__).resolve().parent
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_KINDS |= {".svg": "image/svg+xml"}
FILES = {
    f"/{name if name != 'page.html' else ''}": name
    for name in ("page.html", "page.css", "page.js", "icon.svg")
}


@dataclass(frozen=True)
class Answer:
    """What is sent back."""

    content: bytes
    kind: str
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


def as_answer(
    content: object, status: HTTPStatus = HTTPStatus.OK, headers: Mapping[str, str] | None = None
) -> Answer:
    """Plain values as JSON, which is ASCII whatever the names are."""
    text = json.dumps(content, allow_nan=False)
    return Answer(text.encode("ascii"), "application/json", status, headers or {})


class _Timed(io.RawIOBase):
    """What comes in through a socket, until a moment; however slowly it trickles.

    A timeout of the socket's own would begin anew with every byte.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.until = 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took too long")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class Handler(BaseHTTPRequestHandler):
    """The requests of one connection, one after the other."""

    protocol_version = "HTTP/1.1"
    api: Api
    names: frozenset[str]
    searches: threading.BoundedSemaphore

    def setup(self) -> None:
        """Reads through a clock."""
        super().setup()
        self._incoming = _Timed(self.connection)
        self.rfile = io.BufferedReader(self._incoming)
        self._unread = 0

    def handle_one_request(self) -> None:
        """Reads a head and answers it; what a client does wrong ends its connection alone."""
        self._incoming.until = time.monotonic() + HEAD_SECONDS
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle_one_request()
            return
        self.close_connection = True

    # --- answering --------------------------------------------------------------------------------

    def do_GET(self) -> None:
        """Answers from what is there."""
        self._respond()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_GET

    def _respond(self) -> None:
        try:
            self._unread = self._announced()
            guards.check_head(self.headers)
            guards.check_host(self.headers, self.names)
            if self.path.startswith("/api/"):  # a link to the page may stand anywhere
                guards.check_site(self.headers)
            answer = self._answer()
        except Refused as refused:
            answer = as_answer({"error": refused.sentence}, refused.status, refused.headers)
        except InputError as error:
            answer = as_answer({"error": str(error)}, HTTPStatus.UNPROCESSABLE_ENTITY)
        except (ConnectionError, TimeoutError):
            raise
        except Exception:
            logger.exception("a request was not answered because of an error in the server")
            sentence = "the server made a mistake; its terminal says more"
            answer = as_answer({"error": sentence}, HTTPStatus.INTERNAL_SERVER_ERROR)
        self._send(answer)

    def _announced(self) -> int:
        """How much of a body may follow the head; the connection ends where it is left unread."""
        unsaid = ["0"] if self.command in ("GET", "HEAD") else []
        lengths = self.headers.get_all("Content-Length", unsaid)
        unsure = guards.is_broken(self.headers) or "Transfer-Encoding" in self.headers
        unsure = unsure or len(lengths) != 1
        if unsure or not re.fullmatch("[0-9]{1,18}", lengths[0].strip()):
            return DRAINED_BYTES
        return int(lengths[0])

    def _answer(self) -> Answer:
        # Browsers escape what is not ASCII; curl sends it as it was typed, in UTF-8.
        path, _, text = self.path.encode("latin-1").decode("utf-8", "replace").partition("?")
        for method, pattern, names, answer in ROUTES:
            if (found := re.fullmatch(pattern, path)) is None:
                continue
            if self.command != method and (self.command, method) != ("HEAD", "GET"):
                allowed = "GET, HEAD" if method == "GET" else method
                raise Refused(
                    HTTPStatus.METHOD_NOT_ALLOWED, f"use {allowed} for {path}", Allow=allowed
                )
            return answer(self, _wishes(text, names), *found.groups())
        raise Refused(HTTPStatus.NOT_FOUND, "there is nothing at this address; open /")

    def _send(self, answer: Answer) -> None:
        """Writes the answer; after an unread body the connection ends, slowly enough to be read."""
        if self._unread:
            self.close_connection = True
        self.connection.settimeout(ANSWER_SECONDS)
        self.send_response(answer.status)
        for name, value in {**HEADERS, **answer.headers}.items():
            self.send_header(name, value)
        if answer.status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Type", answer.kind)
            self.send_header("Content-Length", str(len(answer.content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content)
        if self._unread:
            self._drain()

    def _drain(self) -> None:
        """Takes in what is still being sent: closed at once, the client would see no answer."""
        self._incoming.until = time.monotonic() + DRAINED_SECONDS
        left = DRAINED_BYTES
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while left > 0 and (got := self.rfile.read1(65536)):
                left -= len(got)

    # --- what the library would do otherwise ------------------------------------------------------

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """A request that could not even be parsed; nothing of it is repeated."""
        self.close_connection = True
        self.request_version = self.protocol_version
        self.command = ""
        sentence = f"this request is not answered here ({HTTPStatus(code).phrase})"
        self._send(as_answer({"error": sentence}, HTTPStatus(code)))

    def handle_expect_100(self) -> bool:
        """`100 Continue` is said when the body is wanted, not before it is known to fit."""
        return True

    def version_string(self) -> str:
        """Of the Server header."""
        return "Anchorage"

    def log_message(self, format: str, *values: object) -> None:
        """Says nothing: who searched for what is nobody's business."""

    # --- bodies -----------------------------------------------------------------------------------

    def body(self) -> bytes:
        """The body of the request, read to its end."""
        length = guards.body_length(self.headers)
        guards.check_kind(self.headers)
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(HTTPStatus.CONTINUE)
            self.end_headers()
        self._incoming.until = time.monotonic() + BODY_SECONDS
        content = self.rfile.read(length)
        self._unread = 0
        if len(content) < length:
            raise ConnectionResetError("the body ended early")
        return content


# --- routes ---------------------------------------------------------------------------------------


def _wishes(text: str, names: Collection[str] | None) -> dict[str, str]:
    """The parameters of an address; refuses those that would change nothing.

    Args:
        names: which are known; None takes any, as of a link to the page that stands somewhere.
    """
    try:
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=20)
    except ValueError:
        raise Refused(HTTPStatus.BAD_REQUEST, "the address has too many parameters") from None
    wishes: dict[str, str] = {}
    for name, value in pairs if names is not None else ():
        shown = printable(name[:40])
        if name not in names:
            hint = nearest_names(shown, names) if names else "leave it out"
            raise Refused(HTTPStatus.BAD_REQUEST, f"there is no parameter {shown} here; {hint}")
        if name in wishes:
            raise Refused(HTTPStatus.BAD_REQUEST, f"{shown} is given more than once; give it once")
        wishes[name] = value
    return wishes


def _file(name: str) -> Callable[[Handler, Mapping[str, str]], Answer]:
    content = (_HERE / name).read_bytes()
    kind = f"{_KINDS[Path(name).suffix]}; charset=utf-8"
    return lambda handler, query: Answer(content, kind)


def _info(handler: Handler, query: Mapping[str, str]) -> Answer:
    return as_answer(handler.api.info() | {"most_bytes": guards.MOST_BYTES})


def _entries(handler: Handler, query: Mapping[str, str]) -> Answer:
    return as_answer(handler.api.entries(query))


def _entry(handler: Handler, query: Mapping[str, str], row: str) -> Answer:
    return as_answer(handler.api.entry(row, query))


def _picture(handler: Handler, query: Mapping[str, str], row: str, kind: str) -> Answer:
    """The JPEG of an entry, or that the one which the browser holds is still right."""
    picture: Picture = handler.api.picture(row, kind, query)
    headers = {"ETag": f'"{picture.tag}"', "Cache-Control": "private, no-cache"}
    if handler.headers.get("If-None-Match") == headers["ETag"]:
        return Answer(b"", "", HTTPStatus.NOT_MODIFIED, headers)
    return Answer(picture.jpeg(), "image/jpeg", headers=headers)


def _search(handler: Handler, query: Mapping[str, str]) -> Answer:
    if not handler.searches.acquire(blocking=False):
        raise Refused(
            HTTPStatus.SERVICE_UNAVAILABLE,
            f"{MOST_SEARCHES} searches are waiting already; try again in a moment",
            Retry_After="2",
        )
    try:
        return as_answer(handler.api.search(query, handler.body()))
    finally:
        handler.searches.release()


ROUTES: tuple[tuple[str, str, Collection[str] | None, Callable[..., Answer]], ...] = (
    *(("GET", re.escape(path), None, _file(name)) for path, name in FILES.items()),
    ("GET", "/api/info", (), _info),
    ("GET", "/api/entries", ("count", "label"), _entries),
    ("GET", "/api/entries/([0-9]{1,12})", ("check",), _entry),
    ("GET", "/api/entries/([0-9]{1,12})/(thumbnail|image)", ("check",), _picture),
    ("POST", "/api/search", ("top", "crop", "label", "entry", "check"), _search),
)
"""Method, address, the parameters that it takes, and what answers."""

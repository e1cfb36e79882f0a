"""HTTP: each request is read within limits of size and time, and answered once.

    GET  /                       the page, and /page.css, /page.js, /icon.svg
    GET  /api/info               facts about the index
    GET  /api/entries?count=12   some entries; &label=TEXT: those with TEXT in their label or name
    GET  /api/entries/ROW        an entry; /thumbnail and /image: its picture as JPEG
    POST /api/search             the body is a picture, or ?entry=ROW names an entry

Addresses name functions and rows, never files.
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
from collections.abc import Callable, Collection, Iterator, Mapping
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
from utils import InputError, MachineError, nearest_names

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
"""Headers of every answer: the page loads nothing from other sites, and none may embed it."""

HEAD_SECONDS = 15  # to wait for a request's head and read it
BODY_SECONDS = 60
ANSWER_SECONDS = 60
DRAINED_BYTES, DRAINED_SECONDS = 2 * guards.MOST_BYTES, 3
MOST_SEARCHES = 8  # at the same time; all but one of them wait

_HERE = Path(__file__).resolve().parent
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_KINDS |= {".svg": "image/svg+xml"}
FILES = {
    f"/{name if name != 'page.html' else ''}": name
    for name in ("page.html", "page.css", "page.js", "icon.svg")
}


@dataclass(frozen=True)
class Answer:
    """The content, type, status and headers of an answer."""

    content: bytes
    kind: str
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


def as_answer(
    content: object, status: HTTPStatus = HTTPStatus.OK, headers: Mapping[str, str] | None = None
) -> Answer:
    """An answer of plain values as JSON, in ASCII."""
    text = json.dumps(content, allow_nan=False)
    return Answer(text.encode("ascii"), "application/json", status, headers or {})


class _Timed(io.RawIOBase):
    """The input of a socket until a given time; a socket's timeout starts again at each byte."""

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
    room: guards.Room

    def setup(self) -> None:
        """Limits the time for reading."""
        super().setup()
        self._incoming = _Timed(self.connection)
        self.rfile = io.BufferedReader(self._incoming)
        self._unread = 0

    def handle_one_request(self) -> None:
        """Reads a head and answers; a client that fails or is too slow is disconnected."""
        self._incoming.until = time.monotonic() + HEAD_SECONDS
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle_one_request()
            return
        self.close_connection = True

    # --- answering --------------------------------------------------------------------------------

    def do_GET(self) -> None:
        """Answers a request of any method."""
        self._respond()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_GET

    def _respond(self) -> None:
        try:
            self._unread = self._announced()
            guards.check_head(self.headers)
            guards.check_host(self.headers, self.names)
            if self.path.startswith("/api/"):  # other sites may link to the page
                guards.check_site(self.headers)
            answer = self._answer()
        except Refused as refused:
            answer = as_answer({"error": refused.sentence}, refused.status, refused.headers)
        except MachineError as error:
            answer = as_answer({"error": str(error)}, HTTPStatus.SERVICE_UNAVAILABLE)
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
        """The most bytes of a body that may follow the head, and must be read or drained."""
        default = ["0"] if self.command in ("GET", "HEAD") else []
        lengths = self.headers.get_all("Content-Length", default)
        unsure = guards.is_broken(self.headers) or "Transfer-Encoding" in self.headers
        unsure = unsure or len(lengths) != 1
        if unsure or not re.fullmatch("[0-9]{1,18}", lengths[0].strip()):
            return DRAINED_BYTES
        return int(lengths[0])

    def _answer(self) -> Answer:
        # Browsers escape characters that are not ASCII; curl sends them in UTF-8.
        path, _, text = self.path.encode("latin-1").decode("utf-8", "replace").partition("?")
        for method, pattern, names, answer in ROUTES:
            if (found := re.fullmatch(pattern, path)) is None:
                continue
            if self.command != method and (self.command, method) != ("HEAD", "GET"):
                allowed = "GET, HEAD" if method == "GET" else method
                raise Refused(
                    HTTPStatus.METHOD_NOT_ALLOWED, f"use {allowed} for {path}", Allow=allowed
                )
            return answer(self, _parameters(text, names), *found.groups())
        raise Refused(HTTPStatus.NOT_FOUND, "there is nothing at this address; open /")

    def _send(self, answer: Answer) -> None:
        """Writes the answer; if the body was not read, drains it and ends the connection."""
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
        """Reads the rest of the body: if we closed before, the client would not see the answer."""
        self._incoming.until = time.monotonic() + DRAINED_SECONDS
        left = DRAINED_BYTES
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while left > 0 and (got := self.rfile.read1(65536)):
                left -= len(got)

    # --- replaced defaults of the library ---------------------------------------------------------

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers a request that could not be parsed, without repeating any of it."""
        self.close_connection = True
        self.request_version = self.protocol_version
        self.command = ""
        sentence = f"this request is not answered here ({HTTPStatus(code).phrase})"
        self._send(as_answer({"error": sentence}, HTTPStatus(code)))

    def handle_expect_100(self) -> bool:
        """Leaves `100 Continue` to `body`, which sends it once the length is accepted."""
        return True

    def version_string(self) -> str:
        """The value of the Server header."""
        return "Anchorage"

    def log_message(self, format: str, *values: object) -> None:
        """Logs nothing, for the privacy of those who search."""

    # --- bodies -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def body(self) -> Iterator[bytes]:
        """The body of the request; refuses one that is too large, or has no room beside others."""
        length = guards.body_length(self.headers)
        guards.check_kind(self.headers)
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(HTTPStatus.CONTINUE)
            self.end_headers()
        self._incoming.until = time.monotonic() + BODY_SECONDS
        with self.room.part() as take:
            content = io.BytesIO()
            while (left := length - content.tell()) > 0:
                if not (block := self.rfile.read(min(left, guards.BLOCK))):
                    raise ConnectionResetError("the body ended early")
                take(len(block))
                content.write(block)
            self._unread = 0
            yield content.getvalue()


# --- routes ---------------------------------------------------------------------------------------


def _parameters(text: str, names: Collection[str] | None) -> dict[str, str]:
    """The parameters of an address; refuses unknown and repeated ones.

    Args:
        names: those that are known; None: any are ignored, because other sites may add them to a
            link to the page.
    """
    try:
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=20)
    except ValueError:
        raise Refused(HTTPStatus.BAD_REQUEST, "the address has too many parameters") from None
    found: dict[str, str] = {}
    for name, value in pairs if names is not None else ():
        shown = printable(name[:40])
        if name not in names:
            hint = nearest_names(shown, names) if names else "leave it out"
            raise Refused(HTTPStatus.BAD_REQUEST, f"there is no parameter {shown} here; {hint}")
        if name in found:
            raise Refused(HTTPStatus.BAD_REQUEST, f"{shown} is given more than once; give it once")
        found[name] = value
    return found


def _file(name: str) -> Callable[[Handler, Mapping[str, str]], Answer]:
    content = (_HERE / name).read_bytes()
    kind = f"{_KINDS[Path(name).suffix]}; charset=utf-8"
    return lambda handler, query: Answer(content, kind)


def _picture(handler: Handler, query: Mapping[str, str], row: str, kind: str) -> Answer:
    """The JPEG of an entry, or Not Modified if the browser's copy is up to date."""
    picture: Picture = handler.api.picture(row, kind, query)
    headers = {"ETag": f'"{picture.tag}"', "Cache-Control": "private, no-cache"}
    if handler.headers.get("If-None-Match") == headers["ETag"]:
        return Answer(b"", "", HTTPStatus.NOT_MODIFIED, headers)
    return Answer(picture.jpeg(), "image/jpeg", headers=headers)


def _search(handler: Handler, query: Mapping[str, str]) -> Answer:
    with handler.body() as content:  # first: who sends slowly keeps nobody from searching
        if not handler.searches.acquire(blocking=False):
            raise Refused(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"{MOST_SEARCHES} searches are waiting already; try again in a moment",
                Retry_After="2",
            )
        try:
            return as_answer(handler.api.search(query, content))
        finally:
            handler.searches.release()


ROUTES: tuple[tuple[str, str, Collection[str] | None, Callable[..., Answer]], ...] = (
    *(("GET", re.escape(path), None, _file(name)) for path, name in FILES.items()),
    ("GET", "/api/info", (), lambda on, _: as_answer(on.api.info())),
    ("GET", "/api/entries", ("count", "label"), lambda on, q: as_answer(on.api.entries(q))),
    (
        *("GET", "/api/entries/([0-9]{1,12})", ("check",)),
        lambda on, query, row: as_answer(on.api.entry(row, query)),
    ),
    ("GET", "/api/entries/([0-9]{1,12})/(thumbnail|image)", ("check",), _picture),
    ("POST", "/api/search", ("top", "crop", "label", "entry", "check"), _search),
)
"""Method, pattern of the address, its parameters, and the function that answers."""

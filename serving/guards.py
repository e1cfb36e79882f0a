"""Refuses requests that do not come from our own page or a program, and those that are too large.

Any page in the user's browser can send requests to this machine, but it cannot choose the headers
`Host`, `Origin` and `Sec-Fetch-Site`, which browsers write themselves.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from email import errors
from email.message import Message
from http import HTTPStatus

MOST_BYTES = 32_000_000  # of an uploaded picture
MOST_ARRIVED = 8 * MOST_BYTES  # of all pictures that are being read, or searched for
BLOCK = 2**16  # bytes that are read at once
_NAME_AND_PORT = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")


class Refused(Exception):
    """A request is refused, with a status and a sentence that says why and what to do."""

    def __init__(self, status: HTTPStatus, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


_BROKEN = (
    errors.MissingHeaderBodySeparatorDefect,
    errors.FirstHeaderLineIsContinuationDefect,
    errors.MisplacedEnvelopeHeaderDefect,
    errors.HeaderDefect,
)


def is_broken(headers: Message) -> bool:
    """Whether a line of a request's head is not a header; later ones may not have been read."""
    return any(isinstance(defect, _BROKEN) for defect in headers.defects)


def check_head(headers: Message) -> None:
    """Refuses a broken head, in which a proxy may see another sender and another end than we do."""
    if is_broken(headers):
        raise Refused(
            HTTPStatus.BAD_REQUEST, "a line of the request's head is no header; send NAME: VALUE"
        )


# --- the sender -----------------------------------------------------------------------------------


def check_host(headers: Message, names: Collection[str]) -> None:
    """Refuses a request to a name that is not one of this machine's.

    With DNS rebinding, an attacker's name resolves to this machine, so that his page and ours have
    the same origin. A numeric address is safe from that.

    Args:
        names: our names besides numeric addresses and `localhost`, in lower case.
    """
    hosts = headers.get_all("Host") or []
    found = _NAME_AND_PORT.fullmatch(hosts[0].strip()) if len(hosts) == 1 else None
    if found is None:
        raise Refused(HTTPStatus.BAD_REQUEST, "the request has no proper Host header; send one")
    name = found[1].lower().rstrip(".")
    if name == "localhost" or name in names or _is_address(name.strip("[]")):
        return
    raise Refused(
        HTTPStatus.MISDIRECTED_REQUEST,
        f"this server does not go by the name {name}; open it by its address in numbers, or "
        f"start it with --allow-host {name}",
    )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def check_site(headers: Message) -> None:
    """Refuses a request that a page of another site has made the browser send."""
    site = headers.get("Sec-Fetch-Site", "none")
    origin = headers.get("Origin")
    _, _, from_host = (origin or "").lower().partition("://")
    ours = origin is None or from_host == headers.get("Host", "").lower()
    if site not in ("none", "same-origin") or not ours:
        raise Refused(HTTPStatus.FORBIDDEN, "another site's page may not search here")


def own_names() -> set[str]:
    """The names of this machine in its network."""
    name = socket.gethostname().lower()
    return {name, f"{name.partition('.')[0]}.local"} - {"", ".local"}


# --- the body -------------------------------------------------------------------------------------


def body_length(headers: Message) -> int:
    """The number of bytes in a request's body.

    Refuses a length that is missing, repeated, not a plain number or above `MOST_BYTES`, and a body
    in chunks, whose length is known only after it is read.
    """
    if "Transfer-Encoding" in headers:
        raise Refused(
            HTTPStatus.NOT_IMPLEMENTED,
            "a body in chunks is not accepted; send the picture whole, with its Content-Length",
        )
    lengths = headers.get_all("Content-Length") or []
    if not lengths:
        raise Refused(
            HTTPStatus.LENGTH_REQUIRED, "the Content-Length is missing; say how long the picture is"
        )
    if len(lengths) > 1 or not re.fullmatch("[0-9]{1,18}", lengths[0].strip()):
        raise Refused(
            HTTPStatus.BAD_REQUEST, "the Content-Length is not a number of bytes; send one number"
        )
    if (length := int(lengths[0])) > MOST_BYTES:
        raise Refused(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the picture has {length / 1e6:.1f} MB, and at most {MOST_BYTES / 1e6:.0f} MB are "
            "accepted; save it smaller",
        )
    return length


def check_kind(headers: Message) -> None:
    """Refuses a form: the body must be the picture itself."""
    if headers.get("Content-Type", "").strip().lower().startswith("multipart/"):
        raise Refused(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "a form is not accepted; send the picture itself (curl --data-binary @photo.jpg)",
        )


class Room:
    """The memory for the bodies of all requests: it is taken as their bytes arrive.

    Attributes:
        most: bytes that there are. taken: bytes that are in use.
    """

    def __init__(self, most: int = MOST_ARRIVED) -> None:
        self.most, self.taken = most, 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def part(self) -> Iterator[Callable[[int], None]]:
        """A function that takes so many bytes more, or refuses; all is given back at the end."""
        own = 0

        def take(count: int) -> None:
            nonlocal own
            with self._lock:
                if self.taken + count > self.most:
                    raise Refused(
                        HTTPStatus.SERVICE_UNAVAILABLE,
                        "too many pictures are on their way already; try again in a moment",
                        Retry_After="2",
                    )
                self.taken += count
            own += count

        try:
            yield take
        finally:
            with self._lock:
                self.taken -= own

"""The server: its address, its threads, starting and stopping it."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import signal
import socket
import socketserver
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from serving import guards
from serving.api import Api
from serving.gallery import Gallery
from serving.handler import MOST_SEARCHES, Handler
from serving.pictures import bound_pixels
from terminal import fitted, say
from utils import InputError

logger = logging.getLogger("serving")

MOST_CONNECTIONS = 64
LOOPBACK = "127.0.0.1"
_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 2\r\n"
    b"Connection: close\r\n\r\n"
)


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Serves each connection in a thread, up to `MOST_CONNECTIONS`.

    Raises:
        InputError: the address cannot be used.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = MOST_CONNECTIONS

    def __init__(self, host: str, port: int, api: Api, names: Iterable[str] = ()) -> None:
        self.address_family, address = _resolved(host, port)
        self._connections = threading.BoundedSemaphore(MOST_CONNECTIONS)
        searches = threading.BoundedSemaphore(MOST_SEARCHES)
        known = frozenset({name.lower() for name in (*names, host)} | guards.own_names())
        own = {"api": api, "names": known, "searches": searches, "room": guards.Room()}
        handler = type("Handler", (Handler,), own)
        try:
            super().__init__(address, handler)
        except OSError as error:
            raise InputError(_no_address(host, port, error)) from error

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts the thread of a connection, or refuses the connection if there are too many."""
        if not self._connections.acquire(blocking=False):
            request.settimeout(1)
            with contextlib.suppress(OSError):
                request.sendall(_BUSY)
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers the requests of a connection, which then no longer counts."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs an error that has ended a connection, unless the client has closed it."""
        if not isinstance(sys.exc_info()[1], OSError):
            logger.exception("a connection ended because of an error in the server")

    @property
    def url(self) -> str:
        """The address of the page for a browser on this machine."""
        host, port = self.server_address[:2]
        if ipaddress.ip_address(host).is_unspecified:
            host = "::1" if ":" in host else LOOPBACK
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def _resolved(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise InputError(
            f"--host: {host} is not an address of this machine; give one in numbers, such as "
            f"{LOOPBACK}"
        ) from None
    family, _, _, _, address = found[0]
    return family, address


def _no_address(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken; choose another (--port), or --port 0 for any free one"
    if error.errno == errno.EACCES:
        return f"port {port} is only for the administrator; choose one above 1023 (--port)"
    return (
        f"--host: {host} is not an address of this machine ({error.strerror}); give one of its "
        f"own, or leave the flag out for {LOOPBACK}"
    )


# --- the command ----------------------------------------------------------------------------------


def serve(
    path: str | Path,
    *,
    host: str = LOOPBACK,
    port: int = 8000,
    allow_host: Iterable[str] = (),
    device: str | None = None,
    run: str | None = None,
) -> None:
    """Serves the index at `path` until SIGINT or SIGTERM.

    Args:
        host: the address to listen at. port: 0 takes any free one. allow_host: further names by
            which the page may be opened. device: of the network; None: the GPU, if there is one.
        run: the present place of the run, if it has moved.

    Raises:
        InputError: there is no usable index, or the address cannot be used.
    """
    bound_pixels()
    gallery = Gallery(Path(path), device, run)
    try:
        with Server(host, port, Api(gallery), allow_host) as server:
            _announce(server, gallery)
            _serve_until_stopped(server)
    finally:
        gallery.close()
    say("stopped")


def _announce(server: Server, gallery: Gallery) -> None:
    state = gallery.now()
    count = len(state.index)
    if not ipaddress.ip_address(server.server_address[0]).is_loopback:
        warning = (
            "warning: whoever reaches this machine's network can open this page, without a "
            f"password: search here with pictures of their own, and see all {count:,} pictures of "
            "the index with their ids and labels; without --host only this machine can"
        )
        say(fitted(warning, "  ", sys.stderr), file=sys.stderr)
    say(f"{count:,} entries of {gallery.path}")
    say(f"open {server.url} (Ctrl-C ends it)", flush=True)


def _serve_until_stopped(server: Server) -> None:
    """Serves until SIGINT, or SIGTERM, with which containers are stopped."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever(poll_interval=0.2)
    signal.signal(signal.SIGTERM, before)

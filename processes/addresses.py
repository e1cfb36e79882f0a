"""Where a machine listens, and by which of its network's interfaces it is reached by the others.

Left to itself, gloo listens at the address that the machine's own name has. On many systems that is
127.0.1.1 (Debian writes it into /etc/hosts), or none at all, where no other machine finds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

ADDRESS_OF = 0x8915  # Linux: SIOCGIFADDR
INTERFACE = "GLOO_SOCKET_IFNAME"  # in the environment: the one that gloo listens at


def listener(address: str, port: int = 0) -> socket.socket:
    """A socket that listens where those find it who know this machine by an address, or a name.

    Nobody else can come to an address that the machine has for itself alone. Where they have one of
    IPv4, those who come are known by such addresses too.

    Args:
        port: 0 is any free one.

    Raises:
        OSError: the port cannot be used, as where another program listens there.
    """
    own = "127.0.0.1"
    if address in (own, "localhost"):
        return socket.create_server((own, port))
    with contextlib.suppress(ValueError):  # it is a name, which may stand for either kind
        if ipaddress.ip_address(address).version == 4:
            return socket.create_server(("", port))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def own_address(towards: str) -> str:
    """The address that this machine has for another, by its name or address; "" without a way.

    Nothing is sent.
    """
    with contextlib.suppress(OSError):
        for family, kind, _, _, place in socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as way:
                way.connect(place)
                return way.getsockname()[0]
    return ""


def interface_of(address: str) -> str:
    """The interface that has an address; "" where there is none, or the system is no Linux."""
    for name, found in _addresses():
        if found == address:
            return name
    return ""


def _addresses() -> list[tuple[str, str]]:
    """(interface, address) of this machine."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address of IPv4
                answer = fcntl.ioctl(probe, ADDRESS_OF, struct.pack("256s", name.encode()))
                found.append((name, socket.inet_ntoa(answer[20:24])))
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, name = line.split()
            found.append((name, str(ipaddress.IPv6Address(bytes.fromhex(digits)))))
    return found

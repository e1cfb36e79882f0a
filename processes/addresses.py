"""The address at which a machine listens, and the network interface by which others reach it.

By default gloo listens at the address to which the machine's own name resolves. On many systems
that is 127.0.1.1 (Debian writes it into /etc/hosts), which other machines cannot reach, or none.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

ADDRESS_OF = 0x8915  # Linux: SIOCGIFADDR
INTERFACE = "GLOO_SOCKET_IFNAME"  # environment variable: the interface that gloo uses


def listener(address: str, port: int = 0) -> socket.socket:
    """A listening socket that other processes can reach by `address`, an IP address or a name.

    At the loopback address it accepts connections from this machine alone. For an IPv4 address the
    socket is one of IPv4, so that clients have IPv4 addresses too (see `meeting.open_store`).

    Args:
        port: 0 takes any free one.

    Raises:
        OSError: the port cannot be used, for example because another program listens there.
    """
    own = "127.0.0.1"
    if address in (own, "localhost"):
        return socket.create_server((own, port))
    with contextlib.suppress(ValueError):  # a name, which may have addresses of either kind
        if ipaddress.ip_address(address).version == 4:
            return socket.create_server(("", port))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def own_address(towards: str) -> str:
    """This machine's address on the route to another, named by `towards`; "" without a route.

    Nothing is sent.
    """
    with contextlib.suppress(OSError):
        for family, kind, _, _, place in socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(place)
                return probe.getsockname()[0]
    return ""


def interface_of(address: str) -> str:
    """The network interface that has an address; "" if none has, or if this is not Linux."""
    for name, found in _addresses():
        if found == address:
            return name
    return ""


def _addresses() -> list[tuple[str, str]]:
    """All pairs (interface, address) of this machine."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no IPv4 address
                answer = fcntl.ioctl(probe, ADDRESS_OF, struct.pack("256s", name.encode()))
                found.append((name, socket.inet_ntoa(answer[20:24])))
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, name = line.split()
            found.append((name, str(ipaddress.IPv6Address(bytes.fromhex(digits)))))
    return found

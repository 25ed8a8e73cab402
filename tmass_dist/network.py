"""The network interface by which this host reaches another one, and whether a server answers."""

from __future__ import annotations

import ipaddress
import socket


def addresses_towards(host: str, port: int) -> tuple[str, str]:
    """The own address and that of ``host`` on the route to ``host``; nothing is sent.

    Raises:
        OSError: the name does not resolve, or there is no route.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # of a datagram socket: it only chooses the route
        return str(probe.getsockname()[0]), str(probe.getpeername()[0])


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def interface_of(address: str) -> str | None:
    """Name of the interface that has ``address``, as ``eth0``; None if no interface of this host has it."""
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address.partition("%")[0] for entry in entries):
            return name
    # The whole of 127.0.0.0/8 belongs to the loopback interface, which lists only 127.0.0.1.
    return interface_of("127.0.0.1") if is_loopback(address) and address != "127.0.0.1" else None


def answers(url: str, timeout_s: float = 1.5) -> bool:
    """Whether a server answers at ``url`` within ``timeout_s``, with whatever status; proxies are used as set."""
    import threading
    import urllib.error
    import urllib.request

    replies: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s).close()
            replies.append(True)
        except urllib.error.HTTPError:
            replies.append(True)
        except (OSError, ValueError):
            pass

    # In a thread, because the resolution of names has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return bool(replies)

"""Sockets of a job: they listen only on the address to which its processes connect. Needs no torch."""

from __future__ import annotations

import ipaddress
import socket


def is_loopback(address: str) -> bool:
    """Whether an address is a loopback address; no name is resolved."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def listening_address(host: str) -> str | None:
    """The address at which processes reach a host that they are told of by this address or name; None if unknown.

    A name tells none where it has several addresses here, or one of loopback only: many systems write their own name
    beside 127.0.1.1 into /etc/hosts, and other machines then know it by another address.
    """
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    if host == "localhost":
        return "127.0.0.1"
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):  # no such name, or none that a name server would be asked for
        return None
    address = found.pop()
    return None if found or is_loopback(address) else address


def listen(address: str, port: int) -> socket.socket:
    """A socket that listens only on this address; torch's stores would listen on all addresses.

    Raises:
        OSError: another process listens there, or this machine has no such address.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        server.listen(socket.SOMAXCONN)
    except OSError:
        server.close()
        raise
    return server

"""Sockets of a job: they listen only on the address that its processes connect to, for security. Needs no torch."""

from __future__ import annotations

import ipaddress
import socket


def is_loopback(address: str) -> bool:
    """Whether an address is a loopback address. Names other than "localhost" are not resolved and give False."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def listening_address(host: str) -> str | None:
    """The single address at which processes reach `host` (an address or a name); None if it is ambiguous or unknown.

    A name is ambiguous if it resolves to several addresses here, or only to loopback: many systems map their own name
    to 127.0.1.1 in /etc/hosts, while other machines resolve it to another address.
    """
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    if host == "localhost":
        return "127.0.0.1"
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):  # unknown name; UnicodeError: not a valid host name
        return None
    address = found.pop()
    return None if found or is_loopback(address) else address


def listen(address: str, port: int) -> socket.socket:
    """A socket that listens only on this address; torch's own stores listen on all addresses.

    Raises:
        OSError: another process already listens there, or this machine does not have the address.
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

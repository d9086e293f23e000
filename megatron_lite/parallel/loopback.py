"""Sockets of jobs on one machine: they listen where only this machine's processes can connect. Free of torch."""

from __future__ import annotations

import ipaddress
import socket


def is_loopback(address: str) -> bool:
    """Whether an address leads back to the machine that uses it; no name is looked up."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def listen(address: str, port: int) -> socket.socket:
    """A socket that listens at this loopback address alone; torch's stores would listen at all addresses.

    Raises:
        OSError: another process listens there.
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

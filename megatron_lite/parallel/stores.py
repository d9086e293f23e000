"""torch's key-value stores, by which processes find each other, on the address that is needed only."""

from __future__ import annotations

import errno
from typing import Any

import torch.distributed as dist

from megatron_lite.parallel.loopback import listen, listening_address

TorchStore = dist.TCPStore


def tcp_store(
    host_name: str,
    port: int = 0,
    world_size: int | None = None,
    is_master: bool = False,
    timeout: Any = None,
    **options: Any,
) -> dist.TCPStore:
    """A `torch.distributed.TCPStore` whose server, where it has one, listens at the address of `host_name` alone.

    Takes what TCPStore takes, for libraries that make stores of their own. A name that does not tell one address of
    this machine gives torch's own store, which listens at all of them: other nodes may know the name by another one.
    """
    arguments: dict[str, Any] = {"world_size": world_size, "is_master": is_master, **options}
    if timeout is not None:
        arguments["timeout"] = timeout
    address = listening_address(host_name) if is_master and "master_listen_fd" not in options else None
    if address is not None:
        try:
            server = listen(address, port)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # as TCPStore says it: torchrun's c10d then joins the store there
                raise dist.DistNetworkError(f"cannot listen at {host_name}:{port}: {error.strerror}") from error
        else:  # an address of no interface here is translated on the way, as in front of a container
            port, descriptor = server.getsockname()[1], server.detach()  # the store closes it
            arguments["master_listen_fd"] = descriptor
    return TorchStore(host_name, port, **arguments)

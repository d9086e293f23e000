"""torch's key-value stores, which processes use for rendezvous, listening only on the address that is needed."""

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
    """A `torch.distributed.TCPStore` whose server (if it has one) listens only on the address of `host_name`.

    Takes the arguments of TCPStore, because libraries that create their own stores call it in place of TCPStore. If
    the name does not resolve to a single address of this machine, this is torch's own store, which listens on all
    addresses: other nodes may resolve the name to another one.
    """
    arguments: dict[str, Any] = {"world_size": world_size, "is_master": is_master, **options}
    if timeout is not None:
        arguments["timeout"] = timeout
    address = listening_address(host_name) if is_master and "master_listen_fd" not in options else None
    if address is not None:
        try:
            server = listen(address, port)
        except OSError as error:
            # TCPStore's own exception type: torchrun's c10d catches it and joins the store that listens there already.
            if error.errno != errno.EADDRNOTAVAIL:
                raise dist.DistNetworkError(f"cannot listen at {host_name}:{port}: {error.strerror}") from error
        # EADDRNOTAVAIL: no interface here has the address, so it is translated on the way (NAT of a container); torch's
        # own store, which listens on all addresses, is then reachable.
        else:
            port, descriptor = server.getsockname()[1], server.detach()  # the store closes the descriptor
            arguments["master_listen_fd"] = descriptor
    return TorchStore(host_name, port, **arguments)

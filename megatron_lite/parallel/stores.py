"""torch's key-value stores, by which processes find each other, on the address that is needed only."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_lite.parallel.loopback import is_loopback, listen

TorchStore = dist.TCPStore


def local_store(
    host_name: str,
    port: int = 0,
    world_size: int | None = None,
    is_master: bool = False,
    timeout: Any = None,
    **options: Any,
) -> dist.TCPStore:
    """A `torch.distributed.TCPStore` whose server, where it has one at a loopback address, listens there alone.

    Takes what TCPStore takes, for libraries that make stores of their own.
    """
    arguments: dict[str, Any] = {"world_size": world_size, "is_master": is_master, **options}
    if timeout is not None:
        arguments["timeout"] = timeout
    if is_master and is_loopback(host_name) and "master_listen_fd" not in options:
        try:
            server = listen("127.0.0.1" if host_name == "localhost" else host_name, port)
        except OSError as error:  # as TCPStore says it: torchrun's c10d then joins the store that is there already
            raise dist.DistNetworkError(f"cannot listen at {host_name}:{port}: {error.strerror}") from error
        port, descriptor = server.getsockname()[1], server.detach()  # the store closes it
        arguments["master_listen_fd"] = descriptor
    return TorchStore(host_name, port, **arguments)

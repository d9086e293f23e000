"""Several machines: the node rank of this one, and where they meet."""

from __future__ import annotations

import os
from collections.abc import Mapping

from megatron_lite.errors import LaunchError
from megatron_lite.parallel.loopback import is_loopback as is_loopback

NODE_RANK_VARIABLES = ("NODE_RANK", "GROUP_RANK")
"""Where schedulers (Kubernetes' PyTorchJob, cloud services) put a process's node rank within the job."""
NODES_PORT = 29500
"""Default port for several nodes: the other nodes could not know a free port that one machine chose."""


def own_node_rank(asked: int | None, nodes: int, environment: Mapping[str, str] = os.environ) -> int:
    """The node rank of this machine.

    Args:
        asked: launcher.node_rank, which takes precedence over the environment.
    Raises:
        LaunchError: neither is set, or the environment does not hold a rank.
    """
    if asked is not None:
        return asked
    name = next((name for name in NODE_RANK_VARIABLES if name in environment), None)
    if name is None:
        raise LaunchError(
            f"launcher.node_rank=null does not say which of launcher.nodes={nodes} this machine is; give "
            f"launcher.node_rank=0 to {nodes - 1}, or {NODE_RANK_VARIABLES[0]} in the environment, or use "
            "launcher.rendezvous=c10d with launcher=torchrun"
        )
    value = environment[name]
    if not (value.isascii() and value.isdigit() and len(value) < 10 and int(value) < nodes):
        raise LaunchError(
            f"{name}={value!r} in the environment is not among the ranks of launcher.nodes={nodes}, 0 to {nodes - 1}; "
            "correct it, or give launcher.node_rank"
        )
    return int(value)

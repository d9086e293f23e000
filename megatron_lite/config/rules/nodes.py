"""Rules for jobs on several machines that torchrun or deepspeed start."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.derived import spans_machines
from megatron_lite.config.launcher import LauncherName, Rendezvous
from megatron_lite.config.rules.case import Case


def nodes_know_where_to_meet(case: Case) -> Iterator[str]:
    """Loopback, the default, is a different place on each machine. deepspeed uses the first host of its hostfile."""
    launcher = case.config.launcher
    if launcher.name is not LauncherName.torchrun or launcher.nodes <= 1 or launcher.master_address is not None:
        return
    where = "the address of the node of rank 0" if launcher.rendezvous is Rendezvous.static else "that of any node"
    yield (
        f"launcher.master_address is needed for launcher.nodes={launcher.nodes} with launcher.name=torchrun, and "
        f"every node must be able to reach it; set launcher.master_address to {where}"
    )


def deepspeed_knows_its_hosts(case: Case) -> Iterator[str]:
    launcher = case.config.launcher
    if launcher.name is LauncherName.deepspeed and launcher.nodes > 1 and launcher.hostfile is None:
        yield (
            f"launcher.nodes={launcher.nodes} with launcher.name=deepspeed needs launcher.hostfile, a file of lines "
            "`HOST slots=N`; give one, or use launcher=torchrun"
        )


def hostfile_is_of_deepspeed(case: Case) -> Iterator[str]:
    launcher = case.config.launcher
    if launcher.hostfile is not None and launcher.name is not LauncherName.deepspeed:
        yield (
            f"launcher.hostfile={launcher.hostfile} is read by launcher.name=deepspeed only, not {launcher.name}; use "
            "launcher=deepspeed, or launcher.hostfile=null"
        )


def node_rank_is_of_a_node(case: Case) -> Iterator[str]:
    launcher = case.config.launcher
    rank = launcher.node_rank
    if rank is None or not case.sound("launcher.node_rank", "launcher.nodes"):
        return
    if rank >= launcher.nodes:
        last = launcher.nodes - 1
        yield (
            f"launcher.node_rank={rank} is not among the ranks of launcher.nodes={launcher.nodes}, 0 to {last}; use "
            "one of these, or more launcher.nodes"
        )
    elif launcher.name is LauncherName.torchrun and launcher.rendezvous is Rendezvous.c10d:
        yield (
            f"launcher.node_rank={rank} has no meaning with launcher.rendezvous=c10d, where torchrun numbers the "
            "nodes; leave it out, or use launcher.rendezvous=static"
        )


def device_of_other_machines_is_given(case: Case) -> Iterator[str]:
    """This machine's hardware says nothing about others, and every node must compose the same configuration."""
    launcher = case.config.launcher
    started_here = launcher.name in (LauncherName.torchrun, LauncherName.deepspeed)
    if started_here and launcher.device == "auto" and spans_machines(case.config):
        yield (
            "launcher.device=auto looks at this machine only, and the ranks run on several; use launcher.device=cuda "
            "or cpu"
        )

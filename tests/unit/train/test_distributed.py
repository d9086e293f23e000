"""How one process comes into the job, and what it says where it cannot."""

from __future__ import annotations

import multiprocessing
import socket

import pytest
import torch
import torch.distributed as dist

from megatron_lite.errors import LaunchError
from megatron_lite.train.distributed import ProcessEnvironment, own_device, start_process_group
from tests.unit.remedies import obeys

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ranks on this machine."""
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(dist.distributed_c10d, name, getattr(dist.distributed_c10d, name))
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


@obeys("megatron_lite/train/distributed.py:start_process_group")
@pytest.mark.parametrize(("rank", "port_is_free"), [(1, True), (0, False)], ids=["rank 0 is missing", "port is taken"])
def test_a_rank_that_meets_no_other_says_what_to_do(
    rank: int, port_is_free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = ProcessEnvironment(rank=rank, local_rank=rank, world_size=2, local_world_size=2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        if port_is_free:
            server.close()
        with pytest.raises(LaunchError) as error:
            start_process_group(CPU, environment, 0.2)
    message = str(error.value)
    assert message.startswith(
        f"rank {rank} could not connect to the other 1 ranks at 127.0.0.1:{port} within 0.3 s = 1.5 x "
    )
    assert message.endswith("a free port in launcher.master_port, or raise train.timeout_seconds")
    assert not dist.is_initialized()
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    other = multiprocessing.get_context("fork").Process(target=meet, args=(1 - rank,))
    other.start()
    try:
        assert meet(rank) == 2
    finally:
        other.join()
    assert other.exitcode == 0


def meet(rank: int) -> int:
    """How many ranks there are, in a job where each has time to come."""
    start_process_group(CPU, ProcessEnvironment(rank=rank, local_rank=rank, world_size=2, local_world_size=2), 60)
    try:
        return dist.get_world_size()
    finally:
        dist.destroy_process_group()


@obeys("megatron_lite/train/distributed.py:own_device")
def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    with pytest.raises(LaunchError, match=r"start fewer processes or use launcher\.device=cpu"):
        own_device("cuda", ProcessEnvironment(rank=0, local_rank=0, world_size=2, local_world_size=2))
    assert own_device("cpu", ProcessEnvironment(rank=0, local_rank=0, world_size=2, local_world_size=2)) == CPU
    one = ProcessEnvironment(rank=0, local_rank=0, world_size=1, local_world_size=1)
    assert own_device("cuda", one) == torch.device("cuda", 0)

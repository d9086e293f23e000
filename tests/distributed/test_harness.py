"""The harness itself: a failure on any rank must be reported, and name the rank."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import RankError, run_ranks


def _sum_of_ranks(offset: torch.Tensor) -> torch.Tensor:
    total = offset + dist.get_rank()
    dist.all_reduce(total)
    return total


def _raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ArithmeticError("planted")
    dist.barrier()


def _hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(600)


def _kill(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_results_come_in_rank_order_and_the_ranks_talk():
    results = run_ranks(_sum_of_ranks, 2, torch.tensor([10.0]))
    assert [result.item() for result in results] == [21.0, 21.0]


def test_the_first_rank_that_raised_is_named_with_its_traceback():
    with pytest.raises(RankError, match=r"^rank 1 raised") as error:
        run_ranks(_raise_on, 2, 1)
    assert "ArithmeticError: planted" in str(error.value)


def test_a_rank_that_hangs_is_ended():
    with pytest.raises(RankError, match=r"^ranks \[0, 1\] did not end within 6.0 s") as error:
        run_ranks(_hang_on, 2, 1, timeout_seconds=6.0)
    assert "_hang_on" in str(error.value)


def test_a_rank_that_dies_is_named():
    with pytest.raises(RankError, match=r"^rank 1 died with exit code -9"):
        run_ranks(_kill, 2, 1)

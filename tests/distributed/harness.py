"""Run a function on several gloo ranks of this machine, each started in well under a second.

Importing torch, deepspeed and our own packages takes seconds. A fork server imports them once per pytest session, and
every rank is a fork of it. The rendezvous uses a file, so no port can be in use already. Ranks are killed on timeout.
"""

from __future__ import annotations

import faulthandler
import functools
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_PRELOAD = [
    "torch",
    "torch._dynamo",
    "transformers",
    "pytest",
    "tests.distributed.checkpoint_ranks",
    "launch.cli",
    "launch.launching",
    "megatron_lite.train.run",
    "deepspeed.module_inject.auto_ep_layer",  # DeepSpeed imports these two at the start of each engine
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "tests.distributed.frozen_heap",  # must be the last one
]
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::UserWarning",
}
_GRACE_SECONDS = 2.0
_LOG_TAIL = 4000  # characters of a failed rank's output that the report shows


class RankError(AssertionError):
    """A rank raised an exception, died or did not end in time."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_seconds: float = 120.0,
    grace_seconds: float = _GRACE_SECONDS,
) -> list[Any]:
    """Call function(*args) on every rank of a fresh gloo job and return the results in rank order.

    Args:
        function: of a module that the ranks can import; gets its rank from torch.distributed.
        args, result: anything that can be pickled; tensors are copied.
        grace_seconds: time for the other ranks to end by themselves after one has failed.
    Raises:
        RankError: naming the rank that failed first, with its traceback and the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        (folder / "task.pkl").write_bytes(pickle.dumps((function, args)))
        context = fork_server()
        ranks = [
            context.Process(target=_rank_main, args=(rank, world_size, folder, timeout_seconds), daemon=True)
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            _wait(ranks, time.monotonic() + timeout_seconds, grace_seconds)
            exit_codes = [process.exitcode for process in ranks]  # None = still running
        finally:
            _end(ranks)
        if any(code != 0 for code in exit_codes):
            raise RankError(_report(folder, exit_codes, timeout_seconds))
        return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world_size)]


@functools.cache
def fork_server() -> multiprocessing.context.ForkServerContext:
    """The context of one warm server per session. multiprocessing itself ignores modules that cannot be imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    before = os.environ.copy()
    os.environ.update(_ENVIRONMENT)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _wait(ranks: Sequence[BaseProcess], deadline: float, grace_seconds: float) -> None:
    """Wait until all ranks have ended, or one has failed and the grace period of the others is over, or time is up."""
    while alive := [process.sentinel for process in ranks if process.is_alive()]:
        if any(process.exitcode not in (None, 0) for process in ranks):
            deadline = min(deadline, time.monotonic() + grace_seconds)
        if not multiprocessing.connection.wait(alive, timeout=max(0.0, deadline - time.monotonic())):
            return


def _end(ranks: Sequence[BaseProcess]) -> None:
    for process in ranks:
        if process.pid is None:
            continue  # never started
        if process.is_alive():
            process.kill()
        process.join()


def _report(folder: Path, exit_codes: list[int | None], timeout_seconds: float) -> str:
    """Name a rank that died without an exception, or else the first that raised one, or else one that still runs."""
    errors = {}
    for rank in range(len(exit_codes)):
        if (folder / f"{rank}.error").exists():
            moment, _, text = (folder / f"{rank}.error").read_text().partition("\n")
            errors[rank] = (int(moment), text)
    died = [rank for rank, code in enumerate(exit_codes) if code not in (None, 0) and rank not in errors]
    if died:
        blamed, what = died[:1], f"rank {died[0]} died with exit code {exit_codes[died[0]]}"
    elif errors:
        first = min(errors, key=lambda rank: errors[rank][0])
        blamed, what = [first], f"rank {first} raised\n{errors[first][1]}"
    else:
        blamed = [rank for rank, code in enumerate(exit_codes) if code is None]
        what = f"ranks {blamed} did not end within {timeout_seconds} s"
    outputs = [f"--- output of rank {rank} ---\n{_tail(folder / f'{rank}.log')}" for rank in blamed]
    return "\n".join([f"{what}\nexit codes: {exit_codes}", *outputs])


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-_LOG_TAIL:] if log.exists() else ""


def _rank_main(rank: int, world_size: int, folder: Path, timeout_seconds: float) -> None:
    _redirect_output(folder / f"{rank}.log")
    faulthandler.dump_traceback_later(0.9 * timeout_seconds)  # shows where a rank hangs
    _set_environment(rank, world_size, folder)
    try:
        result = _call_in_job(rank, world_size, folder, timedelta(seconds=timeout_seconds))
        (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
    except BaseException:
        (folder / f"{rank}.error").write_text(f"{time.monotonic_ns()}\n{traceback.format_exc()}")
        sys.exit(1)


def _call_in_job(rank: int, world_size: int, folder: Path, timeout: timedelta) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.distributed_c10d.default_pg_timeout = timeout  # for groups that libraries create without a timeout
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    function, args = pickle.loads((folder / "task.pkl").read_bytes())
    result = function(*args)
    dist.barrier()  # no rank may close its connections while another still needs them
    dist.destroy_process_group()
    return result


def _redirect_output(path: Path) -> None:
    """Send what this process and its libraries print to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _set_environment(rank: int, world_size: int, folder: Path) -> None:
    """Set the variables that torchrun sets, and a private folder for compiled extensions unless the session has one."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))

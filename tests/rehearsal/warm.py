"""One warm process that has imported everything, and a fork of it for each rehearsal.

Importing torch, DeepSpeed and our packages takes seconds, and the fake device must be loaded before torch, so none of
it may happen in the process of the tests. `Rehearsals` starts `python -m tests.rehearsal.warm` once and sends it
requests; it answers each with a `Recording`.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from tests.rehearsal import stub
from tests.rehearsal.record import Recording

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 120
_LOG_TAIL = 4000  # characters


class Request(NamedTuple):
    config: Any
    rank: int
    acts: Sequence[str] = ()
    """Names of `rehearse.ACTS`; none = all."""
    fault: str | None = None
    """Name of a function in `faults.py`."""


class Rehearsals:
    """The warm process, seen from the tests."""

    def __init__(self) -> None:
        stub.build()
        ours, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.rehearsal.warm", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._connection = Connection(ours.detach())

    def run(self, request: Request) -> Recording:
        """
        Raises:
            EOFError: the warm process has died.
        """
        self._connection.send(request)
        return self._connection.recv()

    def close(self) -> None:
        self._connection.close()  # it then ends by itself
        self._process.wait(timeout=TIMEOUT_SECONDS)


def _serve(connection: Connection) -> None:
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        connection.send(_in_fork(request))


def _in_fork(request: Request) -> Recording:
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as name:
        result, log = Path(name) / "result", Path(name) / "log"
        pid = os.fork()
        if not pid:
            _end_of_fork(request, result, log)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if result.exists():
            return pickle.loads(result.read_bytes())
        ended = f"did not end within {TIMEOUT_SECONDS} s" if code == -signal.SIGALRM else f"died with exit code {code}"
        return Recording(error=f"the rehearsal {ended}\n{log.read_text(errors='replace')[-_LOG_TAIL:]}")


def _end_of_fork(request: Request, result: Path, log: Path) -> None:
    """Rehearse, write the recording, and end this process."""
    from tests.rehearsal import faults
    from tests.rehearsal.rehearse import rehearse

    signal.alarm(TIMEOUT_SECONDS)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        with faults.planted(request.fault):
            recording = rehearse(request.config, request.rank, acts=request.acts)
        part = result.with_suffix(".part")
        part.write_bytes(pickle.dumps(recording))
        part.replace(result)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _warm_up() -> None:
    """Import all that a rehearsal needs; what was imported is not looked at by the garbage collector again."""
    import gc
    import logging

    stub.load()
    import torch._dynamo  # it lists torch's functions, and must see torch.cuda's own  # noqa: F401

    from tests.rehearsal import fake_cuda

    fake_cuda.replace_torch_cuda()
    import deepspeed.compile.backend  # DeepSpeed imports these three at the start of each engine
    import deepspeed.module_inject.auto_ep_layer
    import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: F401

    from tests.rehearsal import faults, rehearse  # noqa: F401

    logging.disable(logging.WARNING)
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    _warm_up()
    _serve(Connection(int(sys.argv[1])))

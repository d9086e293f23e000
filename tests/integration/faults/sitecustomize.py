"""Plants a fault in one rank of a real run: Python imports this at its start where the folder is on PYTHONPATH.

FAULT="<what> <rank or all> <step>[; ...]" makes the rank sleep, stop, kill itself or raise when it reads the data of
that step. "pause" waits there, once in the life of the folder FAULT_DIR, for its STOP file: what is to happen to the
run can then happen at a known step. "hold" waits there, once, whoever asks. "nan" spoils one number of an activation of
that step, "lr" makes the step's learning rate 100 times as high. "ask" sends it SIGUSR1.

FAULT_ROLLBACK="<rank> <place>" kills the rank in a rollback, at one of ROLLBACK_PLACES.

FAULT_FULL_DISK="<times>" has the file of the rollbacks refused so often.

FAULT_SLOW_SAVES="<seconds>" makes every rank take so long to write its tensors.
"""

from __future__ import annotations

import errno
import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

MODULE = "megatron_lite.train.shard_source"


def _raise() -> None:
    raise ValueError("the loader is broken at https://me:planted@host/x")


def _pause(until_stop: bool = True) -> None:
    folder = Path(os.environ["FAULT_DIR"])
    try:
        (folder / "paused").touch(exist_ok=False)
    except FileExistsError:
        return
    while not (until_stop and (folder / "STOP").exists()):
        time.sleep(0.05)


def _spoil_activation() -> None:
    from megatron_lite.models.mlp import MLP

    forward = MLP.forward

    def spoiled(self: Any, *arguments: Any) -> Any:
        MLP.forward = forward
        output = forward(self, *arguments).clone()  # autograd lets no view be spoiled
        output.view(-1)[0] = float("nan")
        return output

    MLP.forward = spoiled


def _raise_learning_rate() -> None:
    from megatron_lite.train import loop

    learning_rate_at = loop.learning_rate_at

    def raised(*arguments: Any) -> float:
        loop.learning_rate_at = learning_rate_at
        return 100 * learning_rate_at(*arguments)

    loop.learning_rate_at = raised


ROLLBACK_PLACES = {  # the method of RollbackCallback or RollbackRecord, and whether to die after it, not before it
    "ahead of the file": ("add", False),
    "behind the file": ("add", True),
    "in the checkpoints": ("_drop_later", True),
    "behind everything": ("_roll_back", True),
}


def _kill_in_rollback(rank: str, place: str) -> None:
    from megatron_lite.train.stability.rollback import RollbackCallback
    from megatron_lite.train.stability.rollback_record import RollbackRecord

    name, behind = ROLLBACK_PLACES[place]
    owner = RollbackRecord if name == "add" else RollbackCallback
    method = getattr(owner, name)

    def killed(self: Any, *arguments: Any) -> Any:
        own = os.environ["RANK"] == rank
        if own and not behind:
            FAULTS["kill"]()
        result = method(self, *arguments)
        if own:
            FAULTS["kill"]()
        return result

    setattr(owner, name, killed)


def _refuse_record(times: int) -> None:
    from megatron_lite.train.stability import rollback_record

    write, calls = rollback_record.write_rollbacks, 0

    def full(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls <= times:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*arguments)

    rollback_record.write_rollbacks = full


FAULTS = {
    "pause": _pause,
    "hold": lambda: _pause(until_stop=False),
    "sleep": lambda: time.sleep(3600),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "raise": _raise,
    "ask": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "nan": _spoil_activation,
    "lr": _raise_learning_rate,
}


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        plant_all(module.ShardSource)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        spec.loader = _Loader(spec.loader)
        return spec


def _slow_down_saves(seconds: float) -> None:
    from megatron_lite.checkpoint import saving

    write = saving.write

    def slow_write(*arguments: Any) -> Any:
        time.sleep(seconds)
        return write(*arguments)

    saving.write = slow_write


def plant_all(source: Any) -> None:
    """Whatever the environment asks for."""
    if "FAULT" in os.environ:
        for fault in os.environ["FAULT"].split(";"):
            _plant(source, fault)
    if "FAULT_SLOW_SAVES" in os.environ:
        _slow_down_saves(float(os.environ["FAULT_SLOW_SAVES"]))
    if "FAULT_FULL_DISK" in os.environ:
        _refuse_record(int(os.environ["FAULT_FULL_DISK"]))
    if "FAULT_ROLLBACK" in os.environ:
        _kill_in_rollback(*os.environ["FAULT_ROLLBACK"].split(" ", 1))


def _plant(source: Any, fault: str) -> None:
    what, rank, step = fault.split()
    read = source.training
    calls = 0

    def training(self: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(step) and rank in (os.environ["RANK"], "all"):
            FAULTS[what]()
        return read(self, batch)

    source.training = training


if MODULE in sys.modules:  # imported by a test's warm process
    plant_all(sys.modules[MODULE].ShardSource)
elif "FAULT" in os.environ:
    sys.meta_path.insert(0, _Finder())

"""Plants a fault in one rank of a real run: Python imports this at its start where the folder is on PYTHONPATH.

FAULT="<what> <rank> <step>" makes the rank sleep, stop, kill itself or raise when it reads the data of that step.
"pause" waits there, once in the life of the folder FAULT_DIR, for its STOP file: what is to happen to the run can then
happen at a known step. "hold" waits there, once, whoever asks.

FAULT_SLOW_SAVES="<seconds>" makes every rank take so long to write its tensors.
"""

from __future__ import annotations

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

MODULE = "megatron_lite.train.sources"


def _raise() -> None:
    raise ValueError("the loader is broken")


def _pause(until_stop: bool = True) -> None:
    folder = Path(os.environ["FAULT_DIR"])
    try:
        (folder / "paused").touch(exist_ok=False)
    except FileExistsError:
        return
    while not (until_stop and (folder / "STOP").exists()):
        time.sleep(0.05)


FAULTS = {
    "pause": _pause,
    "hold": lambda: _pause(until_stop=False),
    "sleep": lambda: time.sleep(3600),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "raise": _raise,
}


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        _plant(module.ShardSource)
        if "FAULT_SLOW_SAVES" in os.environ:
            _slow_down_saves(float(os.environ["FAULT_SLOW_SAVES"]))


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


def _plant(source: Any) -> None:
    what, rank, step = os.environ["FAULT"].split()
    read = source.training
    calls = 0

    def training(self: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(step) and os.environ["RANK"] == rank:
            FAULTS[what]()
        return read(self, batch)

    source.training = training


if "FAULT" in os.environ:
    sys.meta_path.insert(0, _Finder())

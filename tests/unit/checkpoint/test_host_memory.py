"""Page-locked memory is registered at its own size, and released with its tensor."""

from types import SimpleNamespace

import pytest
import torch

from megatron_lite.checkpoint.host_memory import page_locked


@pytest.mark.parametrize("refused", [0, 1])
def test_locks_what_it_needs_and_no_more(refused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    locked: dict[int, int] = {}

    def register(address: int, size: int, flags: int) -> int:
        if not refused:
            locked[address] = size
        return refused

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=locked.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    buffer = page_locked(5_000_001)
    assert buffer.shape == (5_000_001,)
    assert list(locked.values()) == ([] if refused else [20_000_004])
    part = buffer[:3]
    del buffer
    assert bool(locked) == (not refused)  # a view still needs it
    del part
    assert not locked

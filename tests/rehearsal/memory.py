"""Which storages of the fake device are alive, how large they are together, and the most that they ever were."""

from __future__ import annotations

import weakref

import torch
from torch.utils.weak import WeakIdKeyDictionary

ALLOCATION = 512
"""torch's allocator rounds each size up to a multiple of this."""


class LiveMemory:
    """Follows storages from the operation that makes them until the last tensor that views them is gone."""

    def __init__(self) -> None:
        self._known = WeakIdKeyDictionary()  # storage -> None
        self.live = 0
        self.peak = 0

    def hold(self, tensor: torch.Tensor) -> None:
        """An operation has returned this tensor of the device."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = -(-storage.nbytes() // ALLOCATION) * ALLOCATION
        self._known[storage] = None
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, size).atexit = False

    def _freed(self, size: int) -> None:
        self.live -= size

    def begin(self) -> None:
        """Look for the largest amount from here on."""
        self.peak = self.live

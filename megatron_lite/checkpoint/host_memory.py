"""Page-locked host memory of exactly the size that is needed.

torch's own (`pin_memory=True`) is rounded up to a power of two: 16 GiB for 10 GiB of master weights and moments.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


def page_locked(elements: int) -> Tensor:
    """An uninitialised fp32 vector on the host, into which a GPU copies while the host goes on.

    If the system does not lock that much memory, it is ordinary memory: copies into it are slower, and right.
    """
    buffer = torch.empty(elements, dtype=torch.float32)
    if elements:
        address, runtime = buffer.data_ptr(), torch.cuda.cudart()
        refused = int(runtime.cudaHostRegister(address, buffer.nbytes, 0))
        if not refused:
            weakref.finalize(buffer.untyped_storage(), runtime.cudaHostUnregister, address)
    return buffer

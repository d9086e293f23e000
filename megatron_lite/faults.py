"""What an exception of torch, CUDA, NCCL or gloo says is at fault. Only its text tells: most are plain RuntimeErrors.

The texts are those of `cudaGetErrorString`, of the status names of cuBLAS, cuDNN, cuSOLVER, cuFFT and cuRAND, of the
allocators of torch, and of NCCL's `ncclGetLastError`, which torch appends to its own message. NCCL passes on CUDA's
text, so a failed allocation inside NCCL ends like one of torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum


class Fault(StrEnum):
    """Who has to act."""

    setup = "setup"
    """The user: the driver, a limit or a variable of this machine; `remedy_of_setup` says which."""
    memory = "memory"
    """The user: the run needs more memory than there is; another attempt would end the same way."""
    device = "device"
    """Nobody in the run: a GPU, its driver or its link failed, and another node would do."""
    peer = "peer"
    """Another rank, which this one has lost."""


_SETUP = (
    (
        r"duplicate gpu detected",
        "two ranks use one GPU: start at most one process per GPU, and let all ranks of a node have the same "
        "CUDA_VISIBLE_DEVICES",
    ),
    (
        r"driver version is insufficient|nvidia driver on your system is too old|found no nvidia driver",
        "the driver is too old for this torch: update it, install torch for an older CUDA, or use launcher.device=cpu",
    ),
    (
        r"no kernel image is available",
        "this torch has no kernels for this GPU: install one whose torch.cuda.get_arch_list() names its architecture",
    ),
    (
        r"(shared memory|/dev/shm).*no space left",
        "/dev/shm is full or too small for NCCL: enlarge it (`--shm-size` of a container), or set "
        "launcher.environment.NCCL_SHM_DISABLE=1",
    ),
    (
        r"ibv_\w+.*cannot allocate memory",
        "the limit on locked memory is too low for InfiniBand: raise it with `ulimit -l unlimited`, or in "
        "launcher.environment set NCCL_IB_DISABLE=1",
    ),
    (
        r"no socket interface found",
        "NCCL_SOCKET_IFNAME names no network interface of this node: correct or unset it (`ip link` lists them)",
    ),
)
_MEMORY = (
    r"out of memory|out_of_memory|errormemoryallocation|erroroutofmemory"
    r"|status_alloc_failed|allocation_failed|cufft_alloc_failed"
    r"|failed to (cuda )?(host )?(calloc|malloc|alloc)"
    r"|defaultcpuallocator|can't allocate memory|cannot allocate memory|not enough memory|std::bad_alloc"
)
_DEVICE = (
    r"uncorrectable ecc error|uncorrectable nvlink error|hardware stack error|nvlink or a hardware error"
    r"|fallen off the bus|gpu is lost|gpu requires reset|device\(s\) is/are busy or unavailable"
    r"|system not yet initialized|unsupported display driver|no cuda-capable device is detected"
    r"|cuda (driver )?error: unknown|cuda unknown error|cuda failure \d* ?'unknown error'"
)
# Messages of gloo and NCCL when the process at the other end of a connection is gone.
_PEER = (
    r"closed by (remote )?peer|reset by peer|remote worker|remote process|broken pipe|communicator was aborted"
    r"|connection was likely closed"
)


def fault_of(error: BaseException) -> Fault | None:
    """What the exception, or one that led to it, says is at fault; None if it does not say."""
    for one in _chain(error):
        found = _fault_of_one(one)
        if found is not None:
            return found
    return None


def remedy_of_setup(error: BaseException) -> str:
    """What to change about the machine, for `Fault.setup`."""
    return next(remedy for one in _chain(error) for pattern, remedy in _SETUP if _says(one, pattern))


def telling_line(error: BaseException) -> str:
    """The line that says what is at fault, of messages that may have dozens; else the first line."""
    patterns = [*(pattern for pattern, _ in _SETUP), _MEMORY, _DEVICE, _PEER]
    lines = [line.strip() for one in _chain(error) for line in str(one).splitlines() if line.strip()]
    telling = (line for line in lines if any(re.search(each, line, re.IGNORECASE) for each in patterns))
    return next(telling, lines[0] if lines else type(error).__name__)


def _fault_of_one(error: BaseException) -> Fault | None:
    if isinstance(error, MemoryError):
        return Fault.memory
    if not isinstance(error, RuntimeError):  # a message of Python or of another library may quote anything
        return None
    if any(_says(error, pattern) for pattern, _ in _SETUP):
        return Fault.setup
    if type(error).__name__ == "OutOfMemoryError":  # torch's; this module is imported where torch is not
        return Fault.memory
    kinds = ((Fault.memory, _MEMORY), (Fault.device, _DEVICE), (Fault.peer, _PEER))
    return next((kind for kind, pattern in kinds if _says(error, pattern)), None)


def _says(error: BaseException, pattern: str) -> bool:
    return re.search(pattern, str(error), re.IGNORECASE | re.DOTALL) is not None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception, then those that led to it. A library may raise a cause again, which makes the chain a cycle."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        yield one
        seen.add(id(one))
        one = one.__cause__ or one.__context__

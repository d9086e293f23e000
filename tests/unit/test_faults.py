"""What the texts of CUDA, cuBLAS, NCCL, gloo and torch say is at fault, and how an attempt then ends."""

from __future__ import annotations

import errno

import pytest

from megatron_lite.errors import LaunchError, RunEnd, end_of, library_edge, memory_error
from megatron_lite.faults import Fault, fault_of, remedy_of_setup, telling_line

KERNEL_HINT = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
)


def nccl(what: str, *last: str) -> str:
    """As torch words an error of NCCL."""
    head = f"NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, {what}, NCCL version 2.27.5"
    return "\n".join([head, "ncclUnhandledCudaError: Call to CUDA function failed.", "Last error:", *last])


CUDA_ERROR = "unhandled cuda error (run with NCCL_DEBUG=INFO for details)"
SYSTEM_ERROR = (
    "unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclSystemError: System call "
    "(e.g. socket, malloc) or external library call failed or device error.\nLast error:\n"
)
MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1 GiB is free.",
    "CUDA error: out of memory" + KERNEL_HINT,
    "CUDA driver error: out of memory",
    "HIP out of memory. Tried to allocate 20.00 MiB",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "CUDA error: CUSPARSE_STATUS_ALLOC_FAILED when calling `cusparseCreate(handle)`",
    "cuFFT error: CUFFT_ALLOC_FAILED",
    "CURAND_STATUS_ALLOCATION_FAILED",
    nccl(CUDA_ERROR, "Cuda failure 2 'out of memory'"),
    nccl(CUDA_ERROR, "Failed to CUDA calloc async 4194304 bytes"),
    nccl(CUDA_ERROR, "Failed to CUDA host alloc 33554432 bytes"),
    nccl("unhandled system error", "Failed to malloc 1048576 bytes"),
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "1099511627776 bytes. Error code 12 (Cannot allocate memory)",
    "std::bad_alloc",
    "unable to mmap 1048576 bytes from file <filename not specified>: Cannot allocate memory (12)",
)
DEVICE = (
    "CUDA error: uncorrectable ECC error encountered" + KERNEL_HINT,
    "CUDA error: uncorrectable NVLink error detected during the execution",
    "CUDA error: hardware stack error",
    "CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error",
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
    "CUDA error: system not yet initialized",
    "CUDA error: unknown error",
    "CUDA unknown error - this may be due to an incorrectly set up environment",
    nccl(CUDA_ERROR, "Cuda failure 214 'uncorrectable ECC error encountered'"),
)
PEER = (
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:9613",
    "Read error [10.0.0.2]:5: Connection reset by peer",
    nccl(
        "remote process exited or there was a network error",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    ),
    nccl("remote process exited", "socketProgress: Connection closed by remote peer n2<51159>"),
    "NCCL communicator was aborted on rank 3.",
)
SETUP = (
    nccl("invalid usage", "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"),
    "CUDA error: CUDA driver version is insufficient for CUDA runtime version",
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver",
    "Found no NVIDIA driver on your system.",
    "CUDA error: no kernel image is available for execution on the device" + KERNEL_HINT,
    SYSTEM_ERROR
    + "Error while creating shared memory segment /dev/shm/nccl-a1 (size 9637888), error: No space left on "
    "device (28)",
    SYSTEM_ERROR + "Call to ibv_reg_mr_iova2 failed with error Cannot allocate memory",
    SYSTEM_ERROR + "Bootstrap : no socket interface found",
)
UNKNOWN = (
    "CUDA error: an illegal memory access was encountered" + KERNEL_HINT,
    "CUDA error: device-side assert triggered" + KERNEL_HINT,
    "CUDA error: misaligned address",
    "CUDA error: unspecified launch failure",
    SYSTEM_ERROR + "Call to bind failed: Address already in use",
    nccl(CUDA_ERROR, "Cuda failure 1 'invalid argument'"),
    "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
)
TEXTS = [
    *((text, Fault.memory) for text in MEMORY),
    *((text, Fault.device) for text in DEVICE),
    *((text, Fault.peer) for text in PEER),
    *((text, Fault.setup) for text in SETUP),
    *((text, None) for text in UNKNOWN),
]


@pytest.mark.parametrize(("text", "fault"), TEXTS)
def test_each_text_names_its_fault(text: str, fault: Fault | None) -> None:
    assert fault_of(RuntimeError(text)) is fault


@pytest.mark.parametrize(("text", "fault"), TEXTS)
def test_a_fault_is_found_behind_its_consequence(text: str, fault: Fault | None) -> None:
    """DeepSpeed and our own clean-up raise further errors while they handle the first."""
    error = ValueError("cannot close the file")
    error.__context__ = RuntimeError(text)
    assert fault_of(error) is fault


def test_a_quoted_text_is_no_fault() -> None:
    """Only torch's own kind of error counts: a data error may quote anything."""
    assert fault_of(ValueError("line 3 of the corpus: CUDA out of memory")) is None


def test_a_chain_that_is_a_cycle_ends() -> None:
    first, second = RuntimeError("one"), RuntimeError("CUDA error: out of memory")
    first.__cause__, second.__cause__ = second, first
    assert fault_of(first) is Fault.memory
    second.args = ("two",)
    assert fault_of(first) is None


@pytest.mark.parametrize("text", SETUP)
def test_every_fault_of_the_machine_has_a_remedy(text: str) -> None:
    assert ":" in remedy_of_setup(RuntimeError(text))


def test_the_line_that_tells() -> None:
    """NCCL's own words are the last of the message, torch's the first."""
    assert telling_line(RuntimeError(nccl(CUDA_ERROR, "Failed to CUDA calloc async 608 bytes"))) == (
        "Failed to CUDA calloc async 608 bytes"
    )
    assert telling_line(RuntimeError("CUDA error: out of memory" + KERNEL_HINT)) == "CUDA error: out of memory"
    assert telling_line(MemoryError()) == "MemoryError"


@pytest.mark.parametrize("text", MEMORY)
def test_memory_that_runs_out_in_a_library_keeps_its_meaning(text: str) -> None:
    """At a library's edge every other error becomes ours: this one must still end as OUT_OF_MEMORY."""
    with pytest.raises(RuntimeError) as raised, library_edge(LaunchError, "cannot connect"):
        raise RuntimeError(text)
    explained = memory_error(raised.value)
    assert explained is not None
    assert end_of(explained) is RunEnd.OUT_OF_MEMORY


def test_other_errors_are_no_memory_errors() -> None:
    assert memory_error(LaunchError("CUDA out of memory")) is None
    assert memory_error(OSError(errno.EACCES, "no")) is None

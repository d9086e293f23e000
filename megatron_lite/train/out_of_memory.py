"""Explain what a library says is at fault: out of memory (which rank, which stage, what was planned for it, and which
settings need less), a GPU that failed, or a machine that is not set up for the run."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.data.tokenizer.vocabulary import known_vocab_size
from megatron_lite.errors import DeviceFailedError, DeviceMemoryError, LaunchError, MegatronLiteError
from megatron_lite.faults import Fault, fault_of, remedy_of_setup, telling_line
from megatron_lite.observe.heartbeat import node_name
from megatron_lite.planning.sizes import stage_lines
from megatron_lite.train.distributed import ProcessEnvironment

ON_THE_HOST = ("DefaultCPUAllocator", "std::bad_alloc", "annot allocate memory", "ailed to malloc", "ailed to calloc")


@contextlib.contextmanager
def faults_explained(config: ResolvedConfig, environment: ProcessEnvironment) -> Iterator[None]:
    """Turn errors of torch, CUDA, NCCL and Python that say what is at fault into errors that the user can act on.

    Raises:
        DeviceMemoryError: memory ran out, of the host, of a GPU, or inside cuBLAS, cuDNN or NCCL.
        DeviceFailedError: a GPU, its driver or its link failed.
        LaunchError: the driver, a limit or a variable of this machine is wrong.
    """
    try:
        yield
    except MegatronLiteError:
        raise
    except Exception as error:
        explained = _explained(config, environment, error)
        if explained is None:
            raise
        raise explained from error


def _explained(config: ResolvedConfig, environment: ProcessEnvironment, error: Exception) -> MegatronLiteError | None:
    fault = fault_of(error)
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        fault = Fault.memory
    said = telling_line(error)
    who = _who(config, environment)
    if fault is Fault.memory:
        planned = list(stage_lines(config, known_vocab_size(config)))[_stage(config, environment)].strip()
        remedies = ", ".join(_remedies(config, error))
        return DeviceMemoryError(f"{who} ran out of memory: {said}; planned for it: {planned}; use {remedies}")
    if fault is Fault.device:
        return DeviceFailedError(
            f"the GPU of {who}, its driver or its link failed: {said}; look at `nvidia-smi` and `dmesg`, or leave "
            "the node out: the same command resumes from the newest checkpoint",
            node_name(),
        )
    if fault is Fault.setup:
        return LaunchError(f"{who}: {said}; {remedy_of_setup(error)}")
    return None


def _who(config: ResolvedConfig, environment: ProcessEnvironment) -> str:
    place = config.topology.coordinates(environment.rank)
    return f"rank {environment.rank} (node {node_name()}, tp{place.tensor} pp{place.pipeline} dp{place.data})"


def _stage(config: ResolvedConfig, environment: ProcessEnvironment) -> int:
    return config.topology.coordinates(environment.rank).pipeline


def _remedies(config: ResolvedConfig, error: Exception) -> Iterator[str]:
    """What needs less memory. On a GPU's node, host memory holds other things than the GPU does."""
    on_host = isinstance(error, MemoryError | OSError) or any(text in str(error) for text in ON_THE_HOST)
    if on_host and config.launcher.device == "cuda":
        yield "a node with more memory, or end other programs there"
        if config.parallel.offload_optimizer:
            yield "parallel.offload_optimizer=false"
        if config.train.async_save:
            yield "train.async_save=false"
    else:
        if config.train.micro_batch_size > 1:
            yield f"a train.micro_batch_size below {config.train.micro_batch_size}"
        if config.parallel.recompute.value != "full":
            yield "parallel.recompute=full"
    yield "a larger parallel.tensor_parallel_size or pipeline_parallel_size"

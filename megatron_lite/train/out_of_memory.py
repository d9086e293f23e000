"""Explain out-of-memory errors: which rank, which stage, what was planned for it, and which settings need less."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.data.tokenizer.vocabulary import known_vocab_size
from megatron_lite.errors import DeviceMemoryError
from megatron_lite.observe.heartbeat import node_name
from megatron_lite.planning.sizes import stage_lines
from megatron_lite.train.distributed import ProcessEnvironment

CPU_ALLOCATOR = "DefaultCPUAllocator"  # only this text distinguishes its RuntimeError from others


@contextlib.contextmanager
def memory_errors_explained(config: ResolvedConfig, environment: ProcessEnvironment) -> Iterator[None]:
    """Turn out-of-memory errors of torch and Python into an error that the user can act on.

    Raises:
        DeviceMemoryError: instead of them.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not _is_about_memory(error):
            raise
        raise DeviceMemoryError(_explanation(config, environment, error)) from error


def _is_about_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or CPU_ALLOCATOR in str(error)


def _explanation(config: ResolvedConfig, environment: ProcessEnvironment, error: Exception) -> str:
    place = config.topology.coordinates(environment.rank)
    planned = list(stage_lines(config, known_vocab_size(config)))[place.pipeline].strip()
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    remedies = [f"a train.micro_batch_size below {config.train.micro_batch_size}"] * (config.train.micro_batch_size > 1)
    remedies += ["parallel.recompute=full"] * (config.parallel.recompute.value != "full")
    remedies += ["a larger parallel.tensor_parallel_size or pipeline_parallel_size"]
    return (
        f"rank {environment.rank} (node {node_name()}, tp{place.tensor} pp{place.pipeline} dp{place.data}) ran "
        f"out of memory: {said}; planned for it, without activations: {planned}; use {', '.join(remedies)}"
    )

"""How a rank ends when torch, CUDA, cuBLAS or NCCL says what is at fault."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
import torch

from megatron_lite.config.compose import compose
from megatron_lite.config.derived import fill_in, resolve
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.validate import validate
from megatron_lite.errors import (
    DataError,
    DeviceFailedError,
    DeviceMemoryError,
    LaunchError,
    MegatronLiteError,
    RunEnd,
    end_of,
)
from megatron_lite.train.distributed import ProcessEnvironment
from megatron_lite.train.out_of_memory import faults_explained
from tests.unit.remedies import obeys
from tests.unit.test_faults import DEVICE, MEMORY, PEER, SETUP, UNKNOWN

RANK = ProcessEnvironment(rank=3, local_rank=3, world_size=4, local_world_size=4)


def run(device: str = "cuda", *words: str) -> ResolvedConfig:
    layout = [
        "parallel=dp1_tp2_pp2",
        "train.micro_batch_size=4",
        "train.global_batch_size=8",
        "data.tokenizer_vocab_size=512",
    ]
    return resolve(fill_in(compose("pretrain_gpt", [*layout, *words]), world_size=4, device=device))


def explained(error: Exception, config: ResolvedConfig | None = None) -> MegatronLiteError:
    with pytest.raises(MegatronLiteError) as raised, faults_explained(config or run(), RANK):
        raise error
    return raised.value


@pytest.mark.parametrize(
    "error",
    [
        *(RuntimeError(text) for text in MEMORY),
        torch.OutOfMemoryError("CUDA out of memory."),
        torch.AcceleratorError("CUDA error: out of memory"),
        torch.distributed.DistBackendError(MEMORY[-6]),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_every_failed_allocation_ends_as_out_of_memory_with_what_to_change(error: Exception) -> None:
    told = explained(error)
    assert isinstance(told, DeviceMemoryError)
    assert end_of(told) is RunEnd.OUT_OF_MEMORY
    assert str(told).startswith("rank 3 (node ")
    assert ", tp1 pp1 dp0) ran out of memory: " in str(told)
    assert "planned for it: stage 1" in str(told)
    assert "; use " in str(told)


def test_what_a_gpu_needs_is_not_what_its_host_needs() -> None:
    offload = run("cuda", "parallel.offload_optimizer=true", "parallel.zero_stage=1")
    of_gpu, of_host = (str(explained(error, offload)) for error in (RuntimeError(MEMORY[1]), MemoryError()))
    assert "a train.micro_batch_size below 4, parallel.recompute=full" in of_gpu
    assert "parallel.offload_optimizer=false, train.async_save=false" in of_host
    assert "micro_batch_size" not in of_host
    assert "a train.micro_batch_size below 4" in str(explained(MemoryError(), run("cpu"))), "there is only one memory"


@pytest.mark.parametrize("text", DEVICE)
def test_a_gpu_that_failed_names_its_node(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    told = explained(RuntimeError(text))
    assert isinstance(told, DeviceFailedError)
    assert (told.node, end_of(told)) == ("n7", RunEnd.DEVICE_ERROR)
    assert "rank 3 (node n7, tp1 pp1 dp0)" in str(told)


@pytest.mark.parametrize("text", SETUP)
def test_a_machine_that_is_not_set_up_has_a_remedy(text: str) -> None:
    told = explained(RuntimeError(text))
    assert isinstance(told, LaunchError)
    assert end_of(told) is RunEnd.CONFIG_ERROR


@pytest.mark.parametrize("text", [*PEER, *UNKNOWN])
def test_others_pass_unchanged(text: str) -> None:
    error = RuntimeError(text)
    with pytest.raises(RuntimeError) as raised, faults_explained(run(), RANK):
        raise error
    assert raised.value is error


def test_our_own_errors_pass_unchanged() -> None:
    error = DataError("the corpus is empty")
    error.__cause__ = MemoryError()
    with pytest.raises(DataError) as raised, faults_explained(run(), replace(RANK, rank=0)):
        raise error
    assert raised.value is error


@obeys("megatron_lite/train/out_of_memory.py:_explained")
def test_the_remedies_can_be_typed_and_are_then_not_given_again() -> None:
    words = ["train.micro_batch_size=1", "parallel.recompute=full", "parallel.zero_stage=1", "train.async_save=false"]
    obedient = run("cuda", *words, "launcher.environment.NCCL_SHM_DISABLE=1", "launcher.environment.NCCL_IB_DISABLE=1")
    validate(obedient)
    for error in (RuntimeError(MEMORY[0]), MemoryError()):
        told = str(explained(error, obedient))
        assert not any(word.partition("=")[0] in told for word in words if "zero" not in word), told
        assert told.endswith("a larger parallel.tensor_parallel_size or pipeline_parallel_size")

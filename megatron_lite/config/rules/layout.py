"""Rules between the layout and everything that it splits."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.derived import given_processes, ranks_per_replica
from megatron_lite.config.ranges import MOST_PROCESSES
from megatron_lite.config.rules.case import PROCESSES, SIZES, Case, either, nearest_multiples
from megatron_lite.config.rules.nearest_layout import NearestLayouts
from megatron_lite.config.schema import OptimizerName, Precision, RunConfig


def processes_can_be_planned(case: Case) -> Iterator[str]:
    if not case.sound(*SIZES, *PROCESSES):
        return
    count = case.data * case.tensor * case.pipeline
    if count > MOST_PROCESSES:
        yield (
            f"parallel.data_parallel_size={case.data} x tensor x pipeline = {case.data} x {case.tensor} x "
            f"{case.pipeline} = {count} processes are more than {MOST_PROCESSES}, the most that a plan can list; use "
            "smaller sizes"
        )


def world_size_fits_layout(case: Case) -> Iterator[str]:
    """world_size = data x tensor x pipeline."""
    data = case.config.parallel.data_parallel_size
    given = case.world_size if case.world_size is not None else given_processes(case.config)
    if given is None or given > MOST_PROCESSES or not case.sound(*SIZES, *PROCESSES):
        return
    name = "world_size" if case.world_size is not None else _keys_of_processes(case.config)
    replica = ranks_per_replica(case.config)
    if given % replica and data is None:
        yield (
            f"{name}={given} must be a multiple of tensor x pipeline = {case.tensor} x {case.pipeline} = {replica}; "
            f"{_remedies(case, given)}"
        )
    elif data is not None and data * replica != given:
        yield (
            f"{name}={given} must be data x tensor x pipeline = {data} x {case.tensor} x {case.pipeline} = "
            f"{data * replica}; {_remedies(case, given)}"
        )


def _keys_of_processes(config: RunConfig) -> str:
    """The settings that determine the number of processes; a resolved configuration always has num_processes."""
    launcher = config.launcher
    for key, here in (("processes_per_node", launcher.processes_per_node), ("gpus_per_node", launcher.gpus_per_node)):
        if here is not None and launcher.num_processes in (None, launcher.nodes * here):
            return f"launcher.nodes x launcher.{key}"
    return "launcher.num_processes"


def _remedies(case: Case, given: int) -> str:
    rules = (processes_can_be_planned, sequence_parallel_needs_tensor, zero_stage_fits_pipeline)
    return NearestLayouts(case, given, rules).remedies()


def sequence_parallel_needs_tensor(case: Case) -> Iterator[str]:
    if not case.config.parallel.sequence_parallel or not case.sound(*SIZES, "data.seq_length"):
        return
    length = case.config.data.seq_length
    if case.tensor == 1:
        yield (
            "parallel.sequence_parallel=true needs parallel.tensor_parallel_size > 1, whose ranks share the sequence; "
            "set parallel.sequence_parallel=false"
        )
    elif length % case.tensor:
        yield (
            f"data.seq_length={length} must be a multiple of parallel.tensor_parallel_size={case.tensor} with "
            f"parallel.sequence_parallel=true; use {either(nearest_multiples(length, case.tensor))}"
        )


def zero_stage_fits_pipeline(case: Case) -> Iterator[str]:
    stage = case.config.parallel.zero_stage
    if stage in (2, 3) and case.sound(*SIZES) and case.pipeline > 1:
        yield (
            f"parallel.zero_stage={stage} needs parallel.pipeline_parallel_size=1, not {case.pipeline}: a pipeline "
            "accumulates whole gradients over its micro-batches; use parallel.zero_stage=1"
        )


def zero_0_is_a_reference(case: Case) -> Iterator[str]:
    precision = case.config.train.precision
    if case.config.optimizer.name is OptimizerName.adafactor:
        return  # that rule requires fp32 as well
    if case.config.parallel.zero_stage == 0 and precision is not Precision.fp32:
        yield (
            f"parallel.zero_stage=0 needs train.precision=fp32, not {precision.value}: without ZeRO there are "
            "no right fp32 master weights; use parallel.zero_stage=1"
        )


def adafactor_needs_whole_matrices(case: Case) -> Iterator[str]:
    config = case.config
    if config.optimizer.name is not OptimizerName.adafactor:
        return
    if config.parallel.zero_stage != 0:
        yield (
            f"optimizer.name=adafactor needs parallel.zero_stage=0, not {config.parallel.zero_stage}: ZeRO flattens "
            "parameters, so the rows and columns that Adafactor factors are lost; use parallel.zero_stage=0 or "
            "optimizer.name=adamw"
        )
    elif config.train.precision is not Precision.fp32:
        yield (
            f"optimizer.name=adafactor needs train.precision=fp32, not {config.train.precision.value}: it runs without "
            "ZeRO, which holds the fp32 master weights; use train.precision=fp32 or optimizer.name=adamw"
        )


def offload_needs_zero_and_adamw(case: Case) -> Iterator[str]:
    config = case.config
    if not config.parallel.offload_optimizer:
        return
    if config.parallel.zero_stage == 0:
        yield (
            "parallel.offload_optimizer=true needs parallel.zero_stage >= 1, which owns the states that are moved; "
            "use parallel.zero_stage=1"
        )
    if config.optimizer.name is OptimizerName.sgd:
        yield (
            "parallel.offload_optimizer=true needs optimizer.name=adamw, not sgd: only Adam's arithmetic runs on the "
            "host; set parallel.offload_optimizer=false"
        )

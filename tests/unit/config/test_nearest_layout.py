"""Whoever obeys a suggested layout or number of processes gets a configuration that is valid as a whole."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_lite.config.derived import fill_in
from megatron_lite.config.schema import RunConfig
from megatron_lite.config.validate import problems
from tests.unit.config.test_validate import config_of

SMALL = st.sampled_from([1, 2, 3, 4, 6, 8])
COUNT = re.compile(r"(\d+) processes \(dp=(\d+)\)")
LAYOUT = re.compile(r"layout dp=(\d+) tp=(\d+) pp=(\d+)(?: with train\.global_batch_size=(\d+))?")


def changed(config: RunConfig, **groups: dict[str, Any]) -> RunConfig:
    parts = {name: replace(getattr(config, name), **values) for name, values in groups.items()}
    return fill_in(replace(config, **parts), device="cpu")


@settings(max_examples=60, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 3, 4, 6, 8, 12]),
    layers=st.integers(1, 9),
    batch=st.sampled_from([1, 2, 6, 7, 8, 12, 16, 24, 96]),
    micro=st.sampled_from([1, 2, 4]),
    sizes=st.tuples(SMALL, SMALL, st.none() | SMALL),
    processes=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 30, 64]),
    nodes=st.none() | st.sampled_from([1, 2, 3]),
    stage=st.sampled_from([1, 3]),
    sequence_parallel=st.booleans(),
    ramp=st.sampled_from([0, 0, 2]),
)
def test_what_is_suggested_is_valid(
    heads: int,
    layers: int,
    batch: int,
    micro: int,
    sizes: tuple[int, int, int | None],
    processes: int,
    nodes: int | None,
    stage: int,
    sequence_parallel: bool,
    ramp: int,
) -> None:
    tensor, pipeline, data = sizes
    processes_of = {"num_processes": processes} if nodes is None else {"nodes": nodes, "gpus_per_node": processes}
    config = changed(
        config_of("launcher=slurm"),
        model={"num_attention_heads": heads, "hidden_size": 24 * heads, "num_layers": layers, "ffn_hidden_size": 48},
        train={
            "global_batch_size": batch,
            "micro_batch_size": micro,
            "batch_ramp": replace(config_of().train.batch_ramp, start=ramp, increment=ramp, samples=50 * ramp),
        },
        parallel={
            "tensor_parallel_size": tensor,
            "pipeline_parallel_size": pipeline,
            "data_parallel_size": data,
            "zero_stage": stage,
            "sequence_parallel": sequence_parallel,
        },
        launcher={"num_processes": None, "processes_per_node": None} | processes_of,
    )
    before = problems(config)
    message = next((one for one in before if " must be " in one and "tensor x pipeline = " in one), None)
    assume(message is not None)
    assert message is not None
    others = {*before} - {message}
    for count, _ in COUNT.findall(message):
        assert others.issuperset(problems(with_count(config, int(count)))), (message, count)
    for sizes_found in LAYOUT.findall(message):
        found = [int(size) for size in sizes_found if size]
        names = ("data_parallel_size", "tensor_parallel_size", "pipeline_parallel_size")
        again = changed(
            config,
            parallel=dict(zip(names, found[:3], strict=True)),
            train={"global_batch_size": found[3] if found[3:] else batch},
        )
        assert others.issuperset(problems(again)), (message, sizes_found)
    trains_alone = not sequence_parallel and ramp == 0
    assert not trains_alone or LAYOUT.search(message), message


def with_count(config: RunConfig, count: int) -> RunConfig:
    """On whole nodes of as many GPUs as before where that goes, else with fewer GPUs of each."""
    nodes, gpus = config.launcher.nodes, config.launcher.gpus_per_node
    if gpus is None:
        return changed(config, launcher={"num_processes": count})
    ways = [(count // gpus, gpus), (1, count), (nodes, count // nodes)]
    fitting = [(nodes, here) for nodes, here in ways if nodes * here == count and here <= gpus]
    assert fitting, f"no nodes of {gpus} GPUs have {count} processes"
    return changed(config, launcher={"num_processes": None, "nodes": fitting[0][0], "gpus_per_node": fitting[0][1]})

"""What is said of ranks that differ and of groups that are slow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.parallel.topology import Topology
from megatron_lite.train import startup
from megatron_lite.train.startup import REMEDIES, Identity, Links, code_fingerprint, collect, differences

NODES = ["n1"] * 4 + ["n2"] * 4
TOPOLOGY = Topology(data_parallel_size=2, tensor_parallel_size=2, pipeline_parallel_size=2)


def ranks() -> list[Identity]:
    """Eight on two nodes, all alike; only the first of a node knows its code."""
    same = dict.fromkeys(REMEDIES, "1.0")
    return [
        Identity(node, {**same, "code of megatron_lite": "abc" if rank % 4 == 0 else None}, f"GPU-{rank}")
        for rank, node in enumerate(NODES)
    ]


def change(identities: list[Identity], rank: int, **same: str) -> None:
    known = {name.replace("_", " "): value for name, value in same.items()}
    identities[rank] = replace(identities[rank], same={**identities[rank].same, **known})


def test_equal_ranks() -> None:
    assert differences(ranks()) == []


def test_another_version_on_one_node() -> None:
    identities = ranks()
    for rank in range(4, 8):
        change(identities, rank, torch="2.9.1")
    assert differences(identities) == [
        "the ranks differ in their torch: 1.0 on ranks 0-3 (node n1), 2.9.1 on ranks 4-7 (node n2); install the same "
        "version on all nodes"
    ]


def test_code_is_compared_between_nodes() -> None:
    identities = ranks()
    identities[4] = replace(identities[4], same={**identities[4].same, "code of megatron_lite": "abd"})
    assert differences(identities) == [
        "the ranks differ in their code of megatron_lite: abc on rank 0 (node n1), abd on rank 4 (node n2); check "
        "out the same commit on all nodes, without local changes"
    ]


@pytest.mark.parametrize("name", [name for name in REMEDIES if name != "code of megatron_lite"])
def test_everything_is_compared_on_every_rank(name: str) -> None:
    identities = ranks()
    identities[6] = replace(identities[6], same={**identities[6].same, name: "other"})
    (problem,) = differences(identities)
    assert problem.startswith(f"the ranks differ in their {name}: 1.0 on ranks 0-5, 7 (nodes n1, n2), other on rank 6")


def test_several_differences_are_all_named() -> None:
    identities = ranks()
    change(identities, 3, torch="2.9.1", configuration="ff")
    assert len(differences(identities)) == 2


def test_a_gpu_that_two_ranks_use() -> None:
    identities = ranks()
    identities[5] = replace(identities[5], gpu="GPU-4")
    (problem,) = differences(identities)
    assert problem.startswith("ranks 4-5 (node n2) use the same GPU; set the same CUDA_VISIBLE_DEVICES")


def test_ranks_on_cpus_share_nothing() -> None:
    assert differences([replace(identity, gpu=None) for identity in ranks()]) == []


def test_the_fingerprint_sees_a_changed_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train").mkdir()
    source = tmp_path / "train" / "startup.py"
    monkeypatch.setattr(startup, "__file__", str(source))
    prints = []
    for path, text in ((source, "a"), (source, "b"), (tmp_path / "new.py", "")):
        path.write_text(text)
        prints.append(code_fingerprint())
    assert len(set(prints)) == 3
    assert prints[-1] == code_fingerprint()


def measured(**changes: Any) -> Links:
    """Eight ranks: 0.4, 0.9 and 0.5 ms; `changes`: rank_kind=seconds."""
    times = [{"tensor": 0.0004, "data": 0.0009, "pipeline": 0.0005} for _ in NODES]
    for name, seconds in changes.items():
        _, rank, kind = name.split("_")
        times[int(rank)][kind] = seconds
    return collect(times, TOPOLOGY, NODES)


def test_the_line() -> None:
    assert measured().line == ("8 ranks on 2 nodes; all-reduce of 1 MiB: tensor 0.4 ms, data 0.9 ms, pipeline 0.5 ms")
    assert measured().warnings == []
    assert collect([{}], Topology(), ["n1"]).line == "1 rank on 1 node"


def test_only_kinds_of_more_than_one_rank() -> None:
    links = collect([{"data": 0.001}] * 2, Topology(data_parallel_size=2), ["n1", "n1"])
    assert links.line == "2 ranks on 1 node; all-reduce of 1 MiB: data 1.0 ms"


def test_a_group_is_as_slow_as_its_slowest_rank() -> None:
    assert measured(rank_7_tensor=0.081).warnings == [
        "warning: the tensor group of ranks 6-7 (node n2) takes 81 ms for an all-reduce of 1 MiB, the median is "
        "0.4 ms: a bad link, or a busy node"
    ]
    (warning,) = measured(rank_6_pipeline=0.081).warnings
    assert "the pipeline group of ranks 2, 6 (nodes n1, n2)" in warning


def test_a_slow_network_is_no_outlier_and_a_fast_one_may_vary() -> None:
    slow = {f"rank_{rank}_tensor": 0.3 + 0.01 * rank for rank in range(8)}
    assert measured(**slow).warnings == []
    assert measured(rank_7_tensor=0.0193).warnings == [], "48 times the median, but only 19 ms"


def test_figures() -> None:
    figures = measured(rank_7_tensor=0.081).figures
    assert figures["nodes"] == ["n1", "n2"]
    assert figures["all_reduce_milliseconds"]["tensor"] == {"median": 0.4, "highest": 81.0}
    assert len(figures["warnings"]) == 1

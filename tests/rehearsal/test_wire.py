"""The arithmetic of messages, by numbers worked out by hand, and the reason for a skip."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.rehearsal import budget, stub
from tests.rehearsal.wire import Layout, Stage, minimum_bytes, sent_bytes

PLAIN = Layout(
    data=4,
    tensor=1,
    sequence_parallel=False,
    zero_stage=1,
    micro_batches=3,
    weight_bytes=2,
    gradient_bytes=2,
    recomputes=False,
)
STAGE = Stage(
    parameters=1000,
    tied=0,
    tied_stages=2,
    sums=100,
    gathers=80,
    sums_again=60,
    gathers_again=40,
    loss_elements=10,
    sent=50,
    received=30,
)


@pytest.mark.parametrize(
    ("operation", "ranks", "expected"),
    [
        ("all_reduce", 4, 1500),
        ("reduce_scatter", 4, 750),
        ("all_gather", 2, 500),
        ("all_reduce", 1, 0),
        ("send", 8, 1000),
        ("receive", 2, 0),
        ("barrier", 2, 0),
    ],
)
def test_bytes_of_a_collective(operation: str, ranks: int, expected: float) -> None:
    assert sent_bytes(operation, 1000, ranks) == expected


@pytest.mark.parametrize(
    ("zero_stage", "expected"),
    [
        (0, 2 * 2000 * 0.75),  # an all-reduce
        (1, 2 * 2000 * 0.75),  # a reduce-scatter, an all-gather
        (2, 4 * 2000 * 0.75),  # a reduce-scatter in each of three micro-batches, an all-gather
        (3, 9 * 2000 * 0.75),  # three collectives in each micro-batch
    ],
)
def test_minimum_of_data_parallelism(zero_stage: int, expected: float) -> None:
    assert minimum_bytes(replace(PLAIN, zero_stage=zero_stage), STAGE)["data"] == expected


@pytest.mark.parametrize(
    ("sequence_parallel", "recomputes", "activations"),
    [(False, False, 360), (False, True, 480), (True, False, 440), (True, True, 540)],
)
def test_minimum_of_tensor_parallelism(sequence_parallel: bool, recomputes: bool, activations: int) -> None:
    layout = replace(PLAIN, tensor=2, sequence_parallel=sequence_parallel, recomputes=recomputes)
    assert minimum_bytes(layout, STAGE)["tensor"] == 3 * 0.5 * (activations * 2 + 2 * 10 * 4)


def test_minimum_between_stages() -> None:
    found = minimum_bytes(replace(PLAIN, tensor=2), replace(STAGE, tied=200))
    assert found["pipeline"] == 3 * 2 * 80 / 2
    assert found["stages"] == 200 * 2  # an all-reduce over two


def test_a_figure_above_its_row_is_told_apart_from_one_below() -> None:
    found = budget.compare({"kernels": 11, "memory": 1.2}, {"kernels": 10, "memory": 1.3, "wire_data": 1.0})
    assert list(found.exceeded) == ["kernels"]
    assert set(found.tighter) == {"memory", "wire_data"}


def test_a_figure_without_a_row_is_above_it() -> None:
    assert "wire_tensor" in budget.compare({"wire_tensor": 1.0}, {}).exceeded


def test_without_a_compiler_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stub.shutil, "which", lambda name: None)
    assert "compiler" in (stub.why_not() or "") or "GPU support" in (stub.why_not() or "")

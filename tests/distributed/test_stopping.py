"""A job is asked to stop: all ranks stop at the same boundary, and the interrupted step leaves no trace in the
checkpoint."""

from __future__ import annotations

import math
import os
import signal
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_lite.checkpoint.file_plan import FilePlan, shapes_of_all_ranks
from megatron_lite.config.compose import compose
from megatron_lite.config.derived import resolve
from megatron_lite.config.schema import RunConfig
from megatron_lite.engine.engine import Engine
from megatron_lite.engine.hooks import EngineHooks
from megatron_lite.observe.markers import ask_to_stop
from megatron_lite.optim.batch_ramp import BatchStep
from megatron_lite.train.stopping import MOST_BOUNDARIES, Reason, StopAgreement, StopRequest, StopRequested
from tests.distributed.checkpoint_ranks import resume, save
from tests.distributed.harness import run_ranks
from tests.distributed.layout_ranks import synthetic_engine

VOCAB = 256
BATCH = 16
STEPS = 5
STOPPED_STEP = 2  # the step that is interrupted


def _config(layout: str, *words: str) -> RunConfig:
    sizes = ["model.num_layers=4", "model.hidden_size=32", "model.num_attention_heads=2", "data.seq_length=16"]
    batch = ["train.micro_batch_size=2", f"train.global_batch_size={BATCH}", f"train.steps={STEPS}"]
    return resolve(compose("pretrain_gpt", [f"parallel={layout}", *sizes, *batch, "model.hidden_dropout=0.1", *words]))


def _step(engine: Engine, batches_from: Any, step: int) -> tuple[float, float]:
    context = engine.context
    own = BATCH // context.data_size
    batches = batches_from(step * BATCH + context.data_rank * own, own // 2)
    result = engine.train_step(batches, BatchStep(step * BATCH, BATCH), 1e-2)
    return result.loss, result.grad_norm


class _StopAt:
    """Asks one rank to stop at one boundary; counts the boundaries."""

    def __init__(self, boundary: int, rank: int) -> None:
        self.passed = 0
        self.counts = False
        self._boundary, self._rank = boundary, rank
        self._request = StopRequest(None, grace_seconds=60.0)
        self._agreement = StopAgreement(self._request)

    def __call__(self) -> None:
        if not self.counts:
            return
        self.passed += 1
        if self.passed == self._boundary and dist.get_rank() == self._rank:
            os.kill(os.getpid(), signal.SIGUSR1)
        self._agreement.ask()


def _broken_off_rank(config: RunConfig, boundary: int, folder: str) -> tuple[list[tuple[float, float]], int]:
    """Steps before a stop in the middle of STOPPED_STEP, and the steps after a resume from what was saved then."""
    stop = _StopAt(boundary, rank=dist.get_world_size() - 1)
    engine, batches_from = synthetic_engine(config, VOCAB, EngineHooks(between_micro_batches=stop))
    records = [_step(engine, batches_from, step) for step in range(STOPPED_STEP)]
    stop.counts = True
    with stop._request.listening(), pytest.raises(StopRequested) as raised:
        _step(engine, batches_from, STOPPED_STEP)
    assert raised.value.reason is Reason.usr1
    plan = FilePlan.of(shapes_of_all_ranks(engine.shards.shapes()), None)
    save(engine, plan, Path(folder), STOPPED_STEP, asynchronous=True)
    again, batches_from = synthetic_engine(config, VOCAB)
    assert resume(again, plan, Path(folder)) == STOPPED_STEP
    return records + [_step(again, batches_from, step) for step in range(STOPPED_STEP, STEPS)], stop.passed


def _whole_rank(config: RunConfig) -> list[tuple[float, float]]:
    engine, batches_from = synthetic_engine(config, VOCAB)
    return [_step(engine, batches_from, step) for step in range(STEPS)]


@pytest.mark.parametrize(
    ("layout", "words", "boundary"),
    [
        ("dp2_tp1_pp2", [], 1),
        ("dp2_tp1_pp2", [], 6),
        ("dp1_tp2_pp2", ["parallel.sequence_parallel=true"], 17),
        ("dp2_tp1_pp1", ["train.precision=bf16"], 5),
        ("dp2_tp1_pp1", ["parallel.zero_stage=2"], 3),
        ("dp2_tp1_pp1", ["parallel.zero_stage=3", "parallel.recompute=full"], 4),
    ],
)
def test_what_is_saved_in_the_middle_of_a_step_is_the_step_before(
    layout: str, words: list[str], boundary: int, tmp_path: Path
) -> None:
    config = _config(layout, *words)
    ranks = math.prod(int(part[2:]) for part in layout.split("_"))
    whole = run_ranks(_whole_rank, ranks, config)
    broken = run_ranks(_broken_off_rank, ranks, config, boundary, str(tmp_path))
    assert [records for records, _ in broken] == whole
    assert {passed for _, passed in broken} == {boundary}, "a rank stopped at another boundary"


def _evaluation_rank(config: RunConfig, boundary: int) -> int:
    stop = _StopAt(boundary, rank=0)
    stop.counts = True
    engine, batches_from = synthetic_engine(config, VOCAB, EngineHooks(between_micro_batches=stop))
    own = BATCH // engine.context.data_size
    with stop._request.listening(), pytest.raises(StopRequested):
        engine.evaluate(batches_from(0, own // 2), own // 2)
    return stop.passed


@pytest.mark.parametrize(("layout", "words"), [("dp1_tp1_pp2", []), ("dp2_tp1_pp1", ["parallel.zero_stage=3"])])
def test_an_evaluation_can_be_stopped(layout: str, words: list[str]) -> None:
    assert run_ranks(_evaluation_rank, 2, _config(layout, *words), 3) == [3, 3]


def _counting_rank(seconds_each: list[float]) -> list[int]:
    """At which boundaries the ranks ask each other, if a boundary of rank r takes `seconds_each[r]`."""
    now, asked, passed = 0.0, [], 0
    agreement = StopAgreement(StopRequest(None, 60.0), clock=lambda: now)
    original = agreement.ask

    def ask() -> None:
        asked.append(passed)
        original()

    agreement.ask = ask  # type: ignore[method-assign]
    for _ in range(200):
        passed += 1
        now += seconds_each[dist.get_rank()]
        agreement.at_boundary()
    return asked


def test_quick_boundaries_ask_seldom_and_all_ranks_at_the_same() -> None:
    first, second = run_ranks(_counting_rank, 2, [0.001, 0.1])
    assert first == second
    gaps = [after - before for before, after in pairwise(first)]
    assert gaps[:4] == [2, 4, 8, 9]  # grows at most twofold, up to one second of the slower rank
    assert max(gaps) <= 10


def test_slow_boundaries_ask_every_time() -> None:
    assert run_ranks(_counting_rank, 2, [5.0, 0.1])[1] == list(range(1, 201))


def _file_rank(folder: str) -> str:
    """Only one rank looks for the STOP file; the others learn of it."""
    request = StopRequest(Path(folder) if dist.get_rank() == 0 else None, 60.0)
    agreement = StopAgreement(request)
    agreement.ask()
    dist.barrier()
    if dist.get_rank() == 1:
        ask_to_stop(Path(folder), "maintenance at noon")
    dist.barrier()
    try:
        agreement.ask()
    except StopRequested as stop:
        return str(stop)
    return "goes on"


def test_stop_file_reaches_every_rank() -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert run_ranks(_file_rank, 3, folder) == ["maintenance at noon", *["a file named STOP"] * 2]


def _request_rank() -> str:
    """Only rank 1 asks to stop."""
    agreement = StopAgreement(StopRequest(None, 60.0))
    agreement.at_boundary()
    if dist.get_rank() == 1:
        agreement.request(Reason.save)
    try:
        for _ in range(2 * MOST_BOUNDARIES):
            agreement.at_boundary()
    except StopRequested as request:
        return str(request)
    return "nothing"


def test_what_one_rank_asks_for_stops_all() -> None:
    assert run_ranks(_request_rank, 2) == ["a checkpoint that cannot be written"] * 2


def test_ranks_that_cannot_agree_end_after_the_grace() -> None:
    """The other ranks are gone, and this one waits for them in a collective: it must not wait forever."""
    pid = os.fork()
    if pid == 0:
        with StopRequest(None, grace_seconds=0.2).listening():
            os.kill(os.getpid(), signal.SIGTERM)
            torch.zeros(1)
            while True:
                signal.pause()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 143

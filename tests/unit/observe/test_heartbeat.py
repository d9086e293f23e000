"""What a rank says of itself, and what another one reads."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_lite.observe.heartbeat import Beat, Heartbeat, Phase, Place, node_name, publish, read_beats

PLACE = Place(rank=3, node="n2", pid=77, pipeline=1, data=0, tensor=1)


def test_phases_of_a_step_are_counted() -> None:
    heartbeat = Heartbeat()
    assert (heartbeat.now.phase, heartbeat.now.step) == (Phase.START, 0)
    heartbeat.begin_step(5)
    assert heartbeat.now[:4] == (Phase.DATA, None, 5, 0)
    heartbeat.enter(Phase.FORWARD, 1)
    heartbeat.enter(Phase.FORWARD, 2)
    assert heartbeat.now[:4] == (Phase.FORWARD, 2, 5, 2)
    heartbeat.begin_step(6)
    assert heartbeat.now[:4] == (Phase.DATA, None, 6, 0)


def test_a_phase_lasts_until_the_next() -> None:
    heartbeat = Heartbeat()
    time.sleep(0.02)
    assert heartbeat.seconds >= 0.02
    before = time.monotonic()
    heartbeat.enter(Phase.SAVE)
    assert heartbeat.now.since >= before


def test_a_beat_is_read_as_it_was_published(tmp_path: Path) -> None:
    heartbeat = Heartbeat()
    heartbeat.begin_step(9)
    heartbeat.enter(Phase.FORWARD, 2)
    beat = Beat.of(PLACE, heartbeat)
    publish(tmp_path, beat)
    assert read_beats(tmp_path, 8) == {3: beat}
    assert (beat.rank, beat.node, beat.what, beat.step, beat.finished_step) == (3, "n2", "forward 2", 9, 8)
    assert abs(beat.time - time.time()) < 60


def test_a_shorter_line_covers_a_longer_one(tmp_path: Path) -> None:
    publish(tmp_path, Beat.of(Place(3, "n" * 2000, 7, 0, 0, 0), Heartbeat()))
    publish(tmp_path, Beat.of(PLACE, Heartbeat()))
    assert read_beats(tmp_path, 4)[3].node == "n2"


@pytest.mark.parametrize("text", ["", '{"rank": 3', '{"rank": 3}\n', '{"unknown": 1}\n'])
def test_a_torn_line_is_no_sign_of_life(tmp_path: Path, text: str) -> None:
    (tmp_path / "rank-3").write_text(text)
    assert read_beats(tmp_path, 4) == {}


def test_time_goes_on_behind_a_beat() -> None:
    beat = Beat.of(PLACE, Heartbeat())
    assert beat.seconds_at(beat.time + 10) == pytest.approx(beat.seconds + 10)
    assert beat.seconds_at(beat.time - 10) == beat.seconds, "the reader's clock is behind"


@pytest.mark.parametrize(("phase", "finished"), [(Phase.OPTIMIZER, 8), (Phase.SAVE, 9), (Phase.EVALUATE, 9)])
def test_a_step_is_finished_after_the_optimizer(phase: Phase, finished: int) -> None:
    heartbeat = Heartbeat()
    heartbeat.begin_step(9)
    heartbeat.enter(phase)
    assert Beat.of(PLACE, heartbeat).finished_step == finished


def test_another_thread_sees_where_the_main_thread_is() -> None:
    """In a collective, by its name; and the line of ours that asked for it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    beats: list[Beat] = []
    reader = threading.Thread(target=lambda: beats.append(Beat.of(PLACE, Heartbeat())))

    class SeenWithin(list):
        """all_gather_object pickles it: a place within a collective, reached by the main thread for certain."""

        def __reduce__(self) -> tuple[type, tuple[()]]:
            reader.start()
            reader.join()
            return list, ()

    try:
        dist.all_gather_object([None], SeenWithin())
    finally:
        dist.destroy_process_group()
    assert beats[0].call == "all_gather_object"


@pytest.mark.parametrize(("library", "call"), [("deepspeed", "wait"), ("elsewhere", None)])
def test_a_wait_for_an_asynchronous_collective(library: str, call: str | None) -> None:
    """Its frame is of the library that holds the handle; below it there is only C."""
    names: dict[str, Any] = {}
    exec(compile("def wait(lock):\n    lock.acquire()", f"/site-packages/{library}/handle.py", "exec"), names)
    lock = threading.Lock()
    lock.acquire()
    beats: list[Beat] = []

    def read() -> None:
        time.sleep(0.2)  # until the main thread waits; before, it would be in no call at all
        beats.append(Beat.of(PLACE, Heartbeat()))
        lock.release()

    reader = threading.Thread(target=read)
    reader.start()
    names["wait"](lock)
    reader.join()
    assert beats[0].call == call


def test_no_collective_no_call() -> None:
    beat = Beat.of(PLACE, Heartbeat())
    assert beat.call is None
    assert beat.where.startswith("observe/heartbeat.py:")


def test_the_scheduler_s_name_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-17")
    assert node_name() == "gpu-17"

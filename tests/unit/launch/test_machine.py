"""What the machine offers, without torch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from launch import machine
from launch.machine import PORTS, choose_device, choose_world_size, free_port, require_capacity, visible_gpus
from megatron_lite.config.compose import compose
from megatron_lite.errors import LaunchError


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with eight GPUs and a CUDA build of torch."""
    for name in [*(f"nvidia{index}" for index in range(8)), "nvidiactl", "nvidia-uvm"]:
        (tmp_path / name).touch()
    monkeypatch.setattr(machine, "DEVICES", tmp_path)
    monkeypatch.setattr(machine, "_torch_has_cuda", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 8), ("", 0), ("-1", 0), ("0,1", 2), ("3", 1), ("0,-1,2", 1), ("GPU-abc,GPU-def", 2)]
)
@pytest.mark.usefixtures("eight_gpus")
def test_visible_gpus(monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == count


@pytest.mark.usefixtures("eight_gpus")
def test_cpu_build_of_torch_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_torch_has_cuda", lambda: False)
    assert visible_gpus() == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cuda: Optional[str] = '12.8'\n", True),
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", False),
        ("cuda = '12.8'\n", True),
        ("debug = False\n", False),
    ],
)
def test_build_of_torch_is_read_from_its_version_file(tmp_path: Path, text: str, expected: bool) -> None:
    (tmp_path / "version.py").write_text(text)
    assert machine.built_with_cuda(tmp_path / "version.py") is expected


@pytest.mark.parametrize(
    ("words", "gpus", "expected"),
    [
        (["parallel.data_parallel_size=null"], 8, 8),
        (["parallel.data_parallel_size=null", "parallel.tensor_parallel_size=2"], 7, 6),  # whole replicas
        (["parallel.data_parallel_size=null", "parallel.tensor_parallel_size=4"], 2, None),
        (["parallel.data_parallel_size=null"], 0, None),
        (["parallel.data_parallel_size=null", "launcher.device=cpu"], 8, None),
        (["parallel.data_parallel_size=null", "launcher.num_processes=2"], 8, None),
        (["parallel.data_parallel_size=2"], 8, None),
    ],
)
def test_open_number_of_processes(words: list[str], gpus: int, expected: int | None) -> None:
    assert choose_world_size(compose("pretrain_gpt", words), gpus) == expected


@pytest.mark.parametrize(
    ("setting", "processes", "gpus", "expected"),
    [
        ("auto", 8, 8, "cuda"),
        ("auto", 8, 7, "cpu"),
        ("auto", 1, 0, "cpu"),
        ("cpu", 1, 8, "cpu"),
        ("cuda", 2, 8, "cuda"),
    ],
)
def test_device(setting: str, processes: int, gpus: int, expected: str) -> None:
    assert choose_device(setting, processes, gpus) == expected


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        (0, "launcher.device=cuda needs a GPU for each process and torch sees none here; use launcher.device=cpu"),
        (4, "launcher.device=cuda needs 8 GPUs, one per process, and this machine shows 4; use a layout of 4 processes "
            "or launcher.device=cpu"),
    ],
)  # fmt: skip
def test_too_few_gpus(gpus: int, message: str) -> None:
    with pytest.raises(LaunchError) as caught:
        choose_device("cuda", 8, gpus)
    assert str(caught.value) == message


def test_cluster_layout_is_refused_on_a_laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    require_capacity(32, "cpu")
    require_capacity(3072, "cuda")  # the GPUs have been counted already
    with pytest.raises(LaunchError) as caught:
        require_capacity(33, "cpu")
    assert str(caught.value) == (
        "the layout needs 33 processes, and this machine has no 33 GPUs and only 2 CPU cores; use a layout of at most "
        "32 processes, or --dry-run to see the plan"
    )


def test_free_port_avoids_one_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        monkeypatch.setattr(machine, "PORTS", range(taken, taken + 1))
        with pytest.raises(LaunchError, match=r"no free port .* give launcher\.master_port"):
            free_port("127.0.0.1")
    monkeypatch.undo()
    assert free_port("127.0.0.1") in PORTS

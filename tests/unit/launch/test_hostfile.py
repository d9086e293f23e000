"""Hostfiles: every wrong line has its message, and a right file says how many nodes and ranks there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.hostfile import Host, read_hostfile, with_hosts
from megatron_lite.config.compose import compose
from megatron_lite.errors import ConfigError


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def problems_of(text: str, *words: str) -> list[str]:
    Path("hosts").write_text(text)
    with pytest.raises(ConfigError) as caught:
        with_hosts(compose("pretrain_gpt", ["launcher=deepspeed", "launcher.hostfile=hosts", *words]))
    return caught.value.problems


def test_hosts_in_the_order_of_their_ranks() -> None:
    Path("hosts").write_text("# two\n\n  node-b.lan   slots=8  \n10.0.0.1\tslots=8\n")
    assert read_hostfile("hosts") == [Host("node-b.lan", 8), Host("10.0.0.1", 8)]


def test_every_wrong_line_is_named() -> None:
    text = "node1 slots=4\nnode2 slot=4\nnode1 slots=4\nnode3 slots=8\nnode4 slots=0\nnode$(id) slots=4\nnode5\n"
    assert problems_of(text) == [
        "launcher.hostfile=hosts line 2: 'node2 slot=4' is not `HOST slots=N` with N >= 1; write it like "
        "`node1 slots=8`",
        "launcher.hostfile=hosts line 3: node1 stands above already; give each host one line, with all its slots",
        "launcher.hostfile=hosts line 4: node3 has slots=8, node1 has slots=4; give every host the same number",
        "launcher.hostfile=hosts line 5: 'node4 slots=0' is not `HOST slots=N` with N >= 1; write it like "
        "`node1 slots=8`",
        "launcher.hostfile=hosts line 6: 'node$(id) slots=4' is not `HOST slots=N` with N >= 1; write it like "
        "`node1 slots=8`",
        "launcher.hostfile=hosts line 7: 'node5' is not `HOST slots=N` with N >= 1; write it like `node1 slots=8`",
    ]


def test_file_without_hosts() -> None:
    assert problems_of("# none\n") == ["launcher.hostfile=hosts names no host; write lines `HOST slots=N`"]


def test_file_that_cannot_be_read() -> None:
    for path, reason in (("missing", "No such file or directory"), (".", "Is a directory"), ("binary", "not a text")):
        Path("binary").write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigError) as caught:
            read_hostfile(path)
        assert caught.value.problems == [
            f"launcher.hostfile={path} cannot be read ({reason}); give a file of lines `HOST slots=N`"
        ]


def test_settings_that_say_otherwise() -> None:
    words = ("launcher.nodes=3", "launcher.processes_per_node=2", "launcher.num_processes=6")
    assert problems_of("a slots=4\nb slots=4\n", *words) == [
        "launcher.nodes=3, but hosts has 2 hosts; leave launcher.nodes out, or change the file",
        "launcher.processes_per_node=2, but hosts has slots=4; leave launcher.processes_per_node out, or change the "
        "file",
        "launcher.num_processes=6, but hosts has 2 hosts x 4 slots; leave launcher.num_processes out, or change the "
        "file",
    ]


def test_nodes_and_processes_come_from_the_file() -> None:
    Path("hosts").write_text("a slots=4\nb slots=4\n")
    launcher = with_hosts(compose("pretrain_gpt", ["launcher=deepspeed", "launcher.hostfile=hosts"])).launcher
    assert (launcher.nodes, launcher.processes_per_node, launcher.num_processes) == (2, 4, None)


def test_numbers_that_no_machine_has() -> None:
    digits = 5000 * "9"
    for line in ("node1 slots=99999999999999", "node1 slots=4097", f"node1 slots={digits}"):
        (problem,) = problems_of(f"{line}\n")
        assert "has more slots than 4096, the most that a machine runs; use at most 4096" in problem
    many = "".join(f"node{i} slots=4096\n" for i in range(33))
    (problem,) = problems_of(many)
    assert "33 hosts x 4096 slots, more than the 131072 processes that a plan can list" in problem


def test_device_in_place_of_a_hostfile() -> None:
    """Reading it would never end."""
    with pytest.raises(ConfigError, match=r"cannot be read \(not a file\)"):
        read_hostfile("/dev/zero")


def test_a_home_that_the_shell_has_left_to_us(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    config = with_hosts(compose("pretrain_gpt", ["launcher=deepspeed", "launcher.hostfile=~/hosts"]))
    assert (config.launcher.hostfile, config.launcher.nodes) == (str(tmp_path / "hosts"), 2)

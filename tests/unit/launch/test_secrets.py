"""No secret of the environment, of private files or of refused settings gets into a run folder or into an output."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch.distributed as dist

from launch.cli import main
from launch.preparation import run_folder
from megatron_lite.observe.trackers import build_trackers
from megatron_lite.parallel.stores import tcp_store
from tests.unit.launch.test_launch_plan import plan_of

NAMES = ("HF_TOKEN", "AWS_SESSION_TOKEN", "DB_PASS", "SLURM_JOB_ACCOUNT", "SLURM_JOB_COMMENT", "PASSED", "UNNAMED")


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A place where all that a user may hold secret says "planted", under a private umask."""
    for name in NAMES:
        monkeypatch.setenv(name, f"planted-{name}")
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / ".netrc").write_text("machine host login me password planted-netrc\n")
    (home / ".deepspeed_env").write_text("OTHER=planted-deepspeed\n")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "work" / "hosts").write_text("n0 slots=1\nn1 slots=1\n")
    before = os.umask(0o077)
    yield tmp_path / "work"
    os.umask(before)


def assert_nothing_planted(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if b"planted" in path.read_bytes()] == []
    wide = [path for path in folder.rglob("*") if stat.S_IMODE(path.stat().st_mode) & 0o077 and path.name != "hosts"]
    assert wide == []


@pytest.mark.parametrize(
    "words",
    [
        ["launcher=local", "parallel=dp2"],
        ["launcher=torchrun", "parallel=dp2"],
        ["launcher=deepspeed", "launcher.hostfile=hosts", "launcher.nodes=2", "parallel=dp2"],
        ["launcher=slurm", "launcher.nodes=2", "parallel=dp2", "launcher.setup=['wandb login \"$HF_TOKEN\"']"],
    ],
    ids=lambda words: words[0],
)
def test_what_a_launcher_writes_and_shows(planted: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    words = [*words, "train.run_dir=run", "launcher.pass_environment=[PASSED,DB_PASS]", "launcher.device=cpu"]
    with run_folder(plan_of(*words)):
        pass
    assert_nothing_planted(planted)
    assert main(["pretrain_gpt", *words, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "planted" not in shown.out + shown.err
    assert "taken from this environment for every rank: PASSED, DB_PASS" in shown.out


def test_what_wandb_records(planted: Path) -> None:
    config = plan_of("tracking.wandb=offline", "train.run_dir=run", "launcher.environment={A: other}").config
    config.launcher.setup = ["echo other"]
    trackers = build_trackers(config, planted / "run", is_writer=True)
    trackers.log(1, {"loss": 1.0})
    trackers.finish({})
    files = [path for path in (planted / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert_nothing_planted(planted / "run")
    assert [path for path in files if b"echo other" in path.read_bytes()] == []


def own_addresses() -> list[str]:
    """Loopback, another address of it, and one of this machine where it has a network."""
    interfaces = psutil.net_if_addrs().values()
    found = [one.address for group in interfaces for one in group if one.family is socket.AF_INET]
    return ["127.0.0.1", "127.0.0.2", *[address for address in found if not address.startswith("127.")][:1]]


@pytest.mark.parametrize("address", own_addresses())
def test_a_store_listens_where_its_clients_connect(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def listening() -> set[tuple[str, int]]:
        found = psutil.Process().net_connections("inet")
        return {(one.laddr.ip, one.laddr.port) for one in found if one.status == psutil.CONN_LISTEN}

    before = listening()
    store = tcp_store(address, 0, 1, is_master=True)
    assert listening() - before == {(address, store.port)}
    store.set("key", "value")
    assert tcp_store(address, store.port, 1, is_master=False).get("key") == b"value"
    with pytest.raises(dist.DistNetworkError, match=f"cannot listen at {address}:{store.port}: Address already in use"):
        tcp_store(address, store.port, 1, is_master=True)


@pytest.mark.parametrize(
    ("host", "addresses", "is_narrow"),
    [
        ("127.0.0.2", [], True),
        ("localhost", ["127.0.0.1", "::1"], True),
        ("node0", ["127.0.0.2"], False),  # of /etc/hosts: others know the name by another address
        ("node0", ["192.0.2.1", "192.0.2.2"], False),
        ("node0", [], False),
        ("203.0.113.9", [], False),  # translated: no interface of this machine has it
        ("node0", ["203.0.113.9"], False),
    ],
)
def test_a_store_listens_everywhere_where_its_address_is_not_known(
    host: str, addresses: list[str], is_narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(name: str, port: object, **options: object) -> list[tuple[object, ...]]:
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    monkeypatch.setattr("megatron_lite.parallel.stores.TorchStore", lambda *place, **options: (place, options))
    (name, port), options = cast(Any, tcp_store(host, 0, 1, is_master=True))
    assert name == host
    assert ("master_listen_fd" in options) == (port != 0) == is_narrow
    if is_narrow:
        os.close(options["master_listen_fd"])

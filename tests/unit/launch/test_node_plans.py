"""Plans of several nodes as data, and what each node does with them."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launch.base import LaunchPlan
from launch.cli import main
from launch.deepspeed import private_file
from launch.nodes import is_loopback, own_node_rank
from launch.preparation import run_folder
from launch.processes import Ending
from launch.program import on_this_node
from launch.registry import LAUNCHERS
from launch.torchrun import CANNOT_START, TorchrunLauncher
from megatron_lite.config import frozen
from megatron_lite.errors import ConfigError, LaunchError, RunEnd
from megatron_lite.observe.markers import leave_marker
from tests.unit.launch.test_launch_plan import SCRIPT, plan_of

TWO = ("parallel=dp2_tp2", "launcher=torchrun", "launcher.nodes=2", "launcher.master_address=n0", "train.run_dir=run")
C10D = (*TWO, "launcher.rendezvous=c10d")
PDSH = ("parallel=dp2_tp2", "launcher=deepspeed", "launcher.nodes=2", "launcher.hostfile=hosts", "train.run_dir=run")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "hosts").write_text("n0 slots=2\nn1 slots=2\n")
    return tmp_path


def options(plan: LaunchPlan, argv: tuple[str, ...] | None = None) -> str:
    """The command behind the name of its program."""
    return " ".join((argv or plan.argv)[1:])


def test_torchrun_on_one_machine() -> None:
    plan = plan_of("parallel=dp2_tp2", "launcher=torchrun", "train.run_dir=run", "launcher.grace_seconds=7.5")
    assert Path(plan.argv[0]).name == "torchrun"
    assert options(plan) == (
        "--nnodes 1 --node-rank 0 --nproc-per-node 4 --master-addr 127.0.0.1 --master-port 29123 --local-addr "
        f"127.0.0.1 --max-restarts 0 --shutdown-timeout 8 {SCRIPT} --config {plan.frozen_config}"
    )
    assert (plan.node_argvs, plan.job) == ((), "")


def test_torchrun_static_has_a_command_for_each_node() -> None:
    plan = plan_of(*TWO)
    assert [options(plan, argv) for argv in plan.node_argvs] == [
        f"--nnodes 2 --node-rank {rank} --nproc-per-node 2 --master-addr n0 --master-port 29123 --max-restarts 0 "
        f"--shutdown-timeout 120 {SCRIPT} --config {plan.frozen_config}"
        for rank in (0, 1)
    ]
    assert "GLOO_SOCKET_IFNAME" not in plan.env, "loopback leads nowhere"
    assert plan.env["MASTER_ADDR"] == "n0"


def test_torchrun_c10d_has_one_command_for_all_nodes() -> None:
    plan = plan_of(*C10D)
    run = f"run-{plan.frozen_config.stem}"
    assert options(plan) == (
        f"--nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint n0:29123 --rdzv-id {run} --rdzv-conf "
        f"read_timeout=600 --max-restarts 0 --shutdown-timeout 120 {SCRIPT} --config {plan.frozen_config}"
    )
    assert plan.node_argvs == ()
    assert "--rdzv-id mine" in options(plan_of(*C10D, "launcher.rendezvous_id=mine"))


def test_nodes_on_one_machine_meet_on_loopback() -> None:
    plan = plan_of(*TWO, "launcher.master_address=127.0.0.1")
    assert "--local-addr 127.0.0.1" in options(plan)
    if Path("/sys/class/net/lo").exists():
        assert plan.env["GLOO_SOCKET_IFNAME"] == "lo"


def test_every_node_comes_to_the_same_frozen_file() -> None:
    plans = [plan_of(*TWO, f"launcher.node_rank={rank}", "launcher.master_port=null") for rank in (0, 1)]
    assert plans[0].files == plans[1].files
    assert plans[0].config.launcher.node_rank is None
    assert [plan.env["MASTER_PORT"] for plan in plans] == ["29500", "29500"], "a free port would be another on each"
    assert [on_this_node(plan).argv for plan in plans] == list(plans[0].node_argvs)


def plan_with_variable(*words: str, value: str = "x") -> LaunchPlan:
    """Of a configuration with a variable for all ranks, as a site's preset has it."""
    config = plan_of(*words).config
    config = replace(config, launcher=replace(config.launcher, environment={"SITE": value}))
    return LAUNCHERS[config.launcher.name]().plan(config)


def test_variables_of_every_rank() -> None:
    assert plan_with_variable(*TWO).env["SITE"] == "x"


def test_node_rank_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUP_RANK", "1")
    assert on_this_node(plan_of(*TWO)).node_rank == 1
    monkeypatch.setenv("NODE_RANK", "0")
    assert on_this_node(plan_of(*TWO)).node_rank == 0
    assert on_this_node(plan_of(*TWO, "launcher.node_rank=1")).node_rank == 1, "a setting goes first"


def test_node_rank_that_is_not_given() -> None:
    with pytest.raises(LaunchError) as caught:
        own_node_rank(None, 4, {})
    assert str(caught.value) == (
        "launcher.node_rank=null does not say which of launcher.nodes=4 this machine is; give launcher.node_rank=0 to "
        "3, or NODE_RANK in the environment, or use launcher.rendezvous=c10d with launcher=torchrun"
    )


@pytest.mark.parametrize("value", ["4", "-1", "one", "", "²"])
def test_invalid_node_rank_in_the_environment(value: str) -> None:
    with pytest.raises(LaunchError) as caught:
        own_node_rank(None, 4, {"NODE_RANK": value})
    assert str(caught.value) == (
        f"NODE_RANK={value!r} in the environment is not among the ranks of launcher.nodes=4, 0 to 3; correct it, or "
        "give launcher.node_rank"
    )


def test_loopback() -> None:
    assert [is_loopback(address) for address in ("127.0.0.1", "127.1.2.3", "::1", "localhost")] == [True] * 4
    assert [is_loopback(address) for address in ("10.0.0.1", "localhost.lan", "n0")] == [False] * 3


def test_only_the_node_of_rank_0_takes_the_folder() -> None:
    """While node 0 holds it, node 1 joins, leaving node 0's messages alone; a second node 0 is another run."""
    first, second = (on_this_node(plan_of(*TWO, f"launcher.node_rank={rank}")) for rank in (0, 1))
    with run_folder(first):
        first.error_file.write_text("error: of a rank\n")
        with run_folder(second):
            assert first.error_file.exists()
        with pytest.raises(LaunchError, match="is in use by process"), run_folder(first):
            pass
    with run_folder(second), run_folder(first):
        assert not first.error_file.exists()


def test_c10d_nodes_share_the_folder_of_whichever_was_first() -> None:
    plan, other = plan_of(*C10D), plan_of(*C10D, "launcher.rendezvous_id=other")
    with run_folder(plan):
        plan.error_file.write_text("error: of a rank\n")
        with run_folder(plan):
            assert plan.error_file.exists()
        with pytest.raises(LaunchError, match="is in use by process"), run_folder(other):
            pass


def test_node_that_met_no_other_does_not_take_an_earlier_end_for_its_own() -> None:
    plan = plan_of(*TWO)
    with run_folder(plan):
        leave_marker(plan.run_dir, RunEnd.DONE, "of an earlier attempt")
    assert TorchrunLauncher()._conclude(plan, Ending(), CANNOT_START, left_behind=False) == RunEnd.CONFIG_ERROR
    assert TorchrunLauncher()._conclude(plan, Ending(), 0, left_behind=False) == RunEnd.DONE


def test_deepspeed_through_pdsh() -> None:
    plan = plan_of(*PDSH)
    assert options(plan) == (
        "--no_local_rank --hostfile hosts --force_multi --launcher pdsh --master_addr n0 --master_port 29123 "
        f"--log_level critical {SCRIPT} --config {plan.frozen_config}"
    )
    assert [options(plan, argv) for argv in plan.by_hand] == [
        f"--no_local_rank --hostfile hosts --no_ssh --node_rank {rank} --master_addr n0 --master_port 29123 "
        f"--log_level critical {SCRIPT} --config {plan.frozen_config}"
        for rank in (0, 1)
    ]
    assert plan.node_argvs == (), "one program starts all hosts"


def test_deepspeed_by_hand() -> None:
    plan = plan_of(*PDSH, "launcher.node_rank=1")
    assert on_this_node(plan).argv == plan_of(*PDSH).by_hand[1]
    assert frozen.render(plan.config) == frozen.render(plan_of(*PDSH).config)


def test_variables_reach_remote_ranks_through_deepspeeds_file(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "home").mkdir()
    (elsewhere / "home" / ".deepspeed_env").write_text("DB_PASS=planted-1\nno variable\n")
    monkeypatch.setenv("PASSED_TOKEN", "planted-2")
    plan = plan_with_variable(*PDSH, "launcher.threads_per_process=3", "launcher.pass_environment=[PASSED_TOKEN]")
    file = Path("run/deepspeed.env")
    lines = plan.files[file].splitlines()
    assert {"OMP_NUM_THREADS=3", "DS_ACCELERATOR=cpu", "SITE=x", "MASTER_ADDR=n0"} < set(lines)
    assert f"MEGATRON_LITE_ERROR_FILE={elsewhere}/run/logs/error.txt" in lines
    assert "planted" not in str(plan)
    with run_folder(plan):
        assert file.read_text() == plan.files[file]
    assert not [
        path
        for path in elsewhere.rglob("*")
        if path.is_file() and "run" in path.parts and b"planted" in path.read_bytes()
    ]
    # What DeepSpeed reads is in memory, and inherited by the program alone.
    private = private_file(plan.files[file], plan.config)
    shown = subprocess.run(["cat", private], capture_output=True, text=True, check=True, close_fds=False).stdout
    os.close(int(Path(private).name))
    assert shown.splitlines()[:2] == ["DB_PASS=planted-1", "PASSED_TOKEN=planted-2"]
    assert shown.endswith(plan.files[file])


def test_a_variable_that_is_to_be_passed_has_to_be_there(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*PDSH, "launcher.pass_environment=[NOT_THERE]"]
    with pytest.raises(ConfigError, match=r"launcher\.pass_environment names NOT_THERE, and there is no such variable"):
        plan_of(*words)
    monkeypatch.setenv("NOT_THERE", "x")  # as the message says
    plan_of(*words)


@pytest.mark.parametrize("name", ["with space", "$(id)", "a;b", "100%h", "quo'te", "new\\nline", "ü"])
def test_nothing_is_left_to_the_hosts_shells(name: str) -> None:
    words = [word for word in PDSH if not word.startswith("train.run_dir")]
    value = name.replace("'", "\\'").replace("\\n", "\n")
    with pytest.raises(ConfigError) as caught:
        plan_of(*words, f"train.run_dir='{value}'")
    ours = name.replace("\\n", "\n")
    assert caught.value.problems[0] == (
        f"train.run_dir={ours!r} would be read by a shell on every host, and DeepSpeed does not quote it; use only "
        "letters, digits and @ + = : , . / - _, or start each host with launcher.node_rank"
    )
    plan_of(*words, f"train.run_dir='{value}'", "launcher.node_rank=0")  # there is no such shell


def test_variable_that_a_shell_would_read() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_with_variable(*PDSH, value="a b")
    (problem,) = caught.value.problems
    assert problem.startswith("the variable SITE='a b' would be read by a shell on every host")


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    verb = ["verify"] if "verify" in words else []
    assert main([*verb, "pretrain_gpt", "--dry-run", "launcher.device=cpu", *words[len(verb) :]]) == 0
    return capsys.readouterr().out.splitlines()


def test_dry_run_prints_what_to_type_on_each_node_and_what_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    lines = dry_run(capsys, *TWO, "launcher.node_rank=1")
    block = lines[lines.index("on each node") :]
    assert [line.rpartition(" ")[2] for line in block[1:3]] == ["launcher.node_rank=0", "launcher.node_rank=1"]
    assert all("-m launch pretrain_gpt launcher.device=cpu parallel=dp2_tp2 " in line for line in block[1:3])
    assert block[3] == "which there writes the file above and runs"
    plan = plan_of(*TWO, "launcher.master_port=null")
    assert block[4:] == [f"  {' '.join(argv)}" for argv in plan.node_argvs]


def test_dry_run_of_many_nodes_prints_the_first_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    lines = dry_run(capsys, *TWO, "parallel=dp9", "launcher.nodes=9", "train.global_batch_size=36")
    block = lines[lines.index("on each node, here the first and the last of 9") :]
    assert [line.rpartition("=")[2] for line in block[1:3]] == ["0", "8"]
    assert [line.split()[3:5] for line in block[4:]] == [["--node-rank", "0"], ["--node-rank", "8"]]


def test_dry_run_of_c10d_prints_one_command(capsys: pytest.CaptureFixture[str]) -> None:
    lines = dry_run(capsys, *C10D)
    block = lines[lines.index("on every node") :]
    assert block[1].endswith(" ".join(C10D))
    assert len(block) == 4


def test_dry_run_of_hosts_prints_the_way_without_ssh(capsys: pytest.CaptureFixture[str]) -> None:
    lines = dry_run(capsys, *[word for word in PDSH if "nodes" not in word])
    assert "--launcher pdsh" in lines[lines.index("command") + 1]
    block = lines[lines.index("or, without ssh, on each host") :]
    assert [line.rpartition(" ")[2] for line in block[1:3]] == ["launcher.node_rank=0", "launcher.node_rank=1"]
    assert all("--no_ssh" in line for line in block[4:6])


def test_gpus_of_this_machine_do_not_matter_to_several_nodes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.launching.visible_gpus", lambda: pytest.fail("looked at this machine"))
    assert main(["pretrain_gpt", "--dry-run", *TWO, "launcher.gpus_per_node=2"]) == 0
    assert "on 4 processes (cuda)" in capsys.readouterr().out
    assert main(["pretrain_gpt", "--dry-run", *TWO]) == 2
    assert capsys.readouterr().err == (
        "error: launcher.device=auto looks at this machine only, and the ranks run on several; use "
        "launcher.device=cuda or cpu\n"
    )


def test_plan_with_a_command_for_all_is_left_as_it_is() -> None:
    plan = plan_of(*C10D)
    assert on_this_node(replace(plan, asked_node_rank=1)).argv == plan.argv


def test_verification_runs_all_ranks_here_whatever_the_run_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (TWO, PDSH, ("launcher.nodes=2", "launcher.processes_per_node=2", "parallel=dp2_tp2")):
        lines = dry_run(capsys, "verify", *words)
        assert lines[0].startswith("pretrain_gpt: gpt_tiny on 4 processes (cpu)")
        assert "  MASTER_ADDR=127.0.0.1" in lines
        assert lines[-2] == "command of each rank, with RANK and LOCAL_RANK from 0 to 3, WORLD_SIZE=4"
        assert lines[-1].endswith(" --verify")

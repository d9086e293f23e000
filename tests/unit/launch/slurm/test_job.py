"""Plans of batch jobs as data: nothing is submitted, no Slurm is there."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.base import LaunchPlan
from launch.cli import main
from launch.launching import resolve_for_this_machine
from launch.scripts import CODE
from launch.slurm.launcher import SlurmLauncher
from megatron_lite.config.compose import compose
from megatron_lite.config.derived import resolve
from megatron_lite.config.frozen import frozen_path, load_frozen
from megatron_lite.config.validate import validate

ROOT = Path(__file__).parents[4]
HOSTILE = 'it\'s "a" $(touch pwned) `touch pwned` ${HOME} #; & %j'
WORDS = ["launcher=slurm", "launcher.nodes=2", "launcher.gpus_per_node=4", "parallel=dp2_tp2_pp2"]


def plan_of(*words: str) -> LaunchPlan:
    return SlurmLauncher().plan(resolve_for_this_machine(compose("pretrain_gpt", [*WORDS, *words])))


def text_of(plan: LaunchPlan) -> str:
    assert plan.batch_script is not None
    return plan.files[plan.batch_script]


def options_of(plan: LaunchPlan) -> list[str]:
    """The options of the `#SBATCH` lines, as sbatch reads them."""
    prefix = "#SBATCH "
    lines = [line.removeprefix(prefix) for line in text_of(plan).splitlines() if line.startswith(prefix)]
    return [word for line in lines for word in shlex.split(line)]


def test_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    plan = plan_of("train.run_dir=runs/x")
    run_dir = tmp_path / "runs" / "x"
    assert plan.argv == ("sbatch", "--parsable", f"{run_dir}/job.sh")
    assert set(plan.files) == {frozen_path(plan.config, run_dir), run_dir / "job.sh"}
    assert plan.num_processes == 8
    assert plan.config.launcher.device == "cuda"
    assert plan.env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "120"
    assert "GLOO_SOCKET_IFNAME" not in plan.env
    assert list(tmp_path.iterdir()) == []


def test_options() -> None:
    plan = plan_of(
        "train.run_dir=/runs/x", "launcher.time=24:00:00", "launcher.partition=p", "launcher.account=a",
        "launcher.qos=q", "launcher.grace_seconds=99.5", "launcher.threads_per_process=8", "launcher.chain=3",
        "launcher.sbatch_options=['--constraint=h100|a100', '--exclusive']",
    )  # fmt: skip
    assert options_of(plan) == [
        "--job-name=x", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=32", "--gres=gpu:4", "--time=24:00:00",
        "--partition=p", "--account=a", "--qos=q", "--output=/runs/x/logs/slurm-%j.out", "--open-mode=append",
        "--signal=B:USR1@130", "--dependency=singleton", "--requeue", "--constraint=h100|a100", "--exclusive",
    ]  # fmt: skip


def test_what_is_not_asked_for_is_not_said() -> None:
    plan = plan_of("launcher.gpus_per_node=null")
    names = {option.partition("=")[0] for option in options_of(plan)}
    assert names.isdisjoint({"--gres", "--time", "--partition", "--account", "--qos", "--dependency"})
    assert plan.config.launcher.device == "cpu"


@pytest.mark.parametrize(
    ("words", "processes", "device"),
    [
        (["launcher.nodes=4", "parallel=single", "parallel.data_parallel_size=null"], 16, "cuda"),
        (["launcher.processes_per_node=2", "parallel=tp2", "parallel.data_parallel_size=null"], 4, "cuda"),
        (["launcher.gpus_per_node=null"], 8, "cpu"),
        (["launcher.gpus_per_node=null", "launcher.device=cuda"], 8, "cuda"),
    ],
)
def test_size_comes_from_the_nodes_and_not_from_this_machine(
    monkeypatch: pytest.MonkeyPatch, words: list[str], processes: int, device: str
) -> None:
    monkeypatch.setattr("launch.launching.visible_gpus", lambda: 1 / 0)
    plan = plan_of(*words, "train.global_batch_size=64")
    assert (plan.num_processes, plan.config.launcher.device) == (processes, device)


def test_script_is_a_shell_script() -> None:
    plan = plan_of("launcher.modules=[cuda/12]", "launcher.setup=['x=1']", "launcher.container=i")
    subprocess.run(["bash", "-n"], input=text_of(plan), text=True, check=True)


def node_words(plan: LaunchPlan) -> list[str]:
    """The words that srun gets, those of a node's shell as one."""
    text = text_of(plan).replace("\\\n", "")
    line = next(line for line in text.splitlines() if line.startswith("srun "))
    return shlex.split(line.removesuffix("&"))


def test_ranks_start_through_torchrun() -> None:
    plan = plan_of("train.run_dir=/runs/x", "launcher.srun_arguments=['--cpu-bind=none']")
    words = node_words(plan)
    assert words == [
        "srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--wait=120", "--cpu-bind=none",
        "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}", "sh", "-c", words[-1],
    ]  # fmt: skip
    assert shlex.split(words[-1]) == [
        f"PYTHONPATH={CODE}${{PYTHONPATH:+:$PYTHONPATH}}", "exec", sys.executable, "-m", "launch.slurm.node",
        "--nnodes=2", "--nproc-per-node=4", "--max-restarts=0",
        "--node-rank=$SLURM_NODEID", "--master-addr=$MASTER_ADDR", "--master-port=$MASTER_PORT",
        str(ROOT / "pretrain_gpt.py"), "--config", str(frozen_path(plan.config, Path("/runs/x"))),
    ]  # fmt: skip


def test_ranks_of_one_node_are_reached_from_that_node_alone() -> None:
    plan = plan_of("launcher.nodes=1", "parallel=dp2_tp2_pp1")
    assert "export MASTER_ADDR=127.0.0.1\n" in text_of(plan)
    assert plan.env["GLOO_SOCKET_IFNAME"] == "lo"
    words = shlex.split(node_words(plan)[-1])
    assert words[:5] == [
        f"PYTHONPATH={ROOT}${{PYTHONPATH:+:$PYTHONPATH}}", "exec", sys.executable, "-m", "launch.slurm.node",
    ]  # fmt: skip
    assert "--local-addr=127.0.0.1" in words
    given = plan_of("launcher.nodes=1", "parallel=dp2_tp2_pp1", "launcher.master_address=10.0.0.1")
    assert "--local-addr" not in node_words(given)[-1]
    shown = subprocess.run(
        ["sh", "-c", f'export PYTHONPATH=/b; {words[0].replace(str(ROOT), "/a", 1)} exec env'],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "PYTHONPATH=/a:/b" in shown.stdout.splitlines()


def test_container_has_its_own_python() -> None:
    words = node_words(plan_of("launcher.container=/i.sqsh", "launcher.container_mounts=['/a:/a','/b:/c']"))
    assert {"--container-image=/i.sqsh", f"--container-workdir={Path.cwd()}", "--container-mounts=/a:/a,/b:/c"} < {
        *words
    }
    assert " exec python3 -m launch.slurm.node " in words[-1]


def test_installed_code_is_found_without_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """site-packages ahead of the standard library would shadow it, and a container has packages of its own."""
    for module in ("script", "launcher"):
        monkeypatch.setattr(f"launch.slurm.{module}.is_installed", lambda: True)
    plan = plan_of("launcher.nodes=1", "parallel=dp2_tp2_pp1")
    assert "PYTHONPATH" not in text_of(plan)
    assert f"\n  {sys.executable} -m launch.slurm.attempt " in text_of(plan)
    assert str(ROOT / "pretrain_gpt.py") in node_words(plan)[-1]
    in_container = node_words(plan_of("launcher.container=/i.sqsh"))[-1]
    assert ' --master-port="$MASTER_PORT" -m pretrain_gpt --config ' in in_container


def test_master_may_be_given() -> None:
    text = text_of(plan_of("launcher.master_address=10.0.0.1", "launcher.master_port=29500"))
    assert "export MASTER_ADDR=10.0.0.1\nexport MASTER_PORT=29500\n" in text
    assert "show hostnames" not in text


def test_values_are_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder, a variable and a text of the run that a careless shell would execute."""
    monkeypatch.chdir(tmp_path)
    config = compose("pretrain_gpt", WORDS)
    config.train.run_dir = f"runs/{HOSTILE}"
    config.train.generate_prompt = f"{HOSTILE}\nsecond line"
    config.launcher.environment = {"A": f"{HOSTILE}\nsecond line"}
    resolved = resolve_for_this_machine(config)
    validate(resolved)
    plan = SlurmLauncher().plan(resolved)
    run_dir = tmp_path / "runs" / HOSTILE
    assert f"--job-name={HOSTILE}" in options_of(plan)
    assert f"--output={run_dir}/logs/slurm-%j.out".replace("#; & %j", "#; & %%j") in options_of(plan)
    assert shlex.split(node_words(plan)[-1])[-1] == str(frozen_path(resolved, run_dir))
    exports = [line for line in text_of(plan).partition("attempt()")[0].split("export ") if line.startswith("A=")]
    answer = subprocess.run(
        ["bash", "-c", f"export {exports[0]}\nprintenv A"], capture_output=True, text=True, check=True
    )
    assert answer.stdout == f"{HOSTILE}\nsecond line\n"
    (tmp_path / "frozen.yaml").write_text(next(iter(plan.files.values())))
    assert resolve(load_frozen(tmp_path / "frozen.yaml")) == resolved
    assert not (tmp_path / "pwned").exists()


def test_dry_run_shows_the_script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["pretrain_gpt", *WORDS, "launcher.nodes=2", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "\njob.sh\n  #!/bin/bash\n  #SBATCH --job-name=" in out
    assert "slurm says" not in out


def test_without_slurm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["pretrain_gpt", *WORDS, f"train.run_dir={tmp_path / 'x'}"]) == 2
    assert capsys.readouterr().err == (
        "error: slurm's `sbatch` is not on this machine; log in to the cluster (--dry-run shows the job anywhere)\n"
    )


def commands_of_the_page() -> list[list[str]]:
    """Those in the section on Slurm of docs/launching.md that start something."""
    section = (ROOT / "docs" / "launching.md").read_text().partition("## On Slurm")[2].partition("\n## ")[0]
    lines = section.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[3:] for line in lines if line.startswith("python -m launch pretrain")]


@pytest.mark.parametrize("words", commands_of_the_page(), ids=lambda words: words[-1])
def test_the_documented_commands_are_right(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main([*words, "--dry-run"]) == 0
    assert "#SBATCH --nodes=" in capsys.readouterr().out


def test_the_page_has_commands() -> None:
    assert len(commands_of_the_page()) == 3

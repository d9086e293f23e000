"""Jobs on a real Slurm with stub ranks: what clusters do to a job, and how it reacts.

All jobs are submitted at once, and each test waits for its own: Slurm checks time limits only every 30 s, and a
requeued job waits for several seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from launch.cli import main
from launch.launching import resolve_for_this_machine
from launch.slurm import records
from launch.slurm.launcher import SlurmLauncher
from megatron_lite.config.compose import compose
from megatron_lite.config.frozen import load_frozen
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import LaunchError
from megatron_lite.observe.markers import read_marker
from tests.integration.slurm_cluster import CPUS, Cluster

pytestmark = pytest.mark.slow

STUB = Path(__file__).with_name("stub_torchrun.py")
HOSTILE = 'it\'s "a" $(touch pwned) `touch pwned` ${HOME} #; & %j'
WAIT_SECONDS = 150.0
TWO_NODES = ("launcher.nodes=2", "parallel=dp2")
WHOLE_NODE = (f"launcher.threads_per_process={CPUS}",)
JOBS: dict[str, tuple[str, tuple[str, ...]]] = {  # name -> what the ranks do, settings
    "simple": ("train", (*TWO_NODES, "launcher.gpus_per_node=1")),
    "time limit": ("stopped once", (*TWO_NODES, "launcher.time=1", "launcher.grace_seconds=5")),
    "preempted": ("stopped once", (*WHOLE_NODE, "launcher.partition=low")),
    "requeued by hand": ("stopped once", ()),
    "node lost": ("stopped once", (*TWO_NODES, "launcher.partition=fragile")),
    "cancelled": ("stopped once", ()),
    "config error": ("config error", ("launcher.chain=2",)),
    "killed": ("killed", ("launcher.max_stalled_requeues=1",)),
    "hung": ("hung", TWO_NODES),
    "deaf": ("deaf", ("launcher.grace_seconds=1",)),
    "chain": ("stopped once", ("launcher.chain=3", "launcher.max_requeues=0")),
    "follower": ("stopped once", ()),
    HOSTILE: ("train", ()),
}


@dataclass
class Submitted:
    run_dir: Path
    config: RunConfig
    cluster: Cluster

    @property
    def jobs(self) -> list[int]:
        return records.submissions(self.run_dir)[0]

    @property
    def log(self) -> str:
        """Output of all jobs of the run folder."""
        return "".join(path.read_text() for path in sorted((self.run_dir / "logs").glob("slurm-*.out")))

    def nodes(self) -> list[list[str]]:
        """The nodes of each attempt."""
        return [entry.nodes for entry in records.attempts(self.run_dir, "begin")]

    def wait_for(self, is_so: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not is_so():
            assert time.monotonic() < deadline, f"{what} has not come\n{self.cluster.job(self.jobs[0])}\n{self.log}"
            time.sleep(0.2)

    def wait_for_ranks(self) -> None:
        """Wait until the ranks of the first attempt have started."""
        self.wait_for(lambda: any(self.run_dir.glob("seen-1-*.json")), "the first attempt")

    def wait_for_state(self, state: str, link: int = 0) -> dict[str, str]:
        """Wait until a job has this state; return its fields."""
        self.wait_for(lambda: self.cluster.job(self.jobs[link])["JobState"] == state, f"job {self.jobs[link]} {state}")
        return self.cluster.job(self.jobs[link])


@pytest.fixture(scope="module")
def submitted(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Submitted]]:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield {name: submit(slurm, folder / name, stub, *words) for name, (stub, words) in JOBS.items()}


def submit(cluster: Cluster, run_dir: Path, stub: str, *words: str) -> Submitted:
    config = compose("pretrain_gpt", ["launcher=slurm", "launcher.master_address=127.0.0.1", *words])
    config.train.run_dir = str(run_dir)
    config.train.generate_prompt = HOSTILE
    config.launcher.environment = {"STUB": stub, "TEXT": f"{HOSTILE}\nsecond line"}
    config = resolve_for_this_machine(config)
    launcher = SlurmLauncher(torchrun=[sys.executable, str(STUB)])
    assert launcher.run(launcher.plan(config)) == 0
    return Submitted(run_dir, config, cluster)


def test_each_node_starts_its_ranks(submitted: dict[str, Submitted]) -> None:
    run = submitted["simple"]
    fields = run.wait_for_state("COMPLETED")
    assert fields["Restarts"] == "0"
    (nodes,) = run.nodes()
    reports = [json.loads((run.run_dir / f"seen-1-{node}.json").read_text()) for node in nodes]
    port = str(20000 + run.jobs[0] * 7 % 12000)
    for number, report in enumerate(reports):
        assert {"--nnodes=2", "--nproc-per-node=1", f"--node-rank={number}", f"--master-port={port}"} < {
            *report["argv"]
        }
        assert report["environment"]["CUDA_VISIBLE_DEVICES"] == "0"
    assert f"job {run.jobs[0]}: attempt 1 on {nodes[0]}, {nodes[1]}; newest checkpoint: none\n" in run.log
    assert f"job {run.jobs[0]}: DONE at step 5; newest checkpoint: step 5\n" in run.log


def test_values_are_data(submitted: dict[str, Submitted], tmp_path: Path) -> None:
    run = submitted[HOSTILE]
    run.wait_for_state("COMPLETED")
    (report,) = [json.loads(path.read_text()) for path in run.run_dir.glob("seen-1-*.json")]
    assert report["environment"]["TEXT"] == f"{HOSTILE}\nsecond line"
    assert report["argv"][-2] == "--config"
    assert load_frozen(report["argv"][-1]).train.generate_prompt == HOSTILE
    assert (run.run_dir / "logs" / f"slurm-{run.jobs[0]}.out").exists()
    assert not list(run.run_dir.parents[1].rglob("pwned"))
    assert not Path("pwned").exists()


def test_config_error_ends_the_chain(submitted: dict[str, Submitted]) -> None:
    run = submitted["config error"]
    assert run.wait_for_state("FAILED", 0)["ExitCode"] == "2:0"
    assert run.wait_for_state("FAILED", 1)["ExitCode"] == "2:0"
    assert len(run.nodes()) == 1
    assert "CONFIG_ERROR: data.source=x is empty; not requeued: another attempt would end the same way" in run.log
    assert "\nerror: data.source=x is empty\n" in run.log
    assert f"not started: job {run.jobs[0]} of this chain ended with CONFIG_ERROR" in run.log


def test_cancelled_stays_away(submitted: dict[str, Submitted]) -> None:
    run = submitted["cancelled"]
    run.wait_for_ranks()
    run.cluster.call("scancel", str(run.jobs[0]))
    assert run.wait_for_state("CANCELLED")["Restarts"] == "0"
    run.wait_for(lambda: bool(records.attempts(run.run_dir, "end")), "the decision")
    assert "not requeued from here: Slurm is ending the job itself" in run.log


def test_preempted_by_a_job_of_higher_priority(submitted: dict[str, Submitted]) -> None:
    run = submitted["preempted"]
    run.wait_for_ranks()
    other = submit(run.cluster, run.run_dir.with_name("higher"), "train", *WHOLE_NODE, "launcher.partition=high")
    other.wait_for_state("COMPLETED")
    assert run.wait_for_state("COMPLETED")["Restarts"] == "1"
    require_one_stop(run)
    assert "; requeued, 1 of at most 20" in run.log


def test_requeued_by_hand(submitted: dict[str, Submitted]) -> None:
    run = submitted["requeued by hand"]
    run.wait_for_ranks()
    assert main(["requeue", str(run.run_dir)]) == 0
    assert run.wait_for_state("COMPLETED")["Restarts"] == "1"
    require_one_stop(run)


def test_node_lost(submitted: dict[str, Submitted]) -> None:
    run = submitted["node lost"]
    run.wait_for_ranks()
    lost = run.nodes()[0][1]
    run.cluster.call("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
    try:
        assert run.wait_for_state("COMPLETED")["Restarts"] == "1"
    finally:  # other tests need it
        run.cluster.call("scontrol", "update", f"nodename={lost}", "state=resume")
    assert lost not in run.nodes()[1]
    assert f"job {run.jobs[0]}: the next attempt will do without {lost}\n" in run.log


def test_hang_excludes_the_node_that_it_names(submitted: dict[str, Submitted]) -> None:
    run = submitted["hung"]
    assert run.wait_for_state("COMPLETED")["ExcNodeList"] == "n2"
    assert "n2" not in run.nodes()[1]
    assert f"job {run.jobs[0]}: the next attempt will do without n2\n" in run.log


def test_restarts_without_progress_end(submitted: dict[str, Submitted]) -> None:
    run = submitted["killed"]
    fields = run.wait_for_state("FAILED")
    assert (fields["ExitCode"], fields["Restarts"]) == ("137:0", "1")
    assert "2 attempts in a row have left no newer checkpoint (launcher.max_stalled_requeues=1)" in run.log


def test_ranks_that_do_not_stop_are_killed_in_time(submitted: dict[str, Submitted]) -> None:
    run = submitted["deaf"]
    run.wait_for_ranks()
    run.cluster.call("scancel", "--batch", "--signal=USR1", str(run.jobs[0]))
    assert run.wait_for_state("COMPLETED")["Restarts"] == "1"
    assert "the ranks ended without a word (srun ended with 137)" in run.log


def test_chain_ends_with_the_run(submitted: dict[str, Submitted]) -> None:
    run = submitted["chain"]
    run.wait_for_ranks()
    run.cluster.call("scancel", "--batch", "--signal=USR1", str(run.jobs[0]))
    assert run.wait_for_state("FAILED", 0)["ExitCode"] == "75:0"
    run.wait_for_state("COMPLETED", 1)
    assert run.wait_for_state("COMPLETED", 2)["ExitCode"] == "0:0"
    assert len(run.nodes()) == 2
    require_one_stop(run)
    assert f"job {run.jobs[2]}: the run is done, nothing is left to do\n" in run.log


def test_time_limit(submitted: dict[str, Submitted]) -> None:
    run = submitted["time limit"]
    assert run.wait_for_state("COMPLETED")["Restarts"] == "1"
    require_one_stop(run)


def require_one_stop(run: Submitted) -> None:
    """The first attempt was stopped and had saved; the second resumed from there and finished."""
    marker, checkpoints = read_marker(run.run_dir), sorted(int(p.name[5:]) for p in run.run_dir.glob("checkpoints/*"))
    assert marker is not None
    assert marker.end.name == "DONE"
    assert marker.step == checkpoints[1] == checkpoints[0] + 5
    assert [entry.checkpoint for entry in records.attempts(run.run_dir, "begin")] == [None, checkpoints[0]]


def test_dry_run_asks_slurm(slurm: Cluster, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["pretrain_gpt", "launcher=slurm", f"train.run_dir={tmp_path / 'x'}", "--dry-run"]
    assert main([*words, *TWO_NODES]) == 0
    assert "\nslurm says: Job " in capsys.readouterr().out
    assert main([*words, "launcher.nodes=9", "parallel=dp9", "train.global_batch_size=36"]) == 2
    assert capsys.readouterr().err.startswith("error: slurm would refuse the job (")
    assert not (tmp_path / "x").exists()


def words_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(list(argv)) == 0
    return capsys.readouterr().out


def test_job_is_followed(submitted: dict[str, Submitted], capsys: pytest.CaptureFixture[str]) -> None:
    """Status, logs, a second submission, cancel and requeue of one run folder."""
    run = submitted["follower"]
    run.wait_for_ranks()
    folder, job = str(run.run_dir), run.jobs[0]
    run.wait_for_state("RUNNING")
    status = words_of(capsys, "status", folder)
    assert "\nstate       running\n" in status
    assert f"\njob         {job}: RUNNING on {run.nodes()[0][0]}; restarts: 0\n" in status
    assert f"job {job}: attempt 1 on " in words_of(capsys, "logs", folder)
    launcher = SlurmLauncher()
    with pytest.raises(LaunchError, match=rf"has job {job} \(RUNNING\) already; wait for it"):
        launcher.run(launcher.plan(run.config))
    assert words_of(capsys, "cancel", folder).startswith(f"cancelled job {job}; `python -m launch requeue ")
    run.wait_for_state("CANCELLED")
    again = words_of(capsys, "requeue", folder)
    second = records.submissions(run.run_dir)[1][0]
    assert again.startswith(f"submitted job {second}; run folder {folder}\n")
    assert "DONE at step" in words_of(capsys, "logs", "--follow", folder)
    status = words_of(capsys, "status", folder)
    assert "\nstate       DONE at step " in status
    assert f"\njob         {second}: COMPLETED on " in status
    assert words_of(capsys, "status", folder).count("\njob ") == 1


def test_done_run_is_submitted_again_only_with_more_steps(
    submitted: dict[str, Submitted], capsys: pytest.CaptureFixture[str]
) -> None:
    run, launcher = submitted["simple"], SlurmLauncher(torchrun=[sys.executable, str(STUB)])
    run.wait_for_state("COMPLETED")
    config = replace(run.config, train=replace(run.config.train, steps=5))
    assert launcher.run(launcher.plan(config)) == 0
    assert capsys.readouterr().out == "the run is done: it has reached train.steps=5, and nothing is submitted\n"
    assert len(records.submissions(run.run_dir)) == 1
    config = replace(run.config, train=replace(run.config.train, steps=10))
    assert launcher.run(launcher.plan(config)) == 0
    (job,) = records.submissions(run.run_dir)[1]
    run.wait_for(lambda: run.cluster.job(job)["JobState"] == "COMPLETED", "the second job")
    marker = read_marker(run.run_dir)
    assert marker is not None
    assert marker.step == 10


def test_sweep_submits_one_job_for_each_point(
    slurm: Cluster, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["pretrain_gpt", "launcher=slurm", 'launcher.sbatch_options=["--begin=now+1hour"]']
    assert main([*words, f"train.run_dir={tmp_path / 'run'}", "train.seed=1,2"]) == 0
    folders = sorted(tmp_path.iterdir())
    assert [folder.name for folder in folders] == ["run-seed_1", "run-seed_2"]
    jobs = [records.submissions(folder)[0][0] for folder in folders]
    assert jobs[1] == jobs[0] + 1
    assert [slurm.job(job)["JobState"] for job in jobs] == ["PENDING", "PENDING"]
    for folder, job in zip(folders, jobs, strict=True):
        assert words_of(capsys, "cancel", str(folder)).startswith(f"cancelled job {job}; ")

"""Plans as data: nothing is started, nothing is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launch.base import LaunchPlan
from launch.environment import rank_environment
from launch.registry import LAUNCHERS
from megatron_lite.config import frozen
from megatron_lite.config.compose import compose
from megatron_lite.config.derived import resolve
from megatron_lite.config.launcher import LauncherName

SCRIPT = str(Path(__file__).parents[3] / "pretrain_gpt.py")


def plan_of(*words: str, device: str = "cpu") -> LaunchPlan:
    config = resolve(compose("pretrain_gpt", ["launcher.master_port=29123", *words]), device=device)
    return LAUNCHERS[config.launcher.name]().plan(config)


def test_every_launcher_name_has_a_launcher() -> None:
    assert set(LAUNCHERS) == set(LauncherName)


def test_local_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    plan = plan_of("parallel=dp2_tp2_pp2", "train.run_dir=runs/x", "launcher.threads_per_process=3")
    config_file = frozen.frozen_path(plan.config, Path("runs/x"))
    assert plan.argv == (sys.executable, SCRIPT, "--config", str(config_file))
    assert plan.files == {config_file: frozen.render(plan.config)}
    assert plan.rank_envs[5] == {"RANK": "5", "LOCAL_RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}
    assert [env["RANK"] for env in plan.rank_envs] == list("01234567")
    expected = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29123",
        "OMP_NUM_THREADS": "3",
        "OPENBLAS_NUM_THREADS": "3",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore::FutureWarning,ignore::UserWarning",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "MEGATRON_LITE_ERROR_FILE": str(tmp_path / "runs/x/logs/error.txt"),
    }
    assert {name: plan.env.get(name) for name in expected} == expected
    assert list(tmp_path.iterdir()) == []


def test_plan_on_gpus_hides_none_and_keeps_the_driver_closed_in_the_parent() -> None:
    environment = plan_of("parallel=dp2", device="cuda").env
    assert environment["DS_ACCELERATOR"] == "cuda"
    assert environment["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in environment


def test_loopback_only_where_all_ranks_are_on_one_machine() -> None:
    config = plan_of().config
    assert "GLOO_SOCKET_IFNAME" not in rank_environment(config, one_machine=False)
    if Path("/sys/class/net/lo").exists():
        assert rank_environment(config, one_machine=True)["GLOO_SOCKET_IFNAME"] == "lo"


def test_deepspeed_plan() -> None:
    plan = plan_of("parallel=dp2_tp2_pp2", "launcher=deepspeed", "train.run_dir=runs/x")
    config_file = str(frozen.frozen_path(plan.config, Path("runs/x")))
    assert Path(plan.argv[0]).name == "deepspeed"
    assert plan.argv[1:] == (
        "--no_local_rank", "--num_gpus", "8", "--master_addr", "127.0.0.1", "--master_port", "29123",
        "--log_level", "critical", SCRIPT, "--config", config_file,
    )  # fmt: skip
    assert plan.rank_envs == []


def test_free_port_is_not_part_of_the_frozen_configuration() -> None:
    """Else each start of the same command would freeze another file."""
    config = resolve(compose("pretrain_gpt", []), device="cpu")
    first, second = (LAUNCHERS[LauncherName.local]().plan(config) for _ in range(2))
    assert first.files == second.files
    assert first.config.launcher.master_port is None
    assert first.env["MASTER_PORT"].isdigit()


def test_command_line_can_be_typed() -> None:
    plan = plan_of("train.run_dir='runs/with space'")
    assert plan.command_line().endswith(f"--config '{plan.frozen_config}'")


GPU_ONLY = ("PYTORCH_ALLOC_CONF", "TORCH_NCCL_HIGH_PRIORITY", "CUBLAS_WORKSPACE_CONFIG")


def test_gpus_get_variables_that_cpus_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*GPU_ONLY, "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    found = {device: plan_of("train.deterministic=true", device=device).env for device in ("cpu", "cuda")}
    assert [found["cuda"][name] for name in GPU_ONLY] == ["expandable_segments:True", "1", ":4096:8"]
    assert not set(GPU_ONLY) & set(found["cpu"])
    assert "CUBLAS_WORKSPACE_CONFIG" not in plan_of(device="cuda").env


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("PYTORCH_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
        ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
        ("TORCH_NCCL_HIGH_PRIORITY", "TORCH_NCCL_HIGH_PRIORITY"),
    ],
)
def test_a_value_of_the_user_wins(name: str, ours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0")
    assert ours not in plan_of(device="cuda").env

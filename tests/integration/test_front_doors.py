"""Every way to start a run gives the same run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.runs import REPOSITORY, launch, losses, run

LAYOUT = "parallel=dp2_tp1_pp2"


def _commands(words: list[str]) -> dict[str, list[str]]:
    binaries = Path(sys.executable).parent
    script = str(REPOSITORY / "pretrain_gpt.py")
    return {
        "launcher=deepspeed": launch(*words, "launcher=deepspeed"),
        "torchrun": [str(binaries / "torchrun"), "--standalone", "--nproc-per-node", "4", script, *words],
        "deepspeed": [str(binaries / "deepspeed"), "--no_local_rank", "--num_gpus", "4", script, *words],
    }


@pytest.fixture(scope="module")
def local_losses(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict:
    from tests.integration.runs import TINY

    run_dir = tmp_path_factory.mktemp("local")
    run(launch(*TINY, *corpus, f"train.run_dir={run_dir}", LAYOUT)).require_success()
    return losses(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("door", ["launcher=deepspeed", "torchrun", "deepspeed"])
def test_same_run_through_every_door(
    door: str, tiny: Callable[..., list[str]], tmp_path: Path, local_losses: dict
) -> None:
    finished = run(_commands(tiny("other", LAYOUT))[door]).require_success()
    assert len(local_losses) == 12
    assert losses(tmp_path / "other") == local_losses, "the door changed the curve"
    assert "validation loss" in finished.out, "the summary did not reach the user"
    assert "SEED_LAYERS" not in finished.out + finished.err, "DeepSpeed's chatter reached the terminal"


@pytest.mark.slow
def test_one_process_by_hand(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    run([sys.executable, str(REPOSITORY / "pretrain_gpt.py"), *tiny("alone")]).require_success()
    assert len(losses(tmp_path / "alone")) == 12


@pytest.mark.slow
def test_one_writer_one_line_a_step(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    finished = run(launch(*tiny("run", "parallel=dp2_tp2_pp2"))).require_success()
    assert finished.out.count("step 7/12") == 1
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 12
    assert sorted(path.name for path in (tmp_path / "run" / "logs").glob("rank-*.log")) == [
        f"rank-{rank}.log" for rank in range(8)
    ]

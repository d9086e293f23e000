"""All ways to start a run give the same results."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.runs import REPOSITORY, TINY, launch, losses, run, run_warm

LAYOUT = "parallel=pp2"
RANKS = "2"


def _commands(words: list[str], script: str = "pretrain_gpt") -> dict[str, list[str]]:
    binaries = Path(sys.executable).parent
    file = str(REPOSITORY / f"{script}.py")
    return {
        "launcher=deepspeed": launch(*words, "launcher=deepspeed", script=script),
        "torchrun": [str(binaries / "torchrun"), "--standalone", "--nproc-per-node", RANKS, file, *words],
        "deepspeed": [str(binaries / "deepspeed"), "--no_local_rank", "--num_gpus", RANKS, file, *words],
    }


@pytest.fixture(scope="module")
def local_losses(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict:
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
@pytest.mark.parametrize(("script", "door"), [("pretrain_bert", "torchrun"), ("pretrain_t5", "deepspeed")])
def test_other_scripts_have_the_same_doors(
    script: str, door: str, tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    run_warm(tiny("local", LAYOUT), script=script).require_success()
    finished = run(_commands(tiny("other", LAYOUT), script)[door]).require_success()
    assert len(losses(tmp_path / "local")) == 12
    assert losses(tmp_path / "other") == losses(tmp_path / "local"), "the door changed the curve"
    assert "predicted" in finished.out, "the preview did not reach the user"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("pretrain_gpt", ["objective=prefix_lm", "parallel=pp2"]),
        ("pretrain_gpt", ["objective=fill_in_the_middle", "parallel=tp2"]),
        ("pretrain_bert", ["objective=masked_lm", "objective.whole_word=true", "parallel=pp2"]),
        ("pretrain_t5", ["objective=bart_denoising", "model=bart_base", "model.ffn_hidden_size=64", "parallel=pp2"]),
        (
            "pretrain_t5",
            ["objective=ul2", "data.seq_length=96", "model=t5_v1_1_base", "model.ffn_hidden_size=64", "parallel=zero3"],
        ),
    ],
)
def test_every_objective_trains(script: str, words: list[str], tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    if script == "pretrain_t5":
        words = [*words, "model.num_decoder_layers=2", "model.head_size=16"]
    finished = run_warm([*tiny("run"), *words], script=script).require_success()
    curve = [loss for loss, _ in losses(tmp_path / "run").values()]
    assert len(curve) == 12
    assert curve[-1] < curve[0]
    assert "accuracy" in finished.out


@pytest.mark.slow
def test_one_process_by_hand(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    run([sys.executable, str(REPOSITORY / "pretrain_gpt.py"), *tiny("alone")]).require_success()
    assert len(losses(tmp_path / "alone")) == 12


@pytest.mark.slow
def test_one_writer_one_line_a_step(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    finished = run_warm(tiny("run", "parallel=dp2_tp2_pp2")).require_success()
    assert finished.out.count("step 7/12") == 1
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 12
    assert sorted(path.name for path in (tmp_path / "run" / "logs").glob("rank-*.log")) == [
        f"rank-{rank}.log" for rank in range(8)
    ]

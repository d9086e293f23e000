"""What the README promises: the demo learns its corpus, and `verify` certifies a layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lite.observe.metrics import EVENTS_FILE, read_metrics
from tests.integration.runs import launch, losses, run, run_warm


@pytest.mark.slow
def test_demo_ends_a_nat_below_the_unigram_entropy(tmp_path: Path) -> None:
    """The demo's model, data and optimizer on one rank, which computes the same as eight, for fewer steps."""
    words = [
        "experiment=demo",
        "parallel=single",
        "train.steps=60",
        "train.eval_batches=1",
        "train.eval_interval=0",
        f"train.run_dir={tmp_path / 'demo'}",
        f"data.cache_dir={tmp_path / 'data'}",
    ]
    finished = run(launch(*words), timeout_seconds=1200).require_success()
    summary = next(line for line in finished.out.splitlines() if line.startswith("unigram entropy"))
    assert "below it" in summary
    entropy = float(summary.split()[2].rstrip(","))
    evaluations = [event for event in read_metrics(tmp_path / "demo" / EVENTS_FILE) if event["event"] == "evaluation"]
    assert evaluations[-1]["validation_loss"] < entropy - 1.0
    assert (tmp_path / "demo" / "loss.png").stat().st_size > 10_000
    assert "sample" in finished.out
    assert len(losses(tmp_path / "demo")) == 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "experiment", "vocabulary", "steps", "nats"),
    [("pretrain_bert", "demo_bert", 2048, 240, 0.35), ("pretrain_t5", "demo_t5", 8192, 260, 0.15)],
)
def test_other_demos_learn_more_than_frequencies(
    script: str, experiment: str, vocabulary: int, steps: int, nats: float, tmp_path: Path
) -> None:
    """A large part of each demo, on one rank; BERT with a smaller vocabulary, which it learns faster."""
    words = [
        f"experiment={experiment}",
        "parallel=single",
        f"data.tokenizer_vocab_size={vocabulary}",
        f"train.steps={steps}",
        "train.micro_batch_size=32",
        "train.eval_interval=0",
        "train.save_interval=0",
        f"train.run_dir={tmp_path / 'demo'}",
        f"data.cache_dir={tmp_path / 'data'}",
    ]
    run_warm(words, script=script, timeout_seconds=2400).require_success()
    events = {event["event"]: event for event in read_metrics(tmp_path / "demo" / EVENTS_FILE)}
    assert events["rows"]["sources"][0]["documents"] > 500
    found, baseline = events["evaluation"], events["baseline"]
    assert found["validation_token_loss"] < baseline["entropy_nats"] - nats
    assert found["validation_accuracy"] > baseline["accuracy"]
    if script == "pretrain_bert":
        assert found["validation_accuracy"] > 2 * baseline["accuracy"]
        assert found["validation_sequence_accuracy"] > 0.6


@pytest.mark.slow
def test_verify_certifies_a_layout_and_touches_no_run(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    command = launch(*tiny("run", "parallel=dp1_tp2_pp2"))
    command.insert(command.index("pretrain_gpt"), "verify")
    finished = run(command).require_success()
    assert "tolerance 1e-05" in finished.out
    assert "gradient of layers." in finished.out
    assert not (tmp_path / "run").exists()

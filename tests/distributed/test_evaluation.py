"""Validation and the previews at the end of a run are the same in every layout."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest

from tests.distributed.equivalence_cases import LAYOUTS, VOCAB_SIZE, run_config
from tests.distributed.harness import run_ranks
from tests.distributed.layout_ranks import (
    argmax_rank,
    evaluate_rank,
    evaluated_and_trained_rank,
    evaluated_twice_rank,
)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("gpt2", "dp2_tp2_pp2"),
        ("bert", "dp2_tp2_pp2"),
        ("bert", "sequence_parallel_zero3_dp2_tp2"),
        ("t5_v1_1", "pp4"),
        ("bart", "tp4"),
    ],
)
def test_layout_evaluates_as_one_rank(model: str, layout: str) -> None:
    (expected,) = run_ranks(evaluate_rank, 1, run_config(model), VOCAB_SIZE)
    assert 0.0 <= expected.accuracy < 0.5
    assert (expected.sequence_accuracy is not None) == (model == "bert")
    assert math.isclose(expected.loss, expected.token_loss, rel_tol=1e-6) == (model != "bert")
    config = run_config(model, **LAYOUTS[layout])
    for found in run_ranks(evaluate_rank, config.topology.world_size, config, VOCAB_SIZE):
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.token_loss == pytest.approx(expected.token_loss, rel=1e-5)
        assert found.accuracy == pytest.approx(expected.accuracy, abs=1e-9)
        assert found.sequence_accuracy == (
            None if expected.sequence_accuracy is None else pytest.approx(expected.sequence_accuracy, abs=1e-9)
        )


@pytest.mark.parametrize("model", ["gpt2", "bert"])
def test_one_rank_evaluates_as_torch_does(model: str) -> None:
    """All layouts use the same counting code, so its results are compared with torch's cross-entropy and argmax."""
    config = run_config(model, zero_stage=2)  # the module of ZeRO-2 is called with a batch
    ((found, expected),) = run_ranks(evaluated_twice_rank, 1, config, VOCAB_SIZE)
    assert (expected.sequence_accuracy is not None) == (model == "bert")
    assert 0.1 < expected.accuracy < 0.6
    for name, value in asdict(expected).items():
        assert getattr(found, name) == (None if value is None else pytest.approx(value, rel=1e-5)), name


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_dropout_takes_part_in_training_and_not_in_an_evaluation(zero_stage: int) -> None:
    dropout, plain = (run_config(model, zero_stage=zero_stage) for model in ("gpt2_dropout", "gpt2"))
    ((evaluated, after, without),) = run_ranks(evaluated_and_trained_rank, 1, dropout, VOCAB_SIZE)
    ((expected, _, trained),) = run_ranks(evaluated_and_trained_rank, 1, plain, VOCAB_SIZE)
    assert evaluated == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(trained, rel=1e-6)
    assert after == without
    assert abs(after - trained) > 1e-4


@pytest.mark.parametrize(("model", "layout"), [("t5", "dp2_tp2_pp2"), ("bert", "sequence_parallel_dp2_tp2_pp2")])
def test_layout_predicts_what_one_rank_predicts(model: str, layout: str) -> None:
    (expected,) = run_ranks(argmax_rank, 1, run_config(model), VOCAB_SIZE)
    assert len(set(expected)) > 1, "a constant answer would prove nothing"
    config = run_config(model, **LAYOUTS[layout])
    ranks = config.topology.world_size
    assert run_ranks(argmax_rank, ranks, config, VOCAB_SIZE) == [expected] * ranks

"""Each engine reports its phases in the order in which it executes them."""

from __future__ import annotations

from megatron_lite.config.compose import compose
from megatron_lite.config.derived import resolve
from megatron_lite.config.schema import RunConfig
from megatron_lite.observe.heartbeat import Heartbeat, Phase
from megatron_lite.optim.batch_ramp import BatchStep
from tests.distributed.harness import run_ranks
from tests.distributed.layout_ranks import synthetic_engine

VOCAB = 256
BATCH = 4  # two micro-batches of two


def _config(layout: str) -> RunConfig:
    sizes = ["model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=2", "data.seq_length=16"]
    batch = ["train.micro_batch_size=2", f"train.global_batch_size={BATCH}", "train.steps=2"]
    return resolve(compose("pretrain_gpt", [f"parallel={layout}", *sizes, *batch]))


def _phases_of_rank(config: RunConfig) -> tuple[str, str]:
    """Phases of the second step, and of the evaluation after it."""
    entered: list[str] = []

    class Recording(Heartbeat):
        def enter(self, phase: Phase, micro_batch: int | None = None) -> None:
            entered.append(phase if micro_batch is None else f"{phase} {micro_batch}")

    engine, batches_from = synthetic_engine(config, VOCAB, heartbeat=Recording())
    engine.train_step(batches_from(0, 2), BatchStep(0, BATCH), 1e-2)
    entered.clear()
    engine.train_step(batches_from(BATCH, 2), BatchStep(BATCH, BATCH), 1e-2)
    step = ", ".join(entered)
    entered.clear()
    engine.evaluate(batches_from(0, 2), 2)
    return step, ", ".join(entered)


def test_stages_of_a_pipeline() -> None:
    first, last = run_ranks(_phases_of_rank, 2, _config("pp2"))
    assert first == (
        "forward 1, send, forward 2, receive, send, backward 1, receive, backward 2, reduce, reduce, optimizer, reduce",
        "evaluate 1, send, evaluate 2, send, reduce",
    )
    assert last == (
        "receive, forward 1, backward 1, send, receive, forward 2, backward 2, send, reduce, reduce, optimizer, reduce",
        "receive, evaluate 1, receive, evaluate 2, reduce",
    )


def test_partitioned_gradients() -> None:
    ((step, evaluation),) = run_ranks(_phases_of_rank, 1, _config("zero2"))
    assert step == "forward 1, backward 1, forward 2, backward 2, optimizer, reduce"
    assert evaluation == "evaluate 1, evaluate 2, reduce"

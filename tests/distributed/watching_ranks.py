"""Functions that the ranks run in the tests of layer figures and dropped updates."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_lite.config.schema import RunConfig
from megatron_lite.engine.engine import Engine
from megatron_lite.engine.gradient_norms import LayerFigures, layer_of, sequence_losses, stage_memory_bytes
from megatron_lite.engine.hooks import EngineHooks, PendingUpdate
from megatron_lite.engine.step_result import StepResult
from tests.distributed.layout_ranks import synthetic_engine, train_steps
from tests.full_tensors import full_weights

DROPPED_STEP = 3


@dataclass
class Watched:
    """Results of one rank over a few steps, one of which was dropped."""

    results: list[StepResult] = field(default_factory=list)
    judged: list[tuple[float, float]] = field(default_factory=list)
    layers: list[LayerFigures] = field(default_factory=list)
    expected_ratios: list[dict[str, float]] = field(default_factory=list)
    """Update ratios of this stage's layers, from the full weights before and after the step."""
    sequences: list[list[float]] = field(default_factory=list)
    recent: dict[int, dict[str, float]] = field(default_factory=dict)
    dropped_nothing: bool = False
    """Whether weights and moments are bitwise the same as before the dropped step."""
    updates: int = 0
    memory: list[int] = field(default_factory=list)


def watched_rank(config: RunConfig, vocab_size: int) -> Watched:
    seen = Watched()

    def judge(update: PendingUpdate) -> bool:
        seen.judged.append((update.loss, update.grad_norm))
        return len(seen.judged) == DROPPED_STEP

    engine, batches_from = synthetic_engine(config, vocab_size, EngineHooks(before_update=judge))
    for step in range(config.train.steps):
        weights, state = full_weights(engine), _state(engine)
        seen.results += train_steps(engine, batches_from, config, step, 1, measure_update=True)
        seen.layers.append(engine.meter.figures())
        seen.expected_ratios.append(_ratios(weights, full_weights(engine)))
        size = config.train.global_batch_size
        seen.sequences.append(sequence_losses(engine.loss.sequences, engine.context, size))
        if step + 1 == DROPPED_STEP:
            seen.dropped_nothing = all(torch.equal(a, b) for a, b in zip(state, _state(engine), strict=True))
    seen.recent = engine.meter.recent_grad_norms(config.train.steps)
    seen.updates = engine.shards.updates
    seen.memory = stage_memory_bytes(engine.context)
    return seen


def norms_of_rank(config: RunConfig, vocab_size: int) -> tuple[float, float]:
    """Norms of a step's gradient in a layout with a single stage: as measured, and in fp64."""
    squares: list[float] = []

    def measure(engine: Engine) -> None:
        squares.extend(float(gradient.double().square().sum()) for gradient in engine.full_gradients().values())

    engine, batches_from = synthetic_engine(config, vocab_size, EngineHooks(after_reduction=measure))
    (result,) = train_steps(engine, batches_from, config, 0, 1)
    return result.grad_norm, math.sqrt(sum(squares))


def poisoned_rank(config: RunConfig, vocab_size: int) -> list[tuple[bool, bool, bool]]:
    """For a step in which one element of one rank's gradient is NaN, and for the next step: whether the norm was
    finite, whether the update was dropped, and whether weights and moments stayed bitwise the same."""
    found: list[tuple[bool, bool, bool]] = []

    def poison(engine: Engine) -> None:
        if not found and dist.get_rank() == dist.get_world_size() - 1:
            engine.shards.owned_gradients()[0][0] = math.nan

    engine, batches_from = synthetic_engine(config, vocab_size, EngineHooks(after_reduction=poison))
    for step in range(2):
        state = _state(engine)
        (result,) = train_steps(engine, batches_from, config, step, 1)
        same = all(torch.equal(a, b) for a, b in zip(state, _state(engine), strict=True))
        found.append((math.isfinite(result.grad_norm), result.skipped, same))
    return found


def _state(engine: Engine) -> list[torch.Tensor]:
    return [fragment.values.clone() for fragment in engine.shards.fragments()]


def _ratios(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, float]:
    squares: dict[str, list[float]] = {}
    for name, weight in after.items():
        update, of = squares.setdefault(layer_of(name), [0.0, 0.0])
        update += float((weight - before[name]).double().square().sum())
        squares[layer_of(name)] = [update, of + float(weight.double().square().sum())]
    return {layer: (update / of) ** 0.5 if of else 0.0 for layer, (update, of) in squares.items()}

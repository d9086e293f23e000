"""Model, objective and loss as a configuration asks for them: one place for runs, certificates and tests."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.special import Vocabulary
from megatron_lite.models.build import build_layers
from megatron_lite.models.spec import LayerSpec
from megatron_lite.objectives.base import Objective
from megatron_lite.objectives.build import build_objective
from megatron_lite.objectives.loss import TokenLoss
from megatron_lite.parallel.context import ParallelContext


@dataclass(frozen=True)
class Task:
    """What is trained, and for what."""

    objective: Objective
    specs: list[LayerSpec]
    loss: TokenLoss


def build_task(config: RunConfig, context: ParallelContext, vocabulary: Vocabulary) -> Task:
    """
    Raises:
        ConfigError: the vocabulary lacks what the objective needs.
    """
    objective = build_objective(config.objective, config.data, vocabulary)
    specs = build_layers(
        config.model,
        context,
        vocab_size=vocabulary.size,
        recompute=config.parallel.recompute,
        inputs=objective.inputs,
        next_sentence_head=objective.has_sequence_label,
    )
    return Task(objective, specs, TokenLoss(context, vocabulary.size))

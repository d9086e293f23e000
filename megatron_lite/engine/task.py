"""Build the model, objective and loss from a configuration; used by runs, the equivalence check and tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_lite.config.keys import get_value
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import Compile
from megatron_lite.data.special import Vocabulary
from megatron_lite.models.build import build_layers
from megatron_lite.models.spec import LayerSpec
from megatron_lite.objectives.base import Objective
from megatron_lite.objectives.build import build_objective
from megatron_lite.objectives.loss import TokenLoss
from megatron_lite.observe.step_measures import STEP_MEASURES
from megatron_lite.parallel.auxiliary import Reduction
from megatron_lite.parallel.context import ParallelContext


@dataclass(frozen=True)
class Task:
    """A model with its objective and loss."""

    objective: Objective
    specs: list[LayerSpec]
    loss: TokenLoss
    measures: Mapping[str, Reduction]
    """Names and reductions of the auxiliary measurements of a step, in the order of STEP_MEASURES."""


def build_task(config: ResolvedConfig, context: ParallelContext, vocabulary: Vocabulary) -> Task:
    """
    Raises:
        ConfigError: the vocabulary lacks special tokens that the objective needs.
    """
    objective = build_objective(config.objective, config.data, vocabulary)
    specs = build_layers(
        config.model,
        context,
        vocab_size=vocabulary.size,
        recompute=config.parallel.recompute,
        inputs=objective.inputs,
        next_sentence_head=objective.has_sequence_label,
        compiled_blocks=config.train.compile is Compile.blocks,
    )
    loss = TokenLoss(context, vocabulary.size, config.optimizer, config.train.head_chunk)
    measured = [one for one in STEP_MEASURES if one.setting is None or get_value(config, one.setting)]
    return Task(objective, specs, loss, {measure.name: measure.reduction for measure in measured})

"""The registry of objectives."""

from __future__ import annotations

from collections.abc import Callable

from megatron_lite.config.schema import DataConfig, ObjectiveConfig, ObjectiveName
from megatron_lite.data.special import Vocabulary
from megatron_lite.objectives.bart_denoising import BartDenoising
from megatron_lite.objectives.base import Objective
from megatron_lite.objectives.causal_lm import CausalLM
from megatron_lite.objectives.fill_in_the_middle import FillInTheMiddle
from megatron_lite.objectives.masked_lm import MaskedLM
from megatron_lite.objectives.masked_lm_nsp import MaskedLMNextSentence
from megatron_lite.objectives.prefix_lm import PrefixLM
from megatron_lite.objectives.span_corruption import SpanCorruption
from megatron_lite.objectives.ul2 import UL2

OBJECTIVES: dict[str, Callable[[ObjectiveConfig, DataConfig, Vocabulary], Objective]] = {
    ObjectiveName.causal_lm: CausalLM,
    ObjectiveName.prefix_lm: PrefixLM,
    ObjectiveName.fill_in_the_middle: FillInTheMiddle,
    ObjectiveName.masked_lm: MaskedLM,
    ObjectiveName.masked_lm_nsp: MaskedLMNextSentence,
    ObjectiveName.span_corruption: SpanCorruption,
    ObjectiveName.bart_denoising: BartDenoising,
    ObjectiveName.ul2: UL2,
}


def build_objective(objective: ObjectiveConfig, data: DataConfig, vocabulary: Vocabulary) -> Objective:
    """Build the configured objective. The configuration must be valid, and the vocabulary must have its tokens.

    Raises:
        ConfigError: objective.whole_word is set, but the vocabulary does not mark where words begin.
    """
    return OBJECTIVES[objective.name](objective, data, vocabulary)

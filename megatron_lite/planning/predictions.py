"""What an objective trains a model to predict, in words and as an average count."""

from __future__ import annotations

from collections.abc import Callable

from megatron_lite.config.lengths import denoisers, span_corruption_lengths, ul2_lengths
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import ObjectiveName


def what_is_predicted(config: ResolvedConfig) -> str:
    """One clause, without a full stop."""
    return _CLAUSES.get(config.objective.name, _described_elsewhere)(config)


def _described_elsewhere(config: ResolvedConfig) -> str:
    return f"what they predict says objectives/{config.objective.name.value}.py"


def _causal(config: ResolvedConfig) -> str:
    return "each predicts the next token"


def _prefix(config: ResolvedConfig) -> str:
    predicted = (config.data.seq_length + 1) / 2  # the length is uniform
    return f"{predicted:.4g} of them on average, behind a prefix, predict the next token"


def _fill_in_the_middle(config: ResolvedConfig) -> str:
    objective = config.objective
    return (
        f"each predicts the next token; {objective.fim_fraction:.0%} of the documents are rearranged, "
        f"{objective.fim_spm_fraction:.0%} of these with the suffix first"
    )


def _masked(config: ResolvedConfig) -> str:
    objective, length = config.objective, config.data.seq_length
    kept = 1 - objective.mask_token_fraction - objective.random_token_fraction
    words = "whole words" if objective.whole_word else "tokens"
    return (
        f"{objective.masked_fraction * length:.3g} of them predict masked {words} ({objective.masked_fraction:.3g} x "
        f"{length:,}: {objective.mask_token_fraction:.0%} masks, {objective.random_token_fraction:.0%} random, "
        f"{max(kept, 0):.0%} kept)"
    )


def _masked_with_next_sentence(config: ResolvedConfig) -> str:
    return f"{_masked(config)}, and one whether the parts follow each other ({config.objective.next_fraction:.0%} do)"


def _span_corruption(config: ResolvedConfig) -> str:
    objective = config.objective
    window, decoder, spans = span_corruption_lengths(
        config.data.seq_length, objective.noise_density, objective.mean_span_length
    )
    noise = decoder - spans - 1
    return f"{noise} of {window:,} tokens are predicted ({noise / window:.1%}), in {spans} spans"


def _bart(config: ResolvedConfig) -> str:
    objective = config.objective
    shuffled = ", its sentences are shuffled" if objective.permute_sentences else ""
    return (
        f"the decoder predicts the whole text; {objective.infill_fraction:.0%} of the input is masked in spans of "
        f"{objective.infill_span_length:g} on average{shuffled}"
    )


def _ul2(config: ResolvedConfig) -> str:
    """Positions that denoiser i predicts: removed tokens, sentinels and the end; a mean for the S-denoiser."""
    objective = config.objective
    total = sum(objective.ul2_weights)
    shares = dict.fromkeys("rsx", 0.0)
    predicted = 0.0
    tasks = denoisers(objective)
    for place, (window, longest, _) in ul2_lengths(objective, config.data.seq_length).items():
        mode, share = tasks[place].mode, objective.ul2_weights[place] / total
        shares[mode] += share
        predicted += share * (round(window * tasks[place].noise_density) + 2 if mode == "s" else longest)
    mixture = ", ".join(f"{mode.upper()} {share:.0%}" for mode, share in shares.items())
    tokens = "with" if objective.ul2_mode_tokens else "without"
    return (
        f"{predicted:.4g} of the decoder's on average predict what denoisers took out ({mixture}), {tokens} mode tokens"
    )


_CLAUSES: dict[ObjectiveName, Callable[[ResolvedConfig], str]] = {
    ObjectiveName.causal_lm: _causal,
    ObjectiveName.prefix_lm: _prefix,
    ObjectiveName.fill_in_the_middle: _fill_in_the_middle,
    ObjectiveName.masked_lm: _masked,
    ObjectiveName.masked_lm_nsp: _masked_with_next_sentence,
    ObjectiveName.span_corruption: _span_corruption,
    ObjectiveName.bart_denoising: _bart,
    ObjectiveName.ul2: _ul2,
}

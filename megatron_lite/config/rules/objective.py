"""Rules between the script, what it trains, and the lengths that follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_lite.config.lengths import (
    DENOISERS,
    MIN_SEQ_LENGTH,
    TRAINED_SENTINELS,
    decoder_length,
    sentinels_needed,
    span_corruption_lengths,
    ul2_lengths,
)
from megatron_lite.config.rules.case import SIZES, Case, either, nearest_multiples
from megatron_lite.config.schema import Architecture, ObjectiveName

ARCHITECTURES = {
    "pretrain_gpt": Architecture.decoder,
    "pretrain_bert": Architecture.encoder,
    "pretrain_t5": Architecture.encoder_decoder,
}
OBJECTIVES = {
    "pretrain_gpt": (
        ObjectiveName.causal_lm,
        ObjectiveName.prefix_lm,
        ObjectiveName.fill_in_the_middle,
    ),
    "pretrain_bert": (ObjectiveName.masked_lm_nsp, ObjectiveName.masked_lm),
    "pretrain_t5": (ObjectiveName.span_corruption, ObjectiveName.bart_denoising, ObjectiveName.ul2),
}
NEXT_TOKEN = OBJECTIVES["pretrain_gpt"]
LONGEST_SEARCH = 2**14  # lengths up to which a remedy is looked for
SPAN_KEYS = ("data.seq_length", "objective.noise_density", "objective.mean_span_length")
LENGTH_KEYS = (*SPAN_KEYS, "objective.ul2_s_density", "objective.decoder_seq_length")


def architecture_fits_script(case: Case) -> Iterator[str]:
    script, architecture = case.config.script, case.config.model.architecture
    wanted = ARCHITECTURES.get(script)
    if wanted is None or architecture is wanted:
        return
    other = next(name for name, trained in ARCHITECTURES.items() if trained is architecture)
    yield (
        f"model.architecture={architecture.value} is not what {script} trains ({wanted.value}); run {other}, or choose "
        f"a model of that architecture, such as model={script.removeprefix('pretrain_')}_tiny"
    )


def objective_fits_script(case: Case) -> Iterator[str]:
    script, name = case.config.script, case.config.objective.name
    if script not in OBJECTIVES or name in OBJECTIVES[script]:
        return
    other = next(owner for owner, names in OBJECTIVES.items() if name in names)
    own = [candidate.value for candidate in OBJECTIVES[script]]
    yield (f"objective.name={name.value} does not fit {script}; run {other}, or use {', '.join(own[:-1])} or {own[-1]}")


def masked_tokens_add_up(case: Case) -> Iterator[str]:
    objective = case.config.objective
    keys = ("objective.mask_token_fraction", "objective.random_token_fraction")
    both = objective.mask_token_fraction + objective.random_token_fraction
    if case.sound(*keys) and both > 1 + 1e-9:
        yield (
            f"{keys[0]}={objective.mask_token_fraction:g} and {keys[1]}={objective.random_token_fraction:g} must be "
            f"at most 1 together, not {both:g}; use {keys[1]}={1 - objective.mask_token_fraction:g} or less"
        )


def next_sentence_needs_segments(case: Case) -> Iterator[str]:
    segments = case.model.num_segments
    if not case.sound("model.num_segments") or segments >= 2 or case.model.architecture is not Architecture.encoder:
        return
    if case.config.objective.name is ObjectiveName.masked_lm_nsp:
        yield (
            f"objective.name=masked_lm_nsp needs model.num_segments >= 2, not {segments}: the model must tell the two "
            "parts apart; use model.num_segments=2 or objective=masked_lm"
        )


def weights_name_denoisers(case: Case) -> Iterator[str]:
    weights = case.config.objective.ul2_weights
    key = f"objective.ul2_weights={weights}"
    if len(weights) != len(DENOISERS):
        yield f"{key} has {len(weights)} numbers; give {len(DENOISERS)}, one a denoiser: two R, one S, four X"
    elif not _are_weights(weights):
        yield f"{key} must be 0 or more and not all 0; give each denoiser its share"


def _are_weights(weights: list[float]) -> bool:
    sound = all(0 <= weight < math.inf for weight in weights)
    return len(weights) == len(DENOISERS) and sound and sum(weights) > 0


def decoder_length_can_be_chosen(case: Case) -> Iterator[str]:
    objective = case.config.objective
    if _may_choose_decoder(case):
        return
    reasons = {
        ObjectiveName.span_corruption: "its decoder has as many positions as the spans need",
        ObjectiveName.bart_denoising: "its decoder writes out all data.seq_length positions",
    }
    reason = reasons.get(objective.name, "there is no decoder beside the only stack")
    yield (
        f"objective.decoder_seq_length={objective.decoder_seq_length} cannot be chosen with "
        f"objective.name={objective.name.value}: {reason}; set objective.decoder_seq_length=null"
    )


def _may_choose_decoder(case: Case) -> bool:
    objective = case.config.objective
    return objective.decoder_seq_length is None or objective.name is ObjectiveName.ul2


def eod_mask_needs_next_tokens(case: Case) -> Iterator[str]:
    name = case.config.objective.name
    if case.config.data.mask_loss_after_eod and name not in NEXT_TOKEN:
        yield (
            f"data.mask_loss_after_eod=true has no meaning with objective.name={name.value}, which does not predict "
            "the token behind each position; set data.mask_loss_after_eod=false"
        )


def sequence_holds_sample(case: Case) -> Iterator[str]:
    """There must be room for some text beside what the objective adds."""
    length, objective = case.config.data.seq_length, case.config.objective
    if not case.sound("data.seq_length"):
        return
    shortest = MIN_SEQ_LENGTH.get(objective.name, 1)
    if length < shortest:
        yield (
            f"data.seq_length={length} has no room for text beside the special tokens of objective.name="
            f"{objective.name.value}; use {shortest} or more"
        )
    elif objective.name is ObjectiveName.ul2 and not _decoder_holds_text(case):
        decoder = decoder_length(objective, length)
        yield (
            f"data.seq_length={length} with {decoder} positions of the decoder has no room for a denoiser of "
            "objective.name=ul2; use longer ones"
        )


def _decoder_holds_text(case: Case) -> bool:
    """Whether each denoiser of ul2 finds room, or other rules have refused what decides it."""
    objective = case.config.objective
    if not case.sound(*LENGTH_KEYS) or len(objective.ul2_weights) != len(DENOISERS):
        return True
    try:
        ul2_lengths(objective, case.config.data.seq_length)
    except ValueError:
        return False
    return True


def spans_fit_sequence(case: Case) -> Iterator[str]:
    """Spans of the length that was asked for, rather than the one token that rounding would raise them to."""
    objective, length = case.config.objective, case.config.data.seq_length
    if not _has_lengths(case) or objective.name is not ObjectiveName.span_corruption:
        return
    density, mean = objective.noise_density, objective.mean_span_length
    if not _holds_a_span(length, density, mean):
        lengths = range(length + 1, LONGEST_SEARCH)
        enough = next((candidate for candidate in lengths if _holds_a_span(candidate, density, mean)), None)
        yield (
            f"data.seq_length={length} is too short for a span of objective.mean_span_length={mean:g} at "
            f"objective.noise_density={density:g}; {f'use {enough} or more' if enough else 'use shorter spans'}"
        )
        return
    window = span_corruption_lengths(length, density, mean).window
    noise = round(window * density)
    if round(noise / mean) > window - noise:
        yield (
            f"objective.noise_density={density:g} with objective.mean_span_length={mean:g} leaves {window - noise} of "
            f"{window} tokens to keep {round(noise / mean)} spans apart; use a lower density or longer spans"
        )


def _holds_a_span(length: int, density: float, mean: float) -> bool:
    window = span_corruption_lengths(length, density, mean).window
    return round(round(window * density) / mean) >= 1


def spans_have_sentinels(case: Case) -> Iterator[str]:
    """Of a tokenizer that is trained here; others are looked at when they are opened."""
    objective, data = case.config.objective, case.config.data
    if data.tokenizer != "train" or not _has_lengths(case):
        return
    needed = sentinels_needed(objective, data.seq_length)
    if needed > TRAINED_SENTINELS:
        shorter = range(data.seq_length - 1, MIN_SEQ_LENGTH[objective.name] - 1, -1)
        longest = next(n for n in shorter if sentinels_needed(objective, n) <= TRAINED_SENTINELS)
        other = ", longer spans" if objective.name is ObjectiveName.span_corruption else ""
        yield (
            f"data.seq_length={data.seq_length} makes up to {needed} spans with objective.name={objective.name.value}, "
            f"and data.tokenizer=train gives {TRAINED_SENTINELS} sentinels; use data.seq_length={longest} or "
            f"less{other}, or a tokenizer with more"
        )


def _has_lengths(case: Case) -> bool:
    """Whether `config.lengths` may calculate: nothing that it reads has been refused."""
    objective, length = case.config.objective, case.config.data.seq_length
    if not case.sound(*LENGTH_KEYS) or length < MIN_SEQ_LENGTH.get(objective.name, 1):
        return False
    if objective.name is ObjectiveName.ul2:
        return _are_weights(objective.ul2_weights) and _decoder_holds_text(case)
    return True


def _decoder_length(case: Case) -> int | None:
    """As far as it can be told, and is not simply data.seq_length, of which other rules speak."""
    if not _has_lengths(case) or not _may_choose_decoder(case):
        return None
    length = decoder_length(case.config.objective, case.config.data.seq_length)
    return None if length == case.config.data.seq_length else length


def decoder_fits_positions(case: Case) -> Iterator[str]:
    length, positions = _decoder_length(case), case.model.max_position_embeddings
    if length is None or not case.sound("model.max_position_embeddings") or length <= positions:
        return
    given = case.config.objective.decoder_seq_length is not None
    remedy = f"use at most {positions}" if given else "lower data.seq_length"
    yield (
        f"{_shown(case, length)} are more than model.max_position_embeddings={positions}; {remedy}, or set "
        f"model.max_position_embeddings={length}"
    )


def decoder_splits_evenly(case: Case) -> Iterator[str]:
    """Under sequence parallelism; a wrong data.seq_length itself is refused by the layout's rule."""
    length = _decoder_length(case)
    if length is None or not case.config.parallel.sequence_parallel or not case.sound(*SIZES):
        return
    if length % case.tensor == 0 or case.config.data.seq_length % case.tensor:
        return
    yield (
        f"{_shown(case, length)} must be a multiple of parallel.tensor_parallel_size={case.tensor} with "
        f"parallel.sequence_parallel=true; use {_even_length(case, length)}"
    )


def _shown(case: Case, length: int) -> str:
    objective = case.config.objective
    if objective.decoder_seq_length is not None:
        return f"objective.decoder_seq_length={length}: the decoder's positions"
    return f"objective.name={objective.name.value}: the decoder's {length} positions"


def _even_length(case: Case, length: int) -> str:
    if case.config.objective.name is ObjectiveName.ul2:
        return f"objective.decoder_seq_length={either(nearest_multiples(length, case.tensor))}"
    given = case.config.data.seq_length
    multiples = range(case.tensor, 2 * given, case.tensor)
    for candidate in sorted(multiples, key=lambda multiple: abs(multiple - given)):
        if candidate < MIN_SEQ_LENGTH[case.config.objective.name]:
            continue
        decoder = decoder_length(case.config.objective, candidate)
        if decoder is not None and decoder % case.tensor == 0:
            return f"data.seq_length={candidate}"
    return "parallel.sequence_parallel=false"

"""Rules for lengths that follow from an objective: of sequences, spans and the decoder.

Their order matters: each rule may use values that the rules before it have checked.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from megatron_lite.config.lengths import (
    MIN_SEQ_LENGTH,
    TRAINED_SENTINELS,
    SpanLengths,
    covered_tokens,
    decoder_length,
    denoisers,
    sentinels_needed,
    span_corruption_lengths,
    ul2_lengths,
)
from megatron_lite.config.rules.case import SIZES, Case, Rule, either, nearest_multiples
from megatron_lite.config.rules.objective import denoisers_are_sound, may_choose_decoder
from megatron_lite.config.schema import ObjectiveConfig, ObjectiveName

ALTERNATIVES_TRIED = 1000  # above the value, and as many below
LONGEST_SEARCH = 2**14  # largest length tried for a remedy
LONGEST_DENOISED = 512  # the same for ul2: the length in its paper, where all denoisers fit
LONG_SPAN = 64  # mean span of a denoiser whose spans are cut to fit
SPAN_KEYS = ("data.seq_length", "objective.noise_density", "objective.mean_span_length")
INFILL_KEYS = ("objective.infill_fraction", "objective.infill_span_length")
LENGTH_KEYS = (*SPAN_KEYS, *INFILL_KEYS, "objective.ul2_s_density", "objective.decoder_seq_length")


def lengths_fit(case: Case) -> Iterator[str]:
    """The first of `LENGTH_RULES` that finds a problem: one mistake, one message."""
    yield from next(filter(None, (list(rule(case)) for rule in LENGTH_RULES)), [])


def sequence_holds_sample(case: Case) -> Iterator[str]:
    """There must be room for some text besides what the objective adds."""
    length, objective = case.config.data.seq_length, case.config.objective
    if not case.sound("data.seq_length"):
        return
    shortest = MIN_SEQ_LENGTH.get(objective.name, 1)
    if length < shortest:
        enough = _enough(case, shortest)
        yield (
            f"data.seq_length={length} has no room for text beside the special tokens of objective.name="
            f"{objective.name.value}; {'use longer sequences' if enough is None else f'use {enough} or more'}"
        )
    elif objective.name is ObjectiveName.ul2 and not _decoder_holds_text(case):
        decoder = decoder_length(objective, length)
        yield (
            f"data.seq_length={length} with {decoder} positions of the decoder has no room for a denoiser of "
            f"objective.name=ul2; {_longer(objective, length).removesuffix(',')}"
        )


def _enough(case: Case, shortest: int) -> int | None:
    """The shortest length with room for text and a span; None if no tried length has it."""
    objective = case.config.objective
    if not case.sound(*LENGTH_KEYS[1:]):
        return shortest  # other rules have refused the settings of spans
    density, mean = objective.noise_density, objective.mean_span_length
    lengths = range(shortest, LONGEST_SEARCH)
    if objective.name is ObjectiveName.span_corruption:
        return next((length for length in lengths if _holds_a_span(length, density, mean)), None)
    if objective.name is ObjectiveName.bart_denoising:
        covered = (covered_tokens(length, objective.infill_fraction) for length in lengths)
        return next(
            (length for length, here in zip(lengths, covered, strict=True) if here >= objective.infill_span_length),
            None,
        )
    if objective.name is ObjectiveName.ul2 and denoisers_are_sound(objective):
        return _least(lambda length: _all_fit(replace(objective, decoder_seq_length=None), length))
    return shortest


def _decoder_holds_text(case: Case) -> bool:
    """Whether each denoiser of ul2 has room, or other rules have refused the settings involved."""
    objective = case.config.objective
    if not case.sound(*LENGTH_KEYS) or not denoisers_are_sound(objective):
        return True
    try:
        ul2_lengths(objective, case.config.data.seq_length)
    except ValueError:
        return False
    return True


def spans_fit_sequence(case: Case) -> Iterator[str]:
    """Spans must have the requested length; rounding must not raise them to one token."""
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


def infilling_fits_sequence(case: Case) -> Iterator[str]:
    """BART must have room to mask a span of the mean length."""
    objective, length = case.config.objective, case.config.data.seq_length
    if not _has_lengths(case) or objective.name is not ObjectiveName.bart_denoising:
        return
    fraction, mean = objective.infill_fraction, objective.infill_span_length
    covered = covered_tokens(length, fraction)
    if covered >= mean:
        return
    lengths = range(length + 1, LONGEST_SEARCH)
    enough = next((candidate for candidate in lengths if covered_tokens(candidate, fraction) >= mean), None)
    yield (
        f"data.seq_length={length} is too short for a span of objective.infill_span_length={mean:g}: "
        f"objective.infill_fraction={fraction:g} covers {covered} tokens of it; "
        f"{f'use {enough} or more' if enough else 'use shorter spans'}"
    )


def denoisers_fit_sequence(case: Case) -> Iterator[str]:
    """UL2's short spans (3, 8) must fit whole, and no two denoisers may coincide; spans of 64 are cut to fit."""
    objective, length = case.config.objective, case.config.data.seq_length
    if not _has_lengths(case) or objective.name is not ObjectiveName.ul2:
        return
    fault = _unfit_denoiser(objective, length)
    if fault is None:
        return
    given = objective.decoder_seq_length
    key = f"data.seq_length={length}" + ("" if given is None else f" with objective.decoder_seq_length={given}")
    yield (
        f"{key} is too short for objective.name=ul2: each weighted denoiser of mean span 3 or 8 must take out a whole "
        f"span and no two may become the same task, but {fault.text}; {_longer(objective, length)}"
        f"{_fewer(objective, length)}"
    )


def _fewer(objective: ObjectiveConfig, length: int) -> str:
    """The denoisers to switch off so that the others fit."""
    places: list[int] = []
    weights = list(objective.ul2_weights)
    while fault := _unfit_denoiser(replace(objective, ul2_weights=weights), length):
        places.append(fault.place + 1)
        weights[fault.place] = 0.0
        if not any(weights):
            return " or another objective"
    numbers = ", ".join(map(str, sorted(places)))
    return f" or set number{'s' * (len(places) > 1)} {numbers} of objective.ul2_weights to 0"


class _Fault(NamedTuple):
    place: int
    """Index in `config.lengths.denoisers` of the denoiser that causes it."""
    text: str


def _unfit_denoiser(objective: ObjectiveConfig, length: int) -> _Fault | None:
    """The problem of the first denoiser for which the sequences are too short."""
    tasks: dict[SpanLengths, int] = {}
    for place, lengths in ul2_lengths(objective, length).items():
        mode, mean, density = denoisers(objective)[place]
        if mode == "s":
            continue
        if mean < LONG_SPAN and round(round(lengths.window * density) / mean) < 1:
            return _Fault(place, f"the one of ({mean:g}, {density:g}) does not")
        other = tasks.setdefault(lengths, place)
        if other != place:
            twin = denoisers(objective)[other]
            return _Fault(
                place, f"({twin.mean_span_length:g}, {twin.noise_density:g}) and ({mean:g}, {density:g}) are the same"
            )
    return None


def _longer(objective: ObjectiveConfig, length: int) -> str:
    """The smallest sufficient length: of the decoder if it is given, else data.seq_length with half of it."""
    if objective.decoder_seq_length is not None:
        decoder = _least(lambda decoder: _all_fit(replace(objective, decoder_seq_length=decoder), length))
        if decoder is not None:
            return f"use objective.decoder_seq_length={decoder} or more,"
    usual = replace(objective, decoder_seq_length=None)
    enough = f"use data.seq_length={_least(lambda length: _all_fit(usual, length))} or more"
    return f"{enough}," if objective.decoder_seq_length is None else f"{enough} and objective.decoder_seq_length=null,"


def _all_fit(objective: ObjectiveConfig, length: int) -> bool:
    try:
        return _unfit_denoiser(objective, length) is None
    except ValueError:  # no room for a span
        return False


def _least(fits: Callable[[int], bool]) -> int | None:
    """The smallest number from which on all fit; None if the largest one tried does not fit."""
    wrong = next((number for number in range(LONGEST_DENOISED, 0, -1) if not fits(number)), 0)
    return wrong + 1 if wrong < LONGEST_DENOISED else None


def spans_have_sentinels(case: Case) -> Iterator[str]:
    """For a tokenizer that is trained here; others are checked when they are opened."""
    objective, data = case.config.objective, case.config.data
    if data.tokenizer != "train" or not _has_lengths(case):
        return
    needed = sentinels_needed(objective, data.seq_length)
    if needed > TRAINED_SENTINELS:
        # spans grow with the length, so bisection finds the longest length that works
        lengths = range(MIN_SEQ_LENGTH[objective.name], data.seq_length)
        longest = lengths[bisect_right(lengths, TRAINED_SENTINELS, key=lambda n: _sentinels(objective, n)) - 1]
        other = ", longer spans" if objective.name is ObjectiveName.span_corruption else ""
        yield (
            f"data.seq_length={data.seq_length} makes up to {needed} spans with objective.name={objective.name.value}, "
            f"and data.tokenizer=train gives {TRAINED_SENTINELS} sentinels; use data.seq_length={longest} or "
            f"less{other}, or a tokenizer with more"
        )


def _sentinels(objective: ObjectiveConfig, length: int) -> int:
    try:
        return sentinels_needed(objective, length)
    except ValueError:  # too short for a span
        return 0


def _has_lengths(case: Case) -> bool:
    """Whether `config.lengths` can be used: none of the settings that it reads has been refused."""
    objective, length = case.config.objective, case.config.data.seq_length
    if not case.sound(*LENGTH_KEYS) or length < MIN_SEQ_LENGTH.get(objective.name, 1):
        return False
    if objective.name is ObjectiveName.ul2:
        return denoisers_are_sound(objective) and _decoder_holds_text(case)
    return True


def _decoder_length(case: Case) -> int | None:
    """The decoder's length if it is known and differs from data.seq_length, which other rules check."""
    if not _has_lengths(case) or not may_choose_decoder(case):
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
    """Under sequence parallelism; the layout's rule refuses a wrong data.seq_length itself."""
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
    near = given // case.tensor
    for candidate in (case.tensor * (near + off) for away in range(ALTERNATIVES_TRIED) for off in (away, -away)):
        if candidate < MIN_SEQ_LENGTH[case.config.objective.name]:
            continue
        decoder = decoder_length(case.config.objective, candidate)
        if decoder is not None and decoder % case.tensor == 0:
            return f"data.seq_length={candidate}"
    return "parallel.sequence_parallel=false"


LENGTH_RULES: tuple[Rule, ...] = (
    sequence_holds_sample,
    spans_fit_sequence,
    infilling_fits_sequence,
    denoisers_fit_sequence,
    spans_have_sentinels,
    decoder_fits_positions,
    decoder_splits_evenly,
)

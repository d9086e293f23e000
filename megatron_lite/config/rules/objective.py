"""Rules between the script and what it trains."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_lite.config.lengths import DENOISER_MODES, NUM_SPAN_DENOISERS
from megatron_lite.config.ranges import LONGEST_SEQUENCE, PART
from megatron_lite.config.rules.case import Case
from megatron_lite.config.schema import Architecture, ObjectiveConfig, ObjectiveName

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


def script_is_there(case: Case) -> Iterator[str]:
    script = case.config.script
    if case.sound("script") and script not in ARCHITECTURES:
        yield f"script={script} is not one of {', '.join(ARCHITECTURES)}; leave it out: the command names the script"


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
    if not case.sound("objective.ul2_weights"):
        return
    key = f"objective.ul2_weights={weights}"
    if len(weights) != len(DENOISER_MODES):
        yield f"{key} has {len(weights)} numbers; give {len(DENOISER_MODES)}, one a denoiser: two R, one S, four X"
    elif not are_weights(weights):
        yield f"{key} must be 0 or more and not all 0; give each denoiser its share"


def are_weights(weights: list[float]) -> bool:
    sound = all(0 <= weight < math.inf for weight in weights)
    return len(weights) == len(DENOISER_MODES) and sound and sum(weights) > 0


def span_denoisers_are_described(case: Case) -> Iterator[str]:
    objective = case.config.objective
    described = (
        ("ul2_span_lengths", objective.ul2_span_lengths, _is_span, "be 1 token or more each"),
        ("ul2_noise_densities", objective.ul2_noise_densities, _is_density, "lie inside (0, 1)"),
    )
    for name, values, fits, rule in described:
        if not case.sound(f"objective.{name}"):
            continue
        if len(values) != NUM_SPAN_DENOISERS:
            yield (
                f"objective.{name}={values} has {len(values)} numbers; give {NUM_SPAN_DENOISERS}: of two R- and four "
                "X-denoisers"
            )
        elif not all(map(fits, values)):
            yield f"objective.{name}={values} must {rule}; the paper's are {getattr(ObjectiveConfig(), name)}"


def _is_span(value: float) -> bool:
    return 1 <= value <= LONGEST_SEQUENCE


def _is_density(value: float) -> bool:
    return PART.problem(value) is None


def denoisers_are_sound(objective: ObjectiveConfig) -> bool:
    """Whether `config.lengths.denoisers` and their weights can be used in calculations."""
    spans, densities = objective.ul2_span_lengths, objective.ul2_noise_densities
    described = all(map(_is_span, spans)) and all(map(_is_density, densities))
    return len(spans) == len(densities) == NUM_SPAN_DENOISERS and described and are_weights(objective.ul2_weights)


def decoder_length_can_be_chosen(case: Case) -> Iterator[str]:
    objective = case.config.objective
    if may_choose_decoder(case):
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


def may_choose_decoder(case: Case) -> bool:
    objective = case.config.objective
    return objective.decoder_seq_length is None or objective.name is ObjectiveName.ul2


def bos_needs_a_decoder(case: Case) -> Iterator[str]:
    name, architecture = case.config.objective.name, case.model.architecture
    if case.config.data.add_bos and architecture is not Architecture.decoder:
        yield (
            f"data.add_bos=true has no meaning with objective.name={name.value}, which itself puts tokens around what "
            "the model reads; leave data.add_bos out, or set it to null"
        )


def eod_mask_needs_next_tokens(case: Case) -> Iterator[str]:
    name = case.config.objective.name
    if case.config.data.mask_loss_after_eod and name not in NEXT_TOKEN:
        yield (
            f"data.mask_loss_after_eod=true has no meaning with objective.name={name.value}, which does not predict "
            "the token behind each position; set data.mask_loss_after_eod=false"
        )

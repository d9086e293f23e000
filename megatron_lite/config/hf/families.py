"""Which model of transformers computes the same as a model of ours, if any."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.hf.decoders import DECODERS
from megatron_lite.config.hf.encoder_decoders import ENCODER_DECODERS
from megatron_lite.config.hf.encoders import ENCODERS
from megatron_lite.config.hf.family import DECISIVE, Family, NoCounterpart, decisive_fields
from megatron_lite.config.keys import as_word
from megatron_lite.config.schema import Architecture, ModelConfig, PositionEmbedding

__all__ = ["DECISIVE", "FAMILIES", "Family", "NoCounterpart", "counterpart", "is_read", "model_types", "of_type"]

FAMILIES = (*DECODERS, *ENCODERS, *ENCODER_DECODERS)
_READ_WITH: dict[str, Architecture | PositionEmbedding] = {
    "num_decoder_layers": Architecture.encoder_decoder,
    "position_offset": PositionEmbedding.learned,
    "relative_buckets": PositionEmbedding.relative,
    "relative_max_distance": PositionEmbedding.relative,
    "rotary_base": PositionEmbedding.rotary,
}
"""Fields that a model reads only if another field has this value."""
_MARKS = ("architecture", "position_embedding", "position_offset")
"""Fields by which a model that no family computes is compared with the most similar one."""


def model_types() -> list[str]:
    """transformers' names of the model types."""
    return list(dict.fromkeys(family.model_type for family in FAMILIES))


def of_type(model_type: str) -> list[Family]:
    return [family for family in FAMILIES if family.model_type == model_type]


def counterpart(model: ModelConfig, *, next_sentence: bool = False) -> Family:
    """The family whose model of these sizes gives the same logits.

    Args:
        model: filled in; one whose head count does not divide hidden_size gets that as the reason.
        next_sentence: an encoder also classifies pairs (`derived.has_next_sentence_head`).
    Raises:
        NoCounterpart: lists every setting that the most similar family does not support.
    """
    candidates = of_type(model.family) if model.family else [one for one in FAMILIES if not one.only_if_named]
    if not candidates:
        raise NoCounterpart(f"model.family={model.family} is not known; use {', '.join(model_types())}")
    reasons = {index: list(_differences(model, family, next_sentence)) for index, family in enumerate(candidates)}

    def unlike(index: int) -> tuple[object, ...]:
        family = candidates[index]
        return *_marks_missed(model, family), next_sentence is not family.next_sentence, len(reasons[index]), index

    best = min(reasons, key=unlike)
    if reasons[best]:
        raise NoCounterpart(f"{candidates[best].architecture} of transformers has {', and '.join(reasons[best])}")
    return candidates[best]


def _marks_missed(model: ModelConfig, family: Family) -> Iterator[bool]:
    for name in _MARKS:
        found, values = getattr(model, name), family.fixed.get(name)
        yield is_read(name, model) and (not found if values is None else found not in values)


def _differences(model: ModelConfig, family: Family, next_sentence: bool) -> Iterator[str]:
    """Differences between the family and the model, in words."""
    supported = {**family.fixed, "activation": tuple(dict.fromkeys(family.activations.values()))}
    for name, values in supported.items():
        found = getattr(model, name)
        if found not in values:
            yield f"{' or '.join(map(as_word, values))} for model.{name}={as_word(found)}"
    for name, default in decisive_fields(type(model)):
        is_known = family.knows_field(name) or not is_read(name, model)
        if not is_known and getattr(model, name) != default:
            yield f"no model.{name}={as_word(getattr(model, name))}"
    yield from _of_shared_keys(model, family)
    yield from _of_heads(model, family)
    for name, what in family.nonzero.items():
        if not getattr(model, name):
            yield f"{what} for model.{name}=0"
    if next_sentence and not family.next_sentence:
        yield "no next-sentence head"


def _of_shared_keys(model: ModelConfig, family: Family) -> Iterator[str]:
    """One key of config.json cannot hold two values."""
    for key, entry in family.keys.items():
        decisive = [name for name in entry.fields if name in DECISIVE]
        if len({getattr(model, name) for name in decisive}) > 1:
            values = " and ".join(f"model.{name}={as_word(getattr(model, name))}" for name in decisive)
            yield f"one {key} for {values}"


def _of_heads(model: ModelConfig, family: Family) -> Iterator[str]:
    heads, hidden, held = model.num_attention_heads, model.hidden_size, family.held
    if model.num_query_groups != heads and "num_query_groups" not in held:
        yield f"keys and values for each of {heads} heads, not model.num_query_groups={model.num_query_groups}"
    if "head_size" not in held and model.head_size != hidden / heads:
        size = f"model.hidden_size={hidden} / model.num_attention_heads={heads}"
        yield f"heads of {size} channels, not model.head_size={as_word(model.head_size)}"
    if family.heads_divide_hidden and hidden % heads:
        yield f"no model.num_attention_heads={heads} that does not divide model.hidden_size={hidden}"


def is_read(name: str, model: ModelConfig) -> bool:
    """Whether a model with these settings reads the setting `name`."""
    if name == "scale_tied_head":
        return model.tie_embeddings
    return name not in _READ_WITH or _READ_WITH[name] in (model.architecture, model.position_embedding)

"""`model.init_from`: the weights decide the model's settings; explicit overrides must not contradict them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from megatron_lite.config.derived import fill_in_model, has_next_sentence_head
from megatron_lite.config.hf.folder import Weights, read_weights
from megatron_lite.config.hf.settings import DECISIVE
from megatron_lite.config.keys import as_word
from megatron_lite.config.rules.credentials import address_without_login
from megatron_lite.config.schema import CheckInit, ModelConfig, PositionEmbedding, RunConfig
from megatron_lite.errors import ConfigError

NEXT_SENTENCE_HEADS = ("next_sentence.classifier.weight", "cls.seq_relationship.weight")


def with_weights(config: RunConfig, explicit: Collection[str]) -> RunConfig:
    """The configuration with the settings of the weights in model.init_from.

    They take precedence over presets, but not over explicit overrides, which must agree with them. If no tokenizer is
    given, the one next to the weights is used.

    Args:
        explicit: dotted keys of the user's overrides.
    Raises:
        ConfigError: the weights cannot be used, or lists every override that contradicts them.
        CheckpointError: a file is truncated or damaged.
    """
    name = config.model.init_from
    if name is None:
        return config
    if leaks := list(address_without_login("model.init_from", name)):  # before any message that shows it
        raise ConfigError(leaks)
    weights = read_weights(name, unknown_keys=config.model.check_init is CheckInit.always)
    if weights.script != config.script:
        raise ConfigError(
            f"model.init_from={name} is a model of {weights.script} ({weights.kind}), not of {config.script}; run "
            f"{weights.script}"
        )
    problems = [*contradictions(config.model, weights, explicit), *_lacking(config, weights, explicit)]
    if problems:
        raise ConfigError(problems)
    free = {key: value for key, value in weights.settings.items() if f"model.{key}" not in explicit}
    if "model.name" not in explicit:
        free["name"] = name.rstrip("/").rpartition("/")[2]
    config = replace(config, model=replace(config.model, **free))
    if weights.has_tokenizer and "data.tokenizer" not in explicit:
        config = replace(config, data=replace(config.data, tokenizer=str(weights.folder)))
    return config


def contradictions(model: ModelConfig, weights: Weights, explicit: Collection[str] | None = None) -> Iterator[str]:
    """Settings that differ from those of the weights.

    Args:
        explicit: dotted keys of the user's overrides; None = all keys, for settings that come from earlier weights.
    """
    there = fill_in_model(ModelConfig(**weights.settings))
    is_said = explicit is None or "model.family" in explicit
    if is_said and weights.model_type and model.family not in (None, weights.model_type):
        yield (
            f"model.family={model.family} contradicts model.init_from={model.init_from}, whose config.json has "
            f"model_type={weights.model_type}; leave model.family out, or set model.init_from=null"
        )
    for key in DECISIVE:
        if key not in weights.settings:  # the version that saved the weights did not have it
            continue
        typed, found = getattr(model, key), getattr(there, key)
        is_said = explicit is None or f"model.{key}" in explicit
        if not is_said or typed is None or typed == found or _is_free(key, there):
            continue
        yield (
            f"model.{key}={as_word(typed)} contradicts model.init_from={model.init_from}, whose weights "
            f"({weights.kind}) have {as_word(found)}; leave model.{key} out, or set model.init_from=null"
        )


def _is_free(key: str, model: ModelConfig) -> bool:
    """Whether weights do not depend on it: without a position table, sequences may become longer."""
    return key == "max_position_embeddings" and model.position_embedding is not PositionEmbedding.learned


def _lacking(config: RunConfig, weights: Weights, explicit: Collection[str]) -> Iterator[str]:
    """What the run needs besides the weights of the model."""
    name = config.model.init_from
    if has_next_sentence_head(config) and not any(head in weights.tensors for head in NEXT_SENTENCE_HEADS):
        yield (
            f"objective.name={config.objective.name.value} needs a next-sentence head, which the weights of "
            f"model.init_from={name} ({weights.kind}) lack; use objective=masked_lm"
        )
    if not weights.has_tokenizer and config.data.tokenizer == "train" and "data.tokenizer" not in explicit:
        yield (
            f"model.init_from={name} holds no tokenizer, and its embeddings belong to one; name that in data.tokenizer "
            "(data.tokenizer=train, typed, trains another)"
        )

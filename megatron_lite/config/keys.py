"""Every setting by its dotted key, and suggestions for wrong keys."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any

from megatron_lite.config.facts import facts
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import ConfigError

LIKENESS_OF_SLIPS = 0.8  # two letters swapped, one missing or one too many in names of five or more letters
LONGEST_SHOWN = 160  # characters of a value in a message
# Names from other trainers, whose spelling is too different for a suggestion by similarity.
ALIASES = {
    "lr": "optimizer.learning_rate",
    "min_lr": "optimizer.min_learning_rate",
    "tp": "parallel.tensor_parallel_size",
    "pp": "parallel.pipeline_parallel_size",
    "dp": "parallel.data_parallel_size",
    "world_size": "launcher.num_processes",
    "num_gpus": "launcher.num_processes",
    "num_heads": "model.num_attention_heads",
    "heads": "model.num_attention_heads",
    "files": "data.source",
    "n_head": "model.num_attention_heads",
    "n_layer": "model.num_layers",
    "n_embd": "model.hidden_size",
    "d_model": "model.hidden_size",
    "num_key_value_heads": "model.num_query_groups",
    "head_dim": "model.head_size",
    "max_steps": "train.steps",
    "train_iters": "train.steps",
    "batch_size": "train.global_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "clip_grad": "optimizer.clip_grad_norm",
    "max_unsound_steps": "train.max_non_finite_steps",
    "dtype": "train.precision",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "output_dir": "train.run_dir",
    "block_size": "data.seq_length",
    "sequence_length": "data.seq_length",
    "encoder_seq_length": "data.seq_length",
    "max_source_length": "data.seq_length",
    "max_target_length": "objective.decoder_seq_length",
    "decoder_length": "objective.decoder_seq_length",
    "is_encoder_decoder": "model.architecture",
    "encoder_layers": "model.num_layers",
    "num_encoder_layers": "model.num_layers",
    "encoder_num_layers": "model.num_layers",
    "num_hidden_layers": "model.num_layers",
    "decoder_layers": "model.num_decoder_layers",
    "num_decoder_layers": "model.num_decoder_layers",
    "decoder_num_layers": "model.num_decoder_layers",
    "d_kv": "model.head_size",
    "kv_channels": "model.head_size",
    "d_ff": "model.ffn_hidden_size",
    "intermediate_size": "model.ffn_hidden_size",
    "encoder_ffn_dim": "model.ffn_hidden_size",
    "feed_forward_proj": "model.activation",
    "hidden_act": "model.activation",
    "layer_norm_eps": "model.norm_epsilon",
    "type_vocab_size": "model.num_segments",
    "num_tokentypes": "model.num_segments",
    "relative_attention_num_buckets": "model.relative_buckets",
    "relative_attention_max_distance": "model.relative_max_distance",
    "model_name_or_path": "model.init_from",
    "pretrained_model_name_or_path": "model.init_from",
    "pretrained_checkpoint": "model.init_from",
    "tie_word_embeddings": "model.tie_embeddings",
    "hidden_dropout_prob": "model.hidden_dropout",
    "attention_probs_dropout_prob": "model.attention_dropout",
    "activation_dropout": "model.ffn_dropout",
    "relu_dropout": "model.ffn_dropout",
    "mlm_probability": "objective.masked_fraction",
    "mlm_prob": "objective.masked_fraction",
    "mask_prob": "objective.masked_fraction",
    "masked_lm_prob": "objective.masked_fraction",
    "mask_replace_prob": "objective.mask_token_fraction",
    "random_replace_prob": "objective.random_token_fraction",
    "random_token_prob": "objective.random_token_fraction",
    "whole_word_mask": "objective.whole_word",
    "mask_whole_words": "objective.whole_word",
    "nsp_probability": "objective.next_fraction",
    "short_seq_prob": "objective.short_fraction",
    "fim_rate": "objective.fim_fraction",
    "fim_spm_rate": "objective.fim_spm_fraction",
    "noise_density": "objective.noise_density",
    "corruption_rate": "objective.noise_density",
    "mean_noise_span_length": "objective.mean_span_length",
    "mask_ratio": "objective.infill_fraction",
    "poisson_lambda": "objective.infill_span_length",
    "permute_sentence_ratio": "objective.permute_sentences",
    "denoiser_weights": "objective.ul2_weights",
    "mixture_weights": "objective.ul2_weights",
}


def _walk(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(schema)
    for field in fields(schema):
        key, hint = prefix + field.name, hints[field.name]
        yield key, hint
        if is_dataclass(hint) and isinstance(hint, type):
            yield from _walk(hint, key + ".")


@cache
def schema_keys() -> dict[str, Any]:
    """Dotted key -> type hint, for every setting and every group of settings (whose hint is a dataclass)."""
    return dict(_walk(RunConfig))


def is_group(key: str) -> bool:
    """Whether the key is a group of settings rather than a value."""
    return is_dataclass(schema_keys().get(key))


def is_map(key: str) -> bool:
    """Whether the key's value is a map with user-defined names."""
    return typing.get_origin(schema_keys().get(key)) is dict


class Shape(Enum):
    """Where a setting contains text."""

    text = "text"
    texts = "texts"  # a list
    text_or_texts = "text_or_texts"  # typed `Any`: one text, or a list
    map = "map"  # from names to texts


def text_shape(key: str) -> Shape | None:
    """How a setting contains text; None if it contains none. An entry of a map is a text."""
    hint = schema_keys().get(key)
    if _expects_no_text(key):
        return None
    if hint is None:
        return Shape.text if is_map(key.rpartition(".")[0]) else None
    shapes = {str: Shape.text, str | None: Shape.text, list[str]: Shape.texts, Any: Shape.text_or_texts}
    return Shape.map if is_map(key) else shapes.get(hint)


def _expects_no_text(key: str) -> str | None:
    """What a setting of type `Any` expects that is no text; None = it is another one."""
    found = facts().get(key)
    return None if found is None else found.expects


def may_be_null(key: str) -> bool:
    """Whether the setting may be None."""
    hint = schema_keys().get(key)
    return (hint is Any and _expects_no_text(key) is None) or type(None) in typing.get_args(hint)


def leaf_keys() -> list[str]:
    """The dotted keys that hold a value."""
    return [key for key in schema_keys() if not is_group(key)]


def get_value(config: RunConfig, key: str) -> Any:
    """The value of a dotted key in a configuration."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def as_word(value: Any) -> str:
    """A value as written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Enum):
        return str(value.value)
    return format(value, "g") if isinstance(value, float) else str(value)


def shown(text: str) -> str:
    """A value in a message: on one line, of limited length."""
    line = text if text.isprintable() else text.encode("unicode_escape", "surrogatepass").decode("ascii")
    return line if len(line) <= LONGEST_SHOWN else f"{line[:LONGEST_SHOWN]}... ({len(line)} characters)"


def has_container(key: str, value: Any) -> bool:
    """Whether a value is the list or map that the setting expects; True for settings that expect neither."""
    hint = schema_keys()[key]
    origins = {typing.get_origin(part) for part in (hint, *typing.get_args(hint))}
    containers = tuple(kind for kind in (list, dict) if kind in origins)
    return not containers or isinstance(value, containers) or (value is None and may_be_null(key))


def expects(key: str) -> str:
    """The values that a key accepts, in words: `an integer`, `one of linear, cosine`, `a number or null`."""
    return _expects_no_text(key) or _describe(schema_keys().get(key, str))


_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def _describe(hint: Any) -> str:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(_describe(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"a list of {_describe(typing.get_args(hint)[0]).split(' ', 1)[1]}s"
    if typing.get_origin(hint) is dict:
        return "a map of names to texts, such as {NAME: value}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(member.name for member in hint)
    if is_dataclass(hint):
        return "a group of settings"
    return "a text, a list of texts or null" if hint is Any else _NAMES[hint]


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice of which `word` is a typo, or None: similar names may well mean different things."""
    choices = list(choices)
    swapped = next((choice for choice in choices if _is_swap(word, choice)), None)
    if swapped is not None:  # for short names, this similarity is below the threshold
        return swapped
    matches = difflib.get_close_matches(word, choices, n=1, cutoff=LIKENESS_OF_SLIPS)
    return matches[0] if matches and word[:1] == matches[0][:1] else None


def _is_swap(word: str, choice: str) -> bool:
    """Whether the words differ only by two swapped neighbouring letters."""
    differing = [i for i, (a, b) in enumerate(zip(word, choice, strict=False)) if a != b]
    if len(word) != len(choice) or len(differing) != 2:
        return False
    first, second = differing
    return second == first + 1 and (word[first], word[second]) == (choice[second], choice[first])


def nearest_key(key: str, also: Iterable[str] = ()) -> str | None:
    """The setting that a wrong key most likely means.

    A key may be wrong in its group (`train.hidden_size`) or in its name (`model.hiden_size`), or lack the group
    (`hidden_size`), so both the whole key and its last part are compared; the whole key breaks ties.

    Args:
        also: further valid words, such as the names of configuration groups.
    """
    name = key.rpartition(".")[2]
    if name in ALIASES:
        return ALIASES[name]

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, name, candidate.rpartition(".")[2]).ratio()
        return max(whole, 0.9 * last + 0.1 * whole)

    # `parallel.tensor` is the beginning of a setting in its group, not the name of a group
    inside = [candidate for candidate in leaf_keys() if "." in key and candidate.startswith(key)]
    if inside:
        return inside[0]
    best = max([*leaf_keys(), *(() if "." in key else also)], key=likeness)
    return best if likeness(best) >= 0.6 else None


def choices_text(wrong: str, options: Iterable[str]) -> str:
    """The remedy for an unknown name: the nearest option, and all of them."""
    options = list(options)
    guess = nearest(wrong, options)
    listed = f"choose one of {', '.join(options)}"
    return f"did you mean {guess}? ({listed})" if guess else listed


def require_command(argv: Sequence[str], commands: Iterable[str], program: str) -> None:
    """Refuse a mistyped command of a program with several commands.

    Raises:
        ConfigError: suggests the command that was most likely meant.
    """
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        raise ConfigError(f"{shown(argv[0])} is not a command of `{program}`; {choices_text(argv[0], commands)}")


def unknown_key(key: str, also: Iterable[str] = ()) -> ConfigError:
    """The error for an unknown key.

    Args:
        also: further valid words, such as the names of groups.
    """
    suggestion = nearest_key(key, also)
    if suggestion is None:
        wrong = shown(key) or repr(key)
        return ConfigError(f"{wrong} is not a setting; `python -m launch explain` lists all of them")
    return ConfigError(f"{shown(key)} is not a setting; did you mean {suggestion}?")

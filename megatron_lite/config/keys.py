"""Every setting by its dotted key, and the nearest right key to a wrong one."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any

from megatron_lite.config.schema import RunConfig

# What people type who come from other trainers, where likeness of spelling would not lead them here.
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
    "dtype": "train.precision",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "output_dir": "train.run_dir",
    "block_size": "data.seq_length",
    "sequence_length": "data.seq_length",
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
    """Whether the key holds other settings rather than a value."""
    return is_dataclass(schema_keys().get(key))


def leaf_keys() -> list[str]:
    """The dotted keys that hold a value."""
    return [key for key in schema_keys() if not is_group(key)]


def get_value(config: RunConfig, key: str) -> Any:
    """The value of a dotted key in a configuration."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def expects(key: str) -> str:
    """What a key's value has to be, in words: `an integer`, `one of linear, cosine`, `a number or null`."""
    return _describe(schema_keys()[key])


_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def _describe(hint: Any) -> str:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(_describe(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"a list of {_describe(typing.get_args(hint)[0]).split(' ', 1)[1]}s"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(member.name for member in hint)
    if is_dataclass(hint):
        return "a group of settings"
    return _NAMES.get(hint, "any value")


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice most like `word`, or None when none is like it."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return matches[0] if matches else None


def nearest_key(key: str, also: Iterable[str] = ()) -> str | None:
    """The setting that a wrong key most likely means.

    A key may be wrong in its group (`train.hidden_size`), in its name (`model.hiden_size`) or lack the group
    (`hidden_size`), so both the whole key and its last part are compared; the whole decides between equals.

    Args:
        also: further right words, such as the names of configuration groups.
    """
    name = key.rpartition(".")[2]
    if name in ALIASES:
        return ALIASES[name]

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, name, candidate.rpartition(".")[2]).ratio()
        return max(whole, 0.9 * last + 0.1 * whole)

    # `parallel.tensor` is the beginning of a setting of its group, and no name of a group
    inside = [candidate for candidate in leaf_keys() if "." in key and candidate.startswith(key)]
    if inside:
        return inside[0]
    best = max([*leaf_keys(), *(() if "." in key else also)], key=likeness)
    return best if likeness(best) >= 0.6 else None

"""Modules that all families have, renamed and joined."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_lite.config.derived import complete_model
from megatron_lite.config.schema import ModelConfig


def affine(state: Mapping[str, Tensor], source: str, target: str, *, transpose: bool = False) -> dict[str, Tensor]:
    """Weight and, where there is one, bias of the module `source`, as "<target>.weight" and "<target>.bias"."""
    weight = state[f"{source}.weight"]
    found = {f"{target}.weight": weight.t() if transpose else weight}
    if f"{source}.bias" in state:
        found[f"{target}.bias"] = state[f"{source}.bias"]
    return found


def self_attention(
    state: Mapping[str, Tensor], sources: tuple[str, str, str, str], target: str, model: ModelConfig
) -> dict[str, Tensor]:
    """`sources`: the modules of query, key, value and output."""
    query, key, value = (affine(state, source, "") for source in sources[:3])
    return {
        **{f"{target}.qkv{kind}": fuse_qkv(query[kind], key[kind], value[kind], model) for kind in query},
        **affine(state, sources[3], f"{target}.projection"),
    }


def cross_attention(state: Mapping[str, Tensor], sources: tuple[str, str, str, str], target: str) -> dict[str, Tensor]:
    """`sources`: the modules of query, key, value and output."""
    key, value = (affine(state, source, "") for source in sources[1:3])
    return {
        **affine(state, sources[0], f"{target}.query"),
        **{f"{target}.key_value{kind}": torch.stack([key[kind], value[kind]]) for kind in key},
        **affine(state, sources[3], f"{target}.projection"),
    }


def gated_mlp(state: Mapping[str, Tensor], sources: tuple[str, str, str], target: str) -> dict[str, Tensor]:
    """`sources`: the modules of gate, up and down."""
    gate, up = (affine(state, source, "") for source in sources[:2])
    return {
        **{f"{target}.gate_up{kind}": torch.stack([gate[kind], up[kind]]) for kind in gate},
        **affine(state, sources[2], f"{target}.down"),
    }


def fuse_qkv(query: Tensor, key: Tensor, value: Tensor, model: ModelConfig) -> Tensor:
    """[n d, ...], [g d, ...], [g d, ...] -> [g (n/g + 2) d, ...], ordered as `models.attention` reads it."""
    groups = complete_model(model).num_query_groups
    by_group = [part.unflatten(0, (groups, -1)) for part in (query, key, value)]
    return torch.cat(by_group, dim=1).flatten(0, 1)

"""Which parameters decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into matrices, which decay, and vectors (biases, norm weights), which do not.

    Frozen parameters are left out, a tied one is taken once, and a group without parameters is dropped: a pipeline
    stage may well hold no matrix or no vector, and ZeRO cannot flatten nothing.

    Returns:
        Groups for `torch.optim.Optimizer` with the extra key `name`: `matrices` or `vectors`.
    """
    unique = {id(parameter): parameter for _, parameter in named_parameters if parameter.requires_grad}
    matrices = [parameter for parameter in unique.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in unique.values() if parameter.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"name": "matrices", "params": matrices, "weight_decay": weight_decay},
        {"name": "vectors", "params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]

"""Which parameters have weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into matrices, which have weight decay, and vectors (biases, norm weights), which do not.

    Frozen parameters are left out, a tied one is taken once, and an empty group is dropped: a pipeline stage may have
    no matrices or no vectors, and ZeRO cannot flatten an empty group.

    Returns:
        Groups for `torch.optim.Optimizer` with the extra key `name`: `matrices` or `vectors`.
    """
    matrices: dict[int, nn.Parameter] = {}
    vectors: dict[int, nn.Parameter] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            # A stacked bias, such as that of SwiGLU's gate and up, has two dimensions but is not a matrix.
            dims = len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3's own parameters are flat and empty
            is_matrix = dims >= 2 and not name.endswith("bias")
            (matrices if is_matrix else vectors)[id(parameter)] = parameter
    groups: list[dict[str, Any]] = [
        {"name": "matrices", "params": list(matrices.values()), "weight_decay": weight_decay},
        {"name": "vectors", "params": list(vectors.values()), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]

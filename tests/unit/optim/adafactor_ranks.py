"""What each rank of `test_adafactor.py` runs: Adafactor over slices of given full tensors."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lite.optim.adafactor import Adafactor
from megatron_lite.parallel.sharding import Init, ShardSpec, mark, take_slice

# name: full shape, sharded dimension, padded size of it. Two ranks: `few` has no true row on rank 1.
TENSORS: dict[str, tuple[tuple[int, ...], int | None, int | None]] = {
    "column": ((8, 6), 0, None),
    "column_bias": ((8,), 0, None),
    "row": ((6, 8), 1, None),
    "norm": ((6,), None, None),
    "replicated": ((5, 6), None, None),
    "vocabulary": ((9, 6), 0, 12),
    "few": ((3, 6), 0, 8),
    "stacked": ((3, 8, 6), 1, None),
    "leading": ((4, 5, 6), 0, None),
}
STEPS = 4


def full_tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Rows of very different size: a mean over a slice is far from the mean over the whole.
    return {
        name: torch.randn(shape, generator=generator)
        * torch.logspace(-1, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
        for name, (shape, _, _) in TENSORS.items()
    }


def trained_slices(tensor_size: int, use_group: bool = True) -> dict[str, Tensor]:
    """The parameters of this rank after STEPS updates with gradients that every layout shares."""
    group = dist.group.WORLD if tensor_size > 1 and use_group else None
    rank = dist.get_rank() if tensor_size > 1 else 0
    parameters = {}
    for name, value in full_tensors(0).items():
        shape, dim, padded = TENSORS[name]
        spec = ShardSpec(shape, dim, Init.zeros(), padded)
        parameters[name] = nn.Parameter(take_slice(value, spec, rank, tensor_size).clone())
        mark(parameters[name], spec)
    optimizer = Adafactor(parameters.values(), lr=0.05, weight_decay=0.1, tensor_group=group)
    for step in range(STEPS):
        for name, gradient in full_tensors(step + 1).items():
            spec = parameters[name].shard_spec
            parameters[name].grad = take_slice(gradient, spec, rank, tensor_size).clone()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}

"""The micro-batches of a step, moved to the device at once and without a wait.

A copy from ordinary memory makes the host wait for the device. So all tensors of a step are collected in page-locked
memory, one buffer for each dtype, and copied from there while the device is still busy with the step before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from megatron_lite.data.samples.batch import MicroBatch


def uploaded(batches: Sequence[MicroBatch], device: torch.device) -> Sequence[MicroBatch]:
    """These micro-batches on the device: one asynchronous copy for each dtype. On a CPU they stay as they are.

    Micro-batches of one step share their memory on the device, so they must not be changed in place.
    """
    if device.type == "cpu":
        return batches
    leaves, form = tree_flatten(list(batches))
    places: dict[torch.dtype, list[int]] = {}
    for place, leaf in enumerate(leaves):
        if leaf is not None:  # samples without a class
            places.setdefault(leaf.dtype, []).append(place)
    for dtype, own in places.items():
        moved = _moved([leaves[place] for place in own], dtype, device)
        for place, tensor in zip(own, moved, strict=True):
            leaves[place] = tensor
    return tree_unflatten(leaves, form)


def _moved(tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    sizes = [tensor.numel() for tensor in tensors]
    pinned = torch.empty(sum(sizes), dtype=dtype, pin_memory=device.type == "cuda")
    torch.cat([tensor.reshape(-1) for tensor in tensors], out=pinned)
    # torch frees page-locked memory only after the copies from it have finished.
    parts = pinned.to(device, non_blocking=True).split(sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

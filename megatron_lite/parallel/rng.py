"""Dropout masks as a pure function of (seed, sample, layer, site), so that no generator state has to be kept.

A running generator gives masks that depend on everything drawn before: on the layout, on recomputation, on a resume.
Here torch's generator is seeded anew for each mask from a hash of what the mask is for, and put back afterwards.

Two states, as in Megatron: `replicated` gives all ranks of a tensor-parallel group one mask, for activations that they
hold in common; `tensor_parallel` adds the rank to the key, for shards (attention heads, slices of the sequence).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class DropoutKey(NamedTuple):
    """The key of the dropout masks of one forward pass of one layer."""

    layer_name: str
    first_sample: int
    """Global index of the micro-batch's first sample."""


class RngStates:
    """Keys and seeds of all dropout masks of one rank."""

    def __init__(self, seed: int, *, tensor_rank: int, device: torch.device) -> None:
        self._seed = seed
        self._tensor_rank = tensor_rank
        self._device = device
        self._first_sample = 0
        self._micro_batch_size = 1
        self._forwards: Counter[str] = Counter()

    def begin_step(self, first_sample: int, micro_batch_size: int) -> None:
        """Start a training step.

        Args:
            first_sample: global index of the first sample of this data-parallel rank's first micro-batch.
            micro_batch_size: samples of one micro-batch; this rank's micro-batches follow each other.
        """
        self._first_sample = first_sample
        self._micro_batch_size = micro_batch_size
        self._forwards.clear()

    def next_key(self, layer_name: str) -> DropoutKey:
        """The key of this layer's next micro-batch. Call it outside of recomputed code, which runs twice."""
        micro_batch = self._forwards[layer_name]
        self._forwards[layer_name] += 1
        return DropoutKey(layer_name, self._first_sample + micro_batch * self._micro_batch_size)

    @contextmanager
    def replicated(self, key: DropoutKey, site: str) -> Iterator[None]:
        """Draw the same on all ranks of the tensor-parallel group. `site` distinguishes the masks of one layer."""
        with self._seeded(stable_hash(self._seed, *key, site)):
            yield

    @contextmanager
    def tensor_parallel(self, key: DropoutKey, site: str) -> Iterator[None]:
        """Draw differently on each rank of the tensor-parallel group."""
        with self._seeded(stable_hash(self._seed, *key, site, self._tensor_rank)):
            yield

    @contextmanager
    def _seeded(self, seed: int) -> Iterator[None]:
        generator = self._default_generator()
        state = generator.get_state()
        generator.manual_seed(seed)
        try:
            yield
        finally:
            generator.set_state(state)

    def _default_generator(self) -> torch.Generator:
        if self._device.type != "cuda":
            return torch.default_generator
        torch.cuda.init()
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        return torch.cuda.default_generators[index]


def stable_hash(*parts: object) -> int:
    """A seed in [0, 2^63) that depends on nothing but the parts: not on the process, nor on PYTHONHASHSEED."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

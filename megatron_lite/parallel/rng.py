"""Stateless dropout: masks are a pure function of (seed, sample, layer, site), so checkpoints hold no RNG state.

With a stateful generator, a mask depends on everything drawn before it: on the layout, on recomputation, on a resume.
Here torch's generator is seeded for each mask with a hash of the mask's key, and its state is restored afterwards.
In a compiled block `parallel/graph_ops.py` does the same, with a key that is a tensor.

Two modes, as in Megatron: `replicated` gives all ranks of a tensor-parallel group the same mask, for activations that
are replicated on them; `tensor_parallel` adds the rank to the key, for shards (attention heads, slices of the
sequence).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

_SAMPLE_BYTES, _NAME_BYTES = 8, 120


class DropoutKey(NamedTuple):
    """Identifies the dropout masks of one layer for one micro-batch."""

    layer_name: str
    first_sample: int
    """Global index of the micro-batch's first sample."""

    def packed(self) -> Tensor:
        """[128] uint8 on the CPU: an input of a compiled block, which then serves every layer and micro-batch."""
        name = self.layer_name.encode()
        assert len(name) <= _NAME_BYTES, f"{self.layer_name} is longer than {_NAME_BYTES} bytes"
        sample = self.first_sample.to_bytes(_SAMPLE_BYTES, "little")
        return torch.frombuffer(bytearray(sample + name.ljust(_NAME_BYTES, b"\0")), dtype=torch.uint8)

    @classmethod
    def unpacked(cls, packed: Tensor) -> DropoutKey:
        """The inverse of `packed`."""
        content = packed.numpy().tobytes()
        sample, name = content[:_SAMPLE_BYTES], content[_SAMPLE_BYTES:]
        return cls(name.rstrip(b"\0").decode(), int.from_bytes(sample, "little"))


Key: TypeAlias = DropoutKey | Tensor
"""A tensor in compiled blocks: `DropoutKey.packed`."""


class RngStates:
    """Keys and seeds of all dropout masks of one rank."""

    def __init__(self, seed: int, *, tensor_rank: int, device: torch.device) -> None:
        self.seed = seed
        self.tensor_rank = tensor_rank
        self._device = device
        self._first_sample = 0
        self._micro_batch_size = 1
        self._forwards: Counter[str] = Counter()

    def begin_step(self, first_sample: int, micro_batch_size: int) -> None:
        """Start a training step.

        Args:
            first_sample: global index of the first sample of this data-parallel rank's first micro-batch.
            micro_batch_size: samples per micro-batch; the samples of this rank's micro-batches are consecutive.
        """
        self._first_sample = first_sample
        self._micro_batch_size = micro_batch_size
        self._forwards.clear()

    def next_key(self, layer_name: str) -> DropoutKey:
        """The key for this layer's next micro-batch. It advances a counter, so call it outside recomputed code, which
        runs twice and must draw the same mask both times."""
        micro_batch = self._forwards[layer_name]
        self._forwards[layer_name] += 1
        return DropoutKey(layer_name, self._first_sample + micro_batch * self._micro_batch_size)

    @contextmanager
    def replicated(self, key: DropoutKey, site: str) -> Iterator[None]:
        """Draw the same numbers on all ranks of the tensor-parallel group. `site` tells the masks of a layer apart."""
        with seeded(self._device, stable_hash(self.seed, *key, site)):
            yield

    @contextmanager
    def tensor_parallel(self, key: DropoutKey, site: str) -> Iterator[None]:
        """Draw different numbers on each rank of the tensor-parallel group."""
        with seeded(self._device, stable_hash(self.seed, *key, site, self.tensor_rank)):
            yield


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the default generator of the device: dropout and fused attention draw from it and take no other."""
    generator = _default_generator(device)
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type != "cuda":
        return torch.default_generator
    torch.cuda.init()
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


def stable_hash(*parts: object) -> int:
    """A seed in [0, 2^63) that depends only on the parts; Python's `hash` differs between processes for strings."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

"""Which source a sample comes from: exact shares, without state.

Samples are dealt in blocks of BLOCK. In every block each source has the same whole number of places, so that the
n-th sample of a source is found by arithmetic alone. Its places are spread evenly over the block with a jitter, so
that short stretches keep the shares too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from megatron_lite.data.sampler import raw_bits
from megatron_lite.errors import ConfigError

BLOCK = 65_536


def normalised(weights: Sequence[float], num_sources: int, key: str = "data.weights") -> tuple[float, ...]:
    """Weights as shares that sum to 1.

    Raises:
        ConfigError: wrong count, a weight that is negative or no number, or a sum of zero.
    """
    shown = "[" + ", ".join(f"{weight:g}" for weight in weights) + "]"
    if len(weights) != num_sources:
        raise ConfigError(
            f"{key}={shown} has {len(weights)} entries for {num_sources} sources; give one weight for each source"
        )
    if not all(np.isfinite(weight) and weight >= 0 for weight in weights):
        raise ConfigError(f"{key}={shown} must hold numbers that are 0 or more; correct the negative or infinite ones")
    total = float(sum(weights))
    if total == 0:
        raise ConfigError(f"{key}={shown} sums to 0; give at least one source a positive weight")
    return tuple(weight / total for weight in weights)


def places_per_block(weights: Sequence[float], block: int = BLOCK) -> npt.NDArray[np.int64]:
    """Whole numbers that sum to `block`, nearest to weights x block by largest remainder. Weights sum to 1.

    Raises:
        ConfigError: a positive weight is too small to get a place.
    """
    exact = np.asarray(weights, np.float64) * block
    places = np.floor(exact).astype(np.int64)
    missing = block - int(places.sum())
    by_remainder = np.argsort(-(exact - places), kind="stable")
    places[by_remainder[:missing]] += 1
    for i, weight in enumerate(weights):
        if weight > 0 and places[i] == 0:
            raise ConfigError(
                f"data.weights[{i}]={weight:.3g} of the blend is below its resolution of 1/{block:,}; "
                "give it a larger weight, weight 0, or join its text with another source"
            )
    return places


class Blend:
    """Maps a global sample index to (source, index within the source)."""

    def __init__(self, weights: Sequence[float], seed: int, block: int = BLOCK) -> None:
        self.places = places_per_block(weights, block)
        self._block = block
        self._seed = seed
        self._table = lru_cache(maxsize=2)(self._build_table)

    def __call__(self, index: int) -> tuple[int, int]:
        block, place = divmod(index, self._block)
        sources, ranks = self._table(block)
        source = int(sources[place])
        return source, block * int(self.places[source]) + int(ranks[place])

    def index_of(self, source: int, inner: int) -> int:
        """The global index of a source's sample: the inverse of a call. The source must have places."""
        block, rank = divmod(inner, int(self.places[source]))
        sources, ranks = self._table(block)
        return block * self._block + int(np.flatnonzero((sources == source) & (ranks == rank))[0])

    def _build_table(self, block: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Source of every place of a block, and its rank among the places of that source: two arrays [block]."""
        sources = np.repeat(np.arange(len(self.places), dtype=np.int32), self.places)
        ranks = np.concatenate([np.arange(count, dtype=np.int32) for count in self.places])
        jitter = (raw_bits(self._block, self._seed, block) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        order = np.argsort((ranks + jitter) / self.places[sources], kind="stable")
        return sources[order], ranks[order]

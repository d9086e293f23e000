"""The random choices of a sample, made from raw bits, because numpy's distributions may change between versions."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from megatron_lite.data.sampler import bit_stream

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


class Draws:
    """A sequence of random choices, determined by the key and by the order of the calls."""

    def __init__(self, key: int) -> None:
        self._stream = bit_stream(key)

    def bits(self, count: int) -> npt.NDArray[np.uint64]:
        return np.asarray(self._stream.random_raw(count), np.uint64)

    def uniform(self) -> float:
        """A uniform number in [0, 1), a multiple of 2^-53."""
        return (int(self._stream.random_raw()) >> 11) * 2.0**-53

    def uniforms(self, count: int) -> Floats:
        """[count] numbers like those of `uniform`."""
        return np.asarray((self.bits(count) >> np.uint64(11)) * 2.0**-53, np.float64)

    def below(self, bound: int) -> int:
        """An integer in range(bound), uniform up to a bias of 2^-64 x bound."""
        return (int(self._stream.random_raw()) * bound) >> 64

    def integers(self, bounds: Ints) -> Ints:
        """[len(bounds)] integers: the i-th in range(bounds[i]), uniform up to a bias of 2^-53 x bound."""
        return (self.uniforms(len(bounds)) * bounds).astype(np.int64)  # u < 1, so u x bound never rounds up to bound

    def order(self, count: int) -> Ints:
        """A permutation of range(count)."""
        return np.argsort(self.bits(count), kind="stable")

    def choose(self, count: int, total: int) -> Flags:
        """[total] flags, `count` of them True; all such choices are equally likely."""
        is_chosen = np.zeros(total, np.bool_)
        if count:
            is_chosen[np.argpartition(self.bits(total), count - 1)[:count]] = True
        return is_chosen

    def segments(self, total: int, count: int) -> Ints:
        """[count] positive lengths that sum to `total`; all such divisions are equally likely."""
        assert 1 <= count <= total
        is_bound = np.ones(total + 1, np.bool_)
        is_bound[1:-1] = self.choose(count - 1, total - 1)
        return np.diff(np.flatnonzero(is_bound))

    def from_table(self, cumulative: Floats, count: int) -> Ints:
        """[count] indices; i has the probability cumulative[i] - cumulative[i - 1]. The last entry must be 1."""
        return cumulative.searchsorted(self.uniforms(count), side="right")


def poisson_table(mean: float) -> Floats:
    """Cumulative Poisson probabilities of 0, 1, 2, ..., until the rest is negligible in double precision."""
    assert mean > 0
    values = range(int(mean + 12 * math.sqrt(mean)) + 30)
    chances = [math.exp(value * math.log(mean) - mean - math.lgamma(value + 1)) for value in values]
    table = np.cumsum(chances)
    table[-1] = 1.0
    return table

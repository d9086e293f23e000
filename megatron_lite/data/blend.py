"""Which source each sample comes from: exact shares, computed from the sample number alone, without an index.

The sources form a binary tree. Each split divides the samples that reach it between its two sides: of the first n
samples, the left side gets floor(n x share + phase). The share is an exact fraction, and the phase in [0, 1) depends on
the seed. So shares are never rounded, one walk from the root maps a sample number to its source, and one walk back maps
a sample of a source to its global number.

Error bound: a split is always less than one sample away from its exact share of what reaches it. What reaches it may
itself be off because of the splits above, scaled by its share. No side of two or more sources has more than 2/3 of its
split, so such a side is less than 1 + 2/3 + (2/3)^2 + ... = 3 samples off. A single source with more than 2/3 of its
split has at most half of the split above, because the sources before it are no smaller: it is less than 1 + 1 + 3/2
off. So after any number of samples
    - of two sources, each has had the floor or the ceiling of its exact share, and
    - each of any number of sources is less than 3.5 samples away from it.
A bound of 1 for all sources is possible (R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32, 1980),
but its known algorithm has to start from the first sample, so it allows no random access.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import gcd, isfinite, lcm

from megatron_lite.data.sampler import stream_key
from megatron_lite.errors import ConfigError

ORDER = 2
"""Version of the order; increase it when the same shares and seed give another order of the sources. Version 1 used
blocks of 65,536 samples."""


def normalised(weights: Sequence[float], num_sources: int) -> tuple[Fraction, ...]:
    """data.weights as exact shares that sum to 1: 0.1 is exactly one tenth, not the nearest binary fraction.

    Raises:
        ConfigError: wrong count, a weight that is negative or not finite, or a sum of zero.
    """
    shown = "[" + ", ".join(f"{weight:g}" for weight in weights) + "]"
    if len(weights) != num_sources:
        raise ConfigError(
            f"data.weights={shown} has {len(weights)} entries for {num_sources} sources; give one weight for each "
            "source"
        )
    if not all(isfinite(weight) and weight >= 0 for weight in weights):
        raise ConfigError(f"data.weights={shown} must hold numbers >= 0; correct the negative or infinite ones")
    exact = [Fraction(repr(float(weight))) if isinstance(weight, float) else Fraction(weight) for weight in weights]
    if not any(exact):
        raise ConfigError(f"data.weights={shown} sums to 0; give at least one source a positive weight")
    return shares_of(exact)


def shares_of(sizes: Sequence[Fraction | int]) -> tuple[Fraction, ...]:
    """Sizes, such as numbers of tokens, as shares that sum to 1. At least one of them must be positive."""
    exact = [Fraction(size) for size in sizes]
    total = sum(exact, Fraction())
    return tuple(size / total for size in exact)


@dataclass
class _Split:
    """Sends `left_size` of every `size` samples to the left side."""

    left_size: int
    size: int
    phase: int
    """In range(size): the phase in units of 1 / size."""
    left: int = 0
    """Index of a split (>= 0), or ~source for a leaf."""
    right: int = 0

    def dealt_left(self, count: int) -> int:
        """How many of the first `count` samples go to the left side."""
        return (count * self.left_size + self.phase) // self.size

    def place_of_left(self, rank: int) -> int:
        """Number of the left side's `rank`-th sample, both from 0: the inverse of `dealt_left`."""
        return -((self.phase - (rank + 1) * self.size) // self.left_size) - 1

    def place_of_right(self, rank: int) -> int:
        mirrored = self.size - 1 - self.phase  # n - floor(n x share + phase) is a floor of the same form
        return -((mirrored - (rank + 1) * self.size) // (self.size - self.left_size)) - 1


class Blend:
    """Maps a global sample index to (source, index within the source).

    Args:
        weights: of the sources, in any unit; a source of weight 0 is never drawn.
    """

    def __init__(self, weights: Sequence[Fraction | int], seed: int) -> None:
        scale = lcm(*(Fraction(weight).denominator for weight in weights))
        sizes = [int(weight * scale) for weight in weights]
        used = sorted((source for source, size in enumerate(sizes) if size), key=lambda source: -sizes[source])
        self._splits: list[_Split] = []
        self._paths: dict[int, list[tuple[_Split, bool]]] = {}
        self._root = self._build(used, sizes, seed)

    def __call__(self, index: int) -> tuple[int, int]:
        node, count = self._root, index
        while node >= 0:
            split = self._splits[node]
            dealt = split.dealt_left(count)
            if split.dealt_left(count + 1) > dealt:
                node, count = split.left, dealt
            else:
                node, count = split.right, count - dealt
        return ~node, count

    def index_of(self, source: int, inner: int) -> int:
        """The global index of a sample of a source: the inverse of `__call__`. Its weight must be positive."""
        for split, is_left in reversed(self._paths[source]):
            inner = split.place_of_left(inner) if is_left else split.place_of_right(inner)
        return inner

    def _build(self, used: list[int], sizes: list[int], seed: int) -> int:
        """Build the tree from the root down, the largest sources first; return the root."""
        below: list[tuple[list[int], list[tuple[_Split, bool]]]] = [(used, [])]
        while below:
            group, path = below.pop()
            if len(group) == 1:
                node, self._paths[group[0]] = ~group[0], path
            else:
                node, cut = len(self._splits), _balanced_cut([sizes[source] for source in group])
                split = _split([sizes[source] for source in group], cut, stream_key(seed, node))
                self._splits.append(split)
                below += [(group[:cut], [*path, (split, True)]), (group[cut:], [*path, (split, False)])]
            if path:
                parent, is_left = path[-1]
                setattr(parent, "left" if is_left else "right", node)
        return 0 if self._splits else ~used[0]


def _split(sizes: list[int], cut: int, key: int) -> _Split:
    left, total = sum(sizes[:cut]), sum(sizes)
    unit = gcd(left, total)
    return _Split(left // unit, total // unit, phase=key * (total // unit) >> 64)


def _balanced_cut(descending: list[int]) -> int:
    """How many of the largest sources form the left side: the fewest that have at least a third of the total.

    Either that is one source, or each source has less than a third: then neither side has more than two thirds.
    """
    total = sum(descending)
    return next(cut for cut, size in enumerate(accumulate(descending), start=1) if 3 * size >= total)

"""Orders are permutations, depend on nothing but their key, and never change between versions."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_lite.data.sampler import Permutation, mix64, mix64_array, raw_bits, shuffled_order, stream_key


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000, 4095, 4096, 4097])
def test_permutation_visits_every_number_once(size: int) -> None:
    permutation = Permutation(size, 1234, 5)
    assert sorted(permutation(i) for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [10**5 + 3, 2**31, 2**31 + 1, 10**12])
def test_permutation_of_a_large_size_stays_inside_and_is_injective(size: int) -> None:
    permutation = Permutation(size, 42)
    images = {permutation(i) for i in [*range(1000), *range(size - 1000, size)]}
    assert len(images) == 2000
    assert all(0 <= image < size for image in images)


def test_permutations_of_different_keys_differ() -> None:
    orders = {tuple(Permutation(100, seed, epoch)(i) for i in range(100)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_permutation_is_far_from_the_identity_and_unbiased() -> None:
    """Mean displacement of a random permutation of n is n / 3; neighbours are not kept together."""
    size = 5000
    images = np.array([Permutation(size, 7)(i) for i in range(size)])
    assert abs(np.abs(images - np.arange(size)).mean() / size - 1 / 3) < 0.02
    assert (np.abs(np.diff(images)) == 1).mean() < 0.005


def test_shuffled_order_is_a_permutation_of_its_key() -> None:
    order = shuffled_order(1000, 3, 1)
    assert sorted(order.tolist()) == list(range(1000))
    assert np.array_equal(order, shuffled_order(1000, 3, 1))
    assert not np.array_equal(order, shuffled_order(1000, 3, 2))
    assert not np.array_equal(order, shuffled_order(1000, 4, 1))


def test_orders_are_pinned() -> None:
    """These numbers decide the data order of every run: a change would make old runs unrepeatable."""
    assert mix64(0) == 0xE220A8397B1DCDAF  # first output of SplitMix64 with seed 0
    assert shuffled_order(8, 1234, 0).tolist() == PINNED_ORDER
    assert [Permutation(8, 1234, 0)(i) for i in range(8)] == PINNED_PERMUTATION


PINNED_ORDER = [0, 7, 1, 5, 2, 6, 4, 3]
PINNED_PERMUTATION = [1, 4, 2, 6, 5, 0, 3, 7]


def test_keys_depend_on_every_part_and_its_place() -> None:
    keys = [stream_key(1, 2), stream_key(2, 1), stream_key(1), stream_key(1, 2, 0), stream_key(0, 1, 2)]
    assert len(set(keys)) == len(keys)
    assert raw_bits(4, 1).tolist() != raw_bits(4, 2).tolist()


def test_bits_are_those_of_philox_with_two_keys() -> None:
    key = np.array([stream_key(7, 3), stream_key(2, 7, 3)], np.uint64)
    assert np.array_equal(raw_bits(9, 7, 3), np.random.Philox(key=key).random_raw(9))


def test_vector_and_scalar_hash_agree() -> None:
    values = [0, 1, 2, 2**63, 2**64 - 1, 123456789]
    assert mix64_array(np.array(values, np.uint64)).tolist() == [mix64(value) for value in values]

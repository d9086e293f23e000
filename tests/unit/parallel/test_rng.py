"""Keys and seeds of dropout masks, without processes."""

from __future__ import annotations

import subprocess
import sys

import torch
import torch.nn.functional as F

from megatron_lite.parallel.rng import DropoutKey, RngStates, stable_hash

CPU = torch.device("cpu")


def _states(seed: int = 1, tensor_rank: int = 0) -> RngStates:
    return RngStates(seed, tensor_rank=tensor_rank, device=CPU)


def _mask(states: RngStates, key: DropoutKey, site: str, kind: str = "replicated") -> torch.Tensor:
    with getattr(states, kind)(key, site):
        return F.dropout(torch.ones(64), 0.5)


def test_a_mask_depends_on_seed_sample_layer_and_site():
    key = DropoutKey("layers.0", 8)
    base = _mask(_states(), key, "mlp")
    assert torch.equal(base, _mask(_states(), key, "mlp"))
    others = [
        _mask(_states(seed=2), key, "mlp"),
        _mask(_states(), DropoutKey("layers.0", 9), "mlp"),
        _mask(_states(), DropoutKey("layers.1", 8), "mlp"),
        _mask(_states(), key, "attention"),
    ]
    assert not any(torch.equal(base, other) for other in others)


def test_replicated_masks_ignore_the_tensor_rank_and_tensor_parallel_masks_do_not():
    key = DropoutKey("layers.0", 8)
    first, second = _states(tensor_rank=0), _states(tensor_rank=1)
    assert torch.equal(_mask(first, key, "mlp"), _mask(second, key, "mlp"))
    assert not torch.equal(_mask(first, key, "mlp", "tensor_parallel"), _mask(second, key, "mlp", "tensor_parallel"))


def test_the_generator_goes_on_as_if_nothing_had_been_drawn():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    _mask(_states(), DropoutKey("layers.0", 0), "mlp")
    assert torch.equal(torch.rand(4), expected)


def test_keys_follow_the_micro_batches_of_each_layer():
    states = _states()
    states.begin_step(first_sample=96, micro_batch_size=4)
    assert [states.next_key("layers.0") for _ in range(3)] == [DropoutKey("layers.0", s) for s in (96, 100, 104)]
    assert states.next_key("layers.1") == DropoutKey("layers.1", 96)
    states.begin_step(first_sample=128, micro_batch_size=4)
    assert states.next_key("layers.0") == DropoutKey("layers.0", 128)


def test_data_parallel_ranks_draw_the_keys_that_one_rank_draws():
    def keys(first_sample: int, count: int) -> list[DropoutKey]:
        states = _states()
        states.begin_step(first_sample, micro_batch_size=2)
        return [states.next_key("layers.0") for _ in range(count)]

    assert keys(0, 2) + keys(4, 2) == keys(0, 4)


def test_the_hash_is_the_same_in_another_process():
    code = "from megatron_lite.parallel.rng import stable_hash; print(stable_hash(1, 'layers.0', 'mlp'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == stable_hash(1, "layers.0", "mlp")


def test_the_hash_depends_on_how_its_parts_are_divided():
    assert stable_hash("ab", "c") != stable_hash("a", "bc")
    assert 0 <= stable_hash("x") < 2**63

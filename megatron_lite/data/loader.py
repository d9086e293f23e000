"""From a global sample index to the tensors of a step.

b: micro-batch size, s: sequence length.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.blend import normalised
from megatron_lite.data.dataset import CausalLMDataset, SampleDataset, blended, samples_in
from megatron_lite.data.prepared import PreparedData, Shard
from megatron_lite.errors import ConfigError, DataError

VALIDATION_SEED = 0  # runs that differ in their seed are compared on the same samples


class MicroBatch(NamedTuple):
    """Input, targets and weights of one forward pass."""

    tokens: torch.Tensor  # [b, s] int64
    labels: torch.Tensor  # [b, s] int64: the token that follows each
    loss_weights: torch.Tensor  # [b, s] fp32: 0 where the prediction does not count


def training_dataset(prepared: PreparedData, config: RunConfig) -> SampleDataset:
    """The training samples of a run, in the order that train.seed decides.

    Raises:
        DataError: a source has fewer tokens than one sample needs.
        ConfigError: data.mask_loss_after_eod without a known end-of-document token.
    """
    for shard, weight in zip(prepared.train, prepared.weights, strict=True):
        if weight > 0 and samples_in(shard.tokens, config.data.seq_length) == 0:
            raise _too_small(shard, config.data.seq_length, "training", "add text")
    used = [(shard, weight) for shard, weight in zip(prepared.train, prepared.weights, strict=True) if weight > 0]
    return _dataset(used, prepared, config, config.train.seed)


def validation_dataset(prepared: PreparedData, config: RunConfig) -> SampleDataset:
    """The validation samples; sample i is the same at every validation. Sources too small for one sample stay out.

    Raises:
        DataError: no source holds out enough tokens for one sample.
    """
    pairs = list(zip(prepared.validation, prepared.validation_weights, strict=True))
    long_enough = [pair for pair in pairs if pair[1] > 0 and samples_in(pair[0].tokens, config.data.seq_length) > 0]
    if not long_enough:
        largest = max(prepared.validation, key=lambda shard: shard.tokens)
        raise _too_small(largest, config.data.seq_length, "validation", "raise data.validation_fraction")
    return _dataset(long_enough, prepared, config, VALIDATION_SEED)


def micro_batches(
    dataset: SampleDataset,
    first_sample: int,
    micro_batch_size: int,
    num_micro_batches: int,
    *,
    mask_loss_after_eod: bool = False,
) -> list[MicroBatch]:
    """Consecutive samples from `first_sample` on, as micro-batches.

    Args:
        first_sample: global index of this rank's first sample of the step.
        mask_loss_after_eod: weight 0 where the input is the end-of-document token: what follows it is another
            document's first token.
    """
    count = micro_batch_size * num_micro_batches
    samples = np.empty((count, dataset.seq_length + 1), np.int64)  # [count, s + 1]
    for row in range(count):
        dataset.read_into(first_sample + row, samples[row])
    stacked = torch.from_numpy(samples)
    tokens = stacked[:, :-1].contiguous()
    labels = stacked[:, 1:].contiguous()
    weights = torch.ones(tokens.shape, dtype=torch.float32)
    if mask_loss_after_eod:
        assert dataset.eod_id is not None
        weights = (tokens != dataset.eod_id).to(torch.float32)
    size = micro_batch_size
    return list(map(MicroBatch, tokens.split(size), labels.split(size), weights.split(size)))


def _dataset(pairs: list[tuple[Shard, float]], prepared: PreparedData, config: RunConfig, seed: int) -> SampleDataset:
    if config.data.mask_loss_after_eod and prepared.eod_id is None:
        raise ConfigError(
            "data.mask_loss_after_eod=true needs the end-of-document token, and the shards came without a tokenizer; "
            "name its folder in data.tokenizer"
        )
    datasets = [CausalLMDataset(shard, config.data.seq_length, seed, prepared.eod_id) for shard, _ in pairs]
    return blended(datasets, normalised([weight for _, weight in pairs], len(pairs)), seed)


def _too_small(shard: Shard, seq_length: int, which: str, remedy: str) -> DataError:
    return DataError(
        f"data.seq_length={seq_length} needs at least {seq_length + 1:,} {which} tokens; {shard.source} has "
        f"{shard.tokens:,}; use a smaller data.seq_length, or {remedy}"
    )

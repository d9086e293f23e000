"""The model and batch that every system of the benchmark trains: in one place, so that all systems get the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_lite.config.derived import resolve, resolve_model
from megatron_lite.config.resolved import ResolvedConfig, ResolvedModel
from megatron_lite.config.schema import DataConfig, ModelConfig, ParallelConfig, Precision, RunConfig, TrainConfig
from megatron_lite.data.samples.batch import MicroBatch
from megatron_lite.data.special import Vocabulary
from megatron_lite.planning.flops import flops_per_token

LAYERS, HIDDEN, HEADS, SEQ_LENGTH, MICRO_BATCH = 6, 384, 6, 256, 4
TOKENS_PER_STEP = SEQ_LENGTH * MICRO_BATCH
SEED = 1234


@dataclass(frozen=True)
class Shape:
    """GPT-2 with layers of 384 and the vocabulary that is being measured."""

    vocab_size: int
    precision: Precision
    layers: int = LAYERS
    seq_length: int = SEQ_LENGTH
    micro_batch: int = MICRO_BATCH

    @property
    def tokens(self) -> int:
        """Of one micro-batch."""
        return self.micro_batch * self.seq_length

    def model(self) -> ResolvedModel:
        return resolve_model(
            ModelConfig(
                name="bench",
                num_layers=self.layers,
                hidden_size=HIDDEN,
                num_attention_heads=HEADS,
                max_position_embeddings=self.seq_length,
                vocab_size=self.vocab_size,
            )
        )

    def run(self, parallel: ParallelConfig, global_batch_size: int) -> ResolvedConfig:
        return resolve(
            RunConfig(
                model=self.model(),
                parallel=parallel,
                data=DataConfig(seq_length=self.seq_length),
                train=TrainConfig(
                    micro_batch_size=self.micro_batch,
                    global_batch_size=global_batch_size,
                    precision=self.precision,
                    seed=SEED,
                ),
            )
        )

    def flops_per_step(self) -> float:
        """FLOPs of one micro-batch, forward and backward; causal attention counts half."""
        return self.tokens * flops_per_token(self.model(), self.seq_length, self.vocab_size)

    def batch(self, seed: int = SEED) -> MicroBatch:
        """Random tokens [b, s]: speed does not depend on their values."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, self.vocab_size, (self.micro_batch, self.seq_length + 1), generator=generator)
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        return MicroBatch((inputs,), labels, torch.ones(inputs.shape))

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.vocab_size)

"""The configuration as all other rooms take it: every setting that a user may leave open has its value.

`derived.resolve` makes one, once in each process. Here stand the types, narrower than those of `schema.py`, and what
follows from the settings: the rank grid, the arithmetic of batches, lengths. Saved files are the same for both types.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from megatron_lite.config.launcher import LauncherConfig
from megatron_lite.config.lengths import decoder_length
from megatron_lite.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_lite.errors import ConfigError
from megatron_lite.parallel.topology import Topology


@dataclass
class _Complete:
    """No field that a class declares anew, keyword-only and without a default, holds None."""

    group: ClassVar[str]

    def __post_init__(self) -> None:
        still_open = [
            f"{self.group}.{one.name}" for one in fields(self) if one.kw_only and getattr(self, one.name) is None
        ]
        if still_open:
            raise ConfigError(f"{', '.join(still_open)} cannot be derived from the other settings; give a value")


@dataclass
class ResolvedModel(_Complete, ModelConfig):
    """A model all of whose sizes are known. Only the vocabulary may still come from the tokenizer."""

    group: ClassVar[str] = "model"
    num_query_groups: int = field(kw_only=True)
    head_size: int = field(kw_only=True)
    ffn_hidden_size: int = field(kw_only=True)

    @property
    def decoder_layers(self) -> int:
        """Of the decoder of an encoder_decoder; 0 = the model has one stack."""
        return self.num_decoder_layers or 0


@dataclass
class ResolvedParallel(_Complete, ParallelConfig):
    group: ClassVar[str] = "parallel"
    data_parallel_size: int = field(kw_only=True)


@dataclass
class ResolvedTrain(_Complete, TrainConfig):
    group: ClassVar[str] = "train"
    run_dir: str = field(kw_only=True)


@dataclass
class ResolvedLauncher(_Complete, LauncherConfig):
    group: ClassVar[str] = "launcher"
    num_processes: int = field(kw_only=True)


@dataclass
class ResolvedConfig(RunConfig):
    """Everything that decides a run, nothing of it open."""

    model: ResolvedModel = field(kw_only=True)
    parallel: ResolvedParallel = field(kw_only=True)
    train: ResolvedTrain = field(kw_only=True)
    launcher: ResolvedLauncher = field(kw_only=True)

    @cached_property
    def topology(self) -> Topology:
        """The rank grid."""
        parallel = self.parallel
        return Topology(
            data_parallel_size=parallel.data_parallel_size,
            tensor_parallel_size=parallel.tensor_parallel_size,
            pipeline_parallel_size=parallel.pipeline_parallel_size,
        )

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.train.run_dir)

    @property
    def processes_per_node(self) -> int:
        """Ranks on each node; node k has those from k times as many on."""
        launcher = self.launcher
        return launcher.processes_per_node or launcher.gpus_per_node or launcher.num_processes // launcher.nodes

    def num_micro_batches(self, global_batch_size: int | None = None) -> int:
        """Forward passes of one data-parallel rank in one step.

        Args:
            global_batch_size: sequences of that step; None = the full batch, at the end of any ramp.
        """
        batch = self.train.global_batch_size if global_batch_size is None else global_batch_size
        return batch // (self.train.micro_batch_size * self.parallel.data_parallel_size)

    @property
    def decoder_length(self) -> int:
        """Positions of the decoder; 0 = the model has one stack, of data.seq_length positions."""
        return decoder_length(self.objective, self.data.seq_length) or 0

    @property
    def tokens_per_sample(self) -> int:
        """Positions that the model reads in one sample: of its only stack, or of encoder and decoder together.

        The one meaning of `token` in tokens a step, tokens per second and FLOPs per token.
        """
        return self.data.seq_length + self.decoder_length

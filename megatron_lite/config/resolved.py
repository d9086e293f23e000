"""The configuration that the rest of the program uses: every setting that a user may leave open has a value.

`derived.resolve` creates it, once in each process. This module has the types, narrower than those of `schema.py`, and
values that follow from the settings: the rank grid, batches, lengths. Both types are saved as the same file.
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
    """Checks that no field redeclared by a class (keyword-only, without default) is None."""

    group: ClassVar[str]

    def __post_init__(self) -> None:
        still_open = [
            f"{self.group}.{one.name}" for one in fields(self) if one.kw_only and getattr(self, one.name) is None
        ]
        if still_open:
            raise ConfigError(f"{', '.join(still_open)} cannot be derived from the other settings; give a value")


@dataclass
class ResolvedModel(_Complete, ModelConfig):
    """A model whose sizes are all known. Only the vocabulary may still come from the tokenizer."""

    group: ClassVar[str] = "model"
    num_query_groups: int = field(kw_only=True)
    head_size: int = field(kw_only=True)
    ffn_hidden_size: int = field(kw_only=True)

    @property
    def decoder_layers(self) -> int:
        """Layers of an encoder_decoder's decoder; 0 = the model has one stack."""
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
    """Everything that decides a run, with no value left open."""

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
        """Ranks on each node; node k has the ranks from k times this number on."""
        launcher = self.launcher
        return launcher.processes_per_node or launcher.gpus_per_node or launcher.num_processes // launcher.nodes

    def num_micro_batches(self, global_batch_size: int | None = None) -> int:
        """Number of micro-batches of one data-parallel rank in one step.

        Args:
            global_batch_size: of that step; None = the full batch, reached at the end of any ramp.
        """
        batch = self.train.global_batch_size if global_batch_size is None else global_batch_size
        return batch // (self.train.micro_batch_size * self.parallel.data_parallel_size)

    @property
    def decoder_length(self) -> int:
        """Positions of the decoder; 0 = the model has one stack, of data.seq_length positions."""
        return decoder_length(self.objective, self.data.seq_length) or 0

    @property
    def tokens_per_sample(self) -> int:
        """Positions that the model reads per sample: of its single stack, or of encoder and decoder together.

        This is what `token` means in tokens per step, tokens per second and FLOPs per token.
        """
        return self.data.seq_length + self.decoder_length

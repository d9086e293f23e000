"""Values derived from the settings: sizes, counts and names. Pure arithmetic, with one place for each formula.

Legend: h hidden size, n heads, g query groups, d head size, f inner width of the MLP, v padded vocabulary, t tensor-
and p pipeline-parallel size.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar

from megatron_lite.config.launcher import LauncherName
from megatron_lite.config.ranges import MOST_PROCESSES
from megatron_lite.config.resolved import (
    ResolvedConfig,
    ResolvedLauncher,
    ResolvedModel,
    ResolvedParallel,
    ResolvedTrain,
)
from megatron_lite.config.schema import (
    Architecture,
    ModelConfig,
    Normalization,
    NormPlacement,
    ObjectiveName,
    PositionEmbedding,
    RunConfig,
)
from megatron_lite.parallel.topology import padded_vocab_size

T = TypeVar("T")

GATED_MULTIPLE = 64  # an inner width of 8h/3 is rounded up to this, so that matrices stay divisible


def fill_in_model(model: ModelConfig) -> ModelConfig:
    """The model with every None filled in that follows from other sizes (the vocabulary comes from the tokenizer).

    head_size stays None if num_attention_heads does not divide hidden_size; validation refuses that. num_decoder_layers
    stays None if there is no decoder stack.
    """
    hidden, heads = model.hidden_size, max(1, model.num_attention_heads)
    head_size = hidden // heads if model.head_size is None and hidden % heads == 0 else model.head_size
    decoder_layers = model.num_decoder_layers
    if decoder_layers is None and model.architecture is Architecture.encoder_decoder:
        decoder_layers = model.num_layers
    return replace(
        model,
        num_decoder_layers=decoder_layers,
        num_query_groups=heads if model.num_query_groups is None else model.num_query_groups,
        head_size=head_size,
        ffn_hidden_size=default_ffn_size(model) if model.ffn_hidden_size is None else model.ffn_hidden_size,
    )


def resolve_model(model: ModelConfig) -> ResolvedModel:
    """The model in the form that the code computing with it expects.

    Raises:
        ConfigError: num_attention_heads does not divide hidden_size, which validation would have refused.
    """
    return _as(ResolvedModel, fill_in_model(model))


def _as(kind: type[T], settings: Any) -> T:
    """The same settings as an instance of a narrower type."""
    return kind(**{one.name: getattr(settings, one.name) for one in fields(settings)})


def default_ffn_size(model: ModelConfig) -> int:
    """4h; if gated, 8h/3 rounded up: three matrices then have as many elements as two of 4h (arXiv 2002.05202)."""
    if not model.activation.is_gated:
        return 4 * model.hidden_size
    return -(-8 * model.hidden_size // (3 * GATED_MULTIPLE)) * GATED_MULTIPLE


def all_layers(model: ModelConfig) -> int:
    """Transformer layers that a pipeline splits: those of the single stack, or of the encoder followed by the decoder.

    Args:
        model: as `fill_in_model` returns it.
    """
    return model.num_layers + (model.num_decoder_layers or 0)


def data_parallel_size(config: RunConfig, world_size: int | None = None) -> int:
    """Number of replicas: the setting, or as many as the processes allow, or 1.

    Args:
        world_size: existing processes; None = as many as the launcher's settings request.
    """
    if config.parallel.data_parallel_size is not None:
        return config.parallel.data_parallel_size
    processes = world_size if world_size is not None else given_processes(config)
    return max(1, (processes or 1) // ranks_per_replica(config))


def given_processes(config: RunConfig) -> int | None:
    """Number of processes that the launcher's settings request; None = the layout decides."""
    launcher = config.launcher
    if launcher.num_processes is not None:
        return launcher.num_processes
    here = launcher.processes_per_node or launcher.gpus_per_node
    return None if here is None else launcher.nodes * here


def spans_machines(config: RunConfig) -> bool:
    """Whether ranks run on other machines than the one on which the launcher is started."""
    launcher = config.launcher
    return launcher.nodes > 1 or launcher.hostfile is not None or launcher.name is LauncherName.slurm


def ranks_per_replica(config: RunConfig) -> int:
    """Ranks that hold one copy of the model: t x p."""
    return max(1, config.parallel.tensor_parallel_size) * max(1, config.parallel.pipeline_parallel_size)


def has_next_sentence_head(config: RunConfig) -> bool:
    """Whether the model also predicts if the second part of a pair follows the first."""
    return config.objective.name is ObjectiveName.masked_lm_nsp


def padded_vocabulary(config: RunConfig, vocab_size: int) -> int:
    """Rows of the embedding over all tensor-parallel ranks, for a true vocabulary of `vocab_size`."""
    return padded_vocab_size(vocab_size, config.model.vocab_pad_multiple, config.parallel.tensor_parallel_size)


def run_directory(config: RunConfig) -> Path:
    """The run folder. Its name contains no time and no layout: the same command finds it again, under any layout.

    A shell does not expand the `~` in `train.run_dir=~/run`, so we do.
    """
    if config.train.run_dir is not None:
        return Path(os.path.expanduser(config.train.run_dir))  # Path's may raise, ahead of the rules
    return Path("runs") / f"{config.script}-{config.model.name}"


def fill_in(config: RunConfig, *, world_size: int | None = None, device: str | None = None) -> RunConfig:
    """Fill in everything that follows from other settings, before validation.

    Args:
        world_size: existing processes, which decide data_parallel_size if that is None.
        device: `cpu` or `cuda`, used if launcher.device is `auto`.
    """
    processes = world_size if world_size is not None else given_processes(config)
    if processes is not None and processes % ranks_per_replica(config):
        return config  # no layout has so many processes: validation reports it, and nothing can be derived from them
    replicas = data_parallel_size(config, processes)
    if replicas * ranks_per_replica(config) > MOST_PROCESSES:
        return config  # validation refuses this, too
    filled = replace(
        config,
        model=fill_in_model(config.model),
        parallel=replace(config.parallel, data_parallel_size=replicas),
        launcher=replace(
            config.launcher,
            num_processes=replicas * ranks_per_replica(config) if processes is None else processes,
            device=config.launcher.device if device is None else device,
        ),
    )
    if config.train.run_dir == "":
        return filled  # validation refuses it; as a path it would be the current folder
    return replace(filled, train=replace(filled.train, run_dir=str(run_directory(filled))))


def resolve(config: RunConfig, *, world_size: int | None = None, device: str | None = None) -> ResolvedConfig:
    """Resolve a valid configuration for use by the rest of the program. Frozen configurations are resolved ones.

    Args:
        world_size, device: as for `fill_in`.
    Raises:
        ConfigError: a setting is still None, which validation would have refused with a reason.
    """
    filled = fill_in(config, world_size=world_size, device=device)
    return _as(
        ResolvedConfig,
        replace(
            filled,
            model=_as(ResolvedModel, filled.model),
            parallel=_as(ResolvedParallel, filled.parallel),
            train=_as(ResolvedTrain, filled.train),
            launcher=_as(ResolvedLauncher, filled.launcher),
        ),
    )


@dataclass(frozen=True)
class StageContent:
    """The parts of a model on one pipeline stage, apart from copies that the stage needs anyway."""

    layers: int
    """Layers of the single stack, or of the encoder."""
    decoder_layers: int
    """Layers of an encoder_decoder's decoder."""
    first: bool
    last: bool
    begins_decoder: bool
    """Has the decoder's first layer and, before it, the encoder's final norm and the decoder's embedding."""


def stage_content(model: ResolvedModel, start: int, stop: int, *, first: bool, last: bool) -> StageContent:
    """A stage with the transformer layers [start, stop), in an encoder_decoder those of the encoder first."""
    encoder = model.num_layers
    here = max(0, min(stop, encoder) - start)
    return StageContent(
        layers=here,
        decoder_layers=stop - start - here,
        first=first,
        last=last,
        begins_decoder=start <= encoder < stop,
    )


def stage_contents(model: ResolvedModel, layers_of_stages: Sequence[int]) -> list[StageContent]:
    """The stages in order.

    Args:
        layers_of_stages: number of transformer layers of each, as `planning.stages.layers_of_stages` returns it.
    """
    ends, last = [0, *accumulate(layers_of_stages)], len(layers_of_stages) - 1
    return [
        stage_content(model, start, stop, first=stage == 0, last=stage == last)
        for stage, (start, stop) in enumerate(pairwise(ends))
    ]


@dataclass(frozen=True)
class ParameterCounts:
    """Elements of each kind of layer: of the whole model or of one tensor-parallel rank."""

    model: ResolvedModel
    embedding: int
    """v x h."""
    position_embedding: int
    """(Positions + offset) x h, one table for each stack; 0 if positions are not learned."""
    segment_embedding: int
    embedding_norm: int
    """Per stack."""
    relative_bias: int
    """Buckets x n, one table for each stack; every stage of the stack has a copy."""
    layer: int
    """One transformer layer of the single stack or of the encoder."""
    decoder_layer: int
    """One layer of an encoder_decoder's decoder: it also has cross-attention with its norm."""
    final_norm: int
    """Per stack; 0 for post-norm layers."""
    head: int
    """v x h of the output head; a tied weight is counted with the embedding."""
    head_transform: int
    """h x h + h, and a norm."""
    head_bias: int
    """v."""
    next_sentence: int
    """Pooler h x h + h, and classifier 2 h + 2."""

    @property
    def tied(self) -> bool:
        return self.model.tie_embeddings

    @property
    def total(self) -> int:
        """Parameters of the model; a tied matrix counts once."""
        return self.stage(stage_contents(self.model, [all_layers(self.model)])[0])

    def stage(self, content: StageContent) -> int:
        """Number of parameters on a pipeline stage.

        The word embedding is on the first stage, on the stage where the decoder begins and, if tied, on the last: one
        copy on each of these stages.
        """
        count = content.layers * self.layer + content.decoder_layers * self.decoder_layer
        count += self.relative_bias * ((content.layers > 0) + (content.decoder_layers > 0))
        if content.first or content.begins_decoder or (content.last and self.tied):
            count += self.embedding
        count += (self.position_embedding + self.embedding_norm) * (content.first + content.begins_decoder)
        if content.first:
            count += self.segment_embedding
        if content.last:
            count += self.head_transform + self.head_bias + self.next_sentence + (0 if self.tied else self.head)
        return count + self.final_norm * (content.last + content.begins_decoder)


def parameter_counts(
    model: ResolvedModel, vocabulary: int, tensor_parallel_size: int = 1, *, next_sentence: bool = False
) -> ParameterCounts:
    """Parameters by kind of layer.

    Args:
        vocabulary: rows of the embedding over all ranks: padded as in memory, or true as papers count them.
        tensor_parallel_size: ranks that share each matrix; 1 = the whole model.
        next_sentence: the model has a pooler and a next-sentence head (`has_next_sentence_head`).
    """
    hidden, tensor = model.hidden_size, tensor_parallel_size
    norm = hidden * (2 if model.normalization is Normalization.layernorm else 1)
    dense = hidden * hidden + hidden
    word_matrix = vocabulary * hidden // tensor
    attention, mlp = _attention_parameters(model, tensor), _mlp_parameters(model, tensor)
    return ParameterCounts(
        model=model,
        embedding=word_matrix,
        position_embedding=_position_rows(model) * hidden,
        segment_embedding=model.num_segments * hidden,
        embedding_norm=norm if model.embedding_norm else 0,
        relative_bias=_relative_bias(model, tensor),
        layer=attention + mlp + 2 * norm,
        decoder_layer=2 * attention + mlp + 3 * norm if model.decoder_layers else 0,
        final_norm=norm if model.norm_placement is NormPlacement.pre else 0,
        head=word_matrix,
        head_transform=dense + norm if model.head_transform else 0,
        head_bias=vocabulary // tensor if model.head_bias else 0,
        next_sentence=dense + 2 * hidden + 2 if next_sentence else 0,
    )


def _position_rows(model: ResolvedModel) -> int:
    if model.position_embedding is not PositionEmbedding.learned:
        return 0
    return model.max_position_embeddings + model.position_offset


def _relative_bias(model: ResolvedModel, tensor: int) -> int:
    """One number for each bucket and head; the heads are split."""
    if model.position_embedding is not PositionEmbedding.relative:
        return 0
    return model.relative_buckets * model.num_attention_heads // tensor


def _attention_parameters(model: ResolvedModel, tensor: int) -> int:
    """Query, key and value are split by heads, the output projection by its input; its bias is replicated."""
    hidden = model.hidden_size
    query = model.num_attention_heads * model.head_size // tensor
    key_value = 2 * model.num_query_groups * model.head_size // tensor
    weights = hidden * (query + key_value) + query * hidden
    return weights + (query + key_value + hidden if model.attention_bias else 0)


def _mlp_parameters(model: ResolvedModel, tensor: int) -> int:
    """Up (and gate) are split by output channel, down by input channel; the bias of down is replicated."""
    inner, ups = model.ffn_hidden_size // tensor, 2 if model.activation.is_gated else 1
    weights = (ups + 1) * model.hidden_size * inner
    return weights + (ups * inner + model.hidden_size if model.mlp_bias else 0)

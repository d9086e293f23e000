"""What follows from the settings: sizes, counts and names. Pure arithmetic, one place for each formula.

Legend: h hidden size, n heads, g query groups, d head size, f inner width of the MLP, v padded vocabulary, t tensor-
and p pipeline-parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_lite.config.schema import Activation, ModelConfig, Normalization, PositionEmbedding, RunConfig
from megatron_lite.parallel.topology import Topology, padded_vocab_size

SWIGLU_MULTIPLE = 64  # an inner width of 8h/3 is rounded up to this, so that matrices stay divisible


def complete_model(model: ModelConfig) -> ModelConfig:
    """The model with every None filled that follows from the other sizes (the vocabulary comes from the tokenizer).

    head_size stays None where the heads do not divide hidden_size; validation refuses that.
    """
    hidden, heads = model.hidden_size, max(1, model.num_attention_heads)
    head_size = hidden // heads if model.head_size is None and hidden % heads == 0 else model.head_size
    return replace(
        model,
        num_query_groups=heads if model.num_query_groups is None else model.num_query_groups,
        head_size=head_size,
        ffn_hidden_size=default_ffn_size(model) if model.ffn_hidden_size is None else model.ffn_hidden_size,
    )


def default_ffn_size(model: ModelConfig) -> int:
    """4h, or for SwiGLU 8h/3 rounded up: three matrices then hold what two of 4h do (arXiv 2002.05202, section 2)."""
    if model.activation is not Activation.swiglu:
        return 4 * model.hidden_size
    return -(-8 * model.hidden_size // (3 * SWIGLU_MULTIPLE)) * SWIGLU_MULTIPLE


def residual_init_std(model: ModelConfig) -> float:
    """Of the two projections that add to the residual stream in each layer: init_std / sqrt(2 num_layers) (GPT-2)."""
    return model.init_std / (2 * model.num_layers) ** 0.5


def data_parallel_size(config: RunConfig, world_size: int | None = None) -> int:
    """Replicas: the setting, or as many as the processes allow, or 1.

    Args:
        world_size: processes that are there; None = launcher.num_processes.
    """
    if config.parallel.data_parallel_size is not None:
        return config.parallel.data_parallel_size
    processes = world_size if world_size is not None else config.launcher.num_processes
    return max(1, (processes or 1) // ranks_per_replica(config))


def ranks_per_replica(config: RunConfig) -> int:
    """Ranks that hold one copy of the model: t x p."""
    return max(1, config.parallel.tensor_parallel_size) * max(1, config.parallel.pipeline_parallel_size)


def world_size(config: RunConfig) -> int:
    """Processes of the layout: data x tensor x pipeline."""
    return data_parallel_size(config) * ranks_per_replica(config)


def topology(config: RunConfig) -> Topology:
    """The rank grid of a configuration."""
    return Topology(
        data_parallel_size=data_parallel_size(config),
        tensor_parallel_size=config.parallel.tensor_parallel_size,
        pipeline_parallel_size=config.parallel.pipeline_parallel_size,
    )


def num_micro_batches(config: RunConfig, global_batch_size: int | None = None) -> int:
    """Forward passes of one data-parallel rank in one step.

    Args:
        global_batch_size: sequences of that step; None = the full batch, at the end of any ramp.
    """
    batch = config.train.global_batch_size if global_batch_size is None else global_batch_size
    return batch // (config.train.micro_batch_size * data_parallel_size(config))


def padded_vocabulary(config: RunConfig, vocab_size: int) -> int:
    """Rows of the embedding over all tensor-parallel ranks, for a true vocabulary of `vocab_size`."""
    return padded_vocab_size(vocab_size, config.model.vocab_pad_multiple, config.parallel.tensor_parallel_size)


def run_directory(config: RunConfig) -> Path:
    """The run folder. It has no time in its name: the same command finds the same folder and resumes."""
    if config.train.run_dir is not None:
        return Path(config.train.run_dir)
    parallel = config.parallel
    layout = f"dp{data_parallel_size(config)}_tp{parallel.tensor_parallel_size}_pp{parallel.pipeline_parallel_size}"
    return Path("runs") / f"{config.script}-{config.model.name}-{layout}"


def resolve(config: RunConfig, *, world_size: int | None = None, device: str | None = None) -> RunConfig:
    """The configuration with everything derived filled in. What is frozen is a resolved one.

    Args:
        world_size: processes that are there, which decide data_parallel_size where that is None.
        device: `cpu` or `cuda`, where launcher.device is `auto`.
    """
    processes = world_size if world_size is not None else config.launcher.num_processes
    if processes is not None and processes % ranks_per_replica(config):
        return config  # no layout has so many processes: validation says so, and nothing can be derived from them
    replicas = data_parallel_size(config, processes)
    resolved = replace(
        config,
        model=complete_model(config.model),
        parallel=replace(config.parallel, data_parallel_size=replicas),
        launcher=replace(
            config.launcher,
            num_processes=replicas * ranks_per_replica(config) if processes is None else processes,
            device=config.launcher.device if device is None else device,
        ),
    )
    return replace(resolved, train=replace(resolved.train, run_dir=str(run_directory(resolved))))


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of each kind of layer, in elements: of the whole model or of one tensor-parallel rank."""

    embedding: int
    """v x h."""
    position_embedding: int
    """Positions x h; 0 for rotary ones."""
    layer: int
    """One transformer layer."""
    final_norm: int
    head: int
    """v x h of the output head; where tied, the weight is the embedding's and is counted there."""
    tied: bool

    def total(self, num_layers: int) -> int:
        """Parameters of the model: a tied matrix once."""
        head = 0 if self.tied else self.head
        return self.embedding + self.position_embedding + num_layers * self.layer + self.final_norm + head

    def stage(self, num_layers: int, *, first: bool, last: bool) -> int:
        """Parameters that a pipeline stage holds: the first and the last stage each have a copy of a tied matrix."""
        count = num_layers * self.layer
        if first:
            count += self.embedding + self.position_embedding
        if last:
            count += self.final_norm + (0 if self.tied and first else self.head)
        return count


def parameter_counts(model: ModelConfig, vocabulary: int, tensor_parallel_size: int = 1) -> ParameterCounts:
    """Parameters by kind of layer.

    Args:
        vocabulary: rows of the embedding over all ranks: padded as they are held, or true as papers count them.
        tensor_parallel_size: ranks that share each matrix; 1 = the whole model.
    """
    model = complete_model(model)
    hidden, tensor = model.hidden_size, tensor_parallel_size
    positions = model.max_position_embeddings if model.position_embedding is PositionEmbedding.learned else 0
    norm = hidden * (2 if model.normalization is Normalization.layernorm else 1)
    word_matrix = vocabulary * hidden // tensor
    return ParameterCounts(
        embedding=word_matrix,
        position_embedding=positions * hidden,
        layer=_attention_parameters(model, tensor) + _mlp_parameters(model, tensor) + 2 * norm,
        final_norm=norm,
        head=word_matrix,
        tied=model.tie_embeddings,
    )


def _attention_parameters(model: ModelConfig, tensor: int) -> int:
    """Query, key and value are split by heads, the output projection by its input; its bias is whole on every rank."""
    assert model.num_query_groups is not None
    assert model.head_size is not None
    hidden = model.hidden_size
    query = model.num_attention_heads * model.head_size // tensor
    key_value = 2 * model.num_query_groups * model.head_size // tensor
    weights = hidden * (query + key_value) + query * hidden
    return weights + (query + key_value + hidden if model.attention_bias else 0)


def _mlp_parameters(model: ModelConfig, tensor: int) -> int:
    """Up (and gate) are split by their output, down by its input; the bias of down is whole on every rank."""
    assert model.ffn_hidden_size is not None
    inner, ups = model.ffn_hidden_size // tensor, (2 if model.activation is Activation.swiglu else 1)
    weights = (ups + 1) * model.hidden_size * inner
    return weights + (ups * inner + model.hidden_size if model.mlp_bias else 0)

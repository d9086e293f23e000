"""What a configuration comes to, in plain text: who computes what, on how much, at what cost. Starts nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from megatron_lite.config.derived import (
    data_parallel_size,
    num_micro_batches,
    padded_vocabulary,
    parameter_counts,
    topology,
)
from megatron_lite.config.schema import RunConfig
from megatron_lite.parallel.topology import Topology, layers_per_stage
from megatron_lite.planning.flops import PASSES, itemised_flops
from megatron_lite.planning.memory import model_states

GRID_LIMIT = 64  # ranks up to which each one is shown


def describe(config: RunConfig, vocab_size: int | None) -> str:
    """The plan of a resolved, valid configuration.

    Args:
        vocab_size: true vocabulary; None = not known before the data is prepared, and what hangs on it is left out.
    """
    lines = [*_layout(config), *_batches(config), *_model(config, vocab_size), "", *_grid(config)]
    return "\n".join(lines)


def _row(name: str, text: str) -> str:
    return f"{name:<17}{text}"


def _layout(config: RunConfig) -> Iterator[str]:
    grid, parallel = topology(config), config.parallel
    yield _row(
        "world size",
        f"{grid.world_size} = {grid.data_parallel_size} data x {grid.tensor_parallel_size} tensor x "
        f"{grid.pipeline_parallel_size} pipeline",
    )
    extras = [f"ZeRO-{parallel.zero_stage}", config.train.precision.value, f"recompute {parallel.recompute.value}"]
    if parallel.sequence_parallel:
        extras.append("sequence parallel")
    if parallel.offload_optimizer:
        extras.append("optimizer on the host")
    yield _row("how", ", ".join(extras))
    counts = Counter(layers_per_stage(config.model.num_layers, grid.pipeline_parallel_size))
    stages = [f"{count} stage{'s' if count > 1 else ''} of {layers}" for layers, count in counts.items()]
    yield _row("layers", f"{config.model.num_layers} = {' + '.join(stages)}")


def _batches(config: RunConfig) -> Iterator[str]:
    train = config.train
    count, stages = num_micro_batches(config), config.parallel.pipeline_parallel_size
    yield _row("batch", batch_identity(config, train.global_batch_size))
    ramp = train.batch_ramp
    if ramp.start:
        sizes = range(ramp.start, train.global_batch_size + 1, ramp.increment)
        yield _row(
            "batch ramp",
            f"{ramp.start} to {train.global_batch_size} by {ramp.increment}: {len(sizes)} sizes over {ramp.samples:,} "
            f"samples; first {batch_identity(config, ramp.start)}",
        )
    tokens = train.global_batch_size * config.data.seq_length
    note = " at the full batch" if ramp.start else ""
    yield _row("tokens", f"{tokens:,} a step, {tokens * train.steps:,} in {train.steps:,} steps{note}")
    if stages > 1:
        bubble = (stages - 1) / (count + stages - 1)
        yield _row("pipeline bubble", f"{bubble:.1%} = ({stages} - 1) / ({count} + {stages} - 1) of the time")


def batch_identity(config: RunConfig, global_batch_size: int) -> str:
    """`32 = 4 micro x 4 micro-batches x 2 data-parallel`."""
    return (
        f"{global_batch_size} = {config.train.micro_batch_size} micro x "
        f"{num_micro_batches(config, global_batch_size)} micro-batches x {data_parallel_size(config)} data-parallel"
    )


def _model(config: RunConfig, vocab_size: int | None) -> Iterator[str]:
    if vocab_size is None:
        yield _row("vocabulary", "known once the data is prepared (model.vocab_size=null)")
        return
    parallel, model = config.parallel, config.model
    rows = padded_vocabulary(config, vocab_size)
    tensor = parallel.tensor_parallel_size
    yield _row(
        "vocabulary",
        f"{vocab_size:,} padded to {rows:,} = {rows // tensor:,} rows x {tensor} tensor-parallel "
        f"(multiple of {model.vocab_pad_multiple})",
    )
    whole = parameter_counts(model, vocab_size)
    total = whole.total(model.num_layers)
    parts = [f"{model.num_layers} layers of {whole.layer:,}", f"embedding {whole.embedding:,}"]
    if whole.position_embedding:
        parts.append(f"positions {whole.position_embedding:,}")
    parts.append("head tied" if whole.tied else f"head {whole.head:,}")
    yield _row("parameters", f"{total:,} = {', '.join(parts)}, final norm {whole.final_norm:,}; padding not counted")
    yield from _flops(config, vocab_size, total)
    yield "stages (model states of one rank; activations not counted)"
    yield from _stages(config, vocab_size)


def _flops(config: RunConfig, vocab_size: int, parameters: int) -> Iterator[str]:
    terms = itemised_flops(config.model, config.data.seq_length, vocab_size)
    tokens = config.train.global_batch_size * config.data.seq_length
    yield _row(
        "FLOPs per token",
        f"{terms.training:.3e} = {PASSES} x (qkv {terms.query_key_value:.2e} + causal scores "
        f"{terms.attention_scores:.2e} + projection {terms.projection:.2e} + mlp {terms.mlp:.2e} + "
        f"head {terms.head:.2e})",
    )
    yield _row(
        "compute",
        f"{terms.training * tokens:.3e} FLOPs a step, {terms.training * tokens * config.train.steps:.3e} in all; "
        f"{tokens * config.train.steps / parameters:.3g} tokens per parameter",
    )


def _stages(config: RunConfig, vocab_size: int) -> Iterator[str]:
    """One line per stage: its layers, the parameters that one rank of it holds, the bytes of their states."""
    parallel, model = config.parallel, config.model
    counts = parameter_counts(model, padded_vocabulary(config, vocab_size), parallel.tensor_parallel_size)
    stages = parallel.pipeline_parallel_size
    for stage, layers in enumerate(layers_per_stage(model.num_layers, stages)):
        held = counts.stage(layers, first=stage == 0, last=stage == stages - 1)
        states = model_states(config, held, data_parallel_size(config))
        content = _what_lies_on(stage, stages, layers, bool(counts.position_embedding))
        yield (
            f"  stage {stage}: {content}; {held:,} parameters a rank; {_size(states.total)} = weights "
            f"{_size(states.weights)} + gradients {_size(states.gradients)} + optimizer {_size(states.optimizer)}"
        )


def _what_lies_on(stage: int, stages: int, layers: int, positions: bool) -> str:
    parts = [f"{layers} layer{'s' if layers != 1 else ''}"]
    if stage == 0:
        parts.insert(0, "embedding, positions" if positions else "embedding")
    if stage == stages - 1:
        parts.append("final norm, head")
    return ", ".join(parts)


def _size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.4g} TiB"


def _grid(config: RunConfig) -> Iterator[str]:
    grid = topology(config)
    shown_whole = grid.world_size <= GRID_LIMIT
    yield "rank grid" if shown_whole else f"rank grid (first and last of {grid.world_size} ranks on each stage)"
    for stage in range(grid.pipeline_parallel_size):
        yield from _stage_grid(grid, stage) if shown_whole else _stage_range(grid, stage)


def _stage_grid(grid: Topology, stage: int) -> Iterator[str]:
    tensor = range(grid.tensor_parallel_size)
    yield f"  pp{stage}   " + "".join(f"{f'tp{t}':>6}" for t in tensor)
    for data in range(grid.data_parallel_size):
        yield f"    dp{data:<3}" + "".join(f"{grid.rank(stage, data, t):>6}" for t in tensor)


def _stage_range(grid: Topology, stage: int) -> Iterator[str]:
    last = grid.rank(stage, grid.data_parallel_size - 1, grid.tensor_parallel_size - 1)
    yield (
        f"  pp{stage:<4}ranks {grid.rank(stage, 0, 0)} to {last}: dp0-{grid.data_parallel_size - 1}, "
        f"tp0-{grid.tensor_parallel_size - 1}"
    )

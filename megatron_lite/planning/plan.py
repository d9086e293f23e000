"""A configuration explained in plain text: who computes what, on how much data, at what cost. Starts nothing."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from megatron_lite.config.derived import all_layers, has_next_sentence_head
from megatron_lite.config.hf.families import NoCounterpart, counterpart
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import Compile
from megatron_lite.data.tokenizer.framing import described_ends
from megatron_lite.parallel.topology import Topology, bubble_share, even_cut
from megatron_lite.planning.placement import nodes_of, placement_warnings
from megatron_lite.planning.predictions import what_is_predicted
from megatron_lite.planning.sizes import model_lines, stage_lines
from megatron_lite.planning.stages import ASSUMED_VOCAB_SIZE, imbalance, layer_costs, layers_of_stages

GRID_LIMIT = 64  # largest number of ranks that are shown one by one


def describe(config: ResolvedConfig, vocab_size: int | None) -> str:
    """The plan of a resolved, valid configuration.

    Args:
        vocab_size: true vocabulary; None = unknown until the data is prepared: figures then contain it as `v`.
    """
    lines = [*_layout(config), *_cut(config, vocab_size), _objective(config)]
    lines += [_row("documents", described_ends(config)), *_batches(config)]
    lines += [_row(name, text) for name, text in model_lines(config, vocab_size)]
    lines += _weights(config)
    lines += ["stages (of one rank; on a GPU: model states and activations)", *stage_lines(config, vocab_size), ""]
    lines += [f"warning: {warning}" for warning in placement_warnings(config)]
    return "\n".join([*lines, *_grid(config)])


def _row(name: str, text: str) -> str:
    return f"{name:<17}{text}"


def _layout(config: ResolvedConfig) -> Iterator[str]:
    grid, parallel = config.topology, config.parallel
    yield _row(
        "world size",
        f"{grid.world_size} = {grid.data_parallel_size} data x {grid.tensor_parallel_size} tensor x "
        f"{grid.pipeline_parallel_size} pipeline",
    )
    if config.launcher.nodes > 1:
        yield _row("nodes", f"{config.launcher.nodes} of {config.processes_per_node} ranks each")
    extras = [f"ZeRO-{parallel.zero_stage}", config.train.precision.value, f"recompute {parallel.recompute.value}"]
    if config.train.compile is not Compile.none:
        extras.append(f"compile {config.train.compile.value}")
    if parallel.sequence_parallel:
        extras.append("sequence parallel")
    if parallel.offload_optimizer:
        extras.append("optimizer on the host")
    yield _row("how", ", ".join(extras))


def _cut(config: ResolvedConfig, vocab_size: int | None) -> Iterator[str]:
    """Which stage has how many layers, and how even their work is."""
    layers, decoder = all_layers(config.model), config.model.decoder_layers
    cut, chosen = layers_of_stages(config, vocab_size), config.parallel.stages
    runs = [(held, len(list(run))) for held, run in groupby(cut)]
    stages = [f"{count} stage{'s' if count > 1 else ''} of {held}" for held, count in runs]
    stacks = f"{config.model.num_layers} encoder + {decoder} decoder = " if decoder else ""
    yield _row("layers", f"{layers} = {stacks}{' + '.join(stages)}")
    if len(cut) == 1:
        return
    costs, even = layer_costs(config, vocab_size), even_cut(layers, len(cut))
    text = f"{chosen if isinstance(chosen, str) else 'given'}: the largest has {imbalance(costs, cut):.2f} x the mean"
    if cut != even:
        text += f"; with parallel.stages=even {imbalance(costs, even):.2f} x"
    if vocab_size is None:
        text += f"; at v = {ASSUMED_VOCAB_SIZE:,}, and cut again once v is known"
    yield _row("work of stages", text)


def _weights(config: ResolvedConfig) -> Iterator[str]:
    """Where the weights come from, and whose names they have in checkpoints."""
    if config.model.init_from is not None:
        yield _row("starts from", config.model.init_from)
    try:
        family = counterpart(config.model, next_sentence=has_next_sentence_head(config))
        yield _row("checkpoints", f"folders of transformers' {family.architecture}")
    except NoCounterpart as reason:
        yield _row("checkpoints", f"under our own names: {reason}")


def _objective(config: ResolvedConfig) -> str:
    first, second = config.data.seq_length, config.decoder_length
    lengths = f"{first:,} encoder x {second:,} decoder positions" if second else f"{first:,} positions"
    return _row("objective", f"{config.objective.name.value}: {lengths}; {what_is_predicted(config)}")


def _batches(config: ResolvedConfig) -> Iterator[str]:
    train = config.train
    count, stages = config.num_micro_batches(), config.parallel.pipeline_parallel_size
    yield _row("batch", batch_identity(config, train.global_batch_size))
    ramp = train.batch_ramp
    if ramp.start:
        sizes = range(ramp.start, train.global_batch_size + 1, ramp.increment)
        yield _row(
            "batch ramp",
            f"{ramp.start} to {train.global_batch_size} by {ramp.increment}: {len(sizes)} sizes over {ramp.samples:,} "
            f"samples; first {batch_identity(config, ramp.start)}",
        )
    tokens = train.global_batch_size * config.tokens_per_sample
    note = " at the full batch" if ramp.start else ""
    yield _row("tokens", f"{tokens:,} a step, {tokens * train.steps:,} in {train.steps:,} steps{note}")
    yield _row("learning rate", _learning_rate(config))
    if stages > 1:
        bubble = bubble_share(stages, count)
        yield _row("pipeline bubble", f"{bubble:.1%} = ({stages} - 1) / ({count} + {stages} - 1) of the time")


def _learning_rate(config: ResolvedConfig) -> str:
    """`0.0003 after 10 steps, then decay=linear until step 300: a straight line to min_learning_rate (...)`."""
    optimizer = config.optimizer
    form = optimizer.decay.form
    until = f" until step {optimizer.decay_steps or config.train.steps:,}" if form.has_end else ""
    peak = f"{optimizer.learning_rate:g} after {optimizer.warmup_steps:,} steps"
    source = f" ({form.source})" if form.source else ""
    return f"{peak}, then decay={optimizer.decay}{until}: {form.explanation}{source}"


def batch_identity(config: ResolvedConfig, global_batch_size: int) -> str:
    """`32 = 4 micro x 4 micro-batches x 2 data-parallel`."""
    return (
        f"{global_batch_size} = {config.train.micro_batch_size} micro x "
        f"{config.num_micro_batches(global_batch_size)} micro-batches x "
        f"{config.parallel.data_parallel_size} data-parallel"
    )


def _grid(config: ResolvedConfig) -> Iterator[str]:
    grid = config.topology
    shown_whole = grid.world_size <= GRID_LIMIT
    yield "rank grid" if shown_whole else f"rank grid (first and last of {grid.world_size} ranks on each stage)"
    for stage in range(grid.pipeline_parallel_size):
        yield from _stage_grid(config, grid, stage) if shown_whole else _stage_range(config, grid, stage)


def _stage_grid(config: ResolvedConfig, grid: Topology, stage: int) -> Iterator[str]:
    tensor = range(grid.tensor_parallel_size)
    yield f"  pp{stage}   " + "".join(f"{f'tp{t}':>6}" for t in tensor)
    for data in range(grid.data_parallel_size):
        ranks = [grid.rank(stage, data, t) for t in tensor]
        yield f"    dp{data:<3}" + "".join(f"{rank:>6}" for rank in ranks) + _where(config, ranks[0], ranks[-1])


def _stage_range(config: ResolvedConfig, grid: Topology, stage: int) -> Iterator[str]:
    first = grid.rank(stage, 0, 0)
    last = grid.rank(stage, grid.data_parallel_size - 1, grid.tensor_parallel_size - 1)
    yield (
        f"  pp{stage:<4}ranks {first} to {last}: dp0-{grid.data_parallel_size - 1}, "
        f"tp0-{grid.tensor_parallel_size - 1}{_where(config, first, last)}"
    )


def _where(config: ResolvedConfig, first: int, last: int) -> str:
    return f"   {nodes_of(config, first, last)}" if config.launcher.nodes > 1 else ""

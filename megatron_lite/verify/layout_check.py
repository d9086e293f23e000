"""`python -m launch verify`: the equivalence check of a user's own model and layout on this machine."""

from __future__ import annotations

from dataclasses import replace

from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import BatchRampConfig, Precision
from megatron_lite.data.tokenizer.vocabulary import planned_vocab_size
from megatron_lite.errors import VerificationError
from megatron_lite.observe.console import Console, redirect_output
from megatron_lite.train import distributed
from megatron_lite.train.out_of_memory import faults_explained
from megatron_lite.verify.equivalence import (
    ON_TENSOR_RANKS,
    TOLERANCE,
    comparable,
    differences,
    gather_traces,
    trace_layout,
    trace_twin,
)

NUM_STEPS = 3
_SHOWN = 8


def check_layout(config: ResolvedConfig) -> None:
    """Train a few steps on synthetic samples in this layout and in one process, and compare. Called on all ranks.

    Precision is set to fp32, because in half precision every layout rounds differently. The batch is only two sequences
    per data-parallel rank, in two micro-batches, because one process repeats all of the work while the others wait.

    Raises:
        VerificationError: a difference is larger than the tolerance.
    """
    config = _small(comparable(config))
    environment = distributed.ProcessEnvironment.read()
    console = redirect_output(config.run_dir, environment.rank)
    try:
        with faults_explained(config, environment):
            _compare(config, environment, console)
    finally:
        console.restore()


def _compare(config: ResolvedConfig, environment: distributed.ProcessEnvironment, console: Console) -> None:
    device = distributed.own_device(config.launcher.device, environment)
    context, _ = distributed.join(config, device, environment)
    vocab_size = planned_vocab_size(config)
    traces = gather_traces(trace_layout(config, context, vocab_size, NUM_STEPS), context)
    if context.is_writer:
        found = differences(trace_twin(config, vocab_size, NUM_STEPS, context.device), traces)
        console.print(_text(config, found))
        _require_equal(found)
    distributed.leave()


def _small(config: ResolvedConfig) -> ResolvedConfig:
    train = replace(
        config.train,
        precision=Precision.fp32,
        micro_batch_size=1,
        global_batch_size=2 * config.parallel.data_parallel_size,
        batch_ramp=BatchRampConfig(),
    )
    return replace(config, train=train)


def _text(config: ResolvedConfig, found: dict[str, float]) -> str:
    parallel = config.parallel
    gradients = sum(name.startswith("gradient of") for name in found)
    rows = [f"  {difference:.1e}  {name}" for name, difference in list(found.items())[:_SHOWN]]
    return "\n".join(
        [
            f"{config.model.name} on dp{parallel.data_parallel_size} x tp{parallel.tensor_parallel_size} x "
            f"pp{parallel.pipeline_parallel_size}, ZeRO-{parallel.zero_stage}, against one rank without DeepSpeed:",
            f"{gradients} raw gradients, losses and gradient norms of {NUM_STEPS} steps; tolerance {TOLERANCE:g}",
            "largest relative differences",
            *rows,
        ]
    )


def _require_equal(found: dict[str, float]) -> None:
    name, worst = next(iter(found.items()))
    unequal = [
        other.removeprefix(ON_TENSOR_RANKS)
        for other, by in found.items()
        if other.startswith(ON_TENSOR_RANKS) and not by <= TOLERANCE
    ]
    if unequal:
        raise VerificationError(
            f"tensor ranks have different gradients of {', '.join(unequal)}, which is replicated on them; if each "
            'rank computes a part of it, declare which in its ShardSpec (partial_gradient="heads" or "sequence") and '
            "use the parameter through sum_gradients (megatron_lite/parallel/collectives.py)"
        )
    if not worst <= TOLERANCE:  # also when it is NaN
        raise VerificationError(
            f"{name} differs by {worst:.1e}, more than {TOLERANCE:g}: this layout does not compute what one rank does; "
            "please report it with the printed table"
        )

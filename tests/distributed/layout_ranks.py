"""Functions that the ranks of the equivalence tests run, and the mutations that the tests must catch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.engine import PipelineEngine

import megatron_lite.engine.engine
import megatron_lite.engine.flat_gradients
import megatron_lite.engine.loss_weights
import megatron_lite.engine.shards
import megatron_lite.engine.task
import megatron_lite.models.compiled
import megatron_lite.models.norms
import megatron_lite.parallel.collectives
import megatron_lite.parallel.cross_entropy
import megatron_lite.parallel.fused_head
import megatron_lite.parallel.layers
import megatron_lite.train.generate
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.data.samples.batch import MicroBatch
from megatron_lite.engine.build import build_engine
from megatron_lite.engine.engine import Engine, Evaluation
from megatron_lite.engine.flat_gradients import FlatGradients
from megatron_lite.engine.hooks import EngineHooks
from megatron_lite.engine.inference import forward_through_stages
from megatron_lite.engine.pipelined import PipelinedEngine
from megatron_lite.engine.step_result import StepResult
from megatron_lite.engine.task import build_task
from megatron_lite.models.activations import Activations, StageBoundary
from megatron_lite.models.block import TransformerBlock
from megatron_lite.observe.heartbeat import Heartbeat
from megatron_lite.observe.step_measures import StepMeasure
from megatron_lite.optim.batch_ramp import BatchSchedule, BatchStep
from megatron_lite.optim.learning_rate import learning_rate_at
from megatron_lite.parallel.auxiliary import AuxiliaryChannel
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.gradient_sink import GradientSink
from megatron_lite.train.generate import generate
from megatron_lite.train.preview import predicted_tokens
from megatron_lite.verify.equivalence import Trace, trace_layout
from megatron_lite.verify.synthetic import synthetic_batches, synthetic_vocabulary
from tests.full_tensors import full_weights


def layout_rank(config: ResolvedConfig, vocab_size: int, num_steps: int, mutation: str | None) -> Trace:
    """The trace of one rank of a layout, with its stage's gradients."""
    with planted(mutation), traced_only():
        return trace_layout(config, _context(config), vocab_size, num_steps)


def traced_only() -> AbstractContextManager[Any]:
    """Compiled blocks run their graphs, forward and backward, with torch's kernels: no C++ compiler takes minutes."""
    return mock.patch.object(megatron_lite.models.compiled, "BACKEND", "aot_eager")


def updates_rank(
    configs: Sequence[ResolvedConfig], vocab_size: int, num_steps: int, mutation: str
) -> list[tuple[Trace, Trace]]:
    """Traces of each configuration without and with the fault, including weight updates."""
    found = []
    for config in configs:
        context = _context(config)
        right = trace_layout(config, context, vocab_size, num_steps, full_weights=full_weights)
        with planted(mutation):
            found.append((right, trace_layout(config, context, vocab_size, num_steps, full_weights=full_weights)))
    return found


def fp16_scales_rank(config: ResolvedConfig, vocab_size: int, num_steps: int) -> list[tuple[bool, float, bool]]:
    """For each step: whether it was skipped, the loss scale after it, and whether it changed a weight."""
    engine, batches_from = synthetic_engine(config, vocab_size)
    context, batch_size = engine.context, config.train.global_batch_size
    own = batch_size // (context.data_size * config.train.micro_batch_size)
    records = []
    for step in range(num_steps):
        first = step * batch_size
        before = full_weights(engine)
        batches = batches_from(first + context.data_rank * own * config.train.micro_batch_size, own)
        result = engine.train_step(batches, BatchStep(first, batch_size), 1e-3)
        after = full_weights(engine)
        changed = any(not torch.equal(before[name], after[name]) for name in before)
        records.append((result.skipped, result.loss_scale, changed))
    return records


def fp16_growth_rank(config: ResolvedConfig, vocab_size: int) -> list[tuple[float, float]]:
    """For each step of plain SGD: norm of the update / (learning rate x gradient norm), and the loss scale."""
    engine, batches_from = synthetic_engine(config, vocab_size)
    batch_size = config.train.global_batch_size
    records = []
    for step in range(config.train.steps):
        batches = batches_from(0, batch_size // config.train.micro_batch_size)
        before = full_weights(engine)
        result = engine.train_step(batches, BatchStep(step * batch_size, batch_size), 1e-3)
        moved = sum(float((after - before[name]).square().sum()) for name, after in full_weights(engine).items())
        records.append((moved**0.5 / (1e-3 * result.grad_norm), result.loss_scale))
    return records


def generate_rank(
    config: ResolvedConfig, vocab_size: int, prompt: list[int], num_tokens: int, diverged: bool = False
) -> list[int]:
    """The tokens that an untrained model generates in this layout."""
    engine, _ = synthetic_engine(config, vocab_size)
    if diverged:
        for parameter in engine.module.parameters():
            parameter.data.fill_(float("nan"))
    seq_length = config.data.seq_length
    return generate(engine, prompt, num_tokens=num_tokens, seq_length=seq_length, vocab_size=vocab_size)


def prefix_rank(config: ResolvedConfig, vocab_size: int, prompt: list[int], num_tokens: int) -> list[int]:
    """The prefix lengths that the model is given, token by token."""
    seen: list[int] = []

    def spy(engine: Engine, inputs: list[torch.Tensor]) -> Any:
        seen.append(int(inputs[1]))
        return forward_through_stages(engine, inputs)

    with mock.patch.object(megatron_lite.train.generate, "forward_through_stages", spy):
        generate_rank(config, vocab_size, prompt, num_tokens)
    return seen


def evaluate_rank(config: ResolvedConfig, vocab_size: int) -> Evaluation:
    """Evaluation of an untrained model."""
    engine, batches_from = synthetic_engine(config, vocab_size)
    context = engine.context
    own = config.train.global_batch_size // (context.data_size * config.train.micro_batch_size)
    return engine.evaluate(batches_from(context.data_rank * own * config.train.micro_batch_size, own), own)


def evaluated_twice_rank(config: ResolvedConfig, vocab_size: int) -> tuple[Evaluation, Evaluation]:
    """Evaluations of an untrained model on one rank: by the engine, and by torch's functions on the model's outputs.

    Every third label is replaced by the model's prediction; otherwise the accuracy would be 0.
    """
    engine, batches_from = synthetic_engine(config, vocab_size)
    batches = batches_from(0, config.train.global_batch_size // config.train.micro_batch_size)
    sums = torch.zeros(2, 3, dtype=torch.float64)  # rows: tokens, classes; columns: correct, nats, all
    engine.module.eval()
    for place, batch in enumerate(batches):
        with torch.no_grad():
            outputs = engine.module(*batch.inputs)
        logits, classes = outputs if isinstance(outputs, tuple) else (outputs, None)
        hit = torch.arange(batch.labels.shape[1]) % 3 == 0
        batch = batch._replace(labels=torch.where(hit, logits[..., :vocab_size].argmax(-1), batch.labels))
        batches[place] = batch
        parts = [(logits[..., :vocab_size].flatten(0, 1), batch.labels.flatten(), batch.loss_weights.flatten())]
        if classes is not None:
            parts.append((classes, batch.sequence_labels, batch.sequence_weights))
        for row, (scores, labels, weights) in enumerate(parts):
            nats = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
            right = scores.argmax(-1) == labels
            sums[row] += torch.stack([(right * weights).sum(), (nats * weights).sum(), weights.sum()]).double()
    (right, nats, tokens), (right_classes, class_nats, count) = sums.tolist()
    loss, share = nats / tokens, right_classes / count if count else None
    total = loss + (class_nats / count if count else 0.0)
    return engine.evaluate(batches, len(batches)), Evaluation(total, loss, right / tokens, share, tokens, count)


def evaluated_and_trained_rank(config: ResolvedConfig, vocab_size: int) -> tuple[float, float, float]:
    """Losses of an evaluation, of the training step after it, and of a training step without an evaluation before."""
    engine, batches_from = synthetic_engine(config, vocab_size)
    own = config.train.global_batch_size // config.train.micro_batch_size
    evaluated = engine.evaluate(batches_from(0, own), own).loss
    (after,) = train_steps(engine, batches_from, config, 0, 1)
    other, batches_from = synthetic_engine(config, vocab_size)
    (without,) = train_steps(other, batches_from, config, 0, 1)
    return evaluated, after.loss, without.loss


def argmax_rank(config: ResolvedConfig, vocab_size: int) -> list[int]:
    """The predictions of an untrained model for the first sample, in this layout."""
    engine, batches_from = synthetic_engine(config, vocab_size)
    batch = batches_from(0, 1)[0]
    return predicted_tokens(engine, batch)[0].tolist()


def synthetic_engine(
    config: ResolvedConfig, vocab_size: int, hooks: EngineHooks | None = None, heartbeat: Heartbeat | None = None
) -> tuple[Engine, Callable[[int, int], list[MicroBatch]]]:
    """An engine, and a function from (first sample, count) to its synthetic micro-batches."""
    context = _context(config)
    vocabulary = synthetic_vocabulary(vocab_size)
    task = build_task(config, context, vocabulary)
    first_batch = config.train.global_batch_size
    engine = build_engine(config, context, task, global_batch_size=first_batch, hooks=hooks, heartbeat=heartbeat)
    return engine, lambda first, count: synthetic_batches(task.objective, vocabulary, first, count, config)


def train_steps(
    engine: Engine,
    batches_from: Callable[[int, int], list[MicroBatch]],
    config: ResolvedConfig,
    first: int,
    count: int,
    *,
    measure_update: bool = False,
) -> list[StepResult]:
    """The steps [first, first + count) of a run, at its learning rates."""
    context, train = engine.context, config.train
    own = train.global_batch_size // (context.data_size * train.micro_batch_size)
    results = []
    for step in range(first, first + count):
        batch = BatchSchedule(train).at(step)
        start = batch.first_sample + context.data_rank * own * train.micro_batch_size
        reads = context.is_first_stage or context.is_last_stage
        rate = learning_rate_at(step + 1, config.optimizer, train.steps)
        batches = batches_from(start, own) if reads else []
        results.append(engine.train_step(batches, batch, rate, measure_update=measure_update))
    return results


def _context(config: ResolvedConfig) -> ParallelContext:
    # DeepSpeed refuses fp16 on a CPU, where it is merely slow: the loss scaling can be tested all the same.
    get_accelerator().is_fp16_supported = lambda: True
    return ParallelContext.build(
        config.topology,
        device=torch.device("cpu"),
        sequence_parallel=config.parallel.sequence_parallel,
        seed=config.train.seed,
    )


@contextmanager
def planted(mutation: str | None) -> Iterator[None]:
    """Run the block with one fault planted in the program."""
    if mutation is None:
        yield
        return
    with _MUTATIONS[mutation]():
        yield


def _patch(target: object, name: str, replacement: Any) -> Callable[[], Any]:
    return lambda: mock.patch.object(target, name, replacement)


_SUM_OVER_STAGES = PipelinedEngine._sum_over_stages


def _double_tied_gradient(self: PipelinedEngine, weight: torch.nn.Parameter, group: Any) -> None:
    _SUM_OVER_STAGES(self, weight, group)
    weight.grad.mul_(2.0)


def _each_micro_batch_its_own_mean(batches: list[Any], context: ParallelContext) -> list[Any]:
    return [batch._replace(loss_weights=batch.loss_weights / batch.loss_weights.sum()) for batch in batches]


def _softmax_over_padding(
    logits: torch.Tensor, labels: torch.Tensor, context: ParallelContext, _: int, *slopes: Any
) -> Any:
    padded = logits.shape[-1] * context.tensor_size
    return megatron_lite.parallel.cross_entropy.cross_entropy_(logits, labels, context, padded, *slopes)


def _slopes_too_large(weights: torch.Tensor, seed: float, terms: Any) -> Any:
    return _SLOPES(weights, 1.05 * seed, terms)


_SLOPES = megatron_lite.parallel.fused_head._slopes


def _sum_all_but_the_relative_bias(self: PipelinedEngine, weight: torch.nn.Parameter, group: Any) -> None:
    if "relative_bias" not in weight.global_name:
        _SUM_OVER_STAGES(self, weight, group)


def _own_sequence_mean(batches: list[Any], context: ParallelContext) -> list[Any]:
    scaled = megatron_lite.engine.loss_weights.scale_loss_weights(batches, context)
    return [batch._replace(sequence_weights=batch.sequence_weights / context.data_size) for batch in scaled]


def _every_rank_takes_the_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    grad_x = grad.new_zeros(ctx.shape)
    grad_x[:, 0] = grad
    return grad_x, None


def _pack_without_memory_gradient(boundary: StageBoundary, x: Activations) -> Any:
    if x.memory is not None:
        x = replace(x, memory=x.memory.detach())
    return _PACK(boundary, x)


_PACK = StageBoundary.pack


@contextmanager
def _clip_coefficient_too_large() -> Iterator[None]:
    """Clips with a coefficient 5 % too large, as if the norm were that much smaller."""
    engine = megatron_lite.engine.engine
    give, clip = engine.clip_by_given_norm, engine.clip_grads_with_norm_  # DeepSpeed's optimizers; ZeRO-0
    with (
        mock.patch.object(
            engine, "clip_by_given_norm", lambda o, norm, *a, **k: give(o, lambda: norm() / 1.05, *a, **k)
        ),
        mock.patch.object(engine, "clip_grads_with_norm_", lambda p, largest, norm: clip(p, largest, norm / 1.05)),
    ):
        yield


_ADD_PRODUCT = GradientSink.add_product
_FORWARD = TransformerBlock.forward
_MEASURES = (
    StepMeasure("block_square", "mean", "mean square of blocks", ""),
    StepMeasure("block_largest", "max", "largest value of blocks", ""),
)


def _with_a_term_of_its_own(block: TransformerBlock, *arguments: Any) -> torch.Tensor:
    """Adds the mean square of a block's output to the loss, and measures its largest value."""
    x, context = _FORWARD(block, *arguments), block.context
    slices = context.tensor_size if context.sequence_parallel else 1
    term = x.float().square().mean() / slices
    x = context.auxiliary.add_loss(x, "block_square", term, on_slices=context.sequence_parallel)
    context.auxiliary.measure("block_largest", x.abs().amax(), on_slices=context.sequence_parallel)
    return x


@contextmanager
def _auxiliary_of_blocks() -> Iterator[None]:
    with (
        mock.patch.object(TransformerBlock, "forward", _with_a_term_of_its_own),
        mock.patch.object(megatron_lite.engine.task, "STEP_MEASURES", _MEASURES),
    ):
        yield


@contextmanager
def _auxiliary_gradient_too_large() -> Iterator[None]:
    begin = AuxiliaryChannel.begin_step
    with (
        _auxiliary_of_blocks(),
        mock.patch.object(AuxiliaryChannel, "begin_step", lambda channel, gradient: begin(channel, 1.05 * gradient)),
    ):
        yield


SCATTERED = "gradients_reduced_by_scattering"
AUXILIARY_OF_BLOCKS, AUXILIARY_UNLISTED = "auxiliary_of_blocks", "auxiliary_unlisted"
AUXILIARY_TOO_LARGE = "auxiliary_gradient_too_large"


def _overwrite(sink: GradientSink, rows: torch.Tensor, x: torch.Tensor) -> None:
    """Forget the micro-batches before this one."""
    sink.clear()
    _ADD_PRODUCT(sink, rows, x)


_MUTATIONS: dict[str, Callable[[], Any]] = {
    AUXILIARY_OF_BLOCKS: _auxiliary_of_blocks,  # not a fault but a feature of layers that no model here uses
    AUXILIARY_TOO_LARGE: _auxiliary_gradient_too_large,  # of the blocks' terms; the head corrects its own
    SCATTERED: _patch(  # as on a GPU; it leaves what other ranks own unreduced
        megatron_lite.engine.flat_gradients, "reduces_by_scattering", lambda flat: True
    ),
    AUXILIARY_UNLISTED: _patch(TransformerBlock, "forward", _with_a_term_of_its_own),
    "row_parallel_without_all_reduce": _patch(megatron_lite.parallel.layers, "sum_partial", lambda x, context: x),
    "column_parallel_without_backward_all_reduce": _patch(
        megatron_lite.parallel.layers, "start_sum", lambda grad, group, scatter: (grad, None)
    ),
    "clip_coefficient_too_large": _clip_coefficient_too_large,
    "tied_gradient_doubled": _patch(PipelinedEngine, "_sum_over_stages", _double_tied_gradient),
    "relative_bias_gradient_not_summed": _patch(PipelinedEngine, "_sum_over_stages", _sum_all_but_the_relative_bias),
    "tied_gradient_not_summed": _patch(PipelinedEngine, "_sum_over_stages", lambda self, weight, group: None),
    "norm_gradient_not_summed_under_sequence_parallel": _patch(
        megatron_lite.models.norms, "sum_gradients", lambda context, *parameters: parameters
    ),
    "replicated_linear_gradient_not_summed_under_sequence_parallel": _patch(
        megatron_lite.parallel.layers, "sum_gradients", lambda context, *parameters: parameters
    ),
    "first_position_gradient_on_every_rank": _patch(
        megatron_lite.parallel.collectives._FirstPosition, "backward", staticmethod(_every_rank_takes_the_gradient)
    ),
    "memory_gradient_lost_between_stages": _patch(StageBoundary, "pack", _pack_without_memory_gradient),
    "sequence_weights_not_shared_over_data_ranks": _patch(
        megatron_lite.engine.engine, "scale_loss_weights", _own_sequence_mean
    ),
    "data_parallel_gradients_not_reduced": _patch(PipelineEngine, "_exec_reduce_grads", lambda self: None),
    "flat_gradients_not_reduced": _patch(FlatGradients, "_average", lambda gradients, group: None),
    "first_micro_batch_overwritten": _patch(
        GradientSink, "add_product", lambda sink, rows, x: _overwrite(sink, rows, x)
    ),
    "mean_of_micro_batch_means": _patch(
        megatron_lite.engine.engine, "scale_loss_weights", _each_micro_batch_its_own_mean
    ),
    "replicated_parameters_counted_on_every_rank": _patch(
        megatron_lite.engine.shards, "share", lambda size, parts, index: (0, size)
    ),
    "padded_vocabulary_in_the_softmax": _patch(
        megatron_lite.parallel.fused_head, "cross_entropy_", _softmax_over_padding
    ),
    "head_gradient_too_large": _patch(megatron_lite.parallel.fused_head, "_slopes", _slopes_too_large),
}

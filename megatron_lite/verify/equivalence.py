"""The equivalence check: compares a layout's gradients, per parameter and before clipping, with those of its twin, a
plain one-rank torch loop.

Both train on the same synthetic samples with uneven loss weights. The twin uses no DeepSpeed, no process group and no
sharding, so anything that a layout drops, counts twice or averages wrongly shows up as a difference. Its loss,
denominator, clipping and optimizer are torch's or written out here, so that a bug in ours shows up as well.

Shapes: b micro-batch, s sequence, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megatron_lite.config.lengths import sentinels_needed
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import Compile, OptimizerConfig, OptimizerName, Recompute
from megatron_lite.data.samples.batch import MicroBatch
from megatron_lite.data.special import Vocabulary
from megatron_lite.engine.build import build_engine
from megatron_lite.engine.engine import Engine
from megatron_lite.engine.hooks import EngineHooks
from megatron_lite.engine.loss_weights import scale_loss_weights, targets_of
from megatron_lite.engine.task import build_task
from megatron_lite.models.flat import FlatModel
from megatron_lite.objectives.loss import TokenLoss
from megatron_lite.optim.batch_ramp import BatchSchedule
from megatron_lite.optim.build import build_optimizer
from megatron_lite.optim.learning_rate import learning_rate_at
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.sharding import join_slices
from megatron_lite.verify.synthetic import synthetic_batches, synthetic_vocabulary

ON_TENSOR_RANKS = "between tensor ranks: gradient of "
TOLERANCE = 1e-5
"""Largest relative difference in fp32: of a parameter's raw gradient, of the gradient norm, of a step's loss."""


@dataclass
class Trace:
    """The results of a run that are compared."""

    losses: list[float] = field(default_factory=list)  # one per step
    grad_norms: list[float] = field(default_factory=list)  # one per step, before clipping
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)  # of the first step, full, by global name
    measures: list[dict[str, float]] = field(default_factory=list)  # one per step, of `observe.step_measures`
    unequal: dict[str, float] = field(default_factory=dict)  # differences between tensor ranks in the first step
    updates: dict[str, torch.Tensor] = field(default_factory=dict)  # sum over all steps, if recorded


def trace_layout(
    config: ResolvedConfig,
    context: ParallelContext,
    vocab_size: int,
    num_steps: int,
    *,
    full_weights: Callable[[Engine], dict[str, torch.Tensor]] | None = None,
) -> Trace:
    """Train in the context's layout; the recorded gradients are those of this rank's stage. A collective of all ranks.

    Args:
        full_weights: returns the full weights of this rank's stage; None = weight updates are not recorded. Under Adam
            they reveal little, because its updates do not depend on the scale of the gradient.
    """
    vocabulary = _vocabulary(config, vocab_size)
    task = build_task(config, context, vocabulary)
    schedule = BatchSchedule(config.train)
    trace = Trace()
    hooks = EngineHooks(after_reduction=lambda engine: _record_first(engine, trace))
    first_batch = schedule.at(0).global_batch_size
    engine = build_engine(config, context, task, global_batch_size=first_batch, hooks=hooks)
    before = full_weights(engine) if full_weights else {}
    for step in range(num_steps):
        batch = schedule.at(step)
        num_micro_batches = config.num_micro_batches(batch.global_batch_size)
        own_first = batch.first_sample + context.data_rank * num_micro_batches * config.train.micro_batch_size
        reads = context.is_first_stage or context.is_last_stage  # middle stages get no data, as in a run
        micro_batches = (
            synthetic_batches(task.objective, vocabulary, own_first, num_micro_batches, config) if reads else []
        )
        learning_rate = learning_rate_at(step + 1, config.optimizer, config.train.steps)
        result = engine.train_step(micro_batches, batch, learning_rate)
        trace.losses.append(result.loss)
        trace.grad_norms.append(result.grad_norm)
        trace.measures.append(dict(result.measures))
    if full_weights:
        trace.updates = {name: weight - before[name] for name, weight in full_weights(engine).items()}
    return trace


def _vocabulary(config: ResolvedConfig, size: int) -> Vocabulary:
    return synthetic_vocabulary(size, sentinels_needed(config.objective, config.data.seq_length))


def trace_twin(config: ResolvedConfig, vocab_size: int, num_steps: int, device: torch.device | str = "cpu") -> Trace:
    """The same training in one process with torch only."""
    vocabulary = _vocabulary(config, vocab_size)
    context = ParallelContext.single(seed=config.train.seed, device=device)
    plain = replace(
        config,
        parallel=replace(config.parallel, recompute=Recompute.none),
        train=replace(config.train, compile=Compile.none),
        optimizer=replace(config.optimizer, z_loss_weight=0.0),  # the twin computes its own z-loss
    )
    task = build_task(plain, context, vocabulary)
    model = FlatModel(task.specs).to(device)
    z_loss_weight = config.optimizer.z_loss_weight
    before = _full_of_one_rank(model, lambda parameter: parameter.detach())
    optimizer = PlainOptimizer(model, config.optimizer)
    schedule = BatchSchedule(config.train)
    trace = Trace()
    for step in range(num_steps):
        batch = schedule.at(step)
        count = batch.global_batch_size // config.train.micro_batch_size
        micro_batches = synthetic_batches(task.objective, vocabulary, batch.first_sample, count, config)
        context.rng.begin_step(batch.first_sample, config.train.micro_batch_size)
        context.auxiliary.begin_step(1.0 / count)
        batches = [_on(device, batch) for batch in micro_batches]
        terms = _terms_of(task.loss, scale_loss_weights(batches, context)) if task.measures else None
        loss, z_loss = _accumulate(model, batches, vocab_size, z_loss_weight, terms)
        task.loss.begin_step()
        trace.losses.append(loss)
        own_z_loss = {"z_loss": z_loss} if z_loss_weight else {}
        trace.measures.append(context.auxiliary.collect(task.measures, count) | own_z_loss)
        if step == 0:
            trace.gradients = _full_of_one_rank(model, _gradient)
        trace.grad_norms.append(_clip(model, config.optimizer.clip_grad_norm))
        optimizer.step(learning_rate_at(step + 1, config.optimizer, config.train.steps))
    after = _full_of_one_rank(model, lambda parameter: parameter.detach())
    trace.updates = {name: weight - before[name] for name, weight in after.items()}
    return trace


def _on(device: torch.device | str, batch: MicroBatch) -> MicroBatch:
    inputs = tuple(tensor.to(device) for tensor in batch.inputs)
    return MicroBatch(inputs, *(None if tensor is None else tensor.to(device) for tensor in batch[1:]))


def _terms_of(loss: TokenLoss, scaled: Sequence[MicroBatch]) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """Returns a function of a micro-batch's index and logits [b, s, v]: the sum of the auxiliary losses of `loss`, to
    be added to the mean loss of the global batch. It also records the measurements of `loss`."""
    auxiliary = loss.context.auxiliary

    def terms(index: int, logits: torch.Tensor) -> torch.Tensor:
        labels, weights, *_ = targets_of(scaled[index])
        loss.see(logits.detach().flatten(0, 1), labels.flatten(), weights.flatten())
        exact = logits[..., : loss.vocab_size].float()
        log_sums, labels = exact.logsumexp(-1), labels.clamp(0, loss.vocab_size - 1)
        losses = log_sums - exact.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        found = loss.terms(losses, log_sums, weights)
        for name, term in found.items():
            auxiliary.measure(name, term)
        return auxiliary.gradient * sum(found.values(), torch.zeros((), device=logits.device))

    return terms


def _accumulate(
    model: FlatModel,
    batches: Sequence[MicroBatch],
    vocab_size: int,
    z_loss_weight: float,
    terms: Callable[[int, torch.Tensor], torch.Tensor] | None,
) -> tuple[float, float]:
    """Accumulate the gradients of the mean loss over all counted tokens of a global batch, plus the mean class loss.

    Args:
        terms: from `_terms_of`.
    Returns:
        this loss, and the z-loss, which is also included in the gradients
    """
    tokens = max(float(sum(batch.loss_weights.sum() for batch in batches)), 1e-20)
    samples = sum(len(batch.labels) for batch in batches)
    total, z_total = 0.0, 0.0
    for index, batch in enumerate(batches):
        outputs = model(*batch.inputs)
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        loss = _token_losses(logits, batch, vocab_size) / tokens
        if batch.sequence_labels is not None:
            loss = loss + F.cross_entropy(outputs[1].float(), batch.sequence_labels, reduction="sum") / samples
        total += loss.item()
        if z_loss_weight:
            log_sums = logits[..., :vocab_size].float().logsumexp(-1)
            z_loss = z_loss_weight * (log_sums.square() * batch.loss_weights).sum() / tokens
            z_total += z_loss.item()
            loss = loss + z_loss
        if terms is not None:
            loss = loss + terms(index, logits)
        loss.backward()
    return total, z_total


def _token_losses(logits: torch.Tensor, batch: MicroBatch, vocab_size: int) -> torch.Tensor:
    """Weighted sum of torch's cross-entropy over the vocabulary without padding; logits [b, s, v]."""
    counted = batch.loss_weights > 0
    losses = F.cross_entropy(logits[..., :vocab_size][counted].float(), batch.labels[counted], reduction="none")
    return (losses * batch.loss_weights[counted]).sum()


class PlainOptimizer:
    """torch's Adam and SGD with decoupled weight decay, applied to matrices only.

    Adafactor is ours, because torch's would include the padding rows of the vocabulary in a matrix's statistics.
    """

    def __init__(self, model: FlatModel, config: OptimizerConfig) -> None:
        named = {id(parameter): (name, parameter) for name, parameter in model.named_parameters()}
        self._matrices = [one for name, one in named.values() if one.dim() > 1 and name.rpartition(".")[2] != "bias"]
        self._decay = config.weight_decay
        parameters = [parameter for _, parameter in named.values()]
        self._optimizer: torch.optim.Optimizer
        if config.name is OptimizerName.adamw:
            betas = config.beta1, config.beta2
            self._optimizer = torch.optim.Adam(parameters, config.learning_rate, betas, config.epsilon)
        elif config.name is OptimizerName.sgd:
            self._optimizer = torch.optim.SGD(parameters, config.learning_rate, config.momentum)
        else:
            single = ParallelContext.single(device=parameters[0].device)
            self._optimizer, self._decay = build_optimizer(model.named_parameters(), config, single), 0.0

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for matrix in self._matrices:
            matrix.mul_(1.0 - learning_rate * self._decay)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()


def differences(twin: Trace, traces: Sequence[Trace]) -> dict[str, float]:
    """Relative differences by name, largest first; each is the maximum over all ranks' traces.

    For a parameter: ‖layout - twin‖ / ‖twin‖ over the whole tensor; for a step: |layout - twin| / |twin|. Every rank's
    copy of a tied or replicated parameter is compared. If a parameter is missing on all ranks or in the twin, the
    difference is inf.
    """
    found: dict[str, float] = {}
    for trace in traces:
        for name, difference in _differences_of_rank(twin, trace):
            found[name] = max(difference, found.get(name, 0.0))
    for name in twin.gradients:
        found.setdefault(f"gradient of {name}", math.inf)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _differences_of_rank(twin: Trace, trace: Trace) -> Iterator[tuple[str, float]]:
    for kind in ("gradient", "update"):
        for name, tensor in getattr(trace, f"{kind}s").items():
            expected = getattr(twin, f"{kind}s").get(name)
            if expected is None or expected.shape != tensor.shape:
                yield f"{kind} of {name}", math.inf
            else:
                difference = float((tensor - expected).norm() / expected.norm().clamp(min=1e-30))
                yield f"{kind} of {name}", math.inf if math.isnan(difference) else difference
    for step, (own, of_twin) in enumerate(zip(trace.measures, twin.measures, strict=True), start=1):
        for name, expected in of_twin.items():
            difference = abs(own.get(name, math.nan) - expected) / max(abs(expected), 1e-30)
            yield f"{name} of step {step}", math.inf if math.isnan(difference) else difference
    for name, difference in trace.unequal.items():
        yield f"{ON_TENSOR_RANKS}{name}", math.inf if math.isnan(difference) else difference
    for kind in ("losses", "grad_norms"):
        for step, (mine, theirs) in enumerate(zip(getattr(trace, kind), getattr(twin, kind), strict=True), start=1):
            difference = abs(mine - theirs) / max(abs(theirs), 1e-30)
            yield f"{kind} of step {step}", math.inf if math.isnan(difference) else difference


def comparable(config: ResolvedConfig) -> ResolvedConfig:
    """The configuration without those kinds of dropout whose masks depend on the layout.

    Masks are the same under any data parallelism, pipeline parallelism and ZeRO stage, and inside the MLP always.
    Attention heads, and hidden states under sequence parallelism, are split over tensor ranks, which therefore draw
    different masks than a single rank.
    """
    if config.parallel.tensor_parallel_size == 1:
        return config
    model = replace(config.model, attention_dropout=0.0)
    if config.parallel.sequence_parallel:
        model = replace(model, hidden_dropout=0.0, embedding_dropout=0.0, final_dropout=0.0)
    return replace(config, model=model)


def gather_traces(trace: Trace, context: ParallelContext) -> list[Trace]:
    """All ranks' traces on the writing rank, an empty list on the others. A collective of all ranks.

    Only the first data-parallel replica sends gradients: they are already reduced over the data-parallel ranks, so the
    other replicas have the same.
    """
    if context.data_rank > 0:
        trace = replace(trace, gradients={})
    traces: list[Trace] | None = [trace] * dist.get_world_size() if context.is_writer else None
    dist.gather_object(trace, traces)
    return traces or []


def _record_first(engine: Engine, trace: Trace) -> None:
    if not trace.gradients:
        trace.gradients = engine.full_gradients()
        trace.unequal = engine.gradient_differences()


def _clip(model: FlatModel, largest: float) -> float:
    """Clip the gradient; return its norm before clipping, in fp64: torch's fp32 norm is off by 1e-5 at 1e6 elements."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = float(sum(gradient.double().pow(2).sum() for gradient in gradients) ** 0.5)
    if 0 < largest < norm:
        for gradient in gradients:
            gradient.mul_(largest / (norm + 1e-6))
    return norm


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None, f"{parameter.global_name} got no gradient"
    return parameter.grad


def _full_of_one_rank(model: FlatModel, fetch: Callable[[nn.Parameter], torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        parameter.global_name: join_slices([fetch(parameter)], parameter.shard_spec).cpu().clone()
        for parameter in model.parameters()
    }

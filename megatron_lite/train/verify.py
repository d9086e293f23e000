"""The equivalence certificate: a layout against a bare one-rank torch loop, per parameter, before clipping.

Both train on the same synthetic samples with uneven loss weights. The twin uses no DeepSpeed, no process group and no
sharding, so whatever a layout drops, doubles or averages wrongly shows up as a difference.

Shapes: b micro-batch, s sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from megatron_lite.config.schema import Recompute, RunConfig
from megatron_lite.data.loader import MicroBatch
from megatron_lite.models.flat import FlatModel
from megatron_lite.models.gpt import gpt_layers
from megatron_lite.objectives.loss import TokenLoss
from megatron_lite.optim.batch_ramp import BatchSchedule
from megatron_lite.optim.build import build_optimizer
from megatron_lite.optim.schedule import learning_rate_at
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.train.batches import normalise
from megatron_lite.train.engine import Engine, build_engine

TOLERANCE = 1e-5
"""Largest relative difference in fp32: of a parameter's raw gradient, of the gradient norm, of a step's loss."""


@dataclass
class Trace:
    """What a run did, for comparison."""

    losses: list[float] = field(default_factory=list)  # one a step
    grad_norms: list[float] = field(default_factory=list)  # one a step, before clipping
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)  # of the first step, full, by global name


def synthetic_sample(index: int, config: RunConfig, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample `index`: tokens [s + 1], and loss weights [s] of which a share that differs by sample is zero.

    Token k is drawn in proportion to 1 / (k + 1), as words are, so that there is something to learn.
    """
    generator = torch.Generator().manual_seed(config.train.seed * 1_000_003 + index)
    zipf = 1.0 / torch.arange(1, vocab_size + 1)
    tokens = torch.multinomial(zipf, config.data.seq_length + 1, replacement=True, generator=generator)
    keep = torch.rand(config.data.seq_length, generator=generator) < (index % 5 + 1) / 6
    return tokens, keep.float()


def synthetic_batches(
    first_sample: int, num_micro_batches: int, config: RunConfig, vocab_size: int
) -> list[MicroBatch]:
    """Consecutive samples as micro-batches."""
    size = config.train.micro_batch_size
    batches = []
    for start in range(first_sample, first_sample + num_micro_batches * size, size):
        samples = [synthetic_sample(index, config, vocab_size) for index in range(start, start + size)]
        tokens = torch.stack([tokens for tokens, _ in samples])  # [b, s + 1]
        weights = torch.stack([weights for _, weights in samples])  # [b, s]
        batches.append(MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weights))
    return batches


def trace_layout(config: RunConfig, context: ParallelContext, vocab_size: int, num_steps: int) -> Trace:
    """Train under the context's layout; the gradients are those of this rank's stage. A collective of all ranks."""
    specs = gpt_layers(config.model, context, vocab_size=vocab_size, recompute=config.parallel.recompute)
    schedule = BatchSchedule(config.train)
    engine = build_engine(
        config,
        context,
        specs,
        TokenLoss(context, vocab_size),
        global_batch_size=schedule.at(0).global_batch_size,
    )
    trace = Trace()
    engine.gradient_hooks.append(lambda: _record_first(engine, trace))
    for step in range(num_steps):
        batch = schedule.at(step)
        num_micro_batches = batch.global_batch_size // (config.train.micro_batch_size * context.data_size)
        own_first = batch.first_sample + context.data_rank * num_micro_batches * config.train.micro_batch_size
        reads = context.is_first_stage or context.is_last_stage  # the stages between get nothing, as in a run
        micro_batches = synthetic_batches(own_first, num_micro_batches, config, vocab_size) if reads else []
        learning_rate = learning_rate_at(step + 1, config.optimizer, config.train.steps)
        result = engine.train_step(micro_batches, batch, learning_rate)
        trace.losses.append(result.loss)
        trace.grad_norms.append(result.grad_norm)
    return trace


def trace_twin(config: RunConfig, vocab_size: int, num_steps: int, device: torch.device | str = "cpu") -> Trace:
    """The same training by one process and torch alone."""
    context = ParallelContext.single(seed=config.train.seed, device=device)
    model = FlatModel(gpt_layers(config.model, context, vocab_size=vocab_size, recompute=Recompute.none)).to(device)
    optimizer = build_optimizer(model.named_parameters(), config.optimizer, context)
    loss_function = TokenLoss(context, vocab_size)
    schedule = BatchSchedule(config.train)
    trace = Trace()
    for step in range(num_steps):
        batch = schedule.at(step)
        micro_batches = synthetic_batches(
            batch.first_sample, batch.global_batch_size // config.train.micro_batch_size, config, vocab_size
        )
        context.rng.begin_step(batch.first_sample, config.train.micro_batch_size)
        loss = 0.0
        for micro_batch in normalise(micro_batches, context):
            micro_batch = MicroBatch(*(tensor.to(device) for tensor in micro_batch))
            part = loss_function(model(micro_batch.tokens), (micro_batch.labels, micro_batch.loss_weights))
            (part / len(micro_batches)).backward()
            loss += part.item() / len(micro_batches)
        if step == 0:
            trace.gradients = _full_gradients_of_one_rank(model, vocab_size)
        trace.grad_norms.append(_clip(model, config.optimizer.clip_grad_norm))
        trace.losses.append(loss)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step + 1, config.optimizer, config.train.steps)
        optimizer.step()
        optimizer.zero_grad()
    return trace


def differences(twin: Trace, traces: Sequence[Trace]) -> dict[str, float]:
    """Relative differences by what differs, the largest first; of all ranks' traces the worst.

    A parameter's is ‖layout - twin‖ / ‖twin‖ over the whole tensor; a step's |layout - twin| / |twin|. Every rank's
    copy of a tied or replicated parameter is compared. One that no rank has, or that the twin lacks, differs by inf.
    """
    found: dict[str, float] = {}
    for trace in traces:
        for name, difference in _differences_of_rank(twin, trace):
            found[name] = max(difference, found.get(name, 0.0))
    for name in twin.gradients:
        found.setdefault(f"gradient of {name}", math.inf)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _differences_of_rank(twin: Trace, trace: Trace) -> Iterator[tuple[str, float]]:
    for name, gradient in trace.gradients.items():
        expected = twin.gradients.get(name)
        if expected is None or expected.shape != gradient.shape:
            yield f"gradient of {name}", math.inf
        else:
            difference = float((gradient - expected).norm() / expected.norm().clamp(min=1e-30))
            yield f"gradient of {name}", math.inf if math.isnan(difference) else difference
    for kind in ("losses", "grad_norms"):
        for step, (mine, theirs) in enumerate(zip(getattr(trace, kind), getattr(twin, kind), strict=True), start=1):
            difference = abs(mine - theirs) / max(abs(theirs), 1e-30)
            yield f"{kind} of step {step}", math.inf if math.isnan(difference) else difference


def comparable(config: RunConfig) -> RunConfig:
    """The configuration without the randomness that a layout cannot share.

    Dropout masks agree over data, pipeline and ZeRO. Attention heads, and under sequence parallelism all activations,
    are different slices on different tensor ranks, and so draw different masks than one rank would.
    """
    if config.parallel.tensor_parallel_size == 1:
        return config
    model = replace(config.model, attention_dropout=0.0)
    if config.parallel.sequence_parallel:
        model = replace(model, hidden_dropout=0.0, embedding_dropout=0.0)
    return replace(config, model=model)


def gather_traces(trace: Trace, context: ParallelContext) -> list[Trace]:
    """All ranks' traces on the writing rank, nothing on the others.

    Only the first replica sends its gradients: the others' were joined over the data ranks, and so are the same.
    """
    if context.data_rank > 0:
        trace = replace(trace, gradients={})
    traces: list[Trace] | None = [trace] * dist.get_world_size() if context.is_writer else None
    dist.gather_object(trace, traces)
    return traces or []


def _record_first(engine: Engine, trace: Trace) -> None:
    if not trace.gradients:
        trace.gradients = engine.full_gradients()


def _clip(model: FlatModel, largest: float) -> float:
    """The gradient's norm before clipping, in fp64: torch's own fp32 norm is off by 1e-5 for a million elements."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = float(sum(gradient.double().pow(2).sum() for gradient in gradients) ** 0.5)
    if 0 < largest < norm:
        for gradient in gradients:
            gradient.mul_(largest / (norm + 1e-6))
    return norm


def _full_gradients_of_one_rank(model: FlatModel, vocab_size: int) -> dict[str, torch.Tensor]:
    found = {}
    for parameter in model.parameters():
        assert parameter.grad is not None
        rows = parameter.shard_spec.full_shape[0]
        found[parameter.global_name] = parameter.grad[:rows].cpu().clone()
    return found

"""The one interface to DeepSpeed: the loop sees `Engine`, never which of DeepSpeed's two engines does the work.

`PipelineEngine` with ZeRO-0/1 serves every pipeline size, 1 included; `DeepSpeedEngine` on a flat module serves
ZeRO-2/3, which partition gradients and so cannot be driven by a pipeline schedule. Both get the same layer list.

Shapes: b micro-batch, s sequence, v vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import nn
from torch.nn.utils import clip_grads_with_norm_

from megatron_lite.config.deepspeed import deepspeed_config
from megatron_lite.config.schema import Precision, RunConfig
from megatron_lite.data.batch import MicroBatch
from megatron_lite.models.activations import Wire
from megatron_lite.models.flat import FlatModel, inputs_of
from megatron_lite.models.spec import LayerSpec
from megatron_lite.objectives.loss import Hits, Outputs
from megatron_lite.observe.heartbeat import Heartbeat
from megatron_lite.optim.batch_ramp import BatchStep
from megatron_lite.optim.build import build_optimizer
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.train.batches import normalise, targets_of
from megatron_lite.train.gradients import full_tensors
from megatron_lite.train.mending import (
    DeferredScale,
    clip_by_given_norm,
    forget_empty_step,
    require_right_deepspeed,
    spare_copies,
)
from megatron_lite.train.meter import LayerMeter
from megatron_lite.train.phases import EnginePhases
from megatron_lite.train.schedule import call_at_boundaries
from megatron_lite.train.setup import Task
from megatron_lite.train.shards import shards_of
from megatron_lite.train.staged import Sent, StagedModule, deepspeed_topology, first_wire

# What DeepSpeed would otherwise import and probe in every rank, done once, before a launcher forks. Its Muon, which
# is not offered, is decorated with torch.compile, whose first use imports the whole compiler: 6 CPU-seconds a rank.
with mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda inner: inner)):
    import deepspeed.runtime.zero.muon.muon_optimizer
# The compiled shared-memory all-reduce only serves inference, and its build would hold up the start.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; equal on every rank."""

    loss: float  # nats per token, mean over the whole global batch
    grad_norm: float  # of the whole gradient before clipping
    skipped: bool  # no update was made: the gradient was not finite, or the step was judged to be a spike
    loss_scale: float  # 1 unless fp16


@dataclass(frozen=True)
class Evaluation:
    """How well the model predicts held-out samples; equal on every rank. Fractions are over what the loss counts."""

    loss: float  # what is minimised: nats per token, plus nats per sample where samples have a class
    token_loss: float  # nats per token alone
    accuracy: float  # fraction of tokens whose label has the largest logit
    sequence_accuracy: float | None = None  # of the samples' classes; None = they have none
    tokens: float = 0.0  # all that count, by their weights
    sequences: float = 0.0  # samples that have a class


class Engine(ABC):
    """A model under training."""

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        task: Task,
        global_batch_size: int,
        heartbeat: Heartbeat,
    ) -> None:
        """A collective of all ranks. `global_batch_size`: of the first step, in sequences."""
        self.phases = EnginePhases(heartbeat)
        self.config = config
        self.context = context
        self.loss = task.loss
        self.specs = task.specs
        self.dtype = DTYPES[config.train.precision]
        self.gradient_hooks: list[Callable[[], None]] = []
        """Called between the last reduction of a step and clipping."""
        self.judge: Callable[[float, float], bool] | None = None
        """Told the loss and the norm of a step ahead of its update, the same on every rank; True drops the update.
        Costs a wait for the device; None = every update is made."""
        self.measures_update = False
        """Whether `meter` is to see the next update."""
        self.at_boundary: Callable[[], None] = lambda: None
        """Called between micro-batches, equally often on every rank; what it raises ends the training."""
        self._global_batch_size = global_batch_size
        self._dropped = False
        self._grad_norm = self._clipped_by = torch.zeros(())  # of the newest step: not scaled; times fp16's loss scale
        require_right_deepspeed(deepspeed.__version__)
        if not deepspeed.comm.is_initialized():  # let it adopt the process group that is already there
            deepspeed.init_distributed(dist_backend="nccl" if context.device.type == "cuda" else "gloo")
        self.module, grid = self._wrap(self.specs)
        self.deepspeed_engine = self._initialize(grid)
        self.shards = shards_of(
            self.module, self.deepspeed_engine.optimizer, config.parallel.zero_stage, config.optimizer, context
        )
        self.meter = LayerMeter(self.shards, context)

    @abstractmethod
    def _wrap(self, specs: Sequence[LayerSpec]) -> tuple[nn.Module, PipelineParallelGrid | None]:
        """The layers as DeepSpeed wants them, and the grid where it cannot find it in the module."""

    def train_step(self, batches: Sequence[MicroBatch], step: BatchStep, learning_rate: float) -> StepResult:
        """One optimizer step over one global batch.

        Args:
            batches: this data-parallel rank's micro-batches (empty on stages that neither read tokens nor labels).
            step: which global samples these are a part of.
            learning_rate: of this step.
        """
        self._prepare_step(step, learning_rate)
        if self.context.is_last_stage:
            batches = normalise(batches, self.context)
        self.module.train()
        self.phases.begin()
        self.loss.sequences.clear()
        loss = self._accumulate_and_step(batches)
        return StepResult(
            loss=loss,
            grad_norm=float(self._grad_norm),
            skipped=self._dropped or bool(getattr(self.deepspeed_engine.optimizer, "overflow", False)),
            loss_scale=self.loss_scale,
        )

    def evaluate(self, batches: Sequence[MicroBatch], num_micro_batches: int) -> Evaluation:
        """Over the micro-batches of all data-parallel ranks. A collective of all ranks."""
        weights = _weights_of(batches).to(self.context.device)
        if self.context.is_last_stage:
            batches = normalise(batches, self.context)
        self.module.eval()
        self.phases.begin(evaluating=True)
        self.loss.hits = hits = Hits.none(self.context.device)
        try:
            with torch.no_grad():
                loss = self._evaluate(batches, num_micro_batches)
        finally:
            self.loss.hits = None
        tokens, classes = self._of_job(torch.cat([torch.stack([hits.tokens, hits.sequences]), weights], 1)).tolist()
        (right, nats, counted, token_weight), (right_classes, _, counted_classes, class_weight) = tokens, classes
        counted = max(counted, 1e-20)
        class_accuracy = right_classes / counted_classes if counted_classes else None
        return Evaluation(loss, nats / counted, right / counted, class_accuracy, token_weight, class_weight)

    def _of_job(self, sums: torch.Tensor) -> torch.Tensor:
        """What the last stage has, summed over all data-parallel ranks."""
        if self.context.data_group is not None:
            dist.all_reduce(sums, group=self.context.data_group)
        dist.broadcast(sums, src=self.context.topology.rank(self.context.pipeline_size - 1, data=0, tensor=0))
        return sums

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """This stage's raw gradients by global name; only within a gradient hook. A collective of the stage's ranks."""
        return full_tensors(self.module, self.context, self._gradient)

    def full_weights(self) -> dict[str, torch.Tensor]:
        """This stage's fp32 weights by global name. A collective of the stage's ranks."""
        return full_tensors(self.module, self.context, self._weight)

    def _gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        gradient = safe_get_full_grad(parameter)
        if gradient is None:
            raise RuntimeError(f"{parameter.global_name} got no gradient")
        return gradient / self.loss_scale

    def _weight(self, parameter: nn.Parameter) -> torch.Tensor:
        weight = safe_get_full_fp32_param(parameter)
        return parameter if weight is None else weight  # ZeRO-0 keeps the weight itself in fp32

    @property
    def loss_scale(self) -> float:
        """That the next step begins with; 1 unless fp16."""
        return float(self.deepspeed_engine.optimizer.loss_scale) if self.dtype is torch.float16 else 1.0

    @abstractmethod
    def forward_local(self, sent: Sent) -> Outputs | Sent:
        """This stage's layers, for inference: what `wire_in` packs -> what goes to the next stage, or the outputs."""

    @property
    @abstractmethod
    def wire_in(self) -> Wire:
        """How this stage's input is packed: the batch on the first stage."""

    @abstractmethod
    def _accumulate_and_step(self, batches: Sequence[MicroBatch]) -> float: ...

    @abstractmethod
    def _evaluate(self, batches: Sequence[MicroBatch], num_micro_batches: int) -> float: ...

    def _initialize(self, grid: PipelineParallelGrid | None) -> Any:
        """DeepSpeed's engine: it casts the module, partitions the optimizer and takes over backward and step."""
        optimizer = build_optimizer(self.module.named_parameters(), self.config.optimizer, self.context)
        # A learning rate of zero until the first step: ZeRO and fp16 run an empty step to allocate their state.
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        engine, *_ = deepspeed.initialize(
            model=self.module,
            optimizer=optimizer,
            config=deepspeed_config(
                self.config,
                data_parallel_size=self.context.data_size,
                global_batch_size=self._global_batch_size,
            ),
            mpu=grid,
            dist_init_required=False,
        )
        forget_empty_step(engine.optimizer)
        spare_copies(engine.optimizer, self.context.data_size)
        self._insert_before(engine.optimizer)
        return engine

    def _insert_before(self, optimizer: Any) -> None:
        """Between the last reduction and the update: hooks, the gradient's norms, judgement, and clipping."""
        original_step = optimizer.step
        scale_updates = DeferredScale(optimizer) if self.dtype is torch.float16 else None
        clip_by_given_norm(optimizer, lambda: self._clipped_by, self.context)

        def step(*args: Any, **kwargs: Any) -> Any:
            for hook in self.gradient_hooks:
                hook()
            loss, self._grad_norm = self.meter.measure_gradient(self._loss_part(), self.loss_scale)
            self._dropped = self.judge is not None and self.judge(float(loss), float(self._grad_norm))
            if self._dropped:
                self._drop_update(original_step)
            else:
                self._update(original_step, *args, **kwargs)
            if scale_updates is not None:
                scale_updates.make(self._dropped)

        optimizer.step = step

    def _update(self, original_step: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._clipped_by = self._grad_norm * self.loss_scale
        if self.config.parallel.zero_stage == 0 and self.config.optimizer.clip_grad_norm:
            clip_grads_with_norm_(self.module.parameters(), self.config.optimizer.clip_grad_norm, self._clipped_by)
        if self.measures_update:
            self.meter.before_update()
        original_step(*args, **kwargs)
        self.meter.after_update()

    def _drop_update(self, original_step: Callable[..., Any]) -> None:
        if self.config.parallel.zero_stage == 0:
            return  # torch's own optimizer has nothing to clear up
        self._clipped_by = torch.full_like(self._grad_norm, math.nan)  # DeepSpeed's drop an update by such a norm
        original_step()

    def _loss_part(self) -> torch.Tensor:
        """Scalar: what this rank adds to the loss of the step under way; 0 where nobody judges it."""
        if self.judge is None or not self.context.is_last_stage or self.context.tensor_rank > 0:
            return torch.zeros((), device=self.context.device)
        parts = [sequences[0].sum() for sequences in self.loss.sequences]
        return torch.stack(parts).sum() / (len(parts) * self.context.data_size)

    def _prepare_step(self, step: BatchStep, learning_rate: float) -> None:
        if step.global_batch_size != self._global_batch_size:  # the batch ramp
            self.deepspeed_engine.set_train_batch_size(step.global_batch_size)
            self._global_batch_size = step.global_batch_size
        for group in self.deepspeed_engine.optimizer.param_groups:
            group["lr"] = learning_rate
        own_first = step.first_sample + self.context.data_rank * (step.global_batch_size // self.context.data_size)
        self.context.rng.begin_step(own_first, self.config.train.micro_batch_size)


class PipelinedEngine(Engine):
    """Any pipeline size, with ZeRO-1 (or ZeRO-0 as the fp32 reference)."""

    module: StagedModule

    def _initialize(self, grid: PipelineParallelGrid | None) -> Any:
        engine = super()._initialize(grid)
        call_at_boundaries(engine, lambda: self.at_boundary())
        self.phases.watch(engine)
        return engine

    def _wrap(self, specs: Sequence[LayerSpec]) -> tuple[nn.Module, PipelineParallelGrid | None]:
        self._first_wire = first_wire(specs, self.config.model.hidden_size, self.context)
        return StagedModule(specs, self.config.model.hidden_size, self.context, self.loss), None

    def _accumulate_and_step(self, batches: Sequence[MicroBatch]) -> float:
        return float(self.deepspeed_engine.train_batch(self._as_pairs(batches)))

    def _evaluate(self, batches: Sequence[MicroBatch], num_micro_batches: int) -> float:
        return float(self.deepspeed_engine.eval_batch(self._as_pairs(batches), num_micro_batches=num_micro_batches))

    def forward_local(self, sent: Sent) -> Outputs | Sent:
        return self.module(sent)

    @property
    def wire_in(self) -> Wire:
        return self.module.wire_in

    def _as_pairs(self, batches: Sequence[MicroBatch]) -> Any:
        """The (inputs, labels) iterator that PipelineEngine pulls from."""
        return iter(
            [(self._first_wire.pack(inputs_of(self.specs, batch.inputs)), targets_of(batch)) for batch in batches]
        )


class FlatEngine(Engine):
    """ZeRO-2 and ZeRO-3 without a pipeline."""

    def _wrap(self, specs: Sequence[LayerSpec]) -> tuple[nn.Module, PipelineParallelGrid | None]:
        self._wire = first_wire(specs, self.config.model.hidden_size, self.context)
        needs_grid = self.context.tensor_size > 1
        grid = PipelineParallelGrid(topology=deepspeed_topology(self.context)) if needs_grid else None
        return FlatModel(specs).to(self.context.device), grid

    def _accumulate_and_step(self, batches: Sequence[MicroBatch]) -> float:
        total = torch.zeros((), device=self.context.device)
        for index, batch in enumerate(batches):
            self.at_boundary()
            # Set by hand: a batch ramp changes the count, and DeepSpeed's own counter would then be out of step.
            self.deepspeed_engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            loss = self._micro_batch_loss(batch)
            self.phases.backward()
            self.deepspeed_engine.backward(loss)
            total += loss.detach()
        self.phases.optimizer()
        self.deepspeed_engine.step()
        return self._mean_over_job(total / len(batches))

    def _evaluate(self, batches: Sequence[MicroBatch], num_micro_batches: int) -> float:
        total = torch.zeros((), device=self.context.device)
        for batch in batches:
            self.at_boundary()
            total += self._micro_batch_loss(batch)
        return self._mean_over_job(total / num_micro_batches)

    def forward_local(self, sent: Sent) -> Outputs | Sent:
        x = self._wire.unpack(sent)
        return self.deepspeed_engine(*(getattr(x, field.name) for field in self.specs[0].takes or ()))

    @property
    def wire_in(self) -> Wire:
        return self._wire

    def _micro_batch_loss(self, batch: MicroBatch) -> torch.Tensor:
        self.phases.forward()
        device = self.context.device
        outputs = self.deepspeed_engine(*(tensor.to(device) for tensor in batch.inputs))
        return self.loss(outputs, tuple(tensor.to(device) for tensor in targets_of(batch)))

    def _mean_over_job(self, loss: torch.Tensor) -> float:
        self.phases.reduce()
        if self.context.data_group is not None:
            dist.all_reduce(loss, group=self.context.data_group)
        return float(loss) / self.context.data_size


def _weights_of(batches: Sequence[MicroBatch]) -> torch.Tensor:
    """[2, 1] fp64: of all tokens, and of all samples with a class."""
    tokens = sum(float(batch.loss_weights.sum()) for batch in batches)
    classes = sum(float(batch.sequence_weights.sum()) for batch in batches if batch.sequence_weights is not None)
    return torch.tensor([[tokens], [classes]], dtype=torch.float64)


def build_engine(
    config: RunConfig,
    context: ParallelContext,
    task: Task,
    *,
    global_batch_size: int,
    heartbeat: Heartbeat | None = None,
) -> Engine:
    """The engine for this ZeRO stage; a collective of all ranks. `heartbeat`: None = nobody watches."""
    engine = FlatEngine if config.parallel.zero_stage >= 2 else PipelinedEngine
    return engine(config, context, task, global_batch_size, heartbeat or Heartbeat())

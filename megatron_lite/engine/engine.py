"""One train step, from top to bottom (`Engine.launch_step`), and the one interface to DeepSpeed.

The training loop uses only `Engine` and does not depend on which of DeepSpeed's engines is behind it: `PipelinedEngine`
runs ZeRO-0/1 at any pipeline size, including 1; `FlatEngine` runs ZeRO-2/3, which partition gradients during backward
and therefore do not work with a pipeline schedule. Both run the same schedule over the same layer list.

Shapes: b micro-batch, s sequence, v vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from deepspeed.utils import safe_get_full_grad
from torch import nn
from torch.nn.utils import clip_grads_with_norm_

from megatron_lite.config.deepspeed_config import deepspeed_config
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import Precision
from megatron_lite.data.samples.batch import MicroBatch
from megatron_lite.engine.deepspeed_patches import (
    DeferredScale,
    clip_by_given_norm,
    require_no_step_taken,
    require_right_deepspeed,
    skip_reduction_over_one_rank,
    spare_waits_between_streams,
)
from megatron_lite.engine.flat_gradients import flat_gradients_of
from megatron_lite.engine.full_tensors import full_tensors, replica_differences
from megatron_lite.engine.gradient_norms import LayerMeter
from megatron_lite.engine.hooks import EngineHooks, PendingUpdate
from megatron_lite.engine.loss_weights import scale_loss_weights
from megatron_lite.engine.phases import EnginePhases
from megatron_lite.engine.pipeline_module import Sent
from megatron_lite.engine.pipeline_schedule import (
    NUM_EVALUATION_BUFFERS,
    Action,
    Instruction,
    Tick,
    forward_only,
    num_training_buffers,
    one_forward_one_backward,
)
from megatron_lite.engine.shards import shards_of
from megatron_lite.engine.step_result import LaunchedStep, StepResult
from megatron_lite.engine.task import Task
from megatron_lite.engine.upload import uploaded
from megatron_lite.models.activations import StageBoundary
from megatron_lite.models.spec import LayerSpec
from megatron_lite.objectives.loss import Outputs
from megatron_lite.observe.heartbeat import Heartbeat
from megatron_lite.optim.batch_ramp import BatchStep
from megatron_lite.optim.build import build_optimizer
from megatron_lite.parallel.auxiliary import reduced_measures
from megatron_lite.parallel.context import ParallelContext

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation on held-out samples; equal on every rank. Fractions are over counted tokens."""

    loss: float  # the training loss: nats per token, plus nats per sample if samples have a class
    token_loss: float  # nats per token, without the samples' classes
    accuracy: float  # fraction of tokens whose label has the largest logit
    sequence_accuracy: float | None = None  # of the samples' classes; None = they have none
    tokens: float = 0.0  # sum of the loss weights of all tokens
    sequences: float = 0.0  # samples that have a class


class Engine(ABC):
    """A model being trained, on top of DeepSpeed."""

    def __init__(
        self,
        config: ResolvedConfig,
        context: ParallelContext,
        task: Task,
        global_batch_size: int,
        heartbeat: Heartbeat,
        hooks: EngineHooks,
    ) -> None:
        """A collective of all ranks. `global_batch_size`: of the first step, in sequences."""
        self.config = config
        self.context = context
        self.loss = task.loss
        self._measures = task.measures
        self.specs = task.specs
        self.dtype = DTYPES[config.train.precision]
        self._phases = EnginePhases(heartbeat)
        self._hooks = hooks
        self._global_batch_size = global_batch_size
        self._grad_norm = self._clipped_by = torch.zeros(())  # of the last step: unscaled; times fp16's loss scale
        require_right_deepspeed(deepspeed.__version__)
        if not deepspeed.comm.is_initialized():  # DeepSpeed uses the process group that already exists
            deepspeed.init_distributed(dist_backend="nccl" if context.device.type == "cuda" else "gloo")
        self.module, grid = self._wrap(self.specs)
        self.deepspeed_engine = self._initialize(grid)
        self.shards = shards_of(
            self.module, self.deepspeed_engine.optimizer, config.parallel.zero_stage, config.optimizer, context
        )
        self.meter = LayerMeter(self.shards, context)

    def train_step(
        self, batches: Sequence[MicroBatch], step: BatchStep, learning_rate: float, *, measure_update: bool = False
    ) -> StepResult:
        """One optimizer step over one global batch; see `launch_step`."""
        return self.launch_step(batches, step, learning_rate, measure_update=measure_update).read()

    def launch_step(
        self, batches: Sequence[MicroBatch], step: BatchStep, learning_rate: float, *, measure_update: bool = False
    ) -> LaunchedStep:
        """One optimizer step over one global batch: all of its operations, in order.

        Gradients are zero at the start, because the previous update cleared them. On a GPU this returns while the
        device is still computing, unless a hook or fp16 has to know the norm before the update.

        Args:
            batches: this data-parallel rank's micro-batches (empty on stages that read neither tokens nor labels).
            step: the global batch that these are part of.
            learning_rate: of this step.
            measure_update: record each layer's update for `meter.figures`.
        """
        num_micro_batches = self.config.num_micro_batches(step.global_batch_size)
        self._begin(step, learning_rate, num_micro_batches)
        self._load(self._prepared(batches), self._num_buffers(num_micro_batches))
        for instruction in self._announced(one_forward_one_backward(*self._stage_of_stages, num_micro_batches)):
            self._executors[instruction.action](instruction.buffer)
        self._reduce_tied_weights()  # each stage's part of a shared weight's gradient: word embedding, relative bias
        self._reduce_over_data_parallel()  # ZeRO-0/1; ZeRO-2/3 reduce in each backward pass
        self._phases.optimizer()
        self._hooks.after_reduction(self)
        judged, self._grad_norm = self.meter.measure_gradient(self._loss_part(), self.loss_scale)  # one all-reduce
        dropped = self._is_dropped(judged)
        if dropped:
            self._drop_update()
        else:
            self._update(measure_update)
        self._change_loss_scale(dropped)
        losses = self._mean_over_job(torch.stack([self._loss_sum(), self._token_loss_sum()]), num_micro_batches)
        measured = self.context.auxiliary.gather(self._measures)
        return LaunchedStep(
            torch.cat([losses.double(), self._grad_norm.double()[None], measured]),
            partial(self._result, dropped, self.loss_scale, num_micro_batches * self.context.data_size),
            self.loss.sequences,
        )

    def evaluate(self, batches: Sequence[MicroBatch], num_micro_batches: int) -> Evaluation:
        """Evaluate the micro-batches of all data-parallel ranks. A collective of all ranks."""
        weights = _weights_of(batches).to(self.context.device)
        self.module.eval()
        with self.loss.counting() as counts:
            self._load(self._prepared(batches), NUM_EVALUATION_BUFFERS)
            for instruction in self._announced(forward_only(*self._stage_of_stages, num_micro_batches)):
                self._executors[instruction.action](instruction.buffer)
            loss = float(self._mean_over_job(self._loss_sum().reshape(1), num_micro_batches))
        own = torch.cat([torch.stack([counts.tokens, counts.sequences]), weights], 1)  # [2, 4]
        tokens, classes = self._of_job(own).tolist()
        (right, nats, counted, token_weight), (right_classes, _, counted_classes, class_weight) = tokens, classes
        counted = max(counted, 1e-20)
        class_accuracy = right_classes / counted_classes if counted_classes else None
        return Evaluation(loss, nats / counted, right / counted, class_accuracy, token_weight, class_weight)

    # The parts of a step, in order.

    def _begin(self, step: BatchStep, learning_rate: float, num_micro_batches: int) -> None:
        if step.global_batch_size != self._global_batch_size:  # the batch ramp
            self.deepspeed_engine.set_train_batch_size(step.global_batch_size)
            self._global_batch_size = step.global_batch_size
        for group in self.deepspeed_engine.optimizer.param_groups:
            group["lr"] = learning_rate
        # Dropout masks are keyed by the sample's index in the run, so that they are the same in every layout.
        own_first = step.first_sample + self.context.data_rank * (step.global_batch_size // self.context.data_size)
        self.context.rng.begin_step(own_first, self.config.train.micro_batch_size)
        # DeepSpeed scales each micro-batch's loss by this factor before backward; auxiliary losses have to match.
        self.context.auxiliary.begin_step(self.loss_scale / num_micro_batches)
        self.module.train()
        self.loss.begin_step()

    def _prepared(self, batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        """On the device, with one denominator for the whole global batch. A collective of the last stage, which has the
        labels."""
        on_device = uploaded(batches, self.context.device)
        return scale_loss_weights(on_device, self.context) if self.context.is_last_stage else on_device

    def _announced(self, schedule: Iterable[Tick]) -> Iterator[Instruction]:
        """Yield the instructions of a schedule, and report each to the heartbeat just before it is executed."""
        evaluating = not torch.is_grad_enabled()
        for tick in schedule:
            self._hooks.between_micro_batches()
            for instruction in tick:
                self._phases.instruction(instruction, evaluating=evaluating)
                self.context.auxiliary.record(instruction.action is Action.FORWARD)  # not during recomputation
                yield instruction

    def _is_dropped(self, loss: torch.Tensor) -> bool:
        if self._hooks.before_update is None:
            return False
        # This waits for the device, hence only if a hook needs it.
        judged, norm = torch.stack([loss, self._grad_norm.to(loss.dtype)]).tolist()
        return self._hooks.before_update(PendingUpdate(judged, norm, self.loss_scale))

    def _result(self, dropped: bool, loss_scale: float, micro_batches: int, figures: list[float]) -> StepResult:
        loss, token_loss, grad_norm, *measured = figures
        measures = reduced_measures(self._measures, micro_batches, measured)
        looks_at_norm = self.config.parallel.zero_stage > 0  # torch's own optimizer does not
        skipped = dropped or (looks_at_norm and not math.isfinite(grad_norm))
        return StepResult(loss, token_loss, grad_norm, skipped, loss_scale, measures)

    def _update(self, measure: bool) -> None:
        """Clip, update this rank's partition of the weights, all-gather the weights, clear the gradients."""
        self._clipped_by = self._grad_norm * self.loss_scale
        if self.config.parallel.zero_stage == 0 and self.config.optimizer.clip_grad_norm:
            clip_grads_with_norm_(self.module.parameters(), self.config.optimizer.clip_grad_norm, self._clipped_by)
        if measure:
            self.meter.before_update()
        self._step_optimizer()
        self.meter.after_update()

    def _drop_update(self) -> None:
        if self.config.parallel.zero_stage == 0:  # torch's own optimizer does not look at the norm
            self.deepspeed_engine.zero_grad()
            return
        self._clipped_by = torch.full_like(self._grad_norm, math.nan)  # DeepSpeed skips the update if the norm is NaN
        self._step_optimizer()

    def _change_loss_scale(self, dropped: bool) -> None:
        if self._deferred_scale is not None:
            self._deferred_scale.make(dropped)

    def _mean_over_job(self, sums: torch.Tensor, num_micro_batches: int) -> torch.Tensor:
        """Turn the last stage's sums over micro-batches into means over the global batch, equal on every rank.

        A collective of all ranks.
        """
        self._phases.reduce()
        context = self.context
        means = sums / num_micro_batches
        if context.is_last_stage and context.data_group is not None:
            dist.all_reduce(means, group=context.data_group)
            means /= context.data_size
        if context.pipeline_group is not None:
            last = context.topology.rank(context.pipeline_size - 1, context.data_rank, context.tensor_rank)
            dist.broadcast(means, src=last, group=context.pipeline_group)
        return means

    def _token_loss_sum(self) -> torch.Tensor:
        """The part of `_loss_sum` that is due to tokens, not to the samples' classes."""
        shares = self.loss.token_shares
        return torch.stack(shares).sum() if shares else self._loss_sum()

    # Implemented differently by the two engines.

    @abstractmethod
    def _wrap(self, specs: Sequence[LayerSpec]) -> tuple[nn.Module, PipelineParallelGrid | None]:
        """The layers as a module for DeepSpeed, and DeepSpeed's process grid if the module does not contain it."""

    @abstractmethod
    def _load(self, batches: Sequence[MicroBatch], num_buffers: int) -> None:
        """Prepare to run a schedule over these micro-batches."""

    @property
    @abstractmethod
    def _executors(self) -> Mapping[Action, Callable[[int], None]]:
        """The function that executes each kind of instruction; it takes the index of the buffer."""

    @abstractmethod
    def _loss_sum(self) -> torch.Tensor:
        """Scalar, fp32: loss summed over the micro-batches of the last schedule; 0 on all stages but the last."""

    @abstractmethod
    def _reduce_tied_weights(self) -> None: ...

    @abstractmethod
    def _reduce_over_data_parallel(self) -> None: ...

    @abstractmethod
    def _step_optimizer(self) -> None: ...

    @abstractmethod
    def forward_local(self, sent: Sent) -> Outputs | Sent:
        """Run this stage's layers for inference: packed input -> packed input of the next stage, or the outputs."""

    @property
    @abstractmethod
    def input_boundary(self) -> StageBoundary:
        """How this stage's input is packed; on the first stage that is the batch."""

    # Used by other packages.

    @property
    def loss_scale(self) -> float:
        """The loss scale of the next step; 1 unless fp16."""
        return float(self.deepspeed_engine.optimizer.loss_scale) if self.dtype is torch.float16 else 1.0

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """This stage's raw gradients by global name; only in the `after_reduction` hook. A collective of the stage."""
        return full_tensors(self.module, self.context, self._gradient)

    def gradient_differences(self) -> dict[str, float]:
        """Largest difference between tensor ranks in each replicated parameter's gradient; see `full_gradients`."""
        return replica_differences(self.module, self.context, self._gradient)

    def _gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        gradient = safe_get_full_grad(parameter)
        if gradient is None:
            raise RuntimeError(f"{parameter.global_name} got no gradient")
        return gradient / self.loss_scale

    @property
    def _stage_of_stages(self) -> tuple[int, int]:
        return self.context.pipeline_rank, self.context.pipeline_size

    def _num_buffers(self, num_micro_batches: int) -> int:
        return num_training_buffers(*self._stage_of_stages, num_micro_batches)

    def _loss_part(self) -> torch.Tensor:
        """Scalar: this rank's share of the current step's loss; 0 if no hook needs it."""
        if self._hooks.before_update is None or not self.context.is_last_stage or self.context.tensor_rank > 0:
            return torch.zeros((), device=self.context.device)
        parts = [sequences[0].sum() for sequences in self.loss.sequences]
        return torch.stack(parts).sum() / (len(parts) * self.context.data_size)

    def _of_job(self, sums: torch.Tensor) -> torch.Tensor:
        """The last stage's values, summed over all data-parallel ranks. A collective of all ranks."""
        if self.context.data_group is not None:
            dist.all_reduce(sums, group=self.context.data_group)
        dist.broadcast(sums, src=self.context.topology.rank(self.context.pipeline_size - 1, data=0, tensor=0))
        return sums

    @property
    def _deepspeed_config(self) -> dict[str, Any]:
        """The dictionary for `deepspeed.initialize`."""
        return deepspeed_config(
            self.config,
            global_batch_size=self._global_batch_size,
            pin_memory=self.context.device.type == "cuda",
        )

    def _initialize(self, grid: PipelineParallelGrid | None) -> Any:
        """Create DeepSpeed's engine: it casts the module, partitions the optimizer and runs backward and step."""
        optimizer = build_optimizer(self.module.named_parameters(), self.config.optimizer, self.context)
        # Learning rate 0 until the first step: ZeRO and fp16 run an empty step to allocate optimizer state.
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        engine, *_ = deepspeed.initialize(
            model=self.module,
            optimizer=optimizer,
            config=self._deepspeed_config,
            mpu=grid,
            dist_init_required=False,
        )
        require_no_step_taken(engine.optimizer)
        parallel = self.config.parallel
        has_flat = parallel.zero_stage == 1 and not parallel.offload_optimizer
        self._flat_gradients = flat_gradients_of(engine.optimizer, self.context) if has_flat else None
        skip_reduction_over_one_rank(engine.optimizer, self.context.data_size)
        spare_waits_between_streams(engine.optimizer)
        self._deferred_scale = DeferredScale(engine.optimizer) if self.dtype is torch.float16 else None
        clip_by_given_norm(
            engine.optimizer,
            lambda: self._clipped_by,
            self.config.optimizer.clip_grad_norm,
            has_loss_scale=self.dtype is torch.float16,
        )
        return engine


def _weights_of(batches: Sequence[MicroBatch]) -> torch.Tensor:
    """[2, 1] fp64: of all tokens, and of all samples with a class."""
    tokens = sum(float(batch.loss_weights.sum()) for batch in batches)
    classes = sum(float(batch.sequence_weights.sum()) for batch in batches if batch.sequence_weights is not None)
    return torch.tensor([[tokens], [classes]], dtype=torch.float64)

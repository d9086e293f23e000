"""The one interface to DeepSpeed: the loop sees `Engine`, never which of DeepSpeed's two engines does the work.

`PipelineEngine` with ZeRO-0/1 serves every pipeline size, 1 included; `DeepSpeedEngine` on a flat module serves
ZeRO-2/3, which partition gradients and so cannot be driven by a pipeline schedule. Both get the same layer list.

Shapes: b micro-batch, s sequence, v vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec as PipeLayerSpec
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import nn

from megatron_lite.config.deepspeed import deepspeed_config
from megatron_lite.config.schema import Precision, RunConfig
from megatron_lite.data.loader import MicroBatch
from megatron_lite.models.flat import FlatModel
from megatron_lite.models.spec import LayerSpec
from megatron_lite.objectives.causal_lm import TokenLoss
from megatron_lite.optim.build import build_optimizer
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.topology import stage_bounds
from megatron_lite.train.batches import normalise
from megatron_lite.train.gradients import clip_by_global_norm, full_tensors

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
    skipped: bool  # fp16 overflow: no update was made
    loss_scale: float  # 1 unless fp16


class Engine(ABC):
    """A model under training."""

    def __init__(self, config: RunConfig, context: ParallelContext, loss: TokenLoss, global_batch_size: int) -> None:
        self.config = config
        self.context = context
        self.loss = loss
        self.dtype = DTYPES[config.train.precision]
        self.gradient_hooks: list[Callable[[], None]] = []
        """Called between the last reduction of a step and clipping."""
        self._global_batch_size = global_batch_size
        self._own_grad_norm = 0.0

    module: nn.Module
    deepspeed_engine: Any

    def train_step(self, batches: Sequence[MicroBatch], first_sample: int, learning_rate: float) -> StepResult:
        """One optimizer step over one global batch.

        Args:
            batches: this data-parallel rank's micro-batches (empty on stages that neither read tokens nor labels).
            first_sample: global index of the global batch's first sample.
            learning_rate: of this step.
        """
        self._prepare_step(len(batches), first_sample, learning_rate)
        if self.context.is_last_stage:
            batches = normalise(batches, self.context)
        self.module.train()
        loss = self._accumulate_and_step(batches)
        return StepResult(
            loss=loss,
            grad_norm=self._grad_norm(),
            skipped=bool(getattr(self.deepspeed_engine.optimizer, "overflow", False)),
            loss_scale=self._loss_scale(),
        )

    def evaluate(self, batches: Sequence[MicroBatch], num_micro_batches: int) -> float:
        """Mean loss in nats per token over the micro-batches of all data-parallel ranks; equal on every rank."""
        if self.context.is_last_stage:
            batches = normalise(batches, self.context)
        self.module.eval()
        with torch.no_grad():
            return self._evaluate(batches, num_micro_batches)

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
        return gradient / self._loss_scale()

    def _weight(self, parameter: nn.Parameter) -> torch.Tensor:
        weight = safe_get_full_fp32_param(parameter)
        return parameter if weight is None else weight  # ZeRO-0 keeps the weight itself in fp32

    def _loss_scale(self) -> float:
        return float(self.deepspeed_engine.optimizer.loss_scale) if self.dtype is torch.float16 else 1.0

    @abstractmethod
    def forward_local(self, activations: torch.Tensor) -> torch.Tensor:
        """This stage's layers, for inference: the stage's input to its output."""

    def save(self, folder: Path, tag: str) -> None:
        """Write DeepSpeed's own files below folder/tag; a collective of all ranks."""
        self.deepspeed_engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        """Read what `save` wrote under the same layout; a collective of all ranks."""
        self.deepspeed_engine.load_checkpoint(str(folder), tag=tag)

    @abstractmethod
    def _accumulate_and_step(self, batches: Sequence[MicroBatch]) -> float: ...

    @abstractmethod
    def _evaluate(self, batches: Sequence[MicroBatch], num_micro_batches: int) -> float: ...

    def _initialize(self, module: nn.Module, mpu: Any) -> None:
        """Wrap the module: DeepSpeed casts it, partitions its optimizer state and takes over backward and step."""
        self.module = module
        # A learning rate of zero until the first step: ZeRO and fp16 run an empty step to allocate their state.
        optimizer = build_optimizer(module.named_parameters(), self.config.optimizer, self.context)
        self._zero_learning_rate(optimizer)
        self.deepspeed_engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config(
                self.config,
                data_parallel_size=self.context.data_size,
                global_batch_size=self._global_batch_size,
            ),
            mpu=mpu,
            dist_init_required=False if deepspeed.comm.is_initialized() else None,
        )
        self._forget_empty_step()
        self._insert_before_optimizer_step()

    @staticmethod
    def _zero_learning_rate(optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.0

    def _forget_empty_step(self) -> None:
        """Undo the step count of DeepSpeed's allocation step, which would shift Adam's bias correction."""
        inner = getattr(self.deepspeed_engine.optimizer, "optimizer", self.deepspeed_engine.optimizer)
        for state in inner.state.values():
            if "step" in state:
                state["step"] = torch.zeros_like(state["step"]) if torch.is_tensor(state["step"]) else 0

    def _insert_before_optimizer_step(self) -> None:
        """Run the gradient hooks, and ZeRO-0's clipping, between the last reduction and the update."""
        optimizer = self.deepspeed_engine.optimizer
        original_step = optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            for hook in self.gradient_hooks:
                hook()
            if self.config.parallel.zero_stage == 0:
                self._own_grad_norm = clip_by_global_norm(
                    self.module.parameters(), self.config.optimizer.clip_grad_norm, self.context
                )
            return original_step(*args, **kwargs)

        optimizer.step = step

    def _grad_norm(self) -> float:
        if self.config.parallel.zero_stage == 0:
            return self._own_grad_norm
        norm = self.deepspeed_engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def _prepare_step(self, num_micro_batches: int, first_sample: int, learning_rate: float) -> None:
        micro_batch_size = self.config.train.micro_batch_size
        num_micro_batches = num_micro_batches or self.deepspeed_engine.gradient_accumulation_steps()
        global_batch_size = num_micro_batches * micro_batch_size * self.context.data_size
        if global_batch_size != self._global_batch_size:  # the batch ramp
            self.deepspeed_engine.set_train_batch_size(global_batch_size)
            self._global_batch_size = global_batch_size
        for group in self.deepspeed_engine.optimizer.param_groups:
            group["lr"] = learning_rate
        own_first = first_sample + self.context.data_rank * num_micro_batches * micro_batch_size
        self.context.rng.begin_step(own_first, micro_batch_size)


class PipelinedEngine(Engine):
    """Any pipeline size, with ZeRO-1 (or ZeRO-0 as the fp32 reference)."""

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        specs: Sequence[LayerSpec],
        loss: TokenLoss,
        global_batch_size: int,
    ) -> None:
        super().__init__(config, context, loss, global_batch_size)
        _ensure_deepspeed_comm(context)
        self._initialize(_StagedModule(specs, config.model.num_layers, context, loss), mpu=None)

    def _accumulate_and_step(self, batches: Sequence[MicroBatch]) -> float:
        return float(self.deepspeed_engine.train_batch(_as_pairs(batches)))

    def _evaluate(self, batches: Sequence[MicroBatch], num_micro_batches: int) -> float:
        return float(self.deepspeed_engine.eval_batch(_as_pairs(batches), num_micro_batches=num_micro_batches))

    def forward_local(self, activations: torch.Tensor) -> torch.Tensor:
        return self.module(activations)


class FlatEngine(Engine):
    """ZeRO-2 and ZeRO-3 without a pipeline."""

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        specs: Sequence[LayerSpec],
        loss: TokenLoss,
        global_batch_size: int,
    ) -> None:
        super().__init__(config, context, loss, global_batch_size)
        _ensure_deepspeed_comm(context)
        grid = PipelineParallelGrid(topology=_deepspeed_topology(context)) if context.tensor_size > 1 else None
        self._initialize(FlatModel(specs).to(context.device), mpu=grid)

    def _accumulate_and_step(self, batches: Sequence[MicroBatch]) -> float:
        total = torch.zeros((), device=self.context.device)
        for index, batch in enumerate(batches):
            # Set by hand: a batch ramp changes the count, and DeepSpeed's own counter would then be out of step.
            self.deepspeed_engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            loss = self._micro_batch_loss(batch)
            self.deepspeed_engine.backward(loss)
            total += loss.detach()
        self.deepspeed_engine.step()
        return self._mean_over_job(total / len(batches))

    def _evaluate(self, batches: Sequence[MicroBatch], num_micro_batches: int) -> float:
        total = torch.zeros((), device=self.context.device)
        for batch in batches:
            total += self._micro_batch_loss(batch)
        return self._mean_over_job(total / num_micro_batches)

    def forward_local(self, activations: torch.Tensor) -> torch.Tensor:
        return self.deepspeed_engine(activations)

    def _micro_batch_loss(self, batch: MicroBatch) -> torch.Tensor:
        device = self.context.device
        logits = self.deepspeed_engine(batch.tokens.to(device))  # [b, s, v/t]
        return self.loss(logits, (batch.labels.to(device), batch.loss_weights.to(device)))

    def _mean_over_job(self, loss: torch.Tensor) -> float:
        if self.context.data_group is not None:
            dist.all_reduce(loss, group=self.context.data_group)
        return float(loss) / self.context.data_size


def build_engine(
    config: RunConfig,
    context: ParallelContext,
    specs: Sequence[LayerSpec],
    loss: TokenLoss,
    *,
    global_batch_size: int,
) -> Engine:
    """The engine for this ZeRO stage; a collective of all ranks."""
    engine = FlatEngine if config.parallel.zero_stage >= 2 else PipelinedEngine
    return engine(config, context, specs, loss, global_batch_size)


class _StagedModule(PipelineModule):
    """The layer list as DeepSpeed's pipeline module, cut where our own arithmetic says.

    DeepSpeed's own partitioners build every layer on every rank, or count types by regular expression; the planner
    needs the same answer without building anything.
    """

    def __init__(self, specs: Sequence[LayerSpec], num_layers: int, context: ParallelContext, loss: TokenLoss) -> None:
        names = [spec.name for spec in specs]
        first_block = names.index("layers.0")
        self._bounds = stage_bounds(
            num_layers,
            context.pipeline_size,
            num_before=first_block,
            num_after=len(specs) - first_block - num_layers,
        )
        super().__init__(
            layers=[_LaterTiedLayer(spec) if spec.tied else _LaterLayer(spec) for spec in specs],
            topology=_deepspeed_topology(context),
            loss_fn=loss,
            activation_checkpoint_interval=0,
        )

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self._bounds
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])


class _LaterLayer(PipeLayerSpec):
    """DeepSpeed builds the layers of its own stage only, by calling this."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(nn.Module)
        self.spec = spec

    def build(self, log: bool = False) -> nn.Module:
        return self.spec.build()


class _LaterTiedLayer(TiedLayerSpec):
    """The same for a module that several layers share; DeepSpeed sums its gradient over the stages that hold it."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec.tied, nn.Module, forward_fn=spec.forward, tied_weight_attr="weight")
        self.spec = spec

    def build(self, log: bool = False) -> nn.Module:
        return self.spec.build()


def _deepspeed_topology(context: ParallelContext) -> PipeModelDataParallelTopology:
    return PipeModelDataParallelTopology(
        num_pp=context.pipeline_size, num_mp=context.tensor_size, num_dp=context.data_size
    )


def _ensure_deepspeed_comm(context: ParallelContext) -> None:
    """Let DeepSpeed's communication layer adopt the process group that is already there."""
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if context.device.type == "cuda" else "gloo")


def _as_pairs(batches: Sequence[MicroBatch]) -> Any:
    """The (inputs, labels) iterator that PipelineEngine pulls from."""
    return iter([(batch.tokens, (batch.labels, batch.loss_weights)) for batch in batches])

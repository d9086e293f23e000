"""ZeRO-2 and ZeRO-3, without pipeline parallelism."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from torch import nn

from megatron_lite.data.samples.batch import MicroBatch
from megatron_lite.engine.engine import Engine
from megatron_lite.engine.loss_weights import targets_of
from megatron_lite.engine.partitioned_build import LayerPartitioner
from megatron_lite.engine.pipeline_module import Sent, deepspeed_topology, first_boundary
from megatron_lite.engine.pipeline_schedule import Action
from megatron_lite.models.activations import StageBoundary
from megatron_lite.models.flat import FlatModel
from megatron_lite.models.spec import LayerSpec
from megatron_lite.objectives.loss import Outputs


class FlatEngine(Engine):
    """DeepSpeedEngine around the whole model, driven by the schedule of a one-stage pipeline."""

    def _wrap(self, specs: Sequence[LayerSpec]) -> tuple[nn.Module, PipelineParallelGrid | None]:
        self._boundary = first_boundary(specs, self.config.model.hidden_size, self.context)
        needs_grid = self.context.tensor_size > 1
        grid = PipelineParallelGrid(topology=deepspeed_topology(self.context)) if needs_grid else None
        if self.config.parallel.zero_stage < 3:
            return FlatModel(specs).to(self.context.device), grid
        return FlatModel(specs, LayerPartitioner(self._deepspeed_config, self.dtype, grid)), grid

    def _load(self, batches: Sequence[MicroBatch], num_buffers: int) -> None:
        self._to_come = list(reversed(batches))
        self._total = torch.zeros((), device=self.context.device)

    @property
    def _executors(self) -> Mapping[Action, Callable[[int], None]]:
        """A single stage does not send or receive, and needs only one buffer, so the index is ignored."""
        return {Action.LOAD: self._next_batch, Action.FORWARD: self._forward, Action.BACKWARD: self._backward}

    def _next_batch(self, _: int) -> None:
        batch = self._to_come.pop()
        self._inputs, self._targets = batch.inputs, targets_of(batch)

    def _forward(self, _: int) -> None:
        self._micro_batch_loss = self.deepspeed_engine(*self._inputs, end=lambda x: self.loss(x, self._targets))
        self._total += self._micro_batch_loss.detach()

    def _backward(self, _: int) -> None:
        # Set explicitly: when a batch ramp changes the number of micro-batches, DeepSpeed's own counter is wrong.
        self.deepspeed_engine.set_gradient_accumulation_boundary(not self._to_come)
        self.deepspeed_engine.backward(self._micro_batch_loss)  # also reduces gradients to the ranks that own them

    def _loss_sum(self) -> torch.Tensor:
        return self._total

    def _reduce_tied_weights(self) -> None:
        """Nothing to do: the single stage holds all tied weights."""

    def _reduce_over_data_parallel(self) -> None:
        """Nothing to do: each backward pass has already reduced its gradients."""

    def _step_optimizer(self) -> None:
        self.deepspeed_engine.step()

    def forward_local(self, sent: Sent) -> Outputs | Sent:
        x = self._boundary.unpack(sent)
        return self.deepspeed_engine(*(getattr(x, field.name) for field in self.specs[0].stage_inputs or ()))

    @property
    def input_boundary(self) -> StageBoundary:
        return self._boundary

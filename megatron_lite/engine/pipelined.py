"""Pipeline parallelism of any size, 1 included, with ZeRO-1 (or ZeRO-0 as the fp32 reference)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from torch import nn

from megatron_lite.data.samples.batch import MicroBatch
from megatron_lite.engine.engine import Engine
from megatron_lite.engine.loss_weights import targets_of
from megatron_lite.engine.pipeline_module import Sent, StagedModule, first_boundary
from megatron_lite.engine.pipeline_schedule import Action
from megatron_lite.models.activations import StageBoundary
from megatron_lite.models.flat import inputs_of
from megatron_lite.models.spec import LayerSpec
from megatron_lite.objectives.loss import Outputs
from megatron_lite.planning.stages import layers_of_stages


class PipelinedEngine(Engine):
    """DeepSpeed's PipelineEngine executes the instructions; `Engine.train_step` decides which ones, in what order."""

    module: StagedModule

    def _wrap(self, specs: Sequence[LayerSpec]) -> tuple[nn.Module, PipelineParallelGrid | None]:
        hidden_size = self.config.model.hidden_size
        self._first_boundary = first_boundary(specs, hidden_size, self.context)
        cut = layers_of_stages(self.config, self.loss.vocab_size)
        return StagedModule(specs, hidden_size, cut, self.context, self.loss), None

    def _initialize(self, grid: PipelineParallelGrid | None) -> Any:
        engine = super()._initialize(grid)
        self._of_deepspeed: dict[Action, Callable[[int], None]] = {
            Action.LOAD: self._load_micro_batch,
            Action.RECEIVE: engine._exec_recv_activations,
            Action.FORWARD: engine._exec_forward_pass,  # on the last stage the module's output is the loss
            Action.SEND: engine._exec_send_activations,
            Action.RECEIVE_GRAD: engine._exec_recv_grads,
            Action.BACKWARD: engine._exec_backward_pass,
            Action.SEND_GRAD: engine._exec_send_grads,
        }
        return engine

    def _load(self, batches: Sequence[MicroBatch], num_buffers: int) -> None:
        if not torch.is_grad_enabled():
            dist.barrier()  # no stage may send for this evaluation while its neighbour is still finishing the last one
        pairs = [
            (self._first_boundary.pack(inputs_of(self.specs, batch.inputs)), targets_of(batch)) for batch in batches
        ]
        engine = self.deepspeed_engine
        engine.set_dataiterator(iter(pairs))
        engine.total_loss, engine.fwd_outputs = None, []
        engine._compute_loss = True
        engine._reserve_pipe_buffers(num_buffers)

    @property
    def _executors(self) -> Mapping[Action, Callable[[int], None]]:
        return self._of_deepspeed

    def _load_micro_batch(self, buffer: int) -> None:
        """To the device; on the last stage its targets are those of the forward pass that follows."""
        self.deepspeed_engine._exec_load_micro_batch(buffer)
        if self.context.is_last_stage:
            self.module.targets = self.deepspeed_engine.pipe_buffers["labels"][buffer]

    def _loss_sum(self) -> torch.Tensor:
        total = self.deepspeed_engine.total_loss
        return torch.zeros((), device=self.context.device) if total is None else total.float()

    def _reduce_tied_weights(self) -> None:
        self._phases.reduce()
        if self._flat_gradients is not None:
            self._flat_gradients.complete()
        for weight, group in self.module.get_tied_weights_and_groups():
            self._sum_over_stages(weight, group)

    def _sum_over_stages(self, weight: nn.Parameter, group: dist.ProcessGroup) -> None:
        """The gradient of a tied weight, over the stages that hold a copy."""
        gradient = weight.gradient_sink.total if weight.gradient_sink.in_use else weight.grad
        if gradient is None:  # in bf16 with offload, where DeepSpeed moves it, and its own method skips the weight
            gradient = weight.grad_accum
        dist.all_reduce(gradient, group=group)

    def _reduce_over_data_parallel(self) -> None:
        self._phases.reduce()
        if self._flat_gradients is not None:
            self._flat_gradients.reduce()
        else:
            self.deepspeed_engine._exec_reduce_grads()

    def _step_optimizer(self) -> None:
        self.deepspeed_engine._exec_optimizer_step()
        if self._flat_gradients is not None:
            self._flat_gradients.clear()

    def forward_local(self, sent: Sent) -> Outputs | Sent:
        return self.module(sent)

    @property
    def input_boundary(self) -> StageBoundary:
        return self.module.input_boundary

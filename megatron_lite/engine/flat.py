"""ZeRO-2 and ZeRO-3 without a pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from torch import nn

from megatron_lite.data.samples.batch import MicroBatch
from megatron_lite.engine.engine import Engine
from megatron_lite.engine.loss_weights import targets_of
from megatron_lite.engine.pipeline_module import Sent, deepspeed_topology, first_wire
from megatron_lite.engine.pipeline_schedule import Action, Instruction
from megatron_lite.models.activations import Wire
from megatron_lite.models.flat import FlatModel
from megatron_lite.models.spec import LayerSpec
from megatron_lite.objectives.loss import Outputs


class FlatEngine(Engine):
    """DeepSpeedEngine around the whole model, driven by the schedule of a pipeline of one stage."""

    def _wrap(self, specs: Sequence[LayerSpec]) -> tuple[nn.Module, PipelineParallelGrid | None]:
        self._wire = first_wire(specs, self.config.model.hidden_size, self.context)
        needs_grid = self.context.tensor_size > 1
        grid = PipelineParallelGrid(topology=deepspeed_topology(self.context)) if needs_grid else None
        return FlatModel(specs).to(self.context.device), grid

    def _load(self, batches: Sequence[MicroBatch], num_buffers: int) -> None:
        self._batches = batches
        self._total = torch.zeros((), device=self.context.device)

    def _execute(self, instruction: Instruction) -> None:
        if instruction.action is Action.FORWARD:
            self._micro_batch_loss = self._forward(self._batches[instruction.micro_batch])
            self._total += self._micro_batch_loss.detach()
        elif instruction.action is Action.BACKWARD:
            # Set by hand: a batch ramp changes the count, and DeepSpeed's own counter would then be out of step.
            is_last = instruction.micro_batch == len(self._batches) - 1
            self.deepspeed_engine.set_gradient_accumulation_boundary(is_last)
            self.deepspeed_engine.backward(self._micro_batch_loss)  # reduces gradients to the ranks that own them
        # LOAD: the forward pass moves the micro-batch to the device. One stage sends and receives nothing.

    def _forward(self, batch: MicroBatch) -> torch.Tensor:
        device = self.context.device
        outputs = self.deepspeed_engine(*(tensor.to(device) for tensor in batch.inputs))
        return self.loss(outputs, tuple(tensor.to(device) for tensor in targets_of(batch)))

    def _loss_sum(self) -> torch.Tensor:
        return self._total

    def _reduce_tied_weights(self) -> None:
        """One stage holds them all."""

    def _reduce_over_data_parallel(self) -> None:
        """The backward pass of the last micro-batch has finished it."""

    def _step_optimizer(self) -> None:
        self.deepspeed_engine.step()

    def forward_local(self, sent: Sent) -> Outputs | Sent:
        x = self._wire.unpack(sent)
        return self.deepspeed_engine(*(getattr(x, field.name) for field in self.specs[0].takes or ()))

    @property
    def wire_in(self) -> Wire:
        return self._wire

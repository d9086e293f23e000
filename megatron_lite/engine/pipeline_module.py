"""The layer list as a DeepSpeed PipelineModule, cut into stages as `planning.stages.layers_of_stages` says.

DeepSpeed's own partitioners build every layer on every rank or count layer types by regular expression; the planner
has to get the same partition without building anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

from deepspeed.pipe import LayerSpec as PipeLayerSpec
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron_lite.models.activations import Activations, StageBoundary
from megatron_lite.models.flat import outputs_of
from megatron_lite.models.spec import LayerSpec
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.topology import stage_bounds

Sent: TypeAlias = Tensor | tuple[Tensor, ...]
"""What one stage sends to the next, see `models.activations.StageBoundary`; on the last stage, the loss or logits."""


class StagedModule(PipelineModule):
    """This rank's stage of the model: input from the previous stage -> output to the next."""

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        hidden_size: int,
        layers_of_stages: Sequence[int],
        context: ParallelContext,
        loss: Callable[[Activations, tuple[Tensor, ...]], Tensor],
    ) -> None:
        starts = [index for index, spec in enumerate(specs) if spec.stage_inputs is not None]
        self._bounds = stage_bounds(starts[1:], len(specs), layers_of_stages)
        super().__init__(
            layers=[_LaterTiedLayer(spec) if spec.tied else _LaterLayer(spec) for spec in specs],
            topology=deepspeed_topology(context),
            activation_checkpoint_interval=0,
        )
        self._loss = loss
        self.targets: tuple[Tensor, ...] | None = None
        """For the next forward pass on the last stage, which then returns the loss; None = it returns logits."""
        start, stop = (self._bounds[context.pipeline_rank + side] for side in (0, 1))
        own = specs[start:stop]
        built: list[Any] = getattr(self, "forward_funcs")  # noqa: B009  # not declared in its class
        modules = [self.tied_modules[spec.tied] if spec.tied else made for spec, made in zip(own, built, strict=True)]
        self._calls: list[Callable[[Activations], Activations]] = [
            partial(spec.apply, module) for spec, module in zip(own, modules, strict=True)
        ]
        self.input_boundary = _boundary(specs[start], hidden_size, context)
        self.output_boundary = None if context.is_last_stage else _boundary(specs[stop], hidden_size, context)

    def forward(self, sent: Sent) -> Sent:
        x = self.input_boundary.unpack(sent)
        for call in self._calls:
            x = call(x)
        if self.output_boundary is not None:
            return self.output_boundary.pack(x)
        # Not DeepSpeed's `loss_fn`, which would need all logits as the output, and keeps the output of each buffer.
        targets, self.targets = self.targets, None
        return outputs_of(x) if targets is None else self._loss(x, targets)

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self._bounds
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])


def first_boundary(specs: Sequence[LayerSpec], hidden_size: int, context: ParallelContext) -> StageBoundary:
    """How the batch is packed for the first stage."""
    return _boundary(specs[0], hidden_size, context)


def deepspeed_topology(context: ParallelContext) -> PipeModelDataParallelTopology:
    return PipeModelDataParallelTopology(
        num_pp=context.pipeline_size, num_mp=context.tensor_size, num_dp=context.data_size
    )


def _boundary(spec: LayerSpec, hidden_size: int, context: ParallelContext) -> StageBoundary:
    assert spec.stage_inputs is not None
    return StageBoundary(spec.stage_inputs, hidden_size, context)


class _LaterLayer(PipeLayerSpec):
    """A layer that is built later: DeepSpeed calls `build` only for the layers of this rank's stage."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(nn.Module)
        self.spec = spec

    def build(self, log: bool = False) -> nn.Module:
        return self.spec.build()


class _LaterTiedLayer(TiedLayerSpec):
    """The same for a module that several layers share (tied weights); DeepSpeed sums its gradient over their stages."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec.tied, nn.Module, forward_fn=spec.apply, tied_weight_attr="weight")
        self.spec = spec

    def build(self, log: bool = False) -> nn.Module:
        return self.spec.build()

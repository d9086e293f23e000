"""One forward pass through all pipeline stages without training: for generated text and previews.

Shapes: b samples, s positions whose labels are predicted, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.engine.engine import Engine
from megatron_lite.models.flat import inputs_of
from megatron_lite.objectives.loss import Outputs
from megatron_lite.parallel.context import ParallelContext


@torch.no_grad()
def forward_through_stages(engine: Engine, inputs: Sequence[Tensor]) -> Outputs | None:
    """Returns the model's outputs on the last stage, None on the others. A collective of all ranks.

    Args:
        inputs: of the model, [b, length] or [b] each, the same on every rank; only the first stage uses the values.
    """
    context = engine.context
    engine.module.eval()
    if context.is_first_stage:
        device_inputs = [tensor.to(context.device) for tensor in inputs]
        sent = engine.input_boundary.pack(inputs_of(engine.specs, device_inputs))
    else:
        buffers = engine.input_boundary.empty(len(inputs[0]), engine.dtype, context.device)
        for buffer in buffers:
            dist.recv(buffer, src=_stage_rank(context, -1), group=context.pipeline_group)
        sent = buffers[0] if len(buffers) == 1 else tuple(buffers)
    outputs = engine.forward_local(sent)
    if context.is_last_stage:
        return outputs
    for tensor in [outputs] if isinstance(outputs, Tensor) else outputs:
        dist.send(tensor.contiguous(), dst=_stage_rank(context, +1), group=context.pipeline_group)
    return None


def agree(values: Tensor | None, shape: Sequence[int], context: ParallelContext) -> Tensor:
    """Broadcast the last stage's result to every rank: [*shape] int64 on the CPU. A collective of all ranks.

    Logits of data-parallel replicas may differ in the last bit. If each chose its own next token, one could stop
    generating earlier and leave the others waiting in a collective.
    """
    message = torch.empty(tuple(shape), dtype=torch.int64, device=context.device)
    if values is not None:
        message.copy_(values)
    dist.broadcast(message, src=context.topology.rank(context.pipeline_size - 1, data=0, tensor=0))
    return message.cpu()


def _stage_rank(context: ParallelContext, offset: int) -> int:
    return context.topology.rank(context.pipeline_rank + offset, context.data_rank, context.tensor_rank)

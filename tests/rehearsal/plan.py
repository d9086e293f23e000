"""What a rank should need, from the planner and from `wire.minimum_bytes`: the figures that a recording is held to."""

from __future__ import annotations

import torch

from megatron_lite.config.derived import (
    StageContent,
    has_next_sentence_head,
    padded_vocabulary,
    parameter_counts,
    stage_contents,
)
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import Architecture, Precision, Recompute
from megatron_lite.engine.engine import Engine
from megatron_lite.engine.pipelined import PipelinedEngine
from megatron_lite.models.activations import StageBoundary
from megatron_lite.planning.activations import stage_activations
from megatron_lite.planning.memory import model_states
from megatron_lite.planning.stages import layers_of_stages
from tests.rehearsal import wire

SOFTMAX_SUMS = 2
"""Numbers per position that ranks with parts of the vocabulary exchange: logarithm of the sum, logit of the label."""


def planned_bytes(config: ResolvedConfig, engine: Engine) -> float:
    """Bytes of the device that the planner predicts for the rank of this engine."""
    parallel, context = config.parallel, engine.context
    vocabulary = padded_vocabulary(config, config.model.vocab_size or 0)
    tensor = parallel.tensor_parallel_size
    counts = parameter_counts(config.model, vocabulary, tensor, next_sentence=has_next_sentence_head(config))
    content = _content(config, engine)
    states = model_states(config, counts.stage(content), parallel.data_parallel_size)
    activations = stage_activations(config, content, context.pipeline_rank, vocabulary)
    return states.on_device(config) + activations.total


def _content(config: ResolvedConfig, engine: Engine) -> StageContent:
    cut = layers_of_stages(config, config.model.vocab_size)
    return stage_contents(config.model, cut)[engine.context.pipeline_rank]


def minimum_wire_bytes(config: ResolvedConfig, engine: Engine) -> dict[str, float]:
    """By group, the fewest bytes that the rank of this engine has to send in a step."""
    context, parallel = engine.context, config.parallel
    half = config.train.precision is not Precision.fp32
    layout = wire.Layout(
        data=context.data_size,
        tensor=context.tensor_size,
        sequence_parallel=context.sequence_parallel,
        zero_stage=parallel.zero_stage,
        micro_batches=config.num_micro_batches(),
        weight_bytes=2 if half else 4,
        gradient_bytes=2 if half else 4,
        recomputes=parallel.recompute is Recompute.full,
    )
    parameters = list(engine.module.parameters())
    tied, tied_stages = _tied(engine)
    stage = wire.Stage(
        parameters=sum(getattr(one, "ds_numel", one.numel()) for one in parameters),
        tied=tied,
        tied_stages=tied_stages,
        **_activations(config, engine),
    )
    return wire.minimum_bytes(layout, stage)


def _tied(engine: Engine) -> tuple[int, int]:
    """Elements of weights that this stage shares with others, and how many stages hold them."""
    groups = getattr(engine.module, "tied_comms", {}).values()
    shared = [one for one in groups if len(one["ranks"]) > 1 and engine.context.rank in one["ranks"]]
    elements = sum(one["module"].weight.numel() for one in shared)
    return elements, max((len(one["ranks"]) for one in shared), default=1)


def _activations(config: ResolvedConfig, engine: Engine) -> dict[str, int]:
    """Elements of the activations that a micro-batch of this stage exchanges; see `wire.Stage`."""
    model = config.model
    b, h, s = config.train.micro_batch_size, model.hidden_size, config.data.seq_length
    d = config.decoder_length or s  # positions of the stack with the head
    content = _content(config, engine)
    encoder, decoder = content.layers, content.decoder_layers
    # Each layer: attention and MLP; a decoder's layer also attends to the encoder's output, s positions.
    sums = b * h * (2 * encoder * s + 3 * decoder * d)
    gathers = b * h * (2 * encoder * s + decoder * (3 * d + s))
    again = sums - b * h * (encoder * s + decoder * d)  # recomputation needs no layer's last sum
    embeddings = b * h * s * content.first
    if model.architecture is Architecture.encoder_decoder:
        embeddings += b * h * d * content.begins_decoder
    head = b * h * d * content.last
    sent, received = _crossing(engine, b)
    return {
        "sums": sums + embeddings,
        "gathers": gathers + head,
        "sums_again": again,
        "gathers_again": gathers,
        "loss_elements": SOFTMAX_SUMS * b * d * content.last,
        "sent": sent,
        "received": received,
    }


def _crossing(engine: Engine, batch: int) -> tuple[int, int]:
    """Elements of a micro-batch's activations that go to the next stage and come from the one before."""
    if not isinstance(engine, PipelinedEngine):
        return 0, 0
    context = engine.context

    def elements(boundary: StageBoundary | None) -> int:
        if boundary is None:
            return 0
        tensors = boundary.empty(batch, torch.float32, torch.device("cpu"))
        whole = sum(one.numel() for one in tensors if one.is_floating_point())
        return whole * (context.tensor_size if context.sequence_parallel else 1)

    received = 0 if context.is_first_stage else elements(engine.module.input_boundary)
    return elements(engine.module.output_boundary), received

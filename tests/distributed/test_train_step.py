"""The train step stays short enough to read: limits the depth of the call stack at a step's first matrix product."""

from __future__ import annotations

import traceback
from unittest import mock

import pytest
import torch.nn.functional as F
from torch import nn

from megatron_lite.config.derived import padded_vocabulary, parameter_counts, resolve
from megatron_lite.config.schema import RunConfig
from megatron_lite.models import flat
from megatron_lite.optim.batch_ramp import BatchStep
from tests.distributed.equivalence_cases import VOCAB_SIZE, run_config
from tests.distributed.harness import run_ranks
from tests.distributed.layout_ranks import synthetic_engine

MOST_FRAMES = 20  # most of them are torch's, two for each module, and DeepSpeed's
MOST_OWN_FRAMES = 8


def frames_rank(config: RunConfig) -> list[str]:
    """Files of the frames from `launch_step` to the first matrix product."""
    engine, batches_from = synthetic_engine(config, VOCAB_SIZE)
    found: list[list[str]] = []
    linear = F.linear

    def spy(*arguments: object) -> object:
        frames = traceback.extract_stack()[:-1]
        first = next(place for place, frame in enumerate(frames) if frame.name == "launch_step")
        found.append([frame.filename for frame in frames[first:]])
        return linear(*arguments)

    with mock.patch.object(F, "linear", spy):
        engine.train_step(batches_from(0, 2), BatchStep(0, 8), 1e-3)
    return found[0]


def whole_while_building_rank(config: RunConfig) -> list[int]:
    """Elements of layers that are not partitioned, each time that a layer has been built."""
    found: list[int] = []
    register = flat._register

    def spy(root: nn.Module, name: str, module: nn.Module) -> None:
        register(root, name, module)
        found.append(sum(parameter.numel() for parameter in root.parameters()))

    with mock.patch.object(flat, "_register", spy):
        engine, _ = synthetic_engine(config, VOCAB_SIZE)
    assert not any(parameter.numel() for parameter in engine.module.parameters())
    return found


def test_zero3_builds_one_layer_at_a_time() -> None:
    config = run_config("gpt2", zero_stage=3)
    whole = run_ranks(whole_while_building_rank, 1, config)[0]
    counts = parameter_counts(resolve(config).model, padded_vocabulary(resolve(config), VOCAB_SIZE), 1)
    assert max(whole) == max(counts.layer, counts.embedding)
    assert len(whole) > config.model.num_layers


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_the_first_matrix_product_is_near(zero_stage: int) -> None:
    (frames,) = run_ranks(frames_rank, 1, run_config("gpt2", zero_stage=zero_stage))
    assert sum("megatron_lite/" in file for file in frames) <= MOST_OWN_FRAMES
    if zero_stage == 1:  # with ZeRO-3, its hooks on each module add frames of torch
        assert len(frames) <= MOST_FRAMES


def kept_rank(config: RunConfig) -> int:
    """Elements of the largest output that the last stage keeps after a step."""
    engine, batches_from = synthetic_engine(config, VOCAB_SIZE)
    engine.train_step(batches_from(0, 2), BatchStep(0, 8), 1e-3)
    return max(output.numel() for output in engine.deepspeed_engine.pipe_buffers["outputs"] if output is not None)


def test_the_last_stage_keeps_no_logits() -> None:
    assert run_ranks(kept_rank, 1, run_config("gpt2")) == [1], "the loss alone"

"""Process groups and coordinates of every rank, and low precision across ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.config.derived import resolve_model
from megatron_lite.config.schema import ModelConfig, Normalization, PositionEmbedding, Recompute
from megatron_lite.models.build import build_layers
from megatron_lite.models.fields import Field
from megatron_lite.models.flat import FlatModel
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.topology import Topology
from tests.distributed.harness import RankError, run_ranks
from tests.mean_loss import mean_loss

CPU = torch.device("cpu")
VOCAB_SIZE = 37
INPUTS = (Field("tokens", 16),)


def _groups(topology: Topology) -> dict[str, object]:
    context = ParallelContext.build(topology, device=CPU, sequence_parallel=True, seed=1)

    def members(group: dist.ProcessGroup | None) -> list[int] | None:
        return None if group is None else dist.get_process_group_ranks(group)

    return {
        "coordinates": tuple(context.coordinates),
        "tensor": members(context.tensor_group),
        "data": members(context.data_group),
        "pipeline": members(context.pipeline_group),
        "stages": (context.is_first_stage, context.is_last_stage),
        "writer": context.is_writer,
        "sequence_parallel": context.sequence_parallel,
    }


def test_groups_of_a_2_2_2_grid():
    topology = Topology(data_parallel_size=2, tensor_parallel_size=2, pipeline_parallel_size=2)
    ranks = run_ranks(_groups, 8, topology)
    assert ranks[5] == {
        "coordinates": (1, 0, 1),
        "tensor": [4, 5],
        "data": [5, 7],
        "pipeline": [1, 5],
        "stages": (False, True),
        "writer": False,
        "sequence_parallel": True,
    }
    assert [rank["coordinates"] for rank in ranks] == [tuple(topology.coordinates(rank)) for rank in range(8)]
    assert [rank["writer"] for rank in ranks] == [True] + [False] * 7


def test_axes_of_size_one_have_no_group_and_no_sequence_parallelism():
    for rank in run_ranks(_groups, 2, Topology(data_parallel_size=2)):
        assert rank["tensor"] is None
        assert rank["pipeline"] is None
        assert rank["data"] == [0, 1]
        assert rank["sequence_parallel"] is False


def test_a_layout_of_another_size_is_refused():
    with pytest.raises(RankError, match=r"the job has 2 ranks, the layout .* needs 4"):
        run_ranks(_groups, 2, Topology(tensor_parallel_size=4))


def _loss_and_gradient(dtype: torch.dtype, sequence_parallel: bool) -> tuple[Tensor, Tensor]:
    model = ModelConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=16,
        vocab_pad_multiple=8,
        normalization=Normalization.rmsnorm,
        position_embedding=PositionEmbedding.learned,
    )
    topology = Topology(tensor_parallel_size=2)
    context = ParallelContext.build(topology, device=CPU, sequence_parallel=sequence_parallel, seed=5)
    flat = FlatModel(
        build_layers(resolve_model(model), context, vocab_size=VOCAB_SIZE, recompute=Recompute.none, inputs=INPUTS)
    ).to(dtype)
    tokens = torch.randint(VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(0))
    loss = mean_loss(flat, [tokens], tokens.roll(-1, 1), context, VOCAB_SIZE)
    loss.backward()
    return loss.detach(), torch.cat([parameter.grad.float().flatten() for parameter in flat.parameters()])


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_follows_fp32_on_two_ranks(dtype: torch.dtype, sequence_parallel: bool):
    exact = run_ranks(_loss_and_gradient, 2, torch.float32, sequence_parallel)
    rounded = run_ranks(_loss_and_gradient, 2, dtype, sequence_parallel)
    for (loss, gradient), (low_loss, low_gradient) in zip(exact, rounded, strict=True):
        torch.testing.assert_close(low_loss, loss, rtol=2e-3, atol=0.0)
        assert (low_gradient - gradient).norm() <= 0.03 * gradient.norm()

"""The planned bytes of activations against what autograd really saves, on tensors without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.config.compose import compose
from megatron_lite.config.derived import padded_vocabulary, resolve, stage_contents
from megatron_lite.engine.task import build_task
from megatron_lite.models.flat import FlatModel
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.planning.activations import stage_activations
from megatron_lite.verify.equivalence import synthetic_vocabulary

WORDS = (
    "train.micro_batch_size=2",
    "train.global_batch_size=2",
    "data.seq_length=256",
    "parallel=single",
    "model.hidden_size=128",
    "model.num_attention_heads=8",
    "model.num_layers=3",
)
VOCABULARY = 1024


def flash_attention(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
    """The kernel that torch chooses on a GPU."""
    causal = settings["is_causal"]
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False)[0]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("script", "model"),
    [
        ("pretrain_gpt", ["model=gpt_tiny"]),
        ("pretrain_gpt", ["model=llama_tiny", "model.num_query_groups=8"]),
        ("pretrain_gpt", ["model=llama_tiny", "model.num_query_groups=2"]),
        ("pretrain_gpt", ["model=gpt_tiny", "model.norm_placement=post"]),
    ],
)
def test_a_planned_layer_is_what_autograd_saves(
    script: str, model: list[str], recompute: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*model, *WORDS, f"train.precision={precision}", f"parallel.recompute={recompute}"]
    config = resolve(compose(script, words), device="cuda")
    monkeypatch.setattr(F, "scaled_dot_product_attention", flash_attention)
    with torch.device("meta"):
        planned = stage_activations(
            config, stage_contents(config.model, [config.model.num_layers])[0], 0, padded_vocabulary(config, VOCABULARY)
        )
        saved = saved_bytes(config)
    assert planned.layers == pytest.approx(saved, rel=0.01)


def saved_bytes(config: Any) -> int:
    """Of one forward pass: all storages that autograd saves, without weights."""
    context = ParallelContext.single(device="meta")
    task = build_task(config, context, synthetic_vocabulary(VOCABULARY))
    dtype = torch.float32 if config.train.precision.value == "fp32" else torch.bfloat16
    net = FlatModel(task.specs).to(dtype)
    others = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor
        return tensor

    tokens = torch.zeros(config.train.micro_batch_size, config.data.seq_length, dtype=torch.int64)
    others.add(tokens.untyped_storage()._cdata)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(tokens)
    return sum(one.untyped_storage().nbytes() for storage, one in found.items() if storage not in others)

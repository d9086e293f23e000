"""What is compared: each system is a function that builds a model and returns its training step.

A step is forward, backward, clipping by the global norm at 1.0 and AdamW, over the same micro-batch, and returns the
loss. bf16 means bf16 arithmetic with fp32 weights in the optimizer, in all systems.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import nn

from benchmarks.shape import MICRO_BATCH, Shape
from megatron_lite.config.schema import OptimizerConfig, ParallelConfig, Precision
from megatron_lite.engine.task import build_task
from megatron_lite.models.flat import FlatModel
from megatron_lite.observe.hardware import enable_fast_float32_matmul, reuse_freed_memory
from megatron_lite.optim.batch_ramp import BatchStep
from megatron_lite.optim.build import build_optimizer
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.topology import Topology

Step = Callable[[], float]

LEARNING_RATE = 3e-4
CLIP = 1.0


def bare_torch(shape: Shape) -> Step:
    """Our layers in a plain loop: what the engine is measured against."""
    reuse_freed_memory()
    enable_fast_float32_matmul()
    context = ParallelContext.single()
    task = build_task(shape.run(ParallelConfig(), MICRO_BATCH), context, shape.vocabulary)
    model = FlatModel(task.specs)
    batch = shape.batch()
    weights = batch.loss_weights / batch.loss_weights.sum()

    def backward() -> torch.Tensor:
        loss = model(*batch.inputs, end=lambda x: task.loss(x, (batch.labels, weights)))
        loss.backward()
        return loss

    def optimizer_of(parameters: Iterator[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return build_optimizer(parameters, OptimizerConfig(learning_rate=LEARNING_RATE), context)

    return _plain_step(model, backward, optimizer_of, master_weights=shape.precision is Precision.bf16)


def engine(shape: Shape) -> Step:
    """Our engine on one rank: PipelineEngine with ZeRO-1."""
    from megatron_lite.engine.build import build_engine
    from megatron_lite.train.distributed import ProcessEnvironment, start_process_group

    reuse_freed_memory()
    enable_fast_float32_matmul()
    device = torch.device("cpu")
    start_process_group(device, ProcessEnvironment(0, 0, 1, 1), timeout_seconds=600)
    context = ParallelContext.build(Topology(), device=device, sequence_parallel=False, seed=1234)
    config = shape.run(ParallelConfig(), global_batch_size=MICRO_BATCH)
    task = build_task(config, context, shape.vocabulary)
    built = build_engine(config, context, task, global_batch_size=MICRO_BATCH)
    batch = shape.batch()
    return lambda: built.train_step([batch], BatchStep(0, MICRO_BATCH), LEARNING_RATE).loss


def transformers_autocast(shape: Shape) -> Step:
    """GPT2LMHeadModel in a plain loop; bf16 by autocast over fp32 weights."""
    return _transformers(shape, master_weights=False)


def transformers_master(shape: Shape) -> Step:
    """GPT2LMHeadModel in a plain loop; bf16 weights with fp32 copies in the optimizer."""
    return _transformers(shape, master_weights=shape.precision is Precision.bf16)


SYSTEMS: dict[str, Callable[[Shape], Step]] = {
    "bare_torch": bare_torch,
    "engine": engine,
    "transformers": transformers_autocast,
    "transformers_master": transformers_master,
}


def _transformers(shape: Shape, master_weights: bool) -> Step:
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = shape.model()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=settings.max_position_embeddings,
            n_embd=settings.hidden_size,
            n_layer=settings.num_layers,
            n_head=settings.num_attention_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
    )
    model.train()
    (tokens,) = shape.batch().inputs
    autocast = shape.precision is Precision.bf16 and not master_weights

    def backward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss

    def optimizer_of(parameters: Iterator[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for _, p in parameters], lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)

    return _plain_step(model, backward, optimizer_of, master_weights)


def _plain_step(
    model: nn.Module,
    backward: Callable[[], torch.Tensor],
    optimizer_of: Callable[[Iterator[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
    master_weights: bool,
) -> Step:
    if master_weights:
        return _master_weight_step(model, backward, optimizer_of)
    optimizer = optimizer_of(model.named_parameters())

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step


def _master_weight_step(
    model: nn.Module,
    backward: Callable[[], torch.Tensor],
    optimizer_of: Callable[[Iterator[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
) -> Step:
    masters = [(name, nn.Parameter(p.detach().float().clone())) for name, p in model.named_parameters()]
    model.to(torch.bfloat16)
    weights, copies = list(model.parameters()), [master for _, master in masters]
    optimizer = optimizer_of(iter(masters))

    def step() -> float:
        loss = backward()
        for weight, master in zip(weights, copies, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(copies, CLIP)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, copies)
        return loss.item()

    return step

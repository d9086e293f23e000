"""Continue a text with the model as it lies: sliced over tensor ranks, staged over pipeline ranks.

Shapes: b = 1, s sequence, h hidden, v vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.train.engine import Engine

_NOTHING = -1  # no token


@torch.no_grad()
def generate(
    engine: Engine,
    prompt: Sequence[int],
    *,
    num_tokens: int,
    seq_length: int,
    vocab_size: int,
    stop_id: int | None = None,
    temperature: float = 0.8,
    top_k: int = 40,
) -> list[int]:
    """Sample a continuation; a collective of all ranks, the same result on each.

    Every token costs a whole forward pass over seq_length positions (there is no cache of keys and values): right for
    a short sample at the end of a run, not for serving.

    Args:
        prompt: token ids, at least one; only the last seq_length - 1 are used.
        stop_id: ends the text early (the end-of-document token).
    Returns:
        the prompt and what follows it
    """
    engine.module.eval()
    context = engine.context
    generator = torch.Generator().manual_seed(context.seed)
    tokens = list(prompt)
    for _ in range(num_tokens):
        window = tokens[-max(seq_length - 1, 1) :]
        padded = torch.zeros(1, seq_length, dtype=torch.int64, device=context.device)
        padded[0, : len(window)] = torch.tensor(window)
        logits = _last_stage_logits(engine, padded, position=len(window) - 1, vocab_size=vocab_size)
        token = _agree(_sample(logits, temperature, top_k, generator), context)
        if token in (stop_id, _NOTHING):
            break
        tokens.append(token)
    return tokens


def _last_stage_logits(engine: Engine, tokens: torch.Tensor, position: int, vocab_size: int) -> torch.Tensor | None:
    """[v] on the last stage, None on the others."""
    context = engine.context
    activations = tokens
    if not context.is_first_stage:
        config = engine.config
        length = config.data.seq_length
        if context.sequence_parallel:
            length //= context.tensor_size
        activations = torch.empty(
            1, length, config.model.hidden_size, dtype=engine.dtype, device=context.device
        )  # [b, s, h], or [b, s/t, h]
        dist.recv(activations, src=_stage_rank(context, -1), group=context.pipeline_group)
    output = engine.forward_local(activations)
    if not context.is_last_stage:
        dist.send(output.contiguous(), dst=_stage_rank(context, +1), group=context.pipeline_group)
        return None
    mine = output[0, position].float().contiguous()  # [v/t]
    if context.tensor_group is None:
        return mine[:vocab_size].cpu()
    slices = [torch.empty_like(mine) for _ in range(context.tensor_size)]
    dist.all_gather(slices, mine, group=context.tensor_group)
    return torch.cat(slices)[:vocab_size].cpu()


def _sample(logits: torch.Tensor | None, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if logits is None or not logits.isfinite().all():  # a stage without logits; a run that has diverged
        return _NOTHING
    values, indices = logits.topk(min(top_k, logits.numel()))
    choice = torch.multinomial(torch.softmax(values / temperature, dim=0), 1, generator=generator)
    return int(indices[choice])


def _agree(token: int, context: ParallelContext) -> int:
    """One token for the whole job: replicas whose logits differ in the last bit must not part, or one would wait."""
    message = torch.tensor([token], device=context.device)
    dist.broadcast(message, src=context.topology.rank(context.pipeline_size - 1, data=0, tensor=0))
    return int(message)


def _stage_rank(context: ParallelContext, offset: int) -> int:
    return context.topology.rank(context.pipeline_rank + offset, context.data_rank, context.tensor_rank)

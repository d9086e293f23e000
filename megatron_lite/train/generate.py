"""Generate text with the model as it is distributed: sliced over tensor ranks, split into pipeline stages.

Shapes: b = 1, s sequence, v vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_lite.engine.engine import Engine
from megatron_lite.engine.inference import agree, forward_through_stages

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
    """Sample a continuation from a decoder; a collective of all ranks, the same result on each.

    Every token costs a whole forward pass over seq_length positions (there is no KV cache): good enough for a short
    sample at the end of a run, not for serving.

    Args:
        prompt: token ids, at least one; only the last seq_length - 1 are used.
        stop_id: the end-of-document token, which ends the text early.
    Returns:
        the prompt and its continuation
    """
    generator = torch.Generator().manual_seed(engine.context.seed)
    tokens = list(prompt)
    for _ in range(num_tokens):
        window = tokens[-max(seq_length - 1, 1) :]
        prefix = max(len(prompt) - (len(tokens) - len(window)), 1)  # tokens of the prompt still in the window
        logits = _next_logits(engine, window, prefix, seq_length, vocab_size)
        choice = None if logits is None else torch.tensor(_sample(logits, temperature, top_k, generator))
        token = int(agree(choice, (), engine.context))
        if token in (stop_id, _NOTHING):
            break
        tokens.append(token)
    return tokens


def _next_logits(
    engine: Engine, window: Sequence[int], prefix: int, seq_length: int, vocab_size: int
) -> torch.Tensor | None:
    """Logits [v] of the token after `window` on the last stage, None on the others."""
    padded = torch.zeros(1, seq_length, dtype=torch.int64)
    padded[0, : len(window)] = torch.tensor(window)
    inputs = [padded]
    if any(field.name == "prefix_lengths" for field in engine.specs[0].stage_inputs or ()):
        inputs.append(torch.tensor([prefix]))
    outputs = forward_through_stages(engine, inputs)
    if outputs is None:
        return None
    assert isinstance(outputs, torch.Tensor)
    mine = outputs[0, len(window) - 1].float().contiguous()  # [v/t]
    group = engine.context.tensor_group
    if group is None:
        return mine[:vocab_size].cpu()
    slices = [torch.empty_like(mine) for _ in range(engine.context.tensor_size)]
    dist.all_gather(slices, mine, group=group)
    return torch.cat(slices)[:vocab_size].cpu()


def _sample(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if not logits.isfinite().all():  # the run has diverged; multinomial would raise
        return _NOTHING
    values, indices = logits.topk(min(top_k, logits.numel()))
    choice = torch.multinomial(torch.softmax(values / temperature, dim=0), 1, generator=generator)
    return int(indices[choice])

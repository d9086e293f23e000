"""A sample of the model's predictions at the end of a run, for objectives that corrupt text: one held-out sample.

Shapes: s positions of the model's input, d positions whose labels are predicted.
"""

from __future__ import annotations

import torch

from megatron_lite.data.samples.batch import MicroBatch, stack
from megatron_lite.data.tokenizer.tokenizer import Tokenizer
from megatron_lite.engine.engine import Engine
from megatron_lite.engine.inference import agree, forward_through_stages
from megatron_lite.models.flat import inputs_of
from megatron_lite.objectives.base import Example
from megatron_lite.parallel.cross_entropy import vocab_parallel_argmax

SHOWN_TOKENS = 60


def preview(engine: Engine, example: Example, tokenizer: Tokenizer) -> str:
    """Input, target and predicted tokens as text. A decoder predicts with teacher forcing.

    A collective of all ranks, the same text on each.
    """
    batch = stack([example])
    found = predicted_tokens(engine, batch)[0]
    counted = batch.loss_weights[0] > 0
    read = inputs_of(engine.specs, batch.inputs)
    assert read.tokens is not None
    length = read.tokens.shape[1] if read.lengths is None else int(read.lengths[0])  # without padding
    return "\n".join(
        f"{title:<9} {_shown(tokens, tokenizer)}"
        for title, tokens in (
            ("input", read.tokens[0, :length]),
            ("target", batch.labels[0][counted]),
            ("predicted", found[counted]),
        )
    )


def predicted_tokens(engine: Engine, batch: MicroBatch) -> torch.Tensor:
    """The most likely label of every position, [b, d] on the CPU. A collective of all ranks, the same on each."""
    outputs = forward_through_stages(engine, batch.inputs)
    found = None
    if outputs is not None:
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        found = vocab_parallel_argmax(logits, engine.context, engine.loss.vocab_size)
    return agree(found, batch.labels.shape, engine.context)


def _shown(tokens: torch.Tensor, tokenizer: Tokenizer) -> str:
    text = tokenizer.decode(tokens[:SHOWN_TOKENS].tolist())
    return text.replace("\n", "\\n") + (" ..." if len(tokens) > SHOWN_TOKENS else "")

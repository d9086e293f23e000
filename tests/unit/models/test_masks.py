"""Which keys are seen, against masks written out entry by entry."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_lite.config.derived import resolve_model
from megatron_lite.config.schema import ModelConfig, Recompute
from megatron_lite.models.build import build_layers
from megatron_lite.models.fields import Field
from megatron_lite.models.flat import FlatModel
from megatron_lite.models.masks import Visibility, key_mask, self_attention_mask
from megatron_lite.parallel.context import ParallelContext
from tests.tiny_models import GPT2, LLAMA

VOCAB_SIZE = 60
LENGTH = 6
SOME = torch.tensor([6, 2, 1])


def _written_out(sees: Callable[[int, int, int], bool]) -> Tensor:
    """[3, 1, s, s]: `sees(sample, query, key)`."""
    grid = [[[sees(b, i, j) for j in range(LENGTH)] for i in range(LENGTH)] for b in range(3)]
    return torch.tensor(grid).unsqueeze(1)


def _mask(visibility: Visibility, *, causal: bool) -> Tensor:
    mask = self_attention_mask(LENGTH, visibility, causal=causal)
    assert mask is not None
    return mask.expand(3, -1, LENGTH, LENGTH)


def test_nothing_beyond_causality_needs_no_mask():
    assert self_attention_mask(LENGTH, Visibility(), causal=True) is None
    assert self_attention_mask(LENGTH, Visibility(), causal=False) is None
    assert self_attention_mask(LENGTH, Visibility(lengths=SOME), causal=True) is None  # padding lies behind


def test_padding_is_seen_by_none():
    mask = _mask(Visibility(lengths=SOME), causal=False)
    assert torch.equal(mask, _written_out(lambda b, i, j: j < SOME[b]))
    assert torch.equal(key_mask(4, SOME)[:, 0, 0].sum(-1), torch.tensor([4, 2, 1]))


def test_a_prefix_is_seen_from_everywhere():
    mask = _mask(Visibility(prefix_lengths=SOME), causal=True)
    assert torch.equal(mask, _written_out(lambda b, i, j: j <= i or j < SOME[b]))


@pytest.mark.parametrize("causal", [False, True])
def test_a_bias_is_a_mask_already(causal: bool):
    bias = torch.randn(1, 2, LENGTH, LENGTH)
    assert self_attention_mask(LENGTH, Visibility(SOME, None, bias), causal=causal) is bias


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_prefix_language_model_sees_its_prefix_both_ways(model: ModelConfig):
    inputs = (Field("tokens", 16), Field("prefix_lengths"))
    layers = build_layers(
        resolve_model(model), ParallelContext.single(), vocab_size=VOCAB_SIZE, recompute=Recompute.none, inputs=inputs
    )
    flat = FlatModel(layers)
    tokens = torch.randint(VOCAB_SIZE, (1, 16), generator=torch.Generator().manual_seed(0))
    prefix = torch.tensor([7])

    def moved_by(changed: int) -> list[int]:
        """Positions whose logits change with the token at `changed`."""
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % VOCAB_SIZE
        with torch.no_grad():
            difference = (flat(other, prefix) - flat(tokens, prefix)).abs().amax(-1)[0]
        return (difference > 1e-5).nonzero().flatten().tolist()

    assert moved_by(5) == list(range(16))  # inside the prefix: all see it
    assert moved_by(7) == list(range(7, 16))  # the first position behind it
    assert moved_by(11) == list(range(11, 16))


def test_no_prefix_is_a_causal_model():
    context = ParallelContext.single()
    tokens = torch.randint(VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(0))

    def logits(inputs: tuple[Field, ...], *values: Tensor) -> Tensor:
        layers = build_layers(
            resolve_model(GPT2), context, vocab_size=VOCAB_SIZE, recompute=Recompute.none, inputs=inputs
        )
        return FlatModel(layers)(*values)

    causal = logits((Field("tokens", 16),), tokens)
    prefix = logits((Field("tokens", 16), Field("prefix_lengths")), tokens, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(prefix, causal, rtol=0.0, atol=1e-6)

"""The layer lists of encoders and encoder-decoders: names, what crosses a cut, recomputation, dropout, precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.config.derived import resolve_model
from megatron_lite.config.schema import NormPlacement, Recompute
from megatron_lite.models.activations import Activations, StageBoundary
from megatron_lite.models.build import build_layers
from megatron_lite.models.fields import Field
from megatron_lite.models.flat import FlatModel
from megatron_lite.models.spec import LayerSpec
from megatron_lite.objectives.loss import TokenLoss
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.topology import Topology
from tests.tiny_models import (
    BERT,
    DECODER_LENGTH,
    DECODER_TOKENS,
    GPT2,
    LENGTH,
    LENGTHS,
    MODELS,
    PAIR,
    ROBERTA,
    SEGMENTS,
    T5,
    TOKENS,
    TinyModel,
)

VOCAB_SIZE = 60
DROPOUT = {
    "embedding_dropout": 0.2,
    "attention_dropout": 0.3,
    "hidden_dropout": 0.1,
    "ffn_dropout": 0.2,
    "final_dropout": 0.1,
}
PREFIX = Field("prefix_lengths")


CASES = {
    **MODELS,
    "gpt2_prefix": TinyModel(GPT2, (TOKENS, PREFIX)),
    "bert_pre_norm": TinyModel(replace(BERT, norm_placement=NormPlacement.pre), (TOKENS,), next_sentence=True),
    "roberta_untied": TinyModel(replace(ROBERTA, tie_embeddings=False), (TOKENS,)),
    "t5_unpadded": TinyModel(T5, PAIR),
}


def _specs(
    case: TinyModel, context: ParallelContext | None = None, recompute: Recompute = Recompute.none, **changes: float
) -> list[LayerSpec]:
    return build_layers(
        resolve_model(replace(case.model, **changes)),
        context or ParallelContext.single(),
        vocab_size=VOCAB_SIZE,
        recompute=recompute,
        inputs=case.inputs,
        next_sentence_head=case.next_sentence,
    )


def _inputs(case: TinyModel) -> Activations:
    generator = torch.Generator().manual_seed(0)
    drawn = {"tokens": (LENGTH, VOCAB_SIZE), "segments": (LENGTH, 2), "decoder_tokens": (DECODER_LENGTH, VOCAB_SIZE)}
    made = {name: torch.randint(high, (2, length), generator=generator) for name, (length, high) in drawn.items()}
    made |= {"lengths": torch.tensor([17, LENGTH]), "prefix_lengths": torch.tensor([5, 0])}
    return Activations(**{field.name: made[field.name] for field in case.inputs})


def _arguments(case: TinyModel) -> list[Tensor]:
    return [getattr(_inputs(case), field.name) for field in case.inputs]


def _labels(case: TinyModel) -> Tensor:
    length = DECODER_LENGTH if DECODER_TOKENS in case.inputs else LENGTH
    return torch.randint(VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(1))


def _fused_loss(x: Activations, case: TinyModel, context: ParallelContext, chunk: int | None = None) -> Tensor:
    """As a run computes it."""
    labels = _labels(case)
    targets = labels, torch.full(labels.shape, 1.0 / labels.numel())
    loss = TokenLoss(context, VOCAB_SIZE, head_chunk=chunk)(replace(x, sequence_logits=None), targets)
    return loss if x.sequence_logits is None else loss + x.sequence_logits.logsumexp(-1).sum()


def _plain_loss(x: Activations, case: TinyModel) -> Tensor:
    """Of whole logits, by torch alone."""
    assert x.head is not None
    logits = x.head(x.hidden, lambda hidden, head: F.linear(hidden, head.weight, head.bias))[..., :VOCAB_SIZE]
    loss = F.cross_entropy(logits.flatten(0, 1), _labels(case).flatten())
    return loss if x.sequence_logits is None else loss + x.sequence_logits.logsumexp(-1).sum()


def _step(case: TinyModel, recompute: Recompute = Recompute.none, first_sample: int = 0, **changes: float):
    """Loss and gradients of one micro-batch."""
    context = ParallelContext.single()
    flat = FlatModel(_specs(case, context, recompute, **changes))
    context.rng.begin_step(first_sample, 2)
    loss = flat(*_arguments(case), end=lambda x: _fused_loss(x, case, context))
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in flat.named_parameters()}


def _names(case: TinyModel) -> list[str]:
    return [spec.name for spec in _specs(case)]


def _starts(specs: Sequence[LayerSpec]) -> dict[str, tuple[str, ...]]:
    """What a stage takes that begins with each entry where one may begin, the first apart."""
    return {
        f"{index} {spec.name}": tuple(field.name for field in spec.stage_inputs)
        for index, spec in enumerate(specs)
        if spec.stage_inputs is not None and index > 0
    }


def test_entries_of_bert():
    assert _names(CASES["bert"]) == [
        "embedding",
        "position_embedding",
        "segment_embedding",
        "embedding_norm",
        "layers.0",
        "layers.1",
        "next_sentence",
        "head_transform",
        "head",
        "head_bias",
    ]
    specs = _specs(CASES["bert"])
    assert specs[0].stage_inputs == (TOKENS, SEGMENTS, LENGTHS)
    assert specs[5].stage_inputs == (Field("hidden", LENGTH), LENGTHS)
    assert specs[0].tied == specs[8].tied == "embedding"


def test_entries_of_t5():
    specs = _specs(CASES["t5_v1_1"])
    assert [spec.name for spec in specs] == [
        "embedding",
        "encoder.relative_bias",
        "encoder.layers.0",
        "encoder.relative_bias",
        "encoder.layers.1",
        "encoder.final_norm",
        "decoder.embedding",
        "decoder.relative_bias",
        "decoder.layers.0",
        "decoder.relative_bias",
        "decoder.layers.1",
        "decoder.relative_bias",
        "decoder.layers.2",
        "decoder.final_norm",
        "head",
    ]
    encoder, decoder = ("hidden", "decoder_tokens", "lengths"), ("hidden", "memory", "lengths")
    assert _starts(specs) == {
        "1 encoder.relative_bias": encoder,
        "3 encoder.relative_bias": encoder,
        "5 encoder.final_norm": encoder,
        "9 decoder.relative_bias": decoder,
        "11 decoder.relative_bias": decoder,
        "13 decoder.final_norm": ("hidden",),
    }
    assert specs[5].stage_inputs[:2] == (Field("hidden", LENGTH), Field("decoder_tokens", DECODER_LENGTH))
    assert specs[9].stage_inputs[:2] == (Field("hidden", DECODER_LENGTH), Field("memory", LENGTH))
    assert [spec.tied for spec in specs if spec.tied] == [
        "embedding",
        *2 * ["encoder_relative_bias"],
        "embedding",
        *3 * ["decoder_relative_bias"],
    ]


def test_entries_of_bart():
    specs = _specs(CASES["bart"])
    assert [spec.name for spec in specs] == [
        "embedding",
        "encoder.position_embedding",
        "encoder.embedding_norm",
        "encoder.layers.0",
        "encoder.layers.1",
        "decoder.embedding",
        "decoder.position_embedding",
        "decoder.embedding_norm",
        "decoder.layers.0",
        "decoder.layers.1",
        "decoder.layers.2",
        "head",
    ]
    assert [key.split()[1] for key in _starts(specs)] == [
        "encoder.layers.0",
        "encoder.layers.1",
        "decoder.embedding",
        "decoder.layers.1",
        "decoder.layers.2",
        "head",
    ]
    assert [index for index, spec in enumerate(specs) if spec.tied] == [0, 5, 11]


class _Stage:
    """A part of a layer list with modules of its own, as a pipeline rank has them."""

    def __init__(self, specs: Sequence[LayerSpec]) -> None:
        shared: dict[str, nn.Module] = {}
        self.calls: list[tuple[Callable[[nn.Module, Activations], Activations], nn.Module]] = []
        for spec in specs:
            module = shared[spec.tied] if spec.tied in shared else spec.build()
            if spec.tied:
                shared[spec.tied] = module
            self.calls.append((spec.apply, module))

    def __call__(self, x: Activations) -> Activations:
        for apply, module in self.calls:
            x = apply(module, x)
        return x

    def gradients(self) -> dict[str, Tensor]:
        modules = {id(module): module for _, module in self.calls}.values()
        return {p.global_name: p.grad for module in modules for p in module.parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_stages_that_hand_on_what_they_take_are_the_whole_model(name: str):
    """Cut wherever a stage may begin, all cuts at once and so a copy of a tied table on each stage that uses it."""
    case = CASES[name]
    context = ParallelContext.single()
    specs = _specs(case, context)
    bounds = [index for index, spec in enumerate(specs) if spec.stage_inputs is not None]
    stages = [_Stage(specs[start:stop]) for start, stop in zip(bounds, [*bounds[1:], len(specs)], strict=True)]
    boundaries = [StageBoundary(specs[start].stage_inputs, case.model.hidden_size, context) for start in bounds[1:]]
    x = _inputs(case)
    for stage, boundary in zip(stages, boundaries, strict=False):
        sent = boundary.pack(stage(x))
        parts = [sent] if isinstance(sent, Tensor) else sent
        buffers = boundary.empty(2, torch.float32, torch.device("cpu"))
        assert [(part.shape, part.dtype) for part in parts] == [(buffer.shape, buffer.dtype) for buffer in buffers]
        assert sum(part.is_floating_point() for part in parts) == 1
        x = boundary.unpack(sent)
    x = stages[-1](x)
    loss = _fused_loss(x, case, context)
    loss.backward()

    expected_loss, expected = _step(case)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0.0)
    summed: dict[str, Tensor] = {}
    for stage in stages:
        for parameter, gradient in stage.gradients().items():
            summed[parameter] = summed[parameter] + gradient if parameter in summed else gradient
    assert summed.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(summed[parameter], gradient, rtol=0.0, atol=1e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.full])
@pytest.mark.parametrize("name", CASES)
def test_recomputation_with_dropout_changes_nothing(name: str, recompute: Recompute):
    case = CASES[name]
    loss, gradients = _step(case, **DROPOUT)
    again_loss, again = _step(case, recompute, **DROPOUT)
    assert torch.equal(loss, again_loss)
    assert all(torch.equal(gradients[parameter], again[parameter]) for parameter in gradients)
    assert not torch.equal(loss, _step(case, first_sample=2, **DROPOUT)[0])


@pytest.mark.parametrize("name", CASES)
def test_each_dropout_acts(name: str):
    plain, _ = _step(CASES[name])
    for kind in DROPOUT:
        assert not torch.equal(_step(CASES[name], **{kind: 0.5})[0], plain), kind


@pytest.mark.parametrize("name", CASES)
def test_initial_weights_do_not_depend_on_the_layout(name: str):
    case = replace(CASES[name], model=replace(CASES[name].model, vocab_pad_multiple=1))
    full = dict(FlatModel(_specs(case)).named_parameters())
    ranks = []
    for rank in range(2):
        context = ParallelContext.single()
        context.topology, context.rank = Topology(tensor_parallel_size=2), rank
        ranks.append(dict(FlatModel(_specs(case, context)).named_parameters()))
    for parameter, tensor in full.items():
        dim = tensor.shard_spec.dim
        joined = ranks[0][parameter] if dim is None else torch.cat([rank[parameter] for rank in ranks], dim)
        assert torch.equal(joined, tensor), parameter


@pytest.mark.parametrize("chunk", [None, 13])
@pytest.mark.parametrize("name", CASES)
def test_fused_head_and_loss_equal_the_plain_pair(name: str, chunk: int | None):
    """The loss, and the gradients of all weights, among them those of the word embedding and of what is before it."""
    case, context = CASES[name], ParallelContext.single()
    found = []
    for end in (partial(_fused_loss, case=case, context=context, chunk=chunk), partial(_plain_loss, case=case)):
        flat = FlatModel(_specs(case, context))
        loss = flat(*_arguments(case), end=end)
        loss.backward()
        found.append({"loss": loss.detach()} | {name: one.grad for name, one in flat.named_parameters()})
    for what, plain in found[1].items():
        assert (found[0][what] - plain).abs().max() <= 1e-6 * max(1.0, float(plain.abs().max())), what


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_low_precision_follows_fp32(name: str, dtype: torch.dtype):
    case, context = CASES[name], ParallelContext.single()
    expected_loss, expected = _step(case)
    flat = FlatModel(_specs(case, context)).to(dtype)
    loss = flat(*_arguments(case), end=lambda x: _fused_loss(x, case, context))
    loss.backward()
    torch.testing.assert_close(loss.float(), expected_loss, rtol=2e-2, atol=0.0)
    for parameter, tensor in flat.named_parameters():
        assert tensor.grad.dtype is dtype
        error = (tensor.grad.float() - expected[parameter]).norm()
        assert error <= 0.1 * expected[parameter].norm() + 1e-4, parameter


@pytest.mark.parametrize("name", ["bert", "t5_v1_1", "bart"])
def test_padding_changes_nothing_that_counts(name: str):
    case = CASES[name]
    flat = FlatModel(_specs(case))
    tokens, *others = _arguments(case)
    changed = tokens.clone()
    changed[0, 17:] = (changed[0, 17:] + 1) % VOCAB_SIZE  # sample 0 has 17 positions
    with torch.no_grad():
        outputs = [flat(ids, *others) for ids in (tokens, changed)]
    before, after = (out[0] if case.next_sentence else out for out in outputs)
    stop = 17 if case.next_sentence else DECODER_LENGTH
    torch.testing.assert_close(before[:, :stop], after[:, :stop], rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_sees_the_whole_encoder_and_its_own_past(name: str):
    case = replace(CASES[name], inputs=PAIR)
    flat = FlatModel(_specs(case))
    tokens, decoder_tokens = _arguments(case)
    later, other_end = decoder_tokens.clone(), tokens.clone()
    later[:, 9:] = (later[:, 9:] + 1) % VOCAB_SIZE
    other_end[:, -1] = (other_end[:, -1] + 1) % VOCAB_SIZE
    with torch.no_grad():
        before, after, elsewhere = flat(tokens, decoder_tokens), flat(tokens, later), flat(other_end, decoder_tokens)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0.0, atol=1e-5)
    assert (before[:, 9:] - after[:, 9:]).abs().amax(-1).min() > 1e-4
    assert (before - elsewhere).abs().amax(-1).min() > 0.0

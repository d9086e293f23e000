"""Our models with random weights, saved as transformers model folders, and the outputs of transformers on one batch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor

from megatron_lite.config.derived import resolve_model
from megatron_lite.config.hf import hf_config
from megatron_lite.config.schema import Activation, ModelConfig, Recompute
from megatron_lite.data.special import SpecialTokens
from megatron_lite.models.build import build_layers
from megatron_lite.models.fields import Field
from megatron_lite.models.flat import FlatModel
from megatron_lite.models.hf import stored_form
from megatron_lite.parallel.context import ParallelContext
from tests.stored_tensors import from_stored, to_stored
from tests.tiny_models import (
    BERT,
    DECODER_LENGTH,
    DECODER_TOKENS,
    GPT2,
    LENGTH,
    LENGTHS,
    LLAMA,
    MODELS,
    PAIR,
    ROBERTA,
    SEGMENTS,
    T5,
    TOKENS,
)

VOCAB_SIZE = 301  # a prime: padded under every layout
TOKEN_IDS = SpecialTokens(eod=0, pad=1, cls=2, sep=3)
_FIRST_TOKEN = 4  # smaller ids are padding in some models, which compute no gradient for them


@dataclass(frozen=True)
class Case:
    """A model that both we and transformers have."""

    model: ModelConfig
    inputs: tuple[Field, ...] = (TOKENS,)
    next_sentence: bool = False

    @property
    def label_length(self) -> int:
        return DECODER_LENGTH if DECODER_TOKENS in self.inputs else LENGTH

    def flat(self, context: ParallelContext, recompute: Recompute = Recompute.none) -> FlatModel:
        specs = build_layers(
            resolve_model(self.model),
            context,
            vocab_size=VOCAB_SIZE,
            recompute=recompute,
            inputs=self.inputs,
            next_sentence_head=self.next_sentence,
        )
        return FlatModel(specs)


@dataclass(frozen=True)
class Expected:
    """Results of the reference: full tensors under our names."""

    weights: dict[str, Tensor]
    logits: Tensor
    sequence_logits: Tensor | None
    gradients: dict[str, Tensor]


def expected(case: Case) -> Expected:
    """Results of the model that transformers builds from our weights and config.json."""
    flat = case.flat(ParallelContext.single())
    shapes = {name: parameter.shard_spec.full_shape for name, parameter in flat.named_parameters()}
    weights = random_weights(shapes)
    form = stored_form(resolve_model(case.model), shapes)
    model = _loaded(to_stored(weights, form), case)
    batch = batch_of(case)
    out = model(**_arguments(batch), use_cache=False) if DECODER_TOKENS in case.inputs else model(**_arguments(batch))
    logits = out.prediction_logits if case.next_sentence else out.logits
    sequence_logits = out.seq_relationship_logits if case.next_sentence else None
    token_losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    _total_loss(token_losses.view_as(batch["labels"]), sequence_logits, batch).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return Expected(
        weights,
        logits.detach(),
        None if sequence_logits is None else sequence_logits.detach(),
        from_stored(gradients, form, shapes),
    )


def _loaded(stored: Mapping[str, Tensor], case: Case) -> transformers.PreTrainedModel:
    """Load the model from a folder, as users do; no weight may be missing or unexpected."""
    config = hf_config(
        resolve_model(case.model), vocab_size=VOCAB_SIZE, tokens=TOKEN_IDS, next_sentence=case.next_sentence
    )
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        save_file(dict(stored), Path(folder, "model.safetensors"), metadata={"format": "pt"})
        model, report = getattr(transformers, config["architectures"][0]).from_pretrained(
            folder, output_loading_info=True
        )
    assert not any(report.values()), report
    return model.train()


def _total_loss(token_losses: Tensor, sequence_logits: Tensor | None, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean over the counted tokens, plus the loss of the samples' classes if there are any."""
    loss = (token_losses * batch["loss_weights"]).sum() / batch["loss_weights"].sum()
    if sequence_logits is None:
        return loss
    return loss + F.cross_entropy(sequence_logits, batch["sequence_labels"])


def batch_of(case: Case) -> dict[str, Tensor]:
    """Two samples: our inputs by name, labels, loss weights; padded if the case has lengths, with ordinary ids."""
    generator = torch.Generator().manual_seed(3)

    def draw(length: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (2, length), generator=generator)

    lengths = torch.tensor([LENGTH, 17])
    made = {
        "tokens": draw(LENGTH, _FIRST_TOKEN, VOCAB_SIZE),
        "labels": draw(case.label_length, 0, VOCAB_SIZE),
        "segments": draw(LENGTH, 0, 2),
        "decoder_tokens": draw(DECODER_LENGTH, _FIRST_TOKEN, VOCAB_SIZE),
        "lengths": lengths,
        "loss_weights": torch.ones(2, case.label_length),
        "sequence_labels": torch.tensor([1, 0]),
    }
    if LENGTHS in case.inputs and DECODER_TOKENS not in case.inputs:
        made["loss_weights"] = (torch.arange(LENGTH) < lengths[:, None]).float()
    names = {field.name for field in case.inputs} | {"labels", "loss_weights", "sequence_labels"}
    return {name: tensor for name, tensor in made.items() if name in names}


def _arguments(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """The batch as arguments of a transformers model."""
    renamed = {"tokens": "input_ids", "segments": "token_type_ids", "decoder_tokens": "decoder_input_ids"}
    arguments = {theirs: batch[ours] for ours, theirs in renamed.items() if ours in batch}
    if "lengths" in batch:
        arguments["attention_mask"] = (torch.arange(LENGTH) < batch["lengths"][:, None]).long()
    return arguments


def random_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random weights, also for biases and norms: their initial zeros and ones would hide errors."""
    generator = torch.Generator().manual_seed(7)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        mean = 1.0 if len(shape) == 1 and "bias" not in name else 0.0
        return mean + 0.1 * torch.randn(shape, generator=generator)

    return {name: draw(name, shape) for name, shape in shapes.items()}


CASES = {
    **{name: Case(tiny.model, tiny.unpadded_inputs, tiny.next_sentence) for name, tiny in MODELS.items()},
    **{
        f"{name}_padded": Case(tiny.model, tiny.inputs, tiny.next_sentence)
        for name, tiny in MODELS.items()
        if LENGTHS in tiny.inputs and tiny.layers_of is None
    },
    "gpt2_untied": Case(replace(GPT2, tie_embeddings=False)),
    "gpt2_exact_gelu": Case(replace(GPT2, activation=Activation.gelu)),
    "gpt2_unscaled": Case(replace(GPT2, attention_scale=False)),
    "llama_multi_head": Case(LLAMA),
    "llama_multi_query": Case(replace(LLAMA, num_query_groups=1)),
    "llama_tied": Case(replace(LLAMA, tie_embeddings=True)),
    "llama_biases": Case(replace(LLAMA, attention_bias=True, mlp_bias=True, num_query_groups=2)),
    "llama_wide_heads": Case(replace(LLAMA, head_size=16, rotary_base=500.0, ffn_hidden_size=48)),
    "llama_geglu": Case(replace(LLAMA, activation=Activation.geglu)),
    "bert_no_segments": Case(BERT, (TOKENS, LENGTHS), next_sentence=True),
    "bert_untied": Case(replace(BERT, tie_embeddings=False), (TOKENS, SEGMENTS), next_sentence=True),
    "roberta_untied": Case(replace(ROBERTA, tie_embeddings=False)),
    "t5_tied_unscaled": Case(replace(T5, scale_tied_head=False), PAIR),
}
"""All of MODELS, and variants of them."""

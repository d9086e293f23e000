"""Models of transformers with random weights, what they are in our settings, and what they say about one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from megatron_lite.config.schema import Activation, ModelConfig, Recompute
from megatron_lite.models.activations import Field
from megatron_lite.models.build import build_layers
from megatron_lite.models.flat import FlatModel
from megatron_lite.models.hf import stored_form
from megatron_lite.models.hf.tensors import from_stored
from megatron_lite.parallel.context import ParallelContext
from tests.tiny_models import (
    BART,
    BERT,
    DECODER_LENGTH,
    DECODER_TOKENS,
    GPT2,
    LENGTH,
    LENGTHS,
    LLAMA,
    PAIR,
    ROBERTA,
    SEGMENTS,
    T5,
    T5_V1_1,
    TOKENS,
)

VOCAB_SIZE = 301  # a prime: padded under every layout
_FIRST_TOKEN = 4  # the ids before it are padding to some models, which give them no gradient


@dataclass(frozen=True)
class Case:
    """A model of ours and its twin."""

    model: ModelConfig
    reference: Callable[[ModelConfig], transformers.PreTrainedModel]
    inputs: tuple[Field, ...] = (TOKENS,)
    next_sentence: bool = False

    @property
    def label_length(self) -> int:
        return DECODER_LENGTH if DECODER_TOKENS in self.inputs else LENGTH

    def flat(self, context: ParallelContext, recompute: Recompute = Recompute.none) -> FlatModel:
        specs = build_layers(
            self.model,
            context,
            vocab_size=VOCAB_SIZE,
            recompute=recompute,
            inputs=self.inputs,
            next_sentence_head=self.next_sentence,
        )
        return FlatModel(specs)


@dataclass(frozen=True)
class Expected:
    """What the reference gives: full tensors under our names."""

    weights: dict[str, Tensor]
    logits: Tensor
    sequence_logits: Tensor | None
    gradients: dict[str, Tensor]


def expected(case: Case) -> Expected:
    model = case.reference(case.model)
    _randomise(model)
    batch = batch_of(case)
    out = model(**_arguments(batch), use_cache=False) if DECODER_TOKENS in case.inputs else model(**_arguments(batch))
    logits = out.prediction_logits if case.next_sentence else out.logits
    sequence_logits = out.seq_relationship_logits if case.next_sentence else None
    token_losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    total_loss(token_losses.view_as(batch["labels"]), sequence_logits, batch).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    flat = case.flat(ParallelContext.single())
    shapes = {name: parameter.shard_spec.full_shape for name, parameter in flat.named_parameters()}
    form = stored_form(case.model, shapes)

    def convert(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return from_stored({name: tensor.detach() for name, tensor in stored.items()}, form, shapes)

    return Expected(
        convert(model.state_dict()),
        logits.detach(),
        None if sequence_logits is None else sequence_logits.detach(),
        convert(gradients),
    )


def total_loss(token_losses: Tensor, sequence_logits: Tensor | None, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean over the tokens that count, plus the loss of the whole samples' classes where there is one."""
    loss = (token_losses * batch["loss_weights"]).sum() / batch["loss_weights"].sum()
    if sequence_logits is None:
        return loss
    return loss + F.cross_entropy(sequence_logits, batch["sequence_labels"])


def batch_of(case: Case) -> dict[str, Tensor]:
    """Two samples: our inputs by name, labels, loss weights; padded where the case has lengths, without padding ids."""
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
    """The batch as transformers' models take it."""
    renamed = {"tokens": "input_ids", "segments": "token_type_ids", "decoder_tokens": "decoder_input_ids"}
    arguments = {theirs: batch[ours] for ours, theirs in renamed.items() if ours in batch}
    if "lengths" in batch:
        arguments["attention_mask"] = (torch.arange(LENGTH) < batch["lengths"][:, None]).long()
    return arguments


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Biases and norms included, so that nothing is hidden by a zero."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        mean = 1.0 if parameter.ndim == 1 and "bias" not in name else 0.0
        parameter.copy_(mean + 0.1 * torch.randn(parameter.shape, generator=generator))


def _gpt2(model: ModelConfig) -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=model.max_position_embeddings,
        n_embd=model.hidden_size,
        n_layer=model.num_layers,
        n_head=model.num_attention_heads,
        activation_function="gelu_new" if model.activation is Activation.gelu_tanh else "gelu",
        layer_norm_epsilon=model.norm_epsilon,
        tie_word_embeddings=model.tie_embeddings,
        resid_pdrop=model.hidden_dropout,
        embd_pdrop=model.embedding_dropout,
        attn_pdrop=model.attention_dropout,
    )
    return transformers.GPT2LMHeadModel(config)


def _llama(model: ModelConfig) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size or 128,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups or model.num_attention_heads,
        head_dim=model.head_size,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.norm_epsilon,
        rope_theta=model.rotary_base,
        rope_parameters={"rope_type": "default", "rope_theta": model.rotary_base},
        attention_bias=model.attention_bias,
        mlp_bias=model.mlp_bias,
        tie_word_embeddings=model.tie_embeddings,
    )
    return transformers.LlamaForCausalLM(config)


def _encoder_settings(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_hidden_size or 4 * model.hidden_size,
        "max_position_embeddings": model.position_offset + model.max_position_embeddings,
        "type_vocab_size": model.num_segments,
        "layer_norm_eps": model.norm_epsilon,
        "hidden_act": "gelu",
        "hidden_dropout_prob": model.hidden_dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
        "tie_word_embeddings": model.tie_embeddings,
    }


def _bert(model: ModelConfig) -> transformers.PreTrainedModel:
    return transformers.BertForPreTraining(transformers.BertConfig(**_encoder_settings(model)))


def _bert_without_pairs(model: ModelConfig) -> transformers.PreTrainedModel:
    return transformers.BertForMaskedLM(transformers.BertConfig(**_encoder_settings(model)))


def _roberta(model: ModelConfig) -> transformers.PreTrainedModel:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**_encoder_settings(model), pad_token_id=1))


def _t5(model: ModelConfig) -> transformers.PreTrainedModel:
    config = transformers.T5Config(
        vocab_size=VOCAB_SIZE,
        d_model=model.hidden_size,
        d_kv=model.head_size,
        d_ff=model.ffn_hidden_size,
        num_layers=model.num_layers,
        num_decoder_layers=model.num_decoder_layers,
        num_heads=model.num_attention_heads,
        relative_attention_num_buckets=model.relative_buckets,
        relative_attention_max_distance=model.relative_max_distance,
        layer_norm_epsilon=model.norm_epsilon,
        feed_forward_proj="gated-gelu" if model.activation is Activation.geglu else "relu",
        dropout_rate=model.hidden_dropout,  # the one rate of all places
        tie_word_embeddings=model.tie_embeddings,
    )
    reference = transformers.T5ForConditionalGeneration(config)
    if not model.tie_embeddings:  # this transformers ties always, and keeps the setting for the factor alone
        reference.lm_head.weight = nn.Parameter(torch.empty_like(reference.shared.weight))
    return reference


def _bart(model: ModelConfig) -> transformers.PreTrainedModel:
    inner = model.ffn_hidden_size or 4 * model.hidden_size
    config = transformers.BartConfig(
        vocab_size=VOCAB_SIZE,
        d_model=model.hidden_size,
        encoder_layers=model.num_layers,
        decoder_layers=model.num_decoder_layers or model.num_layers,
        encoder_attention_heads=model.num_attention_heads,
        decoder_attention_heads=model.num_attention_heads,
        encoder_ffn_dim=inner,
        decoder_ffn_dim=inner,
        max_position_embeddings=model.max_position_embeddings,
        activation_function="gelu",
        dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        activation_dropout=model.ffn_dropout,
    )
    return transformers.BartForConditionalGeneration(config)


CASES = {
    "gpt2": Case(GPT2, _gpt2),
    "gpt2_untied": Case(replace(GPT2, tie_embeddings=False), _gpt2),
    "gpt2_exact_gelu": Case(replace(GPT2, activation=Activation.gelu), _gpt2),
    "llama_multi_head": Case(LLAMA, _llama),
    "llama_grouped_query": Case(replace(LLAMA, num_query_groups=2), _llama),
    "llama_multi_query": Case(replace(LLAMA, num_query_groups=1), _llama),
    "llama_tied": Case(replace(LLAMA, tie_embeddings=True), _llama),
    "llama_biases": Case(replace(LLAMA, attention_bias=True, mlp_bias=True, num_query_groups=2), _llama),
    "llama_wide_heads": Case(replace(LLAMA, head_size=16, rotary_base=500.0, ffn_hidden_size=48), _llama),
    "bert": Case(BERT, _bert, (TOKENS, SEGMENTS), next_sentence=True),
    "bert_padded": Case(BERT, _bert, (TOKENS, SEGMENTS, LENGTHS), next_sentence=True),
    "bert_no_segments": Case(BERT, _bert, (TOKENS, LENGTHS), next_sentence=True),
    "bert_untied": Case(replace(BERT, tie_embeddings=False), _bert, (TOKENS, SEGMENTS), next_sentence=True),
    "bert_without_pairs": Case(BERT, _bert_without_pairs, (TOKENS, SEGMENTS)),
    "roberta": Case(ROBERTA, _roberta),
    "roberta_untied": Case(replace(ROBERTA, tie_embeddings=False), _roberta),
    "roberta_padded": Case(ROBERTA, _roberta, (TOKENS, LENGTHS)),
    "t5": Case(T5, _t5, PAIR),
    "t5_padded": Case(T5, _t5, (*PAIR, LENGTHS)),
    "t5_v1_1": Case(T5_V1_1, _t5, PAIR),
    "t5_v1_1_padded": Case(T5_V1_1, _t5, (*PAIR, LENGTHS)),
    "bart": Case(BART, _bart, PAIR),
    "bart_padded": Case(BART, _bart, (*PAIR, LENGTHS)),
}

"""From transformers into any layout and back: logits agree with imported weights, and again after the export.

A run with TP2 x PP2 starts from a model that transformers initialised and saved, trains, and saves; then transformers
loads the checkpoint's folder like any other model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megatron_lite.checkpoint.parity import THEIR_NAMES
from megatron_lite.config.compose import change, compose
from megatron_lite.config.derived import resolve
from megatron_lite.config.hf.headers import tensors_of
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import RunConfig
from megatron_lite.objectives.build import build_objective
from megatron_lite.verify.synthetic import SYNTHETIC_ROLES, synthetic_vocabulary
from tests.distributed.checkpoint_ranks import RoundTrip, round_trip_rank
from tests.distributed.harness import run_ranks

TOLERANCE = 1e-4  # of a logit
VOCAB_SIZE = 301  # a prime: no tensor-parallel size divides it
SEQ_LENGTH = 24
SIZES = {"vocab_size": VOCAB_SIZE, "pad_token_id": SYNTHETIC_ROLES.index("pad"), "bos_token_id": 0, "eos_token_id": 0}
SMALL = SIZES | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
T5 = SIZES | {"d_model": 32, "d_ff": 48, "d_kv": 16, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 3}
BART = SIZES | {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 2, "decoder_layers": 3}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
GPT2 = SIZES | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": SEQ_LENGTH}


@dataclass(frozen=True)
class Case:
    """A model as transformers creates and saves it, and the run that starts from it."""

    made_as: type[transformers.PreTrainedModel]
    config: transformers.PretrainedConfig
    opened_as: Any
    """The Auto class of transformers."""
    words: tuple[str, ...] = ()
    script: str = "pretrain_gpt"
    dtype: torch.dtype = torch.float32
    saving: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Callable[[], Case]] = {
    "gpt2_without_head": lambda: Case(
        transformers.GPT2Model, transformers.GPT2Config(**GPT2), transformers.AutoModelForCausalLM
    ),
    "gpt2_untied": lambda: Case(
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(**GPT2, tie_word_embeddings=False),
        transformers.AutoModelForCausalLM,
        dtype=torch.float16,
    ),
    "llama_grouped_query": lambda: Case(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
        transformers.AutoModelForCausalLM,
        saving={"max_shard_size": "20KB"},
    ),
    "llama_tied": lambda: Case(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**SMALL, tie_word_embeddings=True, rope_theta=500.0),
        transformers.AutoModelForCausalLM,
        dtype=torch.bfloat16,
    ),
    "mistral": lambda: Case(
        transformers.MistralForCausalLM,
        transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None),
        transformers.AutoModelForCausalLM,
    ),
    "bert": lambda: Case(
        transformers.BertForPreTraining,
        transformers.BertConfig(**SMALL),
        transformers.AutoModelForPreTraining,
        ("objective.name=masked_lm_nsp",),
        "pretrain_bert",
    ),
    "bert_untied": lambda: Case(
        transformers.BertForMaskedLM,
        transformers.BertConfig(**SMALL, tie_word_embeddings=False),
        transformers.AutoModelForMaskedLM,
        ("objective.name=masked_lm",),
        "pretrain_bert",
        dtype=torch.bfloat16,
    ),
    "roberta": lambda: Case(
        transformers.RobertaForMaskedLM,
        transformers.RobertaConfig(**SMALL, type_vocab_size=1),
        transformers.AutoModelForMaskedLM,
        ("objective.name=masked_lm",),
        "pretrain_bert",
    ),
    "t5": lambda: Case(
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(**T5),
        transformers.AutoModelForSeq2SeqLM,
        ("objective.name=span_corruption",),
        "pretrain_t5",
        saving={"max_shard_size": "20KB"},
    ),
    "t5_v1_1": lambda: Case(
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        transformers.AutoModelForSeq2SeqLM,
        ("objective.name=ul2", "data.seq_length=64"),
        "pretrain_t5",
        dtype=torch.bfloat16,
    ),
    "bart": lambda: Case(
        transformers.BartForConditionalGeneration,
        transformers.BartConfig(**BART, **HEADS),
        transformers.AutoModelForSeq2SeqLM,
        ("objective.name=bart_denoising",),
        "pretrain_t5",
        dtype=torch.float16,
    ),
}


@cache
def presets(script: str) -> RunConfig:
    return compose(script, [])


def saved(case: Case, folder: Path) -> Path:
    """Every parameter is random: initial zeros of biases and ones of norms would hide errors."""
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng():
        model = case.made_as(case.config)
    parameters = dict(model.named_parameters())
    if "cls.predictions.decoder.bias" in parameters:  # an untied head; transformers uses this one
        del parameters["cls.predictions.bias"]
    for parameter in parameters.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.to(case.dtype).save_pretrained(folder, **case.saving)
    return folder


def run_config(case: Case, folder: Path) -> ResolvedConfig:
    words = [
        f"model.init_from={folder}",
        "parallel.tensor_parallel_size=2",
        "parallel.pipeline_parallel_size=2",
        f"data.seq_length={SEQ_LENGTH}",
        "data.tokenizer=train",
        "train.steps=3",
        "train.micro_batch_size=2",
        "train.global_batch_size=4",
        "optimizer.warmup_steps=0",
        *case.words,
    ]
    return resolve(change(presets(case.script), words))


@torch.no_grad()
def their_logits(case: Case, folder: Path, trip: RoundTrip, config: RunConfig) -> list[Tensor]:
    """Logits of the model as transformers loads it; no weight may be missing."""
    model, found = case.opened_as.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values()), found
    names = build_objective(config.objective, config.data, synthetic_vocabulary(VOCAB_SIZE)).inputs
    batch = {named.name: tensor for named, tensor in zip(names, trip.batch.inputs, strict=True)}
    arguments = {THEIR_NAMES[name]: tensor for name, tensor in batch.items() if name in THEIR_NAMES}
    if "lengths" in batch:
        arguments["attention_mask"] = visible(batch["tokens"], batch["lengths"]).long()
    outputs = model.eval()(**arguments)
    if "prediction_logits" in outputs:
        return [outputs.prediction_logits, outputs.seq_relationship_logits]
    return [outputs.logits]


def visible(tokens: Tensor, lengths: Tensor) -> Tensor:
    """[b, s]: True at positions that are not padding."""
    return torch.arange(tokens.shape[1]) < lengths[:, None]


def assert_equal(ours: list[Tensor], theirs: list[Tensor], trip: RoundTrip) -> None:
    """Compare positions whose predictions count; padded positions may have any value."""
    counts = trip.batch.loss_weights > 0
    assert counts.any()
    assert len(ours) == len(theirs)
    torch.testing.assert_close(ours[0][counts], theirs[0][counts], rtol=0.0, atol=TOLERANCE)
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(mine, other, rtol=0.0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    source = saved(case, tmp_path / "source")
    config = run_config(case, source)
    assert config.model.vocab_size == VOCAB_SIZE
    ranks = run_ranks(round_trip_rank, 4, config, VOCAB_SIZE, tmp_path / "checkpoints")
    ends = [rank for rank in ranks if rank.before]
    assert len(ends) == 2, "the last stage's tensor-parallel ranks"
    checkpoint = tmp_path / "checkpoints" / "step_00000003"
    theirs_before, theirs_after = (their_logits(case, folder, ends[0], config) for folder in (source, checkpoint))
    for trip in ends:
        assert_equal(trip.before, theirs_before, trip)
        assert_equal(trip.after, theirs_after, trip)
    assert transformers.AutoConfig.from_pretrained(checkpoint).model_type == case.config.model_type
    assert (theirs_after[0] - theirs_before[0]).abs().max() > 100 * TOLERANCE, "nothing was trained"
    assert {entry.dtype for entry in tensors_of(checkpoint).values()} == {"F32"}

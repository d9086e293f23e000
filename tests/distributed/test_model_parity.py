"""Our model against transformers at equal weights: logits and every gradient, on one rank and on two ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from megatron_lite.config.schema import Activation, ModelConfig, Normalization, PositionEmbedding, Recompute
from megatron_lite.models.activations import Field
from megatron_lite.models.build import build_layers
from megatron_lite.models.flat import FlatModel
from megatron_lite.models.hf import from_gpt2, from_llama
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron_lite.parallel.sharding import load_full_tensors, take_slice
from megatron_lite.parallel.topology import Topology
from tests.distributed.harness import run_ranks

TOLERANCE = 1e-5  # largest difference, fp32; absolute for logits, a share of the largest entry for gradients
VOCAB_SIZE = 301  # a prime: padded under every layout
INPUTS = (Field("tokens", 16),)

GPT2 = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, max_position_embeddings=24, vocab_pad_multiple=8
)
LLAMA = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    max_position_embeddings=24,
    vocab_pad_multiple=8,
    normalization=Normalization.rmsnorm,
    activation=Activation.swiglu,
    position_embedding=PositionEmbedding.rotary,
    attention_bias=False,
    mlp_bias=False,
    tie_embeddings=False,
)
CASES = {
    "gpt2": GPT2,
    "gpt2_untied": replace(GPT2, tie_embeddings=False),
    "gpt2_exact_gelu": replace(GPT2, activation=Activation.gelu),
    "llama_multi_head": LLAMA,
    "llama_grouped_query": replace(LLAMA, num_query_groups=2),
    "llama_multi_query": replace(LLAMA, num_query_groups=1),
    "llama_tied": replace(LLAMA, tie_embeddings=True),
    "llama_biases": replace(LLAMA, attention_bias=True, mlp_bias=True, num_query_groups=2),
    "llama_wide_heads": replace(LLAMA, head_size=16, rotary_base=500.0, ffn_hidden_size=48),
}
TENSOR_PARALLEL_CASES = ["gpt2", "gpt2_untied", "llama_multi_head", "llama_grouped_query", "llama_biases"]


def _reference(model: ModelConfig) -> transformers.PreTrainedModel:
    """The transformers model with random weights, biases and norms included, so that nothing is hidden by a zero."""
    if model.position_embedding is PositionEmbedding.learned:
        activation = "gelu_new" if model.activation is Activation.gelu_tanh else "gelu"
        config = transformers.GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_positions=model.max_position_embeddings,
            n_embd=model.hidden_size,
            n_layer=model.num_layers,
            n_head=model.num_attention_heads,
            activation_function=activation,
            layer_norm_epsilon=model.norm_epsilon,
            tie_word_embeddings=model.tie_embeddings,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        reference = transformers.GPT2LMHeadModel(config)
    else:
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
        reference = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            mean = 1.0 if parameter.ndim == 1 and "bias" not in name else 0.0
            parameter.copy_(mean + 0.1 * torch.randn(parameter.shape, generator=generator))
    return reference


def _full(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    convert = from_gpt2 if model.position_embedding is PositionEmbedding.learned else from_llama
    return {name: tensor.detach().clone() for name, tensor in convert(state, model).items()}


def _tokens(model: ModelConfig) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(
        VOCAB_SIZE, (2, model.max_position_embeddings + 1), generator=torch.Generator().manual_seed(3)
    )
    return tokens[:, :-1], tokens[:, 1:]


def _expected(model: ModelConfig) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Weights, logits and gradients of the mean loss, by transformers."""
    reference = _reference(model)
    inputs, labels = _tokens(model)
    logits = reference(inputs).logits
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    return _full(reference.state_dict(), model), logits.detach(), _full(gradients, model)


def _ours(model: ModelConfig, weights: dict[str, Tensor], context: ParallelContext) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's slices of the logits and of the gradients."""
    flat = FlatModel(build_layers(model, context, vocab_size=VOCAB_SIZE, recompute=Recompute.none, inputs=INPUTS))
    load_full_tensors(flat, weights, context)
    inputs, labels = _tokens(model)
    logits = flat(inputs)
    kept = logits.detach().clone()
    vocab_parallel_cross_entropy(logits, labels, context, VOCAB_SIZE).mean().backward()
    return kept, {name: parameter.grad for name, parameter in flat.named_parameters()}


def _on_rank(model: ModelConfig, weights: dict[str, Tensor], topology: Topology, sequence_parallel: bool):
    context = ParallelContext.build(topology, device=torch.device("cpu"), sequence_parallel=sequence_parallel, seed=1)
    return _ours(model, weights, context)


@pytest.mark.parametrize("case", CASES)
def test_one_rank_matches_transformers(case: str):
    model = CASES[case]
    weights, expected_logits, expected = _expected(model)
    logits, gradients = _ours(model, weights, ParallelContext.single())
    _compare(logits[..., :VOCAB_SIZE], expected_logits)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        _compare(gradients[name][: gradient.shape[0]], gradient, gradient.abs().max().item())


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("case", TENSOR_PARALLEL_CASES)
def test_two_tensor_parallel_ranks_match_transformers(case: str, sequence_parallel: bool):
    model = CASES[case]
    weights, expected_logits, expected = _expected(model)
    ranks = run_ranks(_on_rank, 2, model, weights, Topology(tensor_parallel_size=2), sequence_parallel)
    _compare(torch.cat([logits for logits, _ in ranks], -1)[..., :VOCAB_SIZE], expected_logits)
    specs = _specs(model)
    for name, gradient in expected.items():
        slices = [gradients[name] for _, gradients in ranks]
        for rank, part in enumerate(slices):
            _compare(part, take_slice(gradient, specs[name], rank, 2), gradient.abs().max().item())


def _specs(model: ModelConfig):
    context = replace(ParallelContext.single(), topology=Topology(tensor_parallel_size=2))
    layers = build_layers(model, context, vocab_size=VOCAB_SIZE, recompute=Recompute.none, inputs=INPUTS)
    return {name: parameter.shard_spec for name, parameter in FlatModel(layers).named_parameters()}


def _compare(ours: Tensor, theirs: Tensor, unit: float = 1.0) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=TOLERANCE * unit)

"""FLOPs against a count of the matrix products themselves, and peaks against their data sheets."""

from __future__ import annotations

import pytest

from megatron_lite.config.compose import compose
from megatron_lite.config.derived import parameter_counts, resolve, resolve_model
from megatron_lite.config.schema import Activation, Architecture, ModelConfig, Precision
from megatron_lite.planning.flops import dense_peak_flops, flops_of_run, flops_per_token, itemised_flops


def test_terms_by_hand() -> None:
    """h 128, 4 heads of 32, f 512, 4 layers, s 128, v 8192: two FLOPs for each weight and each score."""
    terms = itemised_flops(resolve_model(ModelConfig()), 128, 8192)
    assert terms.query_key_value == 4 * 2 * 128 * 3 * 128
    assert terms.projection == 4 * 2 * 128 * 128
    assert terms.mlp == 4 * 2 * 2 * 128 * 512
    assert terms.head == 2 * 128 * 8192
    pairs = sum(range(1, 129)) / 128  # positions that a token looks at, averaged over the sequence
    assert terms.attention_scores == 4 * 2 * 2 * 128 * pairs


def test_full_square_is_what_palm_counts() -> None:
    """arXiv 2204.02311, appendix B: 6 N + 12 L H Q T, with N the weights of all matrix products."""
    model = resolve(compose("pretrain_gpt", ["model=llama_7b"])).model
    counts = parameter_counts(model, 32000)
    weights = 32 * (counts.layer - 2 * 4096) + counts.head
    assert itemised_flops(model, 2048, 32000, causal=False).training == 6 * weights + 12 * 32 * 32 * 128 * 2048


def test_against_torch_on_the_matrix_products() -> None:
    """torch's own counter over one forward pass of plain products of these shapes, grouped heads included."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    model = resolve(compose("pretrain_gpt", ["model=llama_tiny"])).model  # h 128, 4 heads, 2 groups, f 384 SwiGLU
    tokens = torch.zeros(16, 128)
    with FlopCounterMode(display=False) as counter:
        for _ in range(model.num_layers):
            tokens @ torch.zeros(128, 4 * 32 + 2 * 2 * 32)
            tokens @ torch.zeros(4 * 32, 128)
            (tokens @ torch.zeros(128, 2 * 384))[:, :384] @ torch.zeros(384, 128)
        tokens @ torch.zeros(128, 1000)
    terms = itemised_flops(model, 16, 1000)
    assert 16 * (terms.forward - terms.attention_scores) == counter.get_total_flops()


def test_encoder_looks_both_ways_and_transforms_its_head() -> None:
    """h 128, 4 layers of 4 heads of 32, s 128, v 8192: every position looks at all 128."""
    model = resolve(compose("pretrain_bert", [])).model
    terms, decoder = itemised_flops(model, 128, 8192), itemised_flops(resolve_model(ModelConfig()), 128, 8192)
    assert terms.attention_scores == 4 * 2 * 2 * 128 * 128
    assert terms.head == 2 * 128 * 8192 + 2 * 128 * 128
    assert (terms.query_key_value, terms.projection, terms.mlp) == (
        decoder.query_key_value, decoder.projection, decoder.mlp,
    )  # fmt: skip
    assert terms.cross_attention == 0


def test_encoder_decoder_against_torch_on_the_matrix_products() -> None:
    """torch's own counter over one sample; below the diagonal of the decoder's scores it counts the full square."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    s, r, layers, decoder_layers, v = 12, 7, 3, 2, 1000
    model = resolve_model(ModelConfig(
        architecture=Architecture.encoder_decoder, num_layers=layers, num_decoder_layers=decoder_layers, hidden_size=24,
        num_attention_heads=4, head_size=8, ffn_hidden_size=40, activation=Activation.geglu,
    ))  # fmt: skip

    def attend(queries: int, keys: int) -> None:
        torch.zeros(queries, 24) @ torch.zeros(24, 32)
        torch.zeros(keys, 24) @ torch.zeros(24, 64)
        (torch.zeros(4, queries, 8) @ torch.zeros(4, 8, keys)) @ torch.zeros(4, keys, 8)
        torch.zeros(queries, 32) @ torch.zeros(32, 24)

    def feed_forward(length: int) -> None:
        (torch.zeros(length, 24) @ torch.zeros(24, 80))[:, :40] @ torch.zeros(40, 24)

    with FlopCounterMode(display=False) as counter:
        for _ in range(layers):
            attend(s, s)
            feed_forward(s)
        for _ in range(decoder_layers):
            attend(r, r)
            attend(r, s)
            feed_forward(r)
        torch.zeros(r, 24) @ torch.zeros(24, v)
    full = itemised_flops(model, s, v, decoder_seq_length=r, causal=False)
    assert full.forward * (s + r) == pytest.approx(counter.get_total_flops(), rel=1e-12)
    causal = itemised_flops(model, s, v, decoder_seq_length=r)
    above_diagonal = r * r - r * (r + 1) / 2
    assert (full.forward - causal.forward) * (s + r) == pytest.approx(decoder_layers * 4 * 32 * above_diagonal)


def test_flops_of_a_run_take_both_lengths_from_its_settings() -> None:
    config = resolve(compose("pretrain_t5", ["data.seq_length=512"]))
    assert flops_of_run(config, 8192) == itemised_flops(config.model, 512, 8192, decoder_seq_length=114)
    config = resolve(compose("pretrain_gpt", []))
    assert flops_of_run(config, 8192).training == flops_per_token(config.model, 128, 8192)


def test_training_is_three_forward_passes() -> None:
    model = resolve_model(ModelConfig())
    assert flops_per_token(model, 128, 8192) == 3 * itemised_flops(model, 128, 8192).forward


@pytest.mark.parametrize(
    ("device", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 66.9e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H200", 989.4e12, 66.9e12),
        ("NVIDIA B200", 2250e12, 75e12),
        ("NVIDIA GB200", 2500e12, 80e12),
        ("NVIDIA H200 NVL", 835.5e12, 60e12),
        ("NVIDIA GH200 480GB", 989.4e12, 66.9e12),
        ("NVIDIA H800", 989.4e12, 66.9e12),
        ("NVIDIA H20", 148e12, 44e12),
        ("NVIDIA A800-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A10G", 70e12, 35e12),
        ("NVIDIA RTX A6000", 154.8e12, 38.7e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("Tesla T4", 65e12, 8.1e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("Tesla V100-SXM2-32GB", 125e12, 15.7e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
    ],
)
def test_dense_peak_by_driver_name(device: str, half: float, single: float) -> None:
    assert dense_peak_flops(device, Precision.bf16) == half
    assert dense_peak_flops(device, Precision.fp16) == half
    assert dense_peak_flops(device, Precision.fp32) == single


def test_tf32_only_where_allowed_and_there() -> None:
    assert dense_peak_flops("NVIDIA A100-SXM4-80GB", Precision.fp32, allow_tf32=True) == 156e12
    assert dense_peak_flops("Tesla V100-SXM2-32GB", Precision.fp32, allow_tf32=True) == 15.7e12


@pytest.mark.parametrize("device", ["NVIDIA L40", "NVIDIA A1000", "NVIDIA GeForce RTX 3090", "AMD EPYC", ""])
def test_unknown_device_has_no_peak(device: str) -> None:
    assert dense_peak_flops(device, Precision.bf16) is None

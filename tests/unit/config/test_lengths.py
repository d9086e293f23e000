"""Lengths that objectives compute, against figures of the papers' own code and against their definition."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_lite.config.lengths import (
    decoder_length,
    denoisers,
    sentinels_needed,
    span_corruption_lengths,
    span_counts,
    suffix_bounds,
    ul2_lengths,
)
from megatron_lite.config.schema import ObjectiveConfig, ObjectiveName


def test_t5_at_512_is_what_its_paper_trained_on() -> None:
    """`random_spans_helper` of the T5 code: 568 tokens, 512 in, 114 out."""
    assert span_corruption_lengths(512, 0.15, 3.0) == (568, 114, 28)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.15, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("mean", [1.0, 1.5, 3.0, 8.0, 64.0])
def test_the_window_fills_the_encoder_exactly(density: float, mean: float) -> None:
    for seq_length in [*range(3, 70), 511, 512, 1000]:
        window, decoder, spans = span_corruption_lengths(seq_length, density, mean)
        noise = span_counts(window, density, mean)[0]
        assert window - noise + spans + 1 == seq_length
        assert noise + spans + 1 == decoder
        assert 1 <= spans <= min(noise, window - noise)
        following = span_counts(window + 1, density, mean)
        assert window + 1 - following[0] + following[1] + 1 > seq_length  # no longer one would do


@pytest.mark.parametrize(("seq_length", "density"), [(2, 0.15), (512, 1.0), (512, -0.1)])
def test_no_window_is_an_error(seq_length: int, density: float) -> None:
    with pytest.raises(ValueError, match=r"has no room|must lie in"):
        span_corruption_lengths(seq_length, density, 3.0)


def test_decoder_lengths() -> None:
    def length(name: ObjectiveName, given: int | None = None) -> int | None:
        return decoder_length(ObjectiveConfig(name=name, decoder_seq_length=given), 512)

    assert length(ObjectiveName.span_corruption) == 114
    assert length(ObjectiveName.bart_denoising) == 512
    assert (length(ObjectiveName.ul2), length(ObjectiveName.ul2, 114)) == (256, 114)
    single = [name for name in ObjectiveName if length(name) is None]
    assert single == ["causal_lm", "prefix_lm", "fill_in_the_middle", "masked_lm", "masked_lm_nsp"]


def test_ul2_at_512_has_the_rates_and_spans_of_its_table() -> None:
    lengths = ul2_lengths(ObjectiveConfig(name=ObjectiveName.ul2), 512)
    assert sorted(lengths) == list(range(7))
    for place, (window, decoder, spans) in lengths.items():
        mode, mean, density = denoisers(ObjectiveConfig())[place]
        if mode != "s":
            noise = span_counts(window, density, mean)[0]
            assert abs(noise / window - density) < 0.002
            assert abs(noise / spans / mean - 1) < 0.05 or (mean, density) == (64, 0.15)
            assert window - noise + spans + 1 <= 511  # a mode token is ahead
        assert decoder <= 256
    assert lengths[5] == (599, 92, 1)  # 64 at 0.15: 90 noise tokens are nearer to one span than to two
    assert max(window for window, _, _ in lengths.values()) == 599


@pytest.mark.parametrize("room", [4, 5, 8, 33, 64, 300])
@pytest.mark.parametrize("decoder", [3, 7, 20, 150, 400])
def test_no_denoiser_could_use_more_text(room: int, decoder: int) -> None:
    config = ObjectiveConfig(name=ObjectiveName.ul2, decoder_seq_length=decoder, ul2_mode_tokens=False)
    for place, (window, _, _) in ul2_lengths(config, room).items():
        assert _fits(place, window, room, decoder)
        assert not any(_fits(place, window + more, room, decoder) for more in range(1, 20))


def _fits(place: int, window: int, room: int, decoder: int) -> bool:
    mode, mean, density = denoisers(ObjectiveConfig())[place]
    if mode == "s":
        shortest, longest = suffix_bounds(window, 0.25)
        return window - shortest + 2 <= room and longest + 2 <= decoder
    noise, spans = span_counts(window, density, mean)
    return window - noise + spans + 1 <= room and noise + spans + 1 <= decoder


def test_only_denoisers_with_a_weight_need_room() -> None:
    weights = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    config = ObjectiveConfig(name=ObjectiveName.ul2, ul2_weights=weights)
    assert list(ul2_lengths(config, 512)) == [3]
    with pytest.raises(ValueError, match="has no room"):
        ul2_lengths(config, 4)  # a decoder of 2


def test_sentinels_needed() -> None:
    assert sentinels_needed(ObjectiveConfig(name=ObjectiveName.span_corruption), 512) == 28
    assert sentinels_needed(ObjectiveConfig(name=ObjectiveName.ul2), 512) == 64
    assert sentinels_needed(ObjectiveConfig(name=ObjectiveName.bart_denoising), 512) == 0


@pytest.mark.parametrize("density", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_suffixes_stay_inside_and_have_their_mean(density: float) -> None:
    for window in range(2, 60):
        shortest, longest = suffix_bounds(window, density)
        assert 1 <= shortest <= longest < window
        assert (shortest + longest) / 2 == min(max(round(window * density), 1), window - 1)


def test_lengths_need_neither_torch_nor_numpy() -> None:
    code = "import sys, megatron_lite.config.lengths; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

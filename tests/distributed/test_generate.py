"""The text generated at the end of a run is the same in every layout."""

from __future__ import annotations

import pytest

from tests.distributed.equivalence_cases import VOCAB_SIZE, run_config
from tests.distributed.harness import run_ranks
from tests.distributed.layout_ranks import generate_rank, prefix_rank

PROMPT = [5, 17, 3]


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, {"pp": 2}),
        (4, {"tp": 2, "dp": 2, "zero_stage": 3}),
        (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
    ],
)
def test_layout_writes_what_one_rank_writes(world_size: int, layout: dict[str, int]) -> None:
    # Longer than the window of 16 tokens, so that it must slide.
    (expected,) = run_ranks(generate_rank, 1, run_config("llama"), VOCAB_SIZE, PROMPT, 20)
    assert len(expected) == len(PROMPT) + 20
    assert len(set(expected)) > 5, "a constant answer would prove nothing"
    results = run_ranks(generate_rank, world_size, run_config("llama", **layout), VOCAB_SIZE, PROMPT, 20)
    assert results == [expected] * world_size


def test_prefix_of_a_prefix_lm_slides_out_of_the_window() -> None:
    """Longer than the window: generated tokens must never attend to later ones, which only a prefix may."""
    long_prompt = [5, 17, 3, 40, 8, 9, 10, 11, 30, 31, 32, 33]
    config = run_config("prefix_lm")
    seen: list[list[int]] = run_ranks(prefix_rank, 1, config, VOCAB_SIZE, long_prompt, 8)[0]
    window = config.data.seq_length - 1
    lengths = [len(long_prompt) + made for made in range(8)]
    assert seen == [max(len(long_prompt) - max(length - window, 0), 1) for length in lengths]
    (expected,) = run_ranks(generate_rank, 1, config, VOCAB_SIZE, long_prompt, 8)
    assert run_ranks(generate_rank, 2, run_config("prefix_lm", pp=2), VOCAB_SIZE, long_prompt, 8) == [expected] * 2


def test_diverged_model_writes_nothing() -> None:
    results = run_ranks(generate_rank, 2, run_config("llama", pp=2), VOCAB_SIZE, PROMPT, 4, True)
    assert results == [PROMPT] * 2

"""The arithmetic of the benchmark's verdicts."""

import pytest

from benchmarks.report import Sample, Target, ratios


def test_ratios_pair_what_was_measured_together() -> None:
    """A machine that slows down to half its speed in the middle changes the times and not the ratio."""
    ours, theirs = Sample.of([1.0, 1.0, 2.0, 2.0]), Sample.of([1.5, 1.5, 3.0, 3.0])
    assert ratios(theirs, ours).values == (1.5, 1.5, 1.5, 1.5)
    with pytest.raises(ValueError, match="zip"):
        ratios(ours, Sample.of([1.0]))


def test_sample_text_shows_the_spread() -> None:
    assert Sample.of([3.0, 1.0, 2.0]).text(1) == "2.0 (1.0 - 3.0)"


def test_targets_know_their_direction() -> None:
    assert Target("speed", 1.7, 1.6).met
    assert not Target("speed", 1.5, 1.6).met
    assert Target("overhead", 4.0, 5.0, at_most=True).met
    assert not Target("overhead", 6.0, 5.0, at_most=True).met

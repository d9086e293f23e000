"""The learning rate: end points, shapes, and continuity at the end of the warm-up."""

import inspect
import itertools
import math
from dataclasses import fields, replace

import pytest

from megatron_lite.config import decays
from megatron_lite.config.schema import Decay, OptimizerConfig
from megatron_lite.optim.learning_rate import learning_rate_at

TOTAL = 100
PEAK, FLOOR, WARMUP = 1e-3, 1e-4, 10
STEPS = (*range(1, 100), 10_000)  # the last one is where inverse_sqrt has come down to FLOOR


def rate(step: int, decay: Decay, **changes: object) -> float:
    settings = {"learning_rate": PEAK, "min_learning_rate": FLOOR, "warmup_steps": WARMUP, "decay": decay, **changes}
    return learning_rate_at(step, OptimizerConfig(**settings), TOTAL)


@pytest.mark.parametrize("decay", list(Decay))
def test_warmup_grows_linearly_to_the_peak(decay: Decay) -> None:
    assert [rate(step, decay) for step in (1, 5, 10)] == pytest.approx([PEAK / 10, PEAK / 2, PEAK])


@pytest.mark.parametrize("decay", list(Decay))
def test_no_jump_after_the_warmup_and_never_upwards(decay: Decay) -> None:
    long = OptimizerConfig(learning_rate=PEAK, min_learning_rate=FLOOR, warmup_steps=1000, decay=decay)
    rates = [learning_rate_at(step, long, 100_000) for step in range(1000, 3000)]
    assert rates[0] == pytest.approx(PEAK)
    steps_down = [before - after for before, after in itertools.pairwise(rates)]
    assert min(steps_down) >= 0
    assert max(steps_down) < PEAK / 1000  # a warm-up step; a jump would be larger


@pytest.mark.parametrize(
    ("decay", "step", "expected"),
    [
        (Decay.linear, 55, (PEAK + FLOOR) / 2),
        (Decay.linear, 100, FLOOR),
        (Decay.cosine, 55, (PEAK + FLOOR) / 2),
        (Decay.cosine, 25, FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi / 6)) / 2),
        (Decay.cosine, 100, FLOOR),
        (Decay.cosine, 250, FLOOR),
        (Decay.inverse_sqrt, 40, PEAK / 2),
        (Decay.inverse_sqrt, 90, PEAK / 3),
        (Decay.inverse_sqrt, 100_000, FLOOR),
        (Decay.constant, 100, PEAK),
        (Decay.wsd, 90, PEAK),
        (Decay.wsd, 95, (PEAK + FLOOR) / 2),
        (Decay.wsd, 100, FLOOR),
    ],
)
def test_decay_values(decay: Decay, step: int, expected: float) -> None:
    assert rate(step, decay) == pytest.approx(expected, rel=1e-12)


def test_decay_steps_ends_the_decay_before_the_run() -> None:
    assert rate(50, Decay.linear, decay_steps=50) == FLOOR
    assert rate(30, Decay.linear, decay_steps=50) == pytest.approx((PEAK + FLOOR) / 2)


@pytest.mark.parametrize("decay", list(Decay))
def test_no_warmup_starts_near_the_peak(decay: Decay) -> None:
    assert rate(1, decay, warmup_steps=0) == pytest.approx(PEAK, rel=0.02)


def test_warmup_longer_than_the_run_stays_defined() -> None:
    assert rate(100, Decay.cosine, warmup_steps=200) == pytest.approx(PEAK / 2)
    assert rate(200, Decay.cosine, warmup_steps=200) == pytest.approx(PEAK)
    assert rate(201, Decay.cosine, warmup_steps=200) == FLOOR


@pytest.mark.parametrize("decay", list(Decay))
def test_a_decay_names_the_settings_that_it_reads(decay: Decay) -> None:
    """What a resume says of a changed setting, and whether `decay_steps` means anything, follows from these names."""
    base = OptimizerConfig(
        learning_rate=PEAK, min_learning_rate=FLOOR, warmup_steps=WARMUP, decay=decay, decay_steps=80
    )
    for field in fields(OptimizerConfig):
        value = getattr(base, field.name)
        if isinstance(value, int | float):
            other = replace(base, **{field.name: value / 2 if isinstance(value, float) else value // 2 + 1})
            moved = any(learning_rate_at(s, base, 100) != learning_rate_at(s, other, 100) for s in STEPS)
            assert moved is decay.form.depends_on(field.name), field.name


@pytest.mark.parametrize("decay", list(Decay))
def test_the_length_of_the_run_matters_where_the_decay_has_an_end(decay: Decay) -> None:
    config = OptimizerConfig(warmup_steps=WARMUP, decay=decay)
    moved = any(learning_rate_at(step, config, 100) != learning_rate_at(step, config, 200) for step in STEPS)
    assert moved is decay.form.has_end


def test_a_decay_without_a_curve_is_refused() -> None:
    source = inspect.getsource(decays)
    broken = source.replace('    constant = "constant", ', '    other = "other"\n    constant = "constant", ')
    assert broken != source
    with pytest.raises(TypeError, match="=other has no curve"):
        exec(compile(broken, decays.__file__, "exec"), {"__name__": decays.__name__})


@pytest.mark.parametrize(
    ("fraction", "middle"), [(0.0, PEAK), (0.5, (PEAK + FLOOR) / 2), (1.0, FLOOR + (PEAK - FLOOR) * 25 / 90)]
)
def test_wsd_decays_in_the_last_part_and_never_before_the_warmup_ends(fraction: float, middle: float) -> None:
    assert rate(75, Decay.wsd, decay_fraction=fraction) == pytest.approx(middle)
    assert rate(WARMUP, Decay.wsd, decay_fraction=fraction) == PEAK

"""`python -m launch compare`: the metrics of two runs, how the runs were configured differently, and a verdict."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.folder import newest_logged
from megatron_lite.config.changes import as_typed
from megatron_lite.config.facts import facts
from megatron_lite.config.keys import is_map
from megatron_lite.config.setting import SAFE
from megatron_lite.data.samples.skips import read_rollbacks, skips_of
from megatron_lite.errors import EXIT_OK, ConfigError
from megatron_lite.observe.comparison import SAMPLES, Comparison, Curve, Parting, curve_of, relative_gap, write_chart
from megatron_lite.observe.lines import Gap
from megatron_lite.observe.metrics import METRICS_FILE
from megatron_lite.observe.phrasing import counted
from megatron_lite.observe.run_folder import RunFolder

EXIT_PARTED = 1
VALIDATION = "validation_loss"
ABSENT = "(not there)"
LABEL_WIDTH = 18
SIDES = ("first", "second")
MOST_GAPS = 4


class Effect(StrEnum):
    """How a setting can relate to two loss curves that diverge."""

    learning = "can change what is learnt"
    rounding = "can change the rounding, from the last digits on"
    nothing = "cannot change the curve"


ROUNDING_GROUP = "parallel."
ROUNDING = (
    "launcher.device",
    "launcher.threads_per_process",
    "launcher.num_processes",
    "train.micro_batch_size",
    "model.vocab_pad_multiple",
)
# Safe to change within a run, but may have an effect: at the start, or once there is a spike.
LEARNING_GROUP = "stability."
LEARNING = ("train.loss_scale.initial_power", "data.max_epochs")
SHOW_ONLY = ("stability.layer_interval", "stability.worst_sequences")


def effect_of(key: str) -> Effect:
    """The effect of a dotted key that differs between two runs."""
    if key.startswith(ROUNDING_GROUP) or key in ROUNDING:
        return Effect.rounding
    is_judging = key.startswith(LEARNING_GROUP) and key not in SHOW_ONLY
    found = facts().get(key)  # None: a setting of another version, which may have had any effect
    is_safe = found is not None and found.resume is SAFE
    return Effect.nothing if is_safe and key not in LEARNING and not is_judging else Effect.learning


def compare(folders: tuple[Path, Path], names: tuple[str, str], tolerance: float, chart: Path | None) -> int:
    """Print the comparison; exit code 0 if the losses agree within the tolerance, else 1.

    Args:
        names: of the runs, as the user typed them.
        tolerance: relative difference of losses that counts as equal.
        chart: HTML file to draw the curves in.
    Raises:
        ConfigError: the runs have no step in common.
        DataError: a record of skipped samples is damaged.
        OSError: the chart cannot be written.
    """
    runs = tuple(RunFolder.read(folder, newest_logged(folder)) for folder in folders)
    first, second = runs
    found = Comparison.of(first, second, tolerance)
    loss = found.partings["loss"]
    if loss.steps == 0:
        raise ConfigError(_nothing_in_common(found, names))
    for label, text in _lines(first, second, names, found):
        print(f"{label:<{LABEL_WIDTH}}{text}")
    if chart is not None:
        write_chart(chart, names, found)
        print(f"{'chart':<{LABEL_WIDTH}}{chart}")
    if loss.first_beyond is not None:
        command = f"python -m launch trace {shlex.quote(names[0])} --step {loss.first_beyond}"
        print(f"{'documents':<{LABEL_WIDTH}}{command}")
    print(verdict(found, (first, second)))
    return EXIT_OK if loss.first_beyond is None else EXIT_PARTED


def _nothing_in_common(found: Comparison, names: tuple[str, str]) -> str:
    counts = [side.count for side in found.sides]
    logged = f"{names[0]} has logged {counted(counts[0], 'step')} and {names[1]} {counts[1]:,}"
    if found.common_steps:
        return f"{logged}, and no step has a loss in both; compare runs that log their losses"
    return f"{logged}, and none is in both; compare runs that have trained the same steps"


def _lines(first: RunFolder, second: RunFolder, names: tuple[str, str], found: Comparison) -> Iterator[tuple[str, str]]:
    for label, name, side in zip(SIDES, names, found.sides, strict=True):
        yield label, f"{name}: {counted(side.count, 'step')}"
    for label, side in zip(SIDES, found.sides, strict=True):
        if side.gaps:
            yield (
                "lines missing",
                f"the {label} has lost {_gaps_text(side.gaps)} of {METRICS_FILE}, which is not part of this",
            )
    for name, parting in found.partings.items():
        yield name.replace("_", " "), _parting_text(parting)
    yield "validation loss", _validation_text(first, second)
    yield from _origins(first, second)
    yield from _settings(first, second)


def _gaps_text(gaps: Sequence[Gap]) -> str:
    more = len(gaps) - MOST_GAPS
    return ", ".join(map(str, gaps[:MOST_GAPS])) + (
        f" and {counted(more, 'more stretch', 'more stretches')}" if more > 0 else ""
    )


def _parting_text(parting: Parting) -> str:
    if parting.steps == 0:
        return "not logged by both"
    values = f"at step {parting.last_step}: {_both(parting.last_values)}"
    if parting.first_different is None:
        return f"the same bit for bit over {counted(parting.steps, 'common step')}; {values}"
    beyond = "never" if parting.first_beyond is None else f"at step {parting.first_beyond}"
    return (
        f"differs from step {parting.first_different} on, by more than {parting.tolerance:g} {beyond}; largest gap "
        f"{parting.largest_gap:.3g} at step {parting.largest_gap_step}; {values}"
    )


def _both(values: tuple[float, float]) -> str:
    return " and ".join(f"{value:.9g}" for value in values)


def _pair(pair: tuple[Curve, Curve], step: int) -> str:
    return " and ".join(f"{curve[step]:.9g}" for curve in pair)


def _validation_text(first: RunFolder, second: RunFolder) -> str:
    pair = (curve_of(first.standing("evaluation"), VALIDATION), curve_of(second.standing("evaluation"), VALIDATION))
    common = sorted(pair[0].keys() & pair[1].keys())
    if not common:
        return "no step was validated in both"
    different = [step for step in common if relative_gap(pair[0][step], pair[1][step]) > 0]
    last = f"at step {common[-1]}: {_pair(pair, common[-1])}"
    if not different:
        return f"the same bit for bit in {counted(len(common), 'validation')}; {last}"
    return f"differs from step {different[0]} on; {last}"


def _origins(first: RunFolder, second: RunFolder) -> Iterator[tuple[str, str]]:
    """Data and software versions, as the latest attempts logged them."""
    begins = [run.newest("resume") or run.newest("start") for run in (first, second)]
    yield "data", _same_or_both(*(begin.get("data_fingerprint") for begin in begins))
    versions = [begin.get("versions") or {} for begin in begins]
    for name in sorted({*versions[0], *versions[1]}):
        yield name, _same_or_both(versions[0].get(name), versions[1].get(name))
    if any(run.skipped for run in (first, second)):
        windows = [", ".join(_window_text(entry["window"]) for entry in run.skipped) for run in (first, second)]
        yield "left out", _same_or_both(*(text or "no samples" for text in windows))


def _window_text(window: Mapping[str, int]) -> str:
    return _numbers_text(window["first"], window["stop"] - 1)


def _numbers_text(first: int, last: int) -> str:
    return f"sample {first}" if first == last else f"samples {first}-{last}"


def _same_or_both(first: Any, second: Any) -> str:
    texts = [ABSENT if value is None else str(value) for value in (first, second)]
    return f"the same: {texts[0]}" if texts[0] == texts[1] else f"differs: {texts[0]} and {texts[1]}"


def _settings(first: RunFolder, second: RunFolder) -> Iterator[tuple[str, str]]:
    before, after = (dict(_flat(run.settings)) for run in (first, second))
    differing = [key for key in {**before, **after} if before.get(key, ABSENT) != after.get(key, ABSENT)]
    if not differing:
        yield "settings", "the same"
    for effect in Effect:
        keys = [key for key in differing if effect_of(key) is effect]
        if keys:
            yield "settings", f"that {effect}"
        for key in keys:
            values = [as_typed(side[key]) if key in side else ABSENT for side in (before, after)]
            yield "", f"  {key}: {values[0]} and {values[1]}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a frozen configuration; a map with user-defined names is one value."""
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and not is_map(key):
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def verdict(found: Comparison, runs: tuple[RunFolder, RunFolder]) -> str:
    """The last line: whether the two runs are the same."""
    loss = found.partings["loss"]
    common = counted(loss.steps, "common step")
    if loss.first_different is None:
        return f"the same loss bit for bit over {common}{_further(found)}"
    if loss.first_beyond is None:
        return (
            f"the same loss within {loss.tolerance:g} over {common}, though not bit for bit from step "
            f"{loss.first_different} on{_further(found)}"
        )
    step = loss.first_beyond
    return f"part at step {step} ({_samples_text(found, runs)}): loss {_both(loss.beyond_values)}; {_before(found)}"


def _further(found: Comparison) -> str:
    """Which run has logged steps that the other has not: these were not compared."""
    more = [side.count - found.common_steps for side in found.sides]
    pairs = zip(SIDES, more, strict=True)
    texts = [f"the {which} has logged {counted(number, 'step')} more" for which, number in pairs if number]
    return "".join(f"; {text}" for text in texts)


def _before(found: Comparison) -> str:
    """What is known of the steps before the one at which they diverge."""
    loss = found.partings["loss"]
    different = loss.first_different
    if different == loss.first_step:
        if different == loss.first_beyond:
            return "no earlier step is in both"
        return f"not bit for bit the same from step {different} on, the first in both"
    if all(side.before_parting == loss.steps_before for side in found.sides):
        return f"bit for bit the same before step {different}"
    return f"bit for bit the same in the {counted(loss.steps_before, 'common step')} before step {different}"


def _samples_text(found: Comparison, runs: tuple[RunFolder, RunFolder]) -> str:
    assert found.beyond is not None
    texts = [_samples_of(run, figures) for run, figures in zip(runs, found.beyond, strict=True)]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} in the first, {texts[1]} in the second"


def _samples_of(run: RunFolder, figures: Mapping[str, float]) -> str:
    """Global indices of the samples that a step trained on, `samples 960-991`."""
    if not all(0 < figures[name] < math.inf for name in SAMPLES):
        return "samples unknown"
    samples, batch = (int(figures[name]) for name in SAMPLES)
    indices = skips_of(read_rollbacks(run.path)).indices(samples - batch, batch)
    return _numbers_text(indices[0], indices[-1])

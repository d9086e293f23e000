"""`python -m launch compare`: the figures of two runs, what differs in what made them, and a verdict."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from megatron_lite.config.changes import SAFE, shown
from megatron_lite.config.keys import is_map
from megatron_lite.data.skips import read_rollbacks, skips_of
from megatron_lite.errors import EXIT_OK, ConfigError
from megatron_lite.observe.comparison import Curve, Parting, curve_of, relative_gap, write_chart
from megatron_lite.observe.run_folder import RunFolder
from megatron_lite.train.step_samples import batch_of_line

EXIT_PARTED = 1
FIGURES = ("loss", "grad_norm")
VALIDATION = "validation_loss"
ABSENT = "(not there)"
LABEL_WIDTH = 18


class Effect(StrEnum):
    """What a setting can have to do with two curves that part."""

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
# Safe to change within a run, and yet not without effect: at its beginning, or once there is a spike.
LEARNING_GROUP = "stability."
LEARNING = ("train.loss_scale.initial_power", "data.max_epochs")
SHOW_ONLY = ("stability.layer_interval", "stability.worst_sequences")


def effect_of(key: str) -> Effect:
    """Of a dotted key that differs between two runs."""
    if key.startswith(ROUNDING_GROUP) or key in ROUNDING:
        return Effect.rounding
    is_judging = key.startswith(LEARNING_GROUP) and key not in SHOW_ONLY
    return Effect.nothing if key in SAFE and key not in LEARNING and not is_judging else Effect.learning


def compare(folders: tuple[Path, Path], names: tuple[str, str], tolerance: float, chart: Path | None) -> int:
    """Print it all; exit code 0 where the losses are the same within the tolerance, else 1.

    Args:
        names: of the runs, as they were typed.
        tolerance: of a loss, relative.
        chart: a page to draw the curves on.
    Raises:
        ConfigError: the runs have no step in common.
        DataError: a record of skipped samples is damaged.
        OSError: the page cannot be written.
    """
    first, second = map(RunFolder.read, folders)
    curves = {name: (curve_of(first.metrics, name), curve_of(second.metrics, name)) for name in FIGURES}
    losses = Parting.of(*curves["loss"], tolerance)
    if losses is None:
        raise ConfigError(
            f"{names[0]} has logged {len(first.metrics)} steps and {names[1]} {len(second.metrics)}, and none is in "
            "both; compare runs that have trained the same steps"
        )
    for label, text in _lines(first, second, names, curves, tolerance):
        print(f"{label:<{LABEL_WIDTH}}{text}")
    if chart is not None:
        write_chart(chart, names, curves)
        print(f"{'chart':<{LABEL_WIDTH}}{chart}")
    if losses.first_beyond is not None:
        command = f"python -m megatron_lite.data trace {shlex.quote(names[0])} --step {losses.first_beyond}"
        print(f"{'documents':<{LABEL_WIDTH}}{command}")
    print(verdict(losses, curves["loss"], (first, second), tolerance))
    return EXIT_OK if losses.first_beyond is None else EXIT_PARTED


def _lines(
    first: RunFolder,
    second: RunFolder,
    names: tuple[str, str],
    curves: Mapping[str, tuple[Curve, Curve]],
    tolerance: float,
) -> Iterator[tuple[str, str]]:
    yield "first", f"{names[0]}: {len(first.metrics):,} steps"
    yield "second", f"{names[1]}: {len(second.metrics):,} steps"
    for name, pair in curves.items():
        yield name.replace("_", " "), _parting_text(Parting.of(*pair, tolerance), pair, tolerance)
    yield "validation loss", _validation_text(first, second)
    yield from _origins(first, second)
    yield from _settings(first, second)


def _parting_text(parting: Parting | None, pair: tuple[Curve, Curve], tolerance: float) -> str:
    if parting is None:
        return "not logged by both"
    values = f"at step {parting.last_step}: {_pair(pair, parting.last_step)}"
    if parting.first_different is None:
        return f"the same bit for bit over {parting.steps:,} common steps; {values}"
    beyond = "never" if parting.first_beyond is None else f"at step {parting.first_beyond}"
    return (
        f"differs from step {parting.first_different} on, by more than {tolerance:g} {beyond}; largest gap "
        f"{parting.largest_gap:.3g} at step {parting.largest_gap_step}; {values}"
    )


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
        return f"the same bit for bit in {len(common)} validations; {last}"
    return f"differs from step {different[0]} on; {last}"


def _origins(first: RunFolder, second: RunFolder) -> Iterator[tuple[str, str]]:
    """Data and programs, as the latest attempts have told them."""
    begins = [run.newest("resume") or run.newest("start") for run in (first, second)]
    yield "data", _same_or_both(*(begin.get("data_fingerprint") for begin in begins))
    versions = [begin.get("versions") or {} for begin in begins]
    for name in sorted({*versions[0], *versions[1]}):
        yield name, _same_or_both(versions[0].get(name), versions[1].get(name))
    if any(run.skipped for run in (first, second)):
        windows = [", ".join(_window_text(entry["window"]) for entry in run.skipped) for run in (first, second)]
        yield "left out", _same_or_both(*(text or "no samples" for text in windows))


def _window_text(window: Mapping[str, int]) -> str:
    return f"samples {window['first']}-{window['stop'] - 1}"


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
            values = [shown(side[key]) if key in side else ABSENT for side in (before, after)]
            yield "", f"  {key}: {values[0]} and {values[1]}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a frozen configuration; a map of the user's own names is one value, and shown without its own."""
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and not is_map(key):
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def verdict(parting: Parting, losses: tuple[Curve, Curve], runs: tuple[RunFolder, RunFolder], tolerance: float) -> str:
    """The last line: whether the two are the same run."""
    if parting.first_different is None:
        return f"the same loss bit for bit over {parting.steps:,} common steps"
    if parting.first_beyond is None:
        return (
            f"the same loss within {tolerance:g} over {parting.steps:,} common steps, though not bit for bit from step "
            f"{parting.first_different} on"
        )
    step = parting.first_beyond
    earlier = f"; bit for bit the same before step {parting.first_different}"
    return f"part at step {step} ({_samples_text(runs, step)}): loss {_pair(losses, step)}{earlier}"


def _samples_text(runs: tuple[RunFolder, RunFolder], step: int) -> str:
    texts = [_samples_of(run, step) for run in runs]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} in the first, {texts[1]} in the second"


def _samples_of(run: RunFolder, step: int) -> str:
    """The global numbers of the samples that a step trained on, `samples 960-991`."""
    line = next(entry for entry in run.metrics if entry["step"] == step)
    if "samples" not in line or "global_batch_size" not in line:
        return "samples unknown"
    batch = batch_of_line(line)
    indices = skips_of(read_rollbacks(run.path)).indices(batch.first_sample, batch.global_batch_size)
    return f"samples {indices[0]}-{indices[-1]}"

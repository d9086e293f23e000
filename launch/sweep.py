"""A sweep: `model.hidden_size=128,256 train.seed=1,2` is one run for each combination, each in its own folder.

Values use Hydra's syntax, including `choice(...)` and `range(...)`, but Hydra only parses them: its multirun would
start the runs in every rank. Values of text settings are split by `config/overrides.py`, since Hydra cannot parse all
texts.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from hydra.core.override_parser.types import Override, ValueType

from megatron_lite.config import overrides
from megatron_lite.config.keys import shown
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.errors import ConfigError, MegatronLiteError, library_edge

RUN_DIR = "train.run_dir"
NAME_LIMIT = 120  # characters that a sweep adds to a folder's name; file systems allow 255 in all
MAX_POINTS = 1000  # runs of a sweep
NAMED_POINTS = 3  # points listed in a message about several points

Result = TypeVar("Result")


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    overrides: tuple[str, ...]
    """Its full command line: one value for each varied override."""
    varied: tuple[tuple[str, str], ...] = ()
    """(key, value) of the varied overrides; empty = no sweep."""

    @property
    def name(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.varied)


def expand(command_line: Sequence[str]) -> list[Point]:
    """The points of a command line, the last varied override changing fastest; a single point if none is varied.

    Raises:
        ConfigError: lists every override whose values cannot be enumerated.
    """
    choices: list[list[str]] = []
    keys: list[str | None] = []
    problems: list[str] = []
    for word in command_line:
        try:
            values = _values(word)
        except ConfigError as error:
            problems += error.problems
            continue
        keys.append(None if values is None else overrides.key_of(word))
        choices.append([word] if values is None else values)
    if not problems and math.prod(map(len, choices)) > MAX_POINTS:
        problems.append(f"the command line makes more than {MAX_POINTS} runs; give fewer values")
    if problems:
        raise ConfigError(problems)
    return [
        Point(
            overrides=combination,
            varied=tuple((key, word.partition("=")[2]) for key, word in zip(keys, combination, strict=True) if key),
        )
        for combination in itertools.product(*choices)
    ]


def _values(word: str) -> list[str] | None:
    """The override once for each of its values; None if it is not a sweep.

    Raises:
        ConfigError: its values cannot be enumerated, or there are none.
    """
    start, _, typed = word.partition("=")
    values = overrides.sweep_values(typed) if overrides.is_text(word) else None
    if values is None:
        override = _sweep(word)
        values = None if override is None else _counted(word, override)
    if values is None:
        return None
    if not values:
        raise ConfigError(
            f"{shown(word)} holds no value; write KEY=A,B,C, or KEY=range(START,STOP) with START below STOP"
        )
    return [f"{start}={value}" for value in values]


def _sweep(word: str) -> Override | None:
    try:
        override = overrides.parse(word)
    except ConfigError:
        return None  # parsing the value reports the error
    return override if override.is_sweep_override() else None


def _counted(word: str, override: Override) -> list[str]:
    if not override.is_discrete_sweep() or override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        raise ConfigError(
            f"{shown(word)} names no values one by one; write them as KEY=A,B,C or KEY=range(START,STOP,STEP)"
        )
    with library_edge(ConfigError, f"{shown(word)} cannot be read", "write KEY=A,B,C or KEY=range(START,STOP)"):
        return list(itertools.islice(override.sweep_string_iterator(), MAX_POINTS + 1))


def build_all(points: Sequence[Point], build: Callable[[Point], Result]) -> list[Result]:
    """The results of `build` for every point, or the problems of all points in one error.

    Raises:
        MegatronLiteError: the unchanged error of a single point.
        ConfigError: each problem once, with the points that have it, unless all points do.
    """
    if len(points) == 1:
        return [build(points[0])]
    built: list[Result] = []
    found: dict[str, list[str]] = {}
    for point in points:
        try:
            built.append(build(point))
        except MegatronLiteError as error:
            for problem in error.problems if isinstance(error, ConfigError) else [str(error)]:
                found.setdefault(problem, []).append(point.name)
    if found:
        raise ConfigError([_of_points(problem, names, len(points)) for problem, names in found.items()])
    return built


def _of_points(problem: str, names: list[str], all_points: int) -> str:
    if len(names) == all_points:
        return problem
    more = f" and {len(names) - NAMED_POINTS} more" if len(names) > NAMED_POINTS else ""
    return f"{'; '.join(names[:NAMED_POINTS])}{more}: {problem}"


def in_own_folder(config: ResolvedConfig, point: Point) -> ResolvedConfig:
    """The configuration with the point's values appended to the name of its run folder."""
    suffix = _suffix([(key, value) for key, value in point.varied if key != RUN_DIR])
    if not suffix:
        return config
    return replace(config, train=replace(config.train, run_dir=f"{config.train.run_dir}{suffix}"))


def _suffix(varied: list[tuple[str, str]]) -> str:
    """`-hidden_size_128-seed_1`. If characters had to be replaced or dropped, a hash keeps the names distinct."""
    short = [key.rpartition(".")[2] for key, _ in varied]
    plain = "".join(
        f"-{key if short.count(last) > 1 else last}_{value}" for (key, value), last in zip(varied, short, strict=True)
    )
    safe = re.sub(r"[^\w.+-]+", "_", plain, flags=re.ASCII)[:NAME_LIMIT]
    if safe == plain:
        return safe
    return f"{safe}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def require_own_folders(points: Sequence[Point], folders: Sequence[Path]) -> None:
    """Refuse points that would overwrite each other.

    Raises:
        ConfigError: lists the points of each shared folder.
    """
    users: dict[Path, list[str]] = {}
    for point, folder in zip(points, folders, strict=True):
        users.setdefault(folder, []).append(point.name)
    shared = {folder: names for folder, names in users.items() if len(names) > 1}
    if shared:
        raise ConfigError(
            [
                f"{RUN_DIR}={folder} would be the folder of {len(names)} runs ({'; '.join(names[:NAMED_POINTS])}); "
                "give each value once"
                for folder, names in shared.items()
            ]
        )


def table(points: Sequence[Point], rows: Sequence[Sequence[str]], titles: Sequence[str]) -> str:
    """A row for each point, with aligned columns below their titles."""
    lines = [("run", *titles), *((point.name, *row) for point, row in zip(points, rows, strict=True))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )

"""The texts of `--help` and `--version`."""

from __future__ import annotations

import platform
import textwrap
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from launch.arguments import OPTIONS, SHORT
from launch.scripts import description
from megatron_lite import __version__
from megatron_lite.config.keys import choices_text, shown
from megatron_lite.config.preset_folders import PresetFolders, find_folders
from megatron_lite.config.presets import defaults_of
from megatron_lite.errors import ConfigError

WIDTH = 120
BUILT_ON = ("torch", "deepspeed", "transformers", "hydra-core")
SETTINGS = """\
settings
  group=preset          choose a preset of a group, such as model=gpt2_124m
  group.key=value       set one value, such as train.steps=1000
  parallel=dpD_tpT_ppP  any layout, such as parallel=dp2_tp2_pp2
  group.key=A,B         a sweep: one run for each value, also choice(A,B) and range(START,STOP,STEP)

`python -m launch explain KEY` shows what a setting means, its type, range, default and presets, and what a resume may
do with it; `explain GROUP` lists the settings of a group, such as `explain optimizer`, and `explain` all groups
"""


def general_help(verbs: Iterable[tuple[str, str]]) -> str:
    """Help on the whole command line.

    Args:
        verbs: (how to type it, what it does).
    """
    folders = find_folders()
    lines = ["usage: python -m launch SCRIPT [SETTING ...] [OPTION ...]", "       python -m launch COMMAND ..."]
    lines += ["(`megatron-lite` is the same as `python -m launch`)", "", "scripts"]
    lines += table((script, description(script)) for script in folders.scripts())
    lines += ["", "commands", *table(verbs), "", *_options(), "", SETTINGS, "presets", *_presets(folders, {})]
    return "\n".join(lines)


def script_help(script: str, program: str, conf: Path | None = None) -> str:
    """Help on one script.

    Args:
        program: the command that starts it, such as `python pretrain_gpt.py`.
        conf: folder with the user's presets; None = `./conf`.
    """
    folders = find_folders(conf)
    lines = [f"usage: {program} [SETTING ...] [OPTION ...]", "", description(script), "", *_options(), "", SETTINGS]
    lines += ["presets (* = what it starts from)", *_presets(folders, defaults_of(folders, script))]
    return "\n".join(lines)


def require_script(script: str) -> str:
    """The name of an entry script.

    Raises:
        ConfigError: there is no such script.
    """
    scripts = PresetFolders().scripts()
    if script not in scripts:
        raise ConfigError(f"{shown(script)!r} is not a script; {choices_text(script, scripts)}")
    return script


def versions() -> str:
    """Versions of this project and of the packages that affect a run's results; imports none of them."""
    rows = [("megatron_lite", __version__), *((name, _version(name)) for name in BUILT_ON)]
    return "\n".join(f"{name:<14}{text}" for name, text in [*rows, ("python", platform.python_version())])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _options() -> list[str]:
    short = {name: letter for letter, name in SHORT.items()}
    rows = [
        (f"{name} {option.value}".rstrip() + (f", {short[name]}" if name in short else ""), option.help)
        for name, option in OPTIONS.items()
    ]
    return ["options", *table(rows)]


def _presets(folders: PresetFolders, chosen: dict[str, str]) -> Iterator[str]:
    rows = (
        (group, ", ".join(f"*{name}" if chosen.get(group) == name else name for name in names))
        for group, names in folders.groups().items()
    )
    return table(rows)


def table(rows: Iterable[tuple[str, str]], indent: int = 2, widest: int = 24) -> Iterator[str]:
    """Two columns; if the first cell is wider than `widest`, it gets a line of its own."""
    rows = list(rows)
    column = min(widest, indent + 2 + max((len(name) for name, _ in rows), default=0))
    for name, text in rows:
        lines = textwrap.wrap(text, WIDTH - column, break_on_hyphens=False, break_long_words=False) or [""]
        if indent + len(name) + 2 > column:
            yield " " * indent + name
        else:
            yield f"{'':<{indent}}{name:<{column - indent}}{lines.pop(0)}".rstrip()
        yield from (" " * column + line for line in lines)

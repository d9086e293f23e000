"""Parses the command line: options, a frozen file, and settings. Shared by `python -m launch` and the scripts."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from megatron_lite.config.keys import nearest, shown
from megatron_lite.errors import ConfigError

VERIFY_FLAG = "--verify"  # passed by `python -m launch verify` to its ranks
EVALUATE_FLAG = "--evaluate"  # passed by `python -m launch evaluate`, followed by the folder with the weights
ALL_FLAG = "--all"  # evaluate each held-out sample once


@dataclass(frozen=True)
class Option:
    """A command-line option, as opposed to a setting."""

    help: str
    value: str = ""
    """Name of its required value; empty = it has none."""


OPTIONS = {
    "--dry-run": Option("print the plan (ranks, batch, parameters, the command) and start nothing"),
    "--cfg": Option(
        "print every setting with its value, as YAML, and where the value comes from; start nothing", "job"
    ),
    "--conf": Option(
        "add presets of your own from this folder, such as DIR/model/NAME.yaml; without it from ./conf", "DIR"
    ),
    "--config": Option(
        "take a run folder's frozen configuration instead of a script: repeats or resumes that run; settings behind it "
        "change single values, such as train.steps",
        "FILE",
    ),
    "--multirun": Option("start one run for each value of a sweep; values with commas are a sweep without it, too"),
    "--debug": Option("show tracebacks of user errors"),
    "--help": Option("show this text"),
    "--version": Option("show the version of megatron_lite and of what it builds on"),
}
SHORT = {"-h": "--help", "-c": "--cfg", "-m": "--multirun"}
# Options of Hydra's own command line that users may type -> what to type here.
OF_HYDRA = {
    "--config-dir": "presets of your own come with --conf DIR",
    "-cd": "presets of your own come with --conf DIR",
    "--config-path": "presets of your own come with --conf DIR",
    "-cp": "presets of your own come with --conf DIR",
    "--config-name": "name a script, such as pretrain_gpt, and choose presets with GROUP=PRESET",
    "-cn": "name a script, such as pretrain_gpt, and choose presets with GROUP=PRESET",
    "--resolve": "--cfg job shows resolved values; leave it out",
    "--package": "--cfg job shows all groups; leave it out",
    "-p": "--cfg job shows all groups; leave it out",
    "--info": "use --cfg job for the values, --dry-run for the plan",
    "-i": "use --cfg job for the values, --dry-run for the plan",
    "--run": "leave it out; a run starts without it",
    "-r": "leave it out; a run starts without it",
}


class Parser(argparse.ArgumentParser):
    """For verbs with options of their own: reports a wrong argument in one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


@dataclass
class Arguments:
    """What the user typed."""

    overrides: list[str] = field(default_factory=list)
    """Settings and presets, `key=value`."""
    script: str | None = None
    """The first argument that is neither an option nor an override."""
    config_file: Path | None = None
    conf: Path | None = None
    """Folder with the user's presets; None = `./conf`, if it exists."""
    dry_run: bool = False
    show_config: bool = False
    debug: bool = False
    help: bool = False
    version: bool = False
    verify: bool = False
    """Verify the layout instead of training."""
    evaluate: Path | None = None
    """Evaluate the weights in this folder instead of training."""
    all: bool = False
    """Evaluate each held-out sample once."""


def parse(argv: list[str], *, names_script: bool = False) -> Arguments:
    """Split a command line.

    Args:
        names_script: the first argument that is not an option and has no `=` is the script's name.
    Raises:
        ConfigError: an unknown option, or an option without its value.
    """
    arguments, rest = Arguments(), list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        name = SHORT.get(name, name)
        if word == EVALUATE_FLAG and rest:
            arguments.evaluate = Path(rest.pop(0))
        elif word in (ALL_FLAG, VERIFY_FLAG):
            setattr(arguments, word[2:], True)
        elif name in OPTIONS:
            _take(arguments, name, value if equals else None, rest)
        elif word.startswith("--") or name in OF_HYDRA:
            raise ConfigError(_unknown_option(name))
        elif names_script and not equals and not word.startswith("-") and arguments.script is None:
            arguments.script = word
        else:
            arguments.overrides.append(word)
    return arguments


def _take(arguments: Arguments, name: str, value: str | None, rest: list[str]) -> None:
    """Record an option with its value: `--conf DIR` or `--conf=DIR`."""
    if not OPTIONS[name].value:
        if value is not None:
            raise ConfigError(f"{name}={shown(value)}: {name} takes no value; leave ={shown(value)} out")
        if name != "--multirun":  # --multirun only repeats what commas in values already mean
            setattr(arguments, name[2:].replace("-", "_"), True)
        return
    value = value if value is not None else (rest.pop(0) if rest else "")
    if name == "--cfg":
        if value != "job":
            raise ConfigError(f"--cfg {shown(value)}".rstrip() + " is not possible; write --cfg job")
        arguments.show_config = True
    elif name == "--conf":
        if not value:
            raise ConfigError("--conf needs a folder; give one with presets of your own, such as --conf my_conf")
        arguments.conf = Path(value)
    else:
        if not value:
            raise ConfigError("--config needs a file; give a config-*.yaml of a run folder")
        arguments.config_file = Path(value)


def _unknown_option(name: str) -> str:
    if name in OF_HYDRA:
        return f"{name} is Hydra's, and not an option here; {OF_HYDRA[name]}"
    guess = nearest(name, OPTIONS)
    if guess:
        return f"{shown(name)} is not an option; did you mean {guess}?"
    return (
        f"{shown(name)} is not an option; options are {', '.join(OPTIONS)}; settings are written key=value, without "
        "dashes"
    )

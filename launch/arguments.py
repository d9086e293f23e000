"""The words of a command line: flags, a frozen file, and settings. Shared by `python -m launch` and the scripts."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from megatron_lite.config.compose import available_scripts, preset_groups
from megatron_lite.config.keys import nearest
from megatron_lite.errors import ConfigError

FLAGS = ("--dry-run", "--debug", "--help")
VERIFY_FLAG = "--verify"  # from `python -m launch verify` to the ranks that it starts

EVALUATE_FLAG = "--evaluate"  # the same of `python -m launch evaluate`; the folder with the weights follows it
ALL_FLAG = "--all"  # on each held-out sample once


class Parser(argparse.ArgumentParser):
    """For commands with options of their own: answers a wrong argument in one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


@dataclass
class Arguments:
    """What the user typed."""

    words: list[str] = field(default_factory=list)
    """Settings and presets, `key=value`."""
    config_file: Path | None = None
    dry_run: bool = False
    debug: bool = False
    help: bool = False
    verify: bool = False
    """Certify the layout instead of training."""
    evaluate: Path | None = None
    """Evaluate the weights of this folder instead of training."""
    all: bool = False
    """On each held-out sample once."""


def parse(argv: list[str]) -> Arguments:
    """Split a command line into flags and words.

    Raises:
        ConfigError: an unknown option, or `--config` without a file.
    """
    arguments, words = Arguments(), list(argv)
    while words:
        word = words.pop(0)
        if word == "--config" or word.startswith("--config="):
            arguments.config_file = Path(_value(word, words))
        elif word == EVALUATE_FLAG and words:
            arguments.evaluate = Path(words.pop(0))
        elif word == ALL_FLAG:
            arguments.all = True
        elif word == VERIFY_FLAG:
            arguments.verify = True
        elif word in FLAGS or word == "-h":
            setattr(arguments, "help" if word == "-h" else word[2:].replace("-", "_"), True)
        elif word.startswith("--"):
            raise ConfigError(_unknown_option(word))
        else:
            arguments.words.append(word)
    return arguments


def _value(word: str, rest: list[str]) -> str:
    value = word.partition("=")[2] if "=" in word else (rest.pop(0) if rest else "")
    if not value:
        raise ConfigError("--config needs a file; give a config-*.yaml of a run folder")
    return value


def _unknown_option(word: str) -> str:
    name = word.partition("=")[0]
    guess = nearest(name, [*FLAGS, "--config"])
    if guess:
        return f"{name} is not an option; did you mean {guess}?"
    return f"{name} is not an option; options are {', '.join(FLAGS)}; settings are written key=value, without dashes"


def usage(program: str) -> str:
    """The help text: what can be typed, with all presets."""
    groups = "\n".join(f"  {group:<11}{', '.join(presets)}" for group, presets in preset_groups().items())
    return f"""usage: {program} [SETTING ...] [--dry-run] [--debug]

  --config FILE   take a run folder's frozen configuration instead of a script: repeats or resumes that run; settings
                  behind it change single values, such as train.steps
  --dry-run       print the plan (ranks, batch, parameters, the command) and start nothing
  --debug         show tracebacks of user errors

settings
  group=preset          choose a preset of a group, such as model=gpt2_124m
  group.key=value       set one value, such as train.steps=1000 (all of them: megatron_lite/config/schema.py)
  parallel=dpD_tpT_ppP  any layout, such as parallel=dp2_tp2_pp2
  group.key=A,B         a sweep: one run for each value, also choice(A,B) and range(START,STOP,STEP)

scripts: {", ".join(available_scripts())}
`python -m launch verify SCRIPT [SETTING ...]` compares a layout with one process, gradient by gradient
`python -m launch evaluate CHECKPOINT [SETTING ...] [--all] [--json]` tells loss and accuracy on held-out text
`python -m launch status|logs|cancel|requeue RUN_FOLDER` follows a run and its jobs (`logs --follow`: to its end)
`python -m launch report RUN_FOLDER [--out FILE]` draws a run on one page, whether it runs, has ended or was killed
`python -m launch compare RUN_FOLDER RUN_FOLDER [--tolerance 1e-6] [--html FILE]` says where two runs part, and why
`python -m launch trace RUN_FOLDER --step N [--text] [--json]` shows the documents that a step was trained on

presets
{groups}
"""

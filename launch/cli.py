"""The command line: `python -m launch SCRIPT ...` or `python -m launch VERB ...`, also installed as `megatron-lite`.

`VERBS` is the only list of verbs: help, suggestions for typos and shell completion read it. What a verb needs is
imported when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from launch.arguments import parse
from launch.messages import show_error
from megatron_lite.config.keys import nearest, shown
from megatron_lite.config.preset_folders import PresetFolders
from megatron_lite.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    ConfigError,
    MegatronLiteError,
    disk_error,
    end_of,
)
from megatron_lite.observe.console import forgive_output

PROGRAM = "python -m launch"
SHORTEST_BEGINNING = 3  # shortest prefix of a verb for which it is suggested
HELP = ("--help", "-h")
BEFORE_A_VERB = ("--debug", "--dry-run", *HELP)  # options that may precede a verb


@dataclass(frozen=True)
class Verb:
    """One command of the launcher other than starting a script."""

    arguments: str
    """Its arguments, as shown in the help."""
    help: str
    run: Callable[[list[str]], int]
    """Takes the arguments, returns the exit code."""
    choices: tuple[str, ...] = ()
    """Possible values of its first argument; empty = given by the user, such as a path."""
    has_help: bool = True
    """It handles --help itself."""


def _verify(argv: list[str]) -> int:
    from launch.launching import launch

    return launch(replace(parse(argv, names_script=True), verify=True))


def _evaluate(argv: list[str]) -> int:
    from launch.evaluation import main

    return main(argv)


def _explain(argv: list[str]) -> int:
    from launch.explaining import main

    return main(argv)


def _follow(verb: str) -> Callable[[list[str]], int]:
    def run(argv: list[str]) -> int:
        from launch.follow import main

        return main([verb, *argv])

    return run


def _watch(verb: str) -> Callable[[list[str]], int]:
    def run(argv: list[str]) -> int:
        from launch.watching import main

        return main([verb, *argv])

    return run


def _data(argv: list[str]) -> int:
    from megatron_lite.data.__main__ import run_command

    return run_command(_without_debug(argv), f"{PROGRAM} data")


def _checkpoint(argv: list[str]) -> int:
    from megatron_lite.checkpoint.__main__ import run_command

    return run_command(_without_debug(argv), f"{PROGRAM} checkpoint")


def _completion(argv: list[str]) -> int:
    from launch.completion import main

    return main(argv)


def _complete(argv: list[str]) -> int:
    from launch.completion import candidates

    print("\n".join(candidates(argv, VERBS)))
    return EXIT_OK


VERBS = {
    "verify": Verb(
        "SCRIPT [SETTING ...]", "compare a layout with one process, gradient by gradient", _verify, has_help=False
    ),
    "evaluate": Verb(
        "CHECKPOINT [SETTING ...]", "report loss and accuracy of a checkpoint on held-out text", _evaluate
    ),
    "explain": Verb("[KEY]", "explain a setting: meaning, type, range, presets", _explain),
    "status": Verb("RUN_FOLDER", "show the state of a run and its jobs", _follow("status"), has_help=False),
    "logs": Verb(
        "RUN_FOLDER [--follow]", "show a run's logs, with --follow to its end", _follow("logs"), has_help=False
    ),
    "cancel": Verb("RUN_FOLDER", "ask a run to save and stop, or cancel its job", _follow("cancel"), has_help=False),
    "requeue": Verb("RUN_FOLDER", "submit a run's job again", _follow("requeue"), has_help=False),
    "report": Verb("RUN_FOLDER [--out FILE]", "draw a run on one page: running, ended or killed", _watch("report")),
    "compare": Verb("RUN_FOLDER RUN_FOLDER", "show where two runs diverge, and why", _watch("compare")),
    "trace": Verb("RUN_FOLDER --step N [--text]", "show the documents that a step was trained on", _watch("trace")),
    "data": Verb(
        "COMMAND ...", "prepare and inspect training data", _data, choices=("prepare", "inspect", "add-tokens")
    ),
    "checkpoint": Verb(
        "COMMAND ...",
        "inspect, verify, prune and export checkpoints",
        _checkpoint,
        choices=("inspect", "verify", "diff", "prune", "export"),
    ),
    "completion": Verb("bash|zsh", "print the completion script of a shell", _completion, choices=("bash", "zsh")),
}
COMPLETE = "complete"  # called by shell completion; not listed


def main(argv: list[str]) -> int:
    """Run one command line; returns the exit code."""
    debug = "--debug" in argv
    try:
        return _run(argv)
    except MegatronLiteError as error:
        show_error(error, debug=debug)
        return end_of(error)
    except OSError as error:
        problem = disk_error(error)
        if problem is None:
            raise
        show_error(problem, debug=debug)
        return problem.end


def _run(argv: list[str]) -> int:
    if argv[:1] == [COMPLETE]:
        return _complete(argv[1:])
    found = next((i for i, word in enumerate(argv) if word not in BEFORE_A_VERB), len(argv))
    name, rest = "".join(argv[found : found + 1]), argv[:found] + argv[found + 1 :]
    verb = VERBS.get(name)
    if verb is None:
        return _run_script(argv)
    if not verb.has_help and not set(HELP).isdisjoint(rest):
        return _show_help(name, rest)
    return verb.run(rest)


def _run_script(argv: list[str]) -> int:
    arguments = parse(argv, names_script=True)
    if arguments.script is not None:
        _require_script(arguments.script)
    if arguments.version:
        from launch.usage import versions

        print(versions())
        return EXIT_OK
    if arguments.help:
        return _show_help("", argv)
    from launch.launching import launch  # imports Hydra, which nothing above needs

    return launch(arguments)


def _require_script(word: str) -> None:
    """Check that the first argument is a script.

    Raises:
        ConfigError: it is not a script, and most likely a mistyped verb.
    """
    if word.removesuffix(".py") in PresetFolders().scripts():
        return
    begun = [verb for verb in VERBS if len(word) >= SHORTEST_BEGINNING and verb.startswith(word)]
    guess = begun[0] if begun else nearest(word, VERBS)
    if guess is not None:
        raise ConfigError(f"{shown(word)} is neither a command nor a script; did you mean {guess}?")


def _show_help(verb: str, argv: Sequence[str]) -> int:
    """Show the help of a script, of a verb that has no options of its own, or of everything."""
    from launch import usage

    words = [word for word in argv if word not in HELP]
    arguments = parse(words, names_script=True) if verb in ("", "verify") else None
    if arguments is not None and arguments.script is not None:
        script = usage.require_script(arguments.script.removesuffix(".py"))
        print(usage.script_help(script, " ".join(filter(None, (PROGRAM, verb, script))), arguments.conf))
    elif verb:
        print(f"usage: {PROGRAM} {verb} {VERBS[verb].arguments}\n\n{VERBS[verb].help}")
    else:
        print(usage.general_help((f"{name} {one.arguments}", one.help) for name, one in VERBS.items()))
    return EXIT_OK


def _without_debug(argv: list[str]) -> list[str]:
    return [word for word in argv if word != "--debug"]


def run() -> None:
    """The console entry point."""
    forgive_output()  # a full disk, and `--dry-run | head`, which closes the pipe early
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before there was anything to stop
        sys.exit(EXIT_INTERRUPTED)

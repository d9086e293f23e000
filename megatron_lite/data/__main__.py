"""`python -m megatron_lite.data`: `prepare [overrides]`, `inspect PATH` or `add-tokens SOURCE DESTINATION`.

`trace RUN` is passed on to `python -m launch trace`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_lite.config.compose import compose
from megatron_lite.config.frozen import load_frozen
from megatron_lite.config.keys import require_command
from megatron_lite.config.lengths import TRAINED_SENTINELS
from megatron_lite.config.preset_folders import find_folders
from megatron_lite.config.schema import ObjectiveName, RunConfig
from megatron_lite.config.validate import validate
from megatron_lite.data.shards.inspection import describe_folder, describe_pair
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.data.shards.prepared import MANIFEST
from megatron_lite.data.tokenizer.needs import add_tokens
from megatron_lite.data.tokenizer.roles import names_text
from megatron_lite.errors import EXIT_OK, EXIT_USER_ERROR, ConfigError, MegatronLiteError

PROGRAM = "python -m megatron_lite.data"


def main(argv: list[str]) -> int:
    """Run one command; returns the exit code."""
    if argv[:1] == ["trace"]:  # it needs runs and objectives, which belong to rooms above this one
        return subprocess.run([sys.executable, "-m", "launch", *argv], check=False).returncode
    try:
        return run_command(argv)
    except MegatronLiteError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR


def run_command(argv: list[str], program: str = PROGRAM) -> int:
    """
    Args:
        program: as which it was called.
    Raises:
        MegatronLiteError: what is wrong with the command or the data.
    """
    require_command(argv, COMMANDS, program)
    arguments = _parser(program).parse_args(argv)
    for line in COMMANDS[arguments.command](arguments):
        print(line)
    return EXIT_OK


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description="Prepare and inspect training data.")
    commands = parser.add_subparsers(dest="command", required=True)
    prepare_command = commands.add_parser("prepare", help="create the shards of a configuration, as a run would")
    prepare_command.add_argument("--script", default="pretrain_gpt", help="entry script whose configuration is used")
    prepare_command.add_argument("--config", type=Path, help="config-*.yaml of a run folder, instead of overrides")
    prepare_command.add_argument("--conf", type=Path, help="folder of presets of your own; ./conf if not given")
    prepare_command.add_argument(
        "overrides", nargs="*", help="such as data.source=my.txt data.tokenizer_vocab_size=16384"
    )
    inspect_command = commands.add_parser("inspect", help="show the contents of a prepared folder or a .bin/.idx pair")
    inspect_command.add_argument("path", type=Path, help="a prepared folder, or the prefix of a .bin/.idx pair")
    inspect_command.add_argument("--verify", action="store_true", help="read all files and compare their checksums")
    inspect_command.add_argument("--documents", type=int, default=1, help="number of documents to show (default 1)")
    add_command = commands.add_parser("add-tokens", help="copy a tokenizer and add the special tokens of an objective")
    add_command.add_argument("--objective", required=True, choices=list(ObjectiveName), metavar="NAME")
    add_command.add_argument(
        "--sentinels", type=int, default=TRAINED_SENTINELS, help="number of sentinels (default %(default)s)"
    )
    add_command.add_argument("source", help="folder or hub name of a tokenizer")
    add_command.add_argument("destination", type=Path, help="new folder for the copy")
    return parser


def _prepare(arguments: argparse.Namespace) -> list[str]:
    config = _config_to_prepare(arguments)
    config = replace(config, launcher=replace(config.launcher, num_processes=None))  # the data does not depend on it
    validate(config)
    prepared = prepare(config, report=print)
    return describe_folder(prepared.folder, verify=False, documents=0)


def _config_to_prepare(arguments: argparse.Namespace) -> RunConfig:
    if arguments.config is None:
        return compose(arguments.script, arguments.overrides, find_folders(arguments.conf))
    if arguments.overrides:
        raise ConfigError(
            f"--config {arguments.config} is a complete configuration, and {arguments.overrides[0]} would change it; "
            "omit one of them"
        )
    return load_frozen(arguments.config)


def _inspect(arguments: argparse.Namespace) -> list[str]:
    path: Path = arguments.path
    if (path / MANIFEST).is_file():
        return describe_folder(path, verify=arguments.verify, documents=arguments.documents)
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    return describe_pair(prefix, verify=arguments.verify, documents=arguments.documents)


def _add_tokens(arguments: argparse.Namespace) -> list[str]:
    added, copy = add_tokens(arguments.source, arguments.destination, arguments.objective, arguments.sentinels)
    return [
        f"{arguments.destination}: {copy.vocab_size:,} tokens, {len(added)} of them new: {names_text(added) or 'none'}",
        f"use it with data.tokenizer={arguments.destination}",
    ]


COMMANDS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "prepare": _prepare,
    "inspect": _inspect,
    "add-tokens": _add_tokens,
}


def run() -> None:
    """The entry point of the console command."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # the reader closed the pipe, as in `trace ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit does not fail


if __name__ == "__main__":
    run()

"""`python -m megatron_lite.data` with `prepare [overrides]`, `inspect PATH` or `add-tokens SOURCE DESTINATION`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_lite.config.compose import compose
from megatron_lite.config.lengths import TRAINED_SENTINELS
from megatron_lite.config.schema import ObjectiveName
from megatron_lite.config.validate import validate
from megatron_lite.data.inspection import describe_folder, describe_pair
from megatron_lite.data.needs import add_tokens, shown
from megatron_lite.data.prepare import prepare
from megatron_lite.data.prepared import MANIFEST
from megatron_lite.errors import EXIT_OK, EXIT_USER_ERROR, MegatronLiteError


def main(argv: list[str]) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        for line in COMMANDS[arguments.command](arguments):
            print(line)
    except MegatronLiteError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megatron_lite.data", description="Prepare text, and look at it.")
    commands = parser.add_subparsers(dest="command", required=True)
    prepare_command = commands.add_parser("prepare", help="make the shards of a configuration, as a run would")
    prepare_command.add_argument("--script", default="pretrain_gpt", help="entry script whose configuration is used")
    prepare_command.add_argument(
        "overrides", nargs="*", help="such as data.source=my.txt data.tokenizer_vocab_size=16384"
    )
    inspect_command = commands.add_parser("inspect", help="show what is in a prepared folder or a .bin/.idx pair")
    inspect_command.add_argument("path", type=Path, help="a prepared folder, or the prefix of a .bin/.idx pair")
    inspect_command.add_argument("--verify", action="store_true", help="read everything and compare the checksums")
    inspect_command.add_argument("--documents", type=int, default=1, help="first documents to show (default 1)")
    add_command = commands.add_parser("add-tokens", help="copy a tokenizer and add what an objective needs")
    add_command.add_argument("--objective", required=True, choices=list(ObjectiveName), metavar="NAME")
    add_command.add_argument(
        "--sentinels", type=int, default=TRAINED_SENTINELS, help="sentinels to have (default %(default)s)"
    )
    add_command.add_argument("source", help="folder or hub name of a tokenizer")
    add_command.add_argument("destination", type=Path, help="new folder for the copy")
    return parser


def _prepare(arguments: argparse.Namespace) -> list[str]:
    config = compose(arguments.script, arguments.overrides)
    config = replace(config, launcher=replace(config.launcher, num_processes=None))  # whatever will train on it
    validate(config)
    prepared = prepare(config, report=print)
    return describe_folder(prepared.folder, verify=False, documents=0)


def _inspect(arguments: argparse.Namespace) -> list[str]:
    path: Path = arguments.path
    if (path / MANIFEST).is_file():
        return describe_folder(path, verify=arguments.verify, documents=arguments.documents)
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    return describe_pair(prefix, verify=arguments.verify, documents=arguments.documents)


def _add_tokens(arguments: argparse.Namespace) -> list[str]:
    added, copy = add_tokens(arguments.source, arguments.destination, arguments.objective, arguments.sentinels)
    return [
        f"{arguments.destination}: {copy.vocab_size:,} tokens, of them {len(added)} new: {shown(added) or 'none'}",
        f"use it with data.tokenizer={arguments.destination}",
    ]


COMMANDS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "prepare": _prepare,
    "inspect": _inspect,
    "add-tokens": _add_tokens,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

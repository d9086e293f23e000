"""`python -m launch explain [KEY]`: what a setting, a group or a preset means."""

from __future__ import annotations

from pathlib import Path

from launch.arguments import Parser
from launch.usage import table
from megatron_lite.config.explain import explain
from megatron_lite.config.preset_folders import find_folders
from megatron_lite.errors import EXIT_OK


def main(argv: list[str]) -> int:
    """Print the explanation.

    Raises:
        ConfigError: there is no such setting.
    """
    parser = Parser(
        prog="python -m launch explain", description="Explain what a setting means, and which values it can have."
    )
    parser.add_argument("key", nargs="?", default="", help="such as optimizer.decay, optimizer or model=gpt_tiny")
    parser.add_argument("--conf", type=Path, metavar="DIR", help="presets of your own; ./conf if not given")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors")
    arguments = parser.parse_args(argv)
    for line in table(explain(arguments.key, find_folders(arguments.conf)), indent=0, widest=48):
        print(line)
    return EXIT_OK

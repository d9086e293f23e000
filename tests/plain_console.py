"""A console over streams as they are, which redirects nothing."""

from __future__ import annotations

import sys
from typing import TextIO

from megatron_lite.observe.console import Console


def plain_console(output: TextIO | None = None) -> Console:
    """None = stdout and stderr."""
    return Console(output if output is not None else sys.stdout, output if output is not None else sys.stderr)

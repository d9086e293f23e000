"""Where our code is: a checkout, or installed by pip. Fast to import: shell completion calls it on each tab key."""

from __future__ import annotations

import ast
import site
import sysconfig
from pathlib import Path

from megatron_lite.errors import LaunchError

CODE = Path(__file__).resolve().parents[1]
"""The folder with our packages and the entry scripts."""


def is_installed() -> bool:
    """Whether this interpreter finds our code from any folder; not the case for a checkout."""
    own = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()}
    return CODE in {Path(folder).resolve() for folder in own}


def script_path(script: str) -> Path:
    """The path of an entry script.

    Raises:
        LaunchError: there is no such script.
    """
    path = CODE / f"{script}.py"
    if not path.is_file():
        raise LaunchError(
            f"{path} is missing, and {script} has a primary configuration; restore the file, or write it like "
            "pretrain_gpt.py"
        )
    return path


def description(script: str) -> str:
    """The first line of the script's docstring."""
    text = ast.get_docstring(ast.parse(script_path(script).read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]

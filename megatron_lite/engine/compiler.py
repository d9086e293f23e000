"""Whether this machine can compile blocks (`train.compile=blocks`), found out before anything is built."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch.utils._triton import has_triton

from megatron_lite.errors import LaunchError

_OF_TRITON = ("gcc", "clang")


def require_compiler(device: torch.device) -> None:
    """
    Raises:
        LaunchError: torch.compile would fail here; the message says what to install.
    """
    missing = _missing_for_gpu() if device.type == "cuda" else _missing_for_cpu()
    headers = Path(sysconfig.get_path("include"))
    if missing is None and not (headers / "Python.h").is_file():
        missing = f"the header Python.h, not in {headers}; install Python's headers (Debian: python3-dev)"
    if missing is not None:
        raise LaunchError(f"train.compile=blocks needs {missing}, or set train.compile=none")


def _missing_for_gpu() -> str | None:
    if not has_triton():
        return (
            "triton and a GPU of compute capability 7.0 or later; install triton in the version of this torch "
            f"({torch.__version__})"
        )
    given = os.environ.get("CC")
    if not any(map(shutil.which, [given] if given else _OF_TRITON)):
        return f"a C compiler, CC={given or ' or '.join(_OF_TRITON)}; install one (Debian: gcc)"
    return None


def _missing_for_cpu() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler  # imports the whole compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return f"a C++ compiler, CXX={os.environ.get('CXX', 'g++')}; install one (Debian: g++)"
    return None

"""What a machine must have for train.compile=blocks, found out before anything is built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_lite.engine import compiler
from megatron_lite.engine.compiler import require_compiler
from megatron_lite.errors import LaunchError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has what a test puts there: programs in PATH, headers, triton."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compiler.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(compiler, "has_triton", lambda: True)
    return tmp_path


def _install(tools: Path, name: str) -> None:
    program = tools / "bin" / name
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)


def test_a_cpu_needs_a_cpp_compiler(tools: Path) -> None:
    from torch._inductor.cpp_builder import cpp_compiler_search

    cpp_compiler_search.cache_clear()
    with pytest.raises(LaunchError) as error:
        require_compiler(CPU)
    assert str(error.value) == (
        "train.compile=blocks needs a C++ compiler, CXX=g++; install one (Debian: g++), or set train.compile=none"
    )
    _install(tools, "g++")  # the remedy
    require_compiler(CPU)
    cpp_compiler_search.cache_clear()


def test_a_gpu_needs_triton_and_a_c_compiler(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "has_triton", lambda: False)
    with pytest.raises(LaunchError, match=r"^train.compile=blocks needs triton and a GPU of compute capability 7.0"):
        require_compiler(GPU)
    monkeypatch.setattr(compiler, "has_triton", lambda: True)
    with pytest.raises(LaunchError, match=r"needs a C compiler, CC=gcc or clang; install one \(Debian: gcc\), or set"):
        require_compiler(GPU)
    _install(tools, "clang")
    require_compiler(GPU)
    monkeypatch.setenv("CC", "none")
    with pytest.raises(LaunchError, match=r"needs a C compiler, CC=none; "):
        require_compiler(GPU)


def test_both_need_pythons_headers(tools: Path) -> None:
    _install(tools, "gcc")
    (tools / "Python.h").unlink()
    with pytest.raises(LaunchError, match=r"needs the header Python.h, not in .*; install Python's headers"):
        require_compiler(GPU)

"""Compiles `device.cpp` and loads it into this process, before torch is imported.

The library is cached in the temporary folder under the hash of its source, of torch's version and of the compiler, so
that only the first run after a change compiles: about 20 seconds of one core.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")
FLAGS = ("-std=c++20", "-O0", "-shared", "-fPIC")


def compiler() -> str | None:
    """The C++ compiler: `CXX`, or the first of g++, c++ and clang++."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "c++", "clang++"))), None)


def why_not() -> str | None:
    """Why no rehearsal is possible on this machine; None = it is."""
    if not sys.platform.startswith("linux"):
        return "the rehearsal on a fake GPU loads torch's shared libraries as Linux does"
    if any((_torch_folder() / "lib" / f"libtorch_{kind}.so").exists() for kind in ("cuda", "hip")):
        return "this torch has GPU support of its own; the rehearsal needs a build for the CPU"
    if compiler() is None:
        return "no C++ compiler (CXX, g++, c++, clang++) for tests/rehearsal/device.cpp"
    return None


def load() -> None:
    """Load the fake device. Call it before `import torch`: torch asks for its CUDA hooks once."""
    if "torch" in sys.modules:
        raise RuntimeError("the fake device has to be loaded before torch")
    libraries = _torch_folder() / "lib"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(libraries / name), mode=ctypes.RTLD_GLOBAL)
    if not ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL).install():
        raise RuntimeError("this torch has a CUDA device of its own")


@functools.cache
def build() -> Path:
    """The compiled library.

    Raises:
        subprocess.CalledProcessError: it does not compile; the compiler's messages go to stderr.
    """
    command = [str(compiler()), *FLAGS, f"-I{_torch_folder() / 'include'}"]
    mark = repr((SOURCE.read_bytes(), version("torch"), command)).encode()
    folder = Path(tempfile.gettempdir()) / f"rehearsal-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"device-{hashlib.sha256(mark).hexdigest()[:16]}.so"
    if not library.exists():
        own = library.with_suffix(f".{os.getpid()}")
        libraries = [f"-L{_torch_folder() / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run([*command, str(SOURCE), *libraries, "-o", str(own)], check=True)
        own.replace(library)  # two processes may build at the same time: the last one wins, both are whole
    return library


def _torch_folder() -> Path:
    """Where torch is installed; found without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent

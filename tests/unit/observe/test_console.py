"""Descriptor-level redirection, in real processes: what prints where, per rank, and after the reader has gone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.errors import ConfigError
from megatron_lite.observe.console import redirect_output
from tests.unit.remedies import obeys

SCRIPT = """
import os, subprocess, sys
from pathlib import Path
from megatron_lite.observe.console import redirect_output
console = redirect_output(Path(sys.argv[1]), int(sys.argv[2]))
print("python noise")
print("python error noise", file=sys.stderr)
os.write(1, b"library noise\\n")
subprocess.run(["echo", "child noise"])
console.print("for the user [not markup] " + "long " * 40)
console.error("what went wrong")
if "restore" in sys.argv:
    console.restore()
    print("after restore")
    os.write(2, b"error after restore\\n")
os._exit(0)  # no flush at exit, as when a rank is killed
"""


def run(run_dir: Path, rank: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(run_dir), str(rank), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


def log_of(run_dir: Path, rank: int) -> str:
    return (run_dir / "logs" / f"rank-{rank}.log").read_text()


def test_rank_0_speaks_and_logs_its_noise(tmp_path: Path) -> None:
    done = run(tmp_path, 0)
    assert done.stdout == "for the user [not markup] " + "long " * 40 + "\n"
    assert done.stderr == "what went wrong\n"
    log = log_of(tmp_path, 0)
    for line in ("python noise", "python error noise", "library noise", "child noise", "what went wrong"):
        assert f"{line}\n" in log
    assert "for the user" not in log


def test_other_ranks_only_speak_of_errors(tmp_path: Path) -> None:
    done = run(tmp_path, 3)
    assert done.stdout == ""
    assert done.stderr == "rank 3: what went wrong\n"
    assert "library noise" in log_of(tmp_path, 3)


def test_logs_are_appended(tmp_path: Path) -> None:
    run(tmp_path, 0)
    run(tmp_path, 0)
    assert log_of(tmp_path, 0).count("python noise\n") == 2


def test_restore(tmp_path: Path) -> None:
    done = run(tmp_path, 0, "restore")
    assert done.stdout.endswith("\nafter restore\n") or "after restore" in done.stdout
    assert done.stderr == "what went wrong\nerror after restore\n"
    assert "after restore" not in log_of(tmp_path, 0)


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path: Path) -> None:
    script = SCRIPT.replace("os._exit(0)", 'Path(sys.argv[1], "survived").touch()\nos._exit(0)').replace(
        'console.print("for', 'for _ in range(100): console.print("for'
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), "0"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "survived").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match=r"train\.run_dir=.* cannot be written"):
        redirect_output(tmp_path / "run", 0)


@obeys("megatron_lite/observe/console.py:redirect_output")
def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match=r"train\.run_dir=.*run cannot be written .*; choose a folder of your own"):
        redirect_output(tmp_path / "run", 0)
    redirect_output(tmp_path / "own", 0).restore()
    assert (tmp_path / "own" / "logs" / "rank-0.log").is_file()

"""A headless Chromium that opens a page from disk, without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # for root in a container, where Chromium's own sandbox cannot be
    "--disable-gpu",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--virtual-time-budget=20000",  # milliseconds of the page's own clock, which waits for nothing
)


@dataclass(frozen=True)
class Opened:
    """A page once its scripts have run."""

    dom: str
    console: list[str]
    """Everything that it or the browser wrote there: errors, failed requests, violations."""


def find_browser() -> str:
    """The test is skipped where there is none, and fails if CI is set."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        reason = "no Chromium here; on Debian: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def open_page(browser: str, page: Path) -> Opened:
    """What the browser makes of a page."""
    finished = run_browser(browser, page, "--dump-dom")
    return Opened(finished.stdout, [line for line in finished.stderr.splitlines() if ":CONSOLE" in line])


def photograph(browser: str, page: Path, picture: Path, *, width: int, height: int, dark: bool = False) -> None:
    """A PNG of the page's first `height` pixels."""
    scheme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    run_browser(browser, page, f"--window-size={width},{height}", f"--screenshot={picture}", *scheme)


def run_browser(browser: str, page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", *flags, page.absolute().as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

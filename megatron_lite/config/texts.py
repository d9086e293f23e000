"""What text settings may contain: file names, paths and labels have rules of their own.

A field of the schema names one: `text=texts.path`. None is never checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

LOST = re.compile("[\x00\x80-\x9f]")
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
LONGEST_NAME_BYTES = 255  # of a file name, on all common file systems
LONGEST_PATH_BYTES = 3072  # Linux's limit is 4096, and our files are some folders below
LONGEST_LABEL_BYTES = 160  # becomes part of a folder's name
LONGEST_TEXT_BYTES = 2**17  # longest argument on a Linux command line
DEVICES = ("auto", "cpu", "cuda")
NO_PROJECT = re.compile(r"[/\\#?%:]")  # not allowed in the name of a wandb project
LONGEST_PROJECT = 128

Check = Callable[[str], str | None]
"""Returns what is wrong with a text, to follow `key=value`; None = nothing."""


def free(text: str) -> str | None:
    """Any text, such as a prompt or a line of shell."""
    if LOST.search(text):
        return "holds a NUL or a C1 control character, which a shell or YAML loses; leave it out"
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return "holds bytes that are not UTF-8; write it in UTF-8"
    if size > LONGEST_TEXT_BYTES:
        return f"has {size} bytes; use at most {LONGEST_TEXT_BYTES}"
    return None


def filled(text: str) -> str | None:
    """Any text that is not empty."""
    return free(text) or (None if text else "is empty; give a text, or leave the setting out")


def line(text: str) -> str | None:
    """One line of text that is not blank, such as a name in another program."""
    if problem := free(text):
        return problem
    if not text.strip():
        return "is empty; give a name, or leave the setting out"
    return "holds a control character; use one line of text" if CONTROL.search(text) else None


def label(text: str) -> str | None:
    """Part of a folder's name."""
    if problem := line(text):
        return problem
    if "/" in text or text in (".", ".."):
        return "becomes part of a folder's name; use a name without `/`"
    size = len(text.encode())
    return f"has {size} bytes; use at most {LONGEST_LABEL_BYTES}" if size > LONGEST_LABEL_BYTES else None


def path(text: str) -> str | None:
    """Path of a file or a folder, which may not exist yet."""
    if problem := free(text):
        return problem
    if not text.strip():
        return "is an empty path, as an unset variable of a shell leaves it; give a path, or leave the setting out"
    if CONTROL.search(text):
        return "holds a control character; give a path without one"
    try:
        Path(text).expanduser()
    except RuntimeError:
        return "begins with the home of a user whom this machine does not know; write the path without ~"
    name = max(text.split("/"), key=lambda part: len(part.encode()))
    if len(name.encode()) > LONGEST_NAME_BYTES:
        return f"holds a name of {len(name.encode())} bytes; file systems take {LONGEST_NAME_BYTES}: use a shorter one"
    if len(text.encode()) > LONGEST_PATH_BYTES:
        return f"has {len(text.encode())} bytes; use a path of at most {LONGEST_PATH_BYTES}"
    return None


def project(text: str) -> str | None:
    """Name of a wandb project."""
    if problem := line(text):
        return problem
    if NO_PROJECT.search(text) or len(text) > LONGEST_PROJECT:
        return rf"is not the name of a wandb project; use at most {LONGEST_PROJECT} characters, and none of / \ # ? % :"
    return None


def host(text: str) -> str | None:
    """A host name or an IP address."""
    problem = line(text)
    return problem or ("is not an address; give a host name or an IP address" if re.search(r"\s", text) else None)


def device(text: str) -> str | None:
    """One of auto, cpu and cuda."""
    return None if text in DEVICES else "is not known; use auto, cpu or cuda"

"""What looks like a credential: never sent to a tracker, and never written into a run folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SECRET_KEY = re.compile(
    r"(api_?key|(access|secret|private)_key|password|passwd|secret|credential|(access|auth|hub|hf)_token)s?$",
    re.IGNORECASE,
)
"""Of names of settings and variables."""
_URL_LOGIN = re.compile(r"(\w+://)[^/@\s]+@")
_URL_SECRET = re.compile(r"\w+://?[^/@\s:]*:[^/@\s]+@|https?://?[^/@\s]+@", re.IGNORECASE)
"""A login with a password; on the web a name alone may be a token. Where a path was made of an address, one slash is
left."""
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(?=['\"]?([^\s,;'\"]))")
"""Of a variable in a line of a shell, or in an option such as --export=NAME=value."""
_COMPUTED = "$`"  # values that the shell looks up when it runs the line


def has_url_secret(text: str) -> bool:
    """Whether an address in the text has a password or a token in it."""
    return _URL_SECRET.search(text) is not None


def assigned_secrets(line: str) -> Iterator[str]:
    """Names of variables like credentials that a line gives a value which stands there in full."""
    for name, first in _ASSIGNMENT.findall(line):
        if SECRET_KEY.search(name) and first not in _COMPUTED:
            yield name


def without_secrets(value: Any) -> Any:
    """A copy with the values of keys named like credentials, and logins inside URLs, replaced by `***`."""
    if isinstance(value, Mapping):
        return {
            str(key): "***" if SECRET_KEY.search(str(key)) and item else without_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    if isinstance(value, Path):
        value = str(value)
    return _URL_LOGIN.sub(r"\1***@", value) if isinstance(value, str) else value

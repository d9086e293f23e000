"""Detect and redact credentials: they are never sent to a tracker or written into a run folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

_KEYS = "api|access|secret|private|encryption|signing|ssh|account|master|license|client|auth|storage|shared|deploy"
SECRET_KEY = re.compile(
    rf"api[_-]?key|({_KEYS})[_-]?keys?$|password|passwd|passphrase|secret|credential|"
    r"(access|auth|hub|hf)[_-]?tokens$|"
    r"(?<![a-z])(?<!eod_)(token|pass|pwd)$",
    re.IGNORECASE,
)
"""Names of settings and variables that hold credentials; data.eod_token is a text token."""
_VARIABLE = re.compile(
    r"(?<![a-z])(tokens?|pass|pwd|pw|keys?|auth|login|otp|bearer|cookie|jwt|pat|sas|dsn|webhook|netrc|"
    r"conn(ection)?_?str(ing)?)(?![a-z])(?!_id$)",
    re.IGNORECASE,
)
"""Further names, of variables only: settings such as data.text_key are not credentials."""
_URL_LOGIN = re.compile(r"(\w+://)[^/@\s]+@")
_PASSWORD = re.compile(r"\w+://[^/@\s:]*:([^/@\s]+)@")
_URL_SECRET = re.compile(r"\w+://?[^/@\s:]*:[^/@\s]+@|https?://?[^/@\s]+@", re.IGNORECASE)
"""A login with a password; in http(s) URLs a user name alone may be a token. A URL that was turned into a path has only
one slash left."""
_ISSUED = re.compile(
    r"(?<![\w-])(?:hf_|api_org_|sk-|[sr]k_live_|gh[opsur]_|github_pat_|glpat-|xox[abeprs]-|AKIA|ASIA|AIza|ya29\.|npm_|"
    r"pypi-|wandb_v\d_|nvapi-|gsk_|SG\.|dop_v1_)[\w.-]{8,}|(?<![\w.-])eyJ[\w-]+\.[\w-]+\.[\w-]*|"
    r"BEGIN[A-Z ]* PRIVATE KEY|hooks\.slack\.com/services/\w"
)
"""Prefixes of keys: Hugging Face, OpenAI, GitHub, GitLab, Slack, AWS, Google, ..."""
_DIGEST = re.compile(r"(?:[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{64})", re.IGNORECASE)
"""The format of keys of wandb and many other services."""
RANDOM_LENGTH = 20
SHORTEST = 8  # of an environment value that is redacted in texts: shorter values may be ordinary words
_LITERAL = r"['\"]?([^\s,;'\"$`|&<>][^\s'\"|&;]*)"
"""A literal value; one that starts with $ or ` is expanded by the shell when it runs the line."""
_ASSIGNMENT = re.compile(r"([A-Za-z_][\w-]*)=(?=['\"]?([^\s,;'\"]))")
"""Assignment of a variable in a shell line, or in an option such as --export=NAME=value."""
_OPTION = re.compile(rf"(?<!\S)--?([A-Za-z][\w-]*)\s+(?!-){_LITERAL}")
_HEADER = re.compile(r"\b((?:proxy-)?authorization|x-[\w-]*(?:key|token|auth)[\w-]*)\s*:\s*(?:\w+\s+)?[^\s$`'\"]", re.I)
_LOGIN = re.compile(r"(?<![-./\w])login\b([^|&;#]*)", re.IGNORECASE)
_LOGIN_WORD = re.compile(r"(?<=\s)(?!-)['\"]?([^\s'\"$`.:/=]+)['\"]?(?=\s|$)")
_SHORT_PASSWORD = re.compile(r"\bsshpass\s+-p|(?<!\S)(?:-u|--user)[ =]*['\"]?[^\s'\"$:=]+:[^\s'\"$]")
_NETRC = re.compile(rf"\b(?:password|passwd)\s+{_LITERAL}", re.IGNORECASE)
_PIPED = re.compile(r"\b(?:echo|printf)\s+['\"]?[^\s'\"$`-].*\|.*(?:stdin|login|netrc)", re.IGNORECASE)
_COMPUTED = "$`"  # first characters of values that the shell expands


def names_secret(variable: str) -> bool:
    """Whether a variable of an environment is named like a credential."""
    return bool(SECRET_KEY.search(variable) or _VARIABLE.search(variable))


def looks_secret(value: str) -> bool:
    """Whether a value looks like a credential, whatever its name."""
    return bool(
        has_url_secret(value)
        or _ISSUED.search(value)
        or _DIGEST.fullmatch(value.strip())
        or any(_looks_random(word) for word in re.split(r"[\s=:,;'\"]+", value))
    )


def _looks_random(word: str) -> bool:
    """Whether a word is long and mixes lower case, upper case and digits, without characters of a path or version."""
    counts = [sum(map(test, word)) for test in (str.islower, str.isupper, str.isdigit)]
    return len(word) >= RANDOM_LENGTH and min(counts) >= 2 and re.fullmatch(r"[A-Za-z0-9+_=-]+", word) is not None


def has_url_secret(text: str) -> bool:
    """Whether a URL in the text contains a password or a token."""
    return _URL_SECRET.search(text) is not None


def without_logins(text: str) -> str:
    """The text with the logins of its URLs replaced by `***`."""
    return _URL_LOGIN.sub(r"\1***@", text)


def redacted(text: str) -> str:
    """A text, such as an exception's message, without credentials that are recognizable by their format or are values
    of this process's environment."""
    text = _ISSUED.sub("***", without_logins(text))
    for value in _own_secrets():
        text = text.replace(value, "***")
    return text


@cache
def _own_secrets() -> tuple[str, ...]:
    """Values of variables that are named like credentials, and passwords in URLs of others; the longest first."""
    named = {value for name, value in os.environ.items() if names_secret(name)}
    logins = {login for value in os.environ.values() for login in _PASSWORD.findall(value)}
    found = (value for value in named | logins if len(value) >= SHORTEST and not os.path.exists(value))
    return tuple(sorted(found, key=len, reverse=True))


def assigned_secrets(line: str) -> Iterator[str]:
    """Names of credential variables to which a shell line assigns a literal value."""
    for name, first in _ASSIGNMENT.findall(line):
        if names_secret(name) and first not in _COMPUTED:
            yield name


def secrets_in_line(line: str) -> Iterator[str]:
    """Descriptions, without the values, of literal credentials in a shell line."""
    for name in assigned_secrets(line):
        yield f"gives a value to {name}, which is named like a credential"
    for name, _ in _OPTION.findall(line):
        if names_secret(name) and not name.endswith(("-stdin", "-file")):
            yield f"gives a value to the option {name}, which is named like a credential"
    for found in _LOGIN.finditer(line):
        if _LOGIN_WORD.search(found[1]) or re.search(r"\s-p\s*['\"]?[^\s'\"$`]", found[1]):
            yield "logs in with a credential"
    if _HEADER.search(line) or _SHORT_PASSWORD.search(line) or _NETRC.search(line) or _PIPED.search(line):
        yield "hands over a credential"
    words = re.split(r"[\s,;'\"]+|(?<=\w)=", line)
    if _ISSUED.search(line) or any(_looks_random(word) for word in words):
        yield "holds what looks like a credential"


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
    return without_logins(value) if isinstance(value, str) else value


TRACKED_GROUPS = ("script", "model", "parallel", "data", "objective", "optimizer", "train", "stability", "tracking")
TRACKED_OF_LAUNCHER = ("name", "num_processes", "threads_per_process", "device", "nodes", "gpus_per_node")


def tracked_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's configuration that trackers may show: what determines training, not how jobs are started.

    It is an allowlist: a new setting stays hidden until it is added here.
    """
    groups = {group: config[group] for group in TRACKED_GROUPS if group in config}
    launcher = config.get("launcher")
    if isinstance(launcher, Mapping):
        groups["launcher"] = {name: launcher[name] for name in TRACKED_OF_LAUNCHER if name in launcher}
    return dict(without_secrets(groups))

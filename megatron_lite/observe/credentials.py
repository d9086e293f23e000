"""What looks like a credential: never sent to a tracker, and never written into a run folder."""

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
"""Of names of settings and variables; data.eod_token is a token of text."""
_VARIABLE = re.compile(
    r"(?<![a-z])(tokens?|pass|pwd|pw|keys?|auth|login|otp|bearer|cookie|jwt|pat|sas|dsn|webhook|netrc|"
    r"conn(ection)?_?str(ing)?)(?![a-z])(?!_id$)",
    re.IGNORECASE,
)
"""Of names of variables alone: settings such as data.text_key are none."""
_URL_LOGIN = re.compile(r"(\w+://)[^/@\s]+@")
_PASSWORD = re.compile(r"\w+://[^/@\s:]*:([^/@\s]+)@")
_URL_SECRET = re.compile(r"\w+://?[^/@\s:]*:[^/@\s]+@|https?://?[^/@\s]+@", re.IGNORECASE)
"""A login with a password; on the web a name alone may be a token. Where a path was made of an address, one slash is
left."""
_ISSUED = re.compile(
    r"(?<![\w-])(?:hf_|api_org_|sk-|[sr]k_live_|gh[opsur]_|github_pat_|glpat-|xox[abeprs]-|AKIA|ASIA|AIza|ya29\.|npm_|"
    r"pypi-|wandb_v\d_|nvapi-|gsk_|SG\.|dop_v1_)[\w.-]{8,}|(?<![\w.-])eyJ[\w-]+\.[\w-]+\.[\w-]*|"
    r"BEGIN[A-Z ]* PRIVATE KEY|hooks\.slack\.com/services/\w"
)
"""Beginnings by which those who issue keys mark them: Hugging Face, OpenAI, GitHub, GitLab, Slack, AWS, Google, ..."""
_DIGEST = re.compile(r"(?:[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{64})", re.IGNORECASE)
"""The form of keys of wandb and of many services."""
RANDOM_LENGTH = 20
SHORTEST = 8  # of a value of the environment that is looked for in texts: shorter ones are words as well
_LITERAL = r"['\"]?([^\s,;'\"$`|&<>][^\s'\"|&;]*)"
"""A value that stands there in full; what begins with $ or ` the shell looks up when it runs the line."""
_ASSIGNMENT = re.compile(r"([A-Za-z_][\w-]*)=(?=['\"]?([^\s,;'\"]))")
"""Of a variable in a line of a shell, or in an option such as --export=NAME=value."""
_OPTION = re.compile(rf"(?<!\S)--?([A-Za-z][\w-]*)\s+(?!-){_LITERAL}")
_HEADER = re.compile(r"\b((?:proxy-)?authorization|x-[\w-]*(?:key|token|auth)[\w-]*)\s*:\s*(?:\w+\s+)?[^\s$`'\"]", re.I)
_LOGIN = re.compile(r"(?<![-./\w])login\b([^|&;#]*)", re.IGNORECASE)
_LOGIN_WORD = re.compile(r"(?<=\s)(?!-)['\"]?([^\s'\"$`.:/=]+)['\"]?(?=\s|$)")
_SHORT_PASSWORD = re.compile(r"\bsshpass\s+-p|(?<!\S)(?:-u|--user)[ =]*['\"]?[^\s'\"$:=]+:[^\s'\"$]")
_NETRC = re.compile(rf"\b(?:password|passwd)\s+{_LITERAL}", re.IGNORECASE)
_PIPED = re.compile(r"\b(?:echo|printf)\s+['\"]?[^\s'\"$`-].*\|.*(?:stdin|login|netrc)", re.IGNORECASE)
_COMPUTED = "$`"  # values that the shell looks up when it runs the line


def names_secret(variable: str) -> bool:
    """Whether a variable of an environment is named like a credential."""
    return bool(SECRET_KEY.search(variable) or _VARIABLE.search(variable))


def looks_secret(value: str) -> bool:
    """Whether a value looks like a credential, whatever it is called."""
    return bool(
        has_url_secret(value)
        or _ISSUED.search(value)
        or _DIGEST.fullmatch(value.strip())
        or any(_looks_random(word) for word in re.split(r"[\s=:,;'\"]+", value))
    )


def _looks_random(word: str) -> bool:
    """Long, and of small and large letters and digits, without the marks of a path or a version."""
    counts = [sum(map(test, word)) for test in (str.islower, str.isupper, str.isdigit)]
    return len(word) >= RANDOM_LENGTH and min(counts) >= 2 and re.fullmatch(r"[A-Za-z0-9+_=-]+", word) is not None


def has_url_secret(text: str) -> bool:
    """Whether an address in the text has a password or a token in it."""
    return _URL_SECRET.search(text) is not None


def without_logins(text: str) -> str:
    """The text with the logins of its addresses replaced by `***`."""
    return _URL_LOGIN.sub(r"\1***@", text)


def redacted(text: str) -> str:
    """A text of anybody's, such as the message of an exception, without the credentials that are known by their form or
    as values of this process's environment."""
    text = _ISSUED.sub("***", without_logins(text))
    for value in _own_secrets():
        text = text.replace(value, "***")
    return text


@cache
def _own_secrets() -> tuple[str, ...]:
    """Values of variables that are named like credentials, and passwords of addresses in others; the longest first."""
    named = {value for name, value in os.environ.items() if names_secret(name)}
    logins = {login for value in os.environ.values() for login in _PASSWORD.findall(value)}
    found = (value for value in named | logins if len(value) >= SHORTEST and not os.path.exists(value))
    return tuple(sorted(found, key=len, reverse=True))


def assigned_secrets(line: str) -> Iterator[str]:
    """Names of variables like credentials that a line gives a value which stands there in full."""
    for name, first in _ASSIGNMENT.findall(line):
        if names_secret(name) and first not in _COMPUTED:
            yield name


def secrets_in_line(line: str) -> Iterator[str]:
    """What of a shell line holds a credential that stands there in full, in words without its value."""
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
    """Of a run's configuration what trackers may show: what decides the training, and nothing of how jobs are started.

    A list of what may be seen, not of what may not: a setting that is new stays unseen until it is named here.
    """
    groups = {group: config[group] for group in TRACKED_GROUPS if group in config}
    launcher = config.get("launcher")
    if isinstance(launcher, Mapping):
        groups["launcher"] = {name: launcher[name] for name in TRACKED_OF_LAUNCHER if name in launcher}
    return dict(without_secrets(groups))

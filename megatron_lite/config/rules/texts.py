"""What text settings may contain: file names, paths and labels have rules of their own.

`tests/unit/config/test_ranges.py` checks that each text setting has an entry. None is never checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_lite.config.keys import get_value, shown
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import ConfigError

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
    """Any text but an empty one."""
    return free(text) or (None if text else "is empty; give a text, or leave the setting out")


def line(text: str) -> str | None:
    """Something on one line that is more than blanks: a name of other programs."""
    if problem := free(text):
        return problem
    if not text.strip():
        return "is empty; give a name, or leave the setting out"
    return "holds a control character; use one line of text" if CONTROL.search(text) else None


def label(text: str) -> str | None:
    """What becomes a part of the name of a folder."""
    if problem := line(text):
        return problem
    if "/" in text or text in (".", ".."):
        return "becomes a part of a folder's name; use a name without `/`"
    size = len(text.encode())
    return f"has {size} bytes; use at most {LONGEST_LABEL_BYTES}" if size > LONGEST_LABEL_BYTES else None


def path(text: str) -> str | None:
    """A file or a folder, there or to be made."""
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
    """The name of a project of wandb."""
    if problem := line(text):
        return problem
    if NO_PROJECT.search(text) or len(text) > LONGEST_PROJECT:
        return rf"is not a project of wandb; use at most {LONGEST_PROJECT} characters, and none of / \ # ? % :"
    return None


def host(text: str) -> str | None:
    """A host name or an IP address."""
    problem = line(text)
    return problem or ("is not an address; give a host name or an IP address" if re.search(r"\s", text) else None)


def device(text: str) -> str | None:
    """One of auto, cpu and cuda."""
    return None if text in DEVICES else "is not known; use auto, cpu or cuda"


TEXTS: dict[str, Check] = {
    "script": label,
    "model.name": label,
    "model.init_from": path,
    "model.family": line,  # checked by `family_computes_the_model`
    "data.source": path,
    "data.text_key": filled,
    "data.document_separator": filled,
    "data.dataset_split": line,
    "data.dataset_config": line,
    "data.tokenizer": path,
    "data.eod_token": line,
    "data.validation_source": path,
    "data.cache_dir": path,
    "train.generate_prompt": free,  # an empty one is checked by `prompt_is_given`
    "train.run_dir": path,
    "tracking.wandb_project": project,
    "tracking.wandb_name": line,
    "launcher.master_address": host,
    "launcher.device": device,
    "launcher.rendezvous_id": line,
    "launcher.hostfile": path,
    "launcher.time": free,  # checked by `time_is_slurms`
    "launcher.partition": free,  # checked by `batch_options_are_lines`, as the next three
    "launcher.account": free,
    "launcher.qos": free,
    "launcher.job_name": free,
    "launcher.modules": line,
    "launcher.setup": free,
    "launcher.environment": free,
    "launcher.pass_environment": free,  # checked by `passed_variables_have_names`
    "launcher.container": path,
    "launcher.container_mounts": free,  # checked by `mounts_are_pairs`
    "launcher.sbatch_options": free,  # checked by `batch_options_are_lines`
    "launcher.srun_arguments": free,
}


def out_of_form(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(key, message) of each invalid text; in a list or a map, of each invalid entry."""
    for key, check in TEXTS.items():
        for name, text in _entries(key, get_value(config, key)):
            if not isinstance(text, str):
                yield key, f"{name}={shown(str(text))} is not a text; quote it: {name}='{shown(str(text))}'"
            elif problem := check(text):
                yield key, f"{name}={shown(text) or repr(text)} {problem}"


def require_form(config: RunConfig, key: str) -> None:
    """Check a single text, for files that are read before the whole configuration can be checked.

    Raises:
        ConfigError: with the messages of `out_of_form`.
    """
    problems = [message for found, message in out_of_form(config) if found == key]
    if problems:
        raise ConfigError(problems)


def _entries(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list):
        yield from ((f"{key}[{i}]", entry) for i, entry in enumerate(value))
    elif isinstance(value, dict):
        yield from ((f"{key}.{name}", entry) for name, entry in value.items())
    elif value is not None:
        yield key, value

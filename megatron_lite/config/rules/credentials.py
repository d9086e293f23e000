"""Keeps credentials out of the configuration: it is written to the run folder, printed by --dry-run and sent to wandb.

Jobs get credentials by reference: launcher.pass_environment names variables of the launching shell. Messages name the
setting, never its value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_lite.config.keys import get_value, leaf_keys
from megatron_lite.config.rules.case import Case
from megatron_lite.observe.credentials import has_url_secret, looks_secret, names_secret, secrets_in_line

ENVIRONMENT = "launcher.environment"
LINES = ("launcher.setup", "launcher.sbatch_options", "launcher.srun_arguments")
KEPT = "and the configuration is kept in the run folder"
EXPORT = (
    "leave it out, export the variable in the shell that launches and name it in launcher.pass_environment, from which "
    "all ranks and the lines of launcher.setup get it (for wandb, `wandb login` in your shell keeps the key)"
)


def credentials_stay_outside(case: Case) -> Iterator[str]:
    for name, value in case.config.launcher.environment.items():
        if value and names_secret(name):
            yield f"{ENVIRONMENT}.{name} is named like a credential, {KEPT}; {EXPORT}"
        elif looks_secret(value) and not has_url_secret(value):
            yield f"{ENVIRONMENT}.{name} holds what looks like a credential, {KEPT}; {EXPORT}"
    for key in LINES:
        for line in get_value(case.config, key):
            for what in dict.fromkeys(secrets_in_line(line)):
                yield f"{key} {what}, {KEPT}; {EXPORT}"
    for key in leaf_keys():
        yield from address_without_login(key, get_value(case.config, key))


def address_without_login(key: str, value: Any) -> Iterator[str]:
    """Check one setting, including all entries of lists and maps."""
    if isinstance(value, str) and has_url_secret(value):
        yield (
            f"{key} holds an address with a login, {KEPT}; leave the login out and give it to what opens the address "
            "in another way, such as ~/.netrc or an exported variable"
        )
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield from address_without_login(f"{key}.{name}", entry)
    elif isinstance(value, list):
        for i, entry in enumerate(value):
            yield from address_without_login(f"{key}[{i}]", entry)

"""The frozen configuration: a YAML file in the run folder, named by the hash of its content, that every rank loads."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

from megatron_lite.config.changes import DATA_KEYS, Change, grade_changes, refusals
from megatron_lite.config.hf.folder import STATE_FILE
from megatron_lite.config.keys import shown
from megatron_lite.config.schema import RunConfig
from megatron_lite.config.texts import path as path_problem
from megatron_lite.errors import ConfigError, DamagedFileError, library_edge
from megatron_lite.files import modified_ns
from megatron_lite.state_files import read_bytes, read_object


@dataclass(frozen=True)
class KeptConfig:
    """The part of a checkpoint's state that holds the configuration."""

    config: dict[str, Any]


class DamagedConfigError(ConfigError):
    """A frozen configuration was changed or damaged, and no checkpoint can restore it."""


INTERPOLATION = re.compile(r"(\\*)\$\{")  # with the backslashes that would escape it
FROZEN_NAME = re.compile(r"config-[0-9a-f]{12}\.yaml")
GIVE_FROZEN = "give a config-*.yaml of a run folder"
LATER_GROUPS = ("objective",)  # runs frozen before this group existed used its current defaults


def render(config: RunConfig) -> str:
    """The configuration as YAML: the same text for the same settings, independent of presets and overrides."""
    return OmegaConf.to_yaml(as_node(config))


def as_node(config: RunConfig) -> DictConfig:
    """The configuration for OmegaConf, with every text escaped: `${HOME}` in a shell line is not an interpolation."""
    return OmegaConf.structured(_escaped(config))


def _escaped(value: Any) -> Any:
    if isinstance(value, str) and not isinstance(value, Enum):
        return INTERPOLATION.sub(lambda found: 2 * found[1] + r"\${", value)
    if isinstance(value, list):
        return [_escaped(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _escaped(entry) for name, entry in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _escaped(getattr(value, field.name)) for field in fields(value)})
    return value


def frozen_path(config: RunConfig, run_dir: Path) -> Path:
    """Where `freeze` writes this configuration: `<run_dir>/config-<first 12 hex digits of its SHA-256>.yaml`."""
    return run_dir / _name_of(render(config).encode())


def _name_of(content: bytes) -> str:
    return f"config-{hashlib.sha256(content).hexdigest()[:12]}.yaml"


def freeze(config: RunConfig, run_dir: Path) -> Path:
    """Write the configuration into the run folder, atomically, and return the file's path.

    An existing file is written again: its modification time shows which configuration the folder last ran with.

    Raises:
        ConfigError: the folder cannot be created or written.
    """
    path = frozen_path(config, run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _replace(path, render(config).encode())
    except OSError as error:
        raise unwritable(run_dir, error) from error
    return path


def _replace(path: Path, content: bytes) -> None:
    """Atomic, since several nodes and ranks may do so at the same time. The file's mode follows the umask."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_frozen(path: Path | str) -> RunConfig:
    """Load a frozen configuration. Unknown keys, wrong types and missing groups are errors: nothing is guessed.

    A single setting may be missing, and so may a group of LATER_GROUPS: the version that wrote the file did not have
    it, and behaved as its current default. A damaged file is restored from the copy in a checkpoint of its run.

    Raises:
        ConfigError: there is no such file, this version cannot read it, or it is damaged and no checkpoint has a copy.
    """
    path = Path(path)
    try:
        content = read_bytes(path)
    except (DamagedFileError, ValueError) as error:
        raise ConfigError(f"--config {error}; {GIVE_FROZEN}") from error
    if content is None:
        raise ConfigError(f"--config {path}: No such file or directory; {GIVE_FROZEN}")
    if FROZEN_NAME.fullmatch(path.name) and path.name != _name_of(content):
        content = _restored(path, content)
    with library_edge(ConfigError, f"--config {path} is not a frozen configuration", GIVE_FROZEN):
        _refuse_aliases(content)
        return _typed(OmegaConf.load(io.BytesIO(content)))


def _refuse_aliases(content: bytes) -> None:
    """Frozen files contain no YAML aliases, and a few lines of them can expand beyond the memory."""
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(content, Loader=yaml.SafeLoader)):
        raise ValueError("it holds aliases (*NAME), which a frozen configuration has not")


def _restored(path: Path, damaged: bytes) -> bytes:
    """Restore a damaged file from the newest checkpoint whose configuration has the hash in the file's name.

    Checkpoints omit the variables of launcher.environment, so these are read from the rest of the damaged file. The
    hash in the name verifies the result, which is also written back.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    for config, variables in product(_kept_configs(path.parent), ({}, _environment_in(damaged))):
        content = render(replace(config, launcher=replace(config.launcher, environment=variables))).encode()
        if _name_of(content) != path.name:
            continue
        print(
            f"warning: {path} is damaged: its content is not what the hash in its name tells; it is restored from the "
            "copy in a checkpoint",
            file=sys.stderr,
            flush=True,
        )
        with contextlib.suppress(OSError):  # the folder may be read-only
            times = path.stat()
            _replace(path, content)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # the time shows what the folder last ran with
        return content
    raise DamagedConfigError(
        f"{path} is damaged: its content is not what the hash in its name tells, and no checkpoint of its run has a "
        "copy of it; repeat the settings of the run instead of --config (the same overrides write the file again), "
        "bring the file back from a backup, or, if it was edited by hand, give it another name"
    )


def _kept_configs(run_dir: Path) -> Iterator[RunConfig]:
    """The configurations with which a run's checkpoints were saved, newest first."""
    for state in sorted((run_dir / "checkpoints").glob(f"step_*/{STATE_FILE}"), reverse=True):
        with contextlib.suppress(DamagedFileError, ConfigError):
            kept = read_object(state, KeptConfig)
            if kept is not None:
                yield from_containers(kept.config)


def _environment_in(damaged: bytes) -> dict[str, str]:
    """launcher.environment from a file whose other parts are damaged."""
    found = re.search(rb"^  environment:\n((?:    .*\n|\n)+)", damaged, re.MULTILINE)
    try:
        with library_edge(ConfigError, "launcher.environment"):
            variables = OmegaConf.to_container(OmegaConf.create(found[1].decode()), resolve=True) if found else {}
    except ConfigError:
        return {}
    return {str(key): str(value) for key, value in variables.items()} if isinstance(variables, dict) else {}


def as_containers(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain dictionaries and lists, for JSON; `from_containers` reads them."""
    return OmegaConf.to_container(as_node(config), enum_to_str=True)  # type: ignore[return-value]


def from_containers(content: dict[str, Any]) -> RunConfig:
    """Read the result of `as_containers` of this version or an earlier one; as strict as `load_frozen`.

    Raises:
        ConfigError: this version does not know one of its settings.
    """
    with library_edge(ConfigError, "this version cannot read the configuration"):
        return _typed(OmegaConf.create(content))


def _typed(loaded: DictConfig | ListConfig) -> RunConfig:
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), loaded))
    missing = [field.name for field in fields(RunConfig) if field.name not in (*loaded, *LATER_GROUPS)]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    assert isinstance(config, RunConfig)
    return config


def check_run_folder(config: RunConfig, run_dir: Path) -> list[Change]:
    """Refuse a folder that is not writable, or whose run cannot continue with this configuration.

    A folder whose run never reached its first step may be used freely. The data's content is unknown here: `DATA_KEYS`
    are checked once the data is prepared.

    Args:
        config: resolved, as it will be frozen.
    Returns:
        differences from the folder's last configuration.
    Raises:
        ConfigError: every change that a run does not allow, or train.run_dir if the folder itself is the problem.
    """
    try:
        _check_writable(run_dir)
        earlier = _last_trained(run_dir)
    except OSError as error:  # a parent folder without permission, a lost disk
        raise unwritable(run_dir, error) from error
    if earlier is None:
        return []
    try:
        previous = load_frozen(earlier)
    except DamagedConfigError as error:
        kept = next(_kept_configs(run_dir), None)
        if earlier != frozen_path(config, run_dir) and kept is None:
            raise ConfigError(f"train.run_dir={run_dir}: {error}") from error
        previous = kept or config  # the file is about to be written again
    except ConfigError as error:
        raise ConfigError(
            f"train.run_dir={run_dir} holds a run whose {earlier.name} this version cannot read ({error}); "
            "give another train.run_dir, or continue with the version that started it"
        ) from error
    newest = max((run_dir / "checkpoints").glob("step_*"), default=None)
    changes = grade_changes(previous, config, newest, undecided=DATA_KEYS)
    refused = refusals(changes, f"the run in train.run_dir={run_dir} ({earlier.name})")
    if refused:
        raise ConfigError(refused)
    return changes


def has_trained(run_dir: Path) -> bool:
    """Whether a folder has results of training: its run reached the first step."""
    metrics, checkpoints = run_dir / "metrics.jsonl", run_dir / "checkpoints"
    has_metrics = metrics.is_file() and metrics.stat().st_size > 0
    return has_metrics or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def _last_trained(run_dir: Path) -> Path | None:
    """The newest frozen configuration of a folder with results of training."""
    frozen = list(run_dir.glob("config-*.yaml"))
    if not frozen or not has_trained(run_dir):
        return None
    return max(frozen, key=modified_ns)


def _check_writable(run_dir: Path) -> None:
    """Check that the folder, or its nearest existing parent, is writable; creates nothing."""
    if problem := path_problem(str(run_dir)):  # a sweep has appended its values to the name that was checked
        raise ConfigError(f"train.run_dir={shown(str(run_dir))} {problem}")
    nearest = run_dir.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ConfigError(
            f"train.run_dir={run_dir} cannot be a folder: {nearest} is a file; give another train.run_dir"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise unwritable(run_dir, PermissionError(13, "Permission denied", str(nearest)))


def unwritable(run_dir: Path, error: OSError) -> ConfigError:
    """The error for a run folder that cannot be written."""
    where = error.filename or run_dir
    return ConfigError(
        f"train.run_dir={run_dir} cannot be written ({where}: {error.strerror}); give a folder that you may write to"
    )

"""The frozen configuration: one YAML file in the run folder, named by its content, that every rank loads."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_lite.config.changes import Change, grade_changes, refusals
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import ConfigError, DamagedFileError
from megatron_lite.files import modified_ns
from megatron_lite.state_files import read_bytes

INTERPOLATION = re.compile(r"(\\*)\$\{")  # with the backslashes that would escape it
LATER_GROUPS = ("objective",)  # runs frozen before there was this group ran with what are now its defaults


def render(config: RunConfig) -> str:
    """The configuration as YAML: the same text for the same settings, whatever presets and words led to them."""
    return OmegaConf.to_yaml(as_node(config))


def as_node(config: RunConfig) -> DictConfig:
    """The configuration as OmegaConf holds it, each text as it is: `${HOME}` of a shell line refers to nothing."""
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
    """Where `freeze` puts this configuration: `<run_dir>/config-<first 12 hex digits of its SHA-256>.yaml`."""
    digest = hashlib.sha256(render(config).encode()).hexdigest()
    return run_dir / f"config-{digest[:12]}.yaml"


def freeze(config: RunConfig, run_dir: Path) -> Path:
    """Write the configuration into the run folder, whole or not at all, and return the file's path.

    An equal file is written again: its date tells which configuration the folder last ran with.

    Raises:
        ConfigError: when the folder cannot be made or written.
    """
    path = frozen_path(config, run_dir)
    temporary = None
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=run_dir, prefix=".config-", delete=False) as file:
            temporary = Path(file.name)
            file.write(render(config))
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise unwritable(run_dir, error) from error
    return path


def load_frozen(path: Path | str) -> RunConfig:
    """The configuration of a frozen file. Unknown keys, wrong types and missing groups are errors: nothing is guessed.

    A single setting may be missing, and so may a group of LATER_GROUPS: a version that did not have it yet ran with
    what is now its default.
    """
    path = Path(path)
    remedy = "give a config-*.yaml of a run folder"
    try:
        content = read_bytes(path)
    except DamagedFileError as error:
        raise ConfigError(f"--config {error}; {remedy}") from error
    if content is None:
        raise ConfigError(f"--config {path}: No such file or directory; {remedy}")
    try:
        return _typed(OmegaConf.load(io.StringIO(content.decode())))
    except (OmegaConfBaseException, YAMLError, ValueError, RecursionError, TypeError, AttributeError) as error:
        first_line = str(error).partition("\n")[0]
        raise ConfigError(f"--config {path} is no frozen configuration: {first_line}; {remedy}") from error


def as_containers(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain dictionaries and lists, for JSON; `from_containers` reads it."""
    return OmegaConf.to_container(as_node(config), enum_to_str=True)  # type: ignore[return-value]


def from_containers(content: dict[str, Any]) -> RunConfig:
    """What `as_containers` gave, in this version or an earlier one; as strict as `load_frozen`.

    Raises:
        ConfigError: this version does not know one of its settings.
    """
    try:
        return _typed(OmegaConf.create(content))
    except (OmegaConfBaseException, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        raise ConfigError(f"this version cannot read the configuration ({first_line})") from error


def _typed(loaded: DictConfig | ListConfig) -> RunConfig:
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), loaded))
    missing = [field.name for field in fields(RunConfig) if field.name not in (*loaded, *LATER_GROUPS)]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    assert isinstance(config, RunConfig)
    return config


def check_run_folder(config: RunConfig, run_dir: Path) -> list[Change]:
    """Refuse a folder that cannot be written, or whose run cannot go on with this configuration.

    A folder whose run never got to its first step is free.

    Args:
        config: resolved, as it is frozen.
    Returns:
        what differs from the configuration that the folder's run last had.
    Raises:
        ConfigError: every change that a run cannot make, or train.run_dir where the folder itself is the matter.
    """
    _check_writable(run_dir)
    earlier = _last_trained(run_dir)
    if earlier is None:
        return []
    try:
        previous = load_frozen(earlier)
    except ConfigError as error:
        raise ConfigError(
            f"train.run_dir={run_dir} holds a run whose {earlier.name} this version cannot read ({error}); "
            "give another train.run_dir, or go on with the version that began it"
        ) from error
    newest = max((run_dir / "checkpoints").glob("step_*"), default=None)
    changes = grade_changes(previous, config, newest)
    refused = refusals(changes, f"the run in train.run_dir={run_dir} ({earlier.name})")
    if refused:
        raise ConfigError(refused)
    return changes


def _last_trained(run_dir: Path) -> Path | None:
    """The newest frozen configuration of a folder that holds the results of training."""
    metrics, checkpoints = run_dir / "metrics.jsonl", run_dir / "checkpoints"
    has_metrics = metrics.is_file() and metrics.stat().st_size > 0
    has_checkpoints = checkpoints.is_dir() and any(checkpoints.iterdir())
    frozen = list(run_dir.glob("config-*.yaml"))
    if not frozen or not (has_metrics or has_checkpoints):
        return None
    return max(frozen, key=modified_ns)


def _check_writable(run_dir: Path) -> None:
    """The folder, or the nearest one above it that exists, must let us write; nothing is made yet."""
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
    """The error of a run folder that the system does not let us write."""
    where = error.filename or run_dir
    return ConfigError(
        f"train.run_dir={run_dir} cannot be written ({where}: {error.strerror}); give a folder that you may write to"
    )

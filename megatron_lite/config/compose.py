"""Composes a typed configuration from `group=preset` and `key=value`, or raises one error with all wrong overrides.

Hydra composes (`initialize_config_dir` and `compose`, never `@hydra.main`, which would give every rank its own working
folder). It stops at the first wrong override, so all are checked here first.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import (
    ConfigKeyError,
    GrammarParseError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)
from yaml import YAMLError

from megatron_lite.config.frozen import as_node
from megatron_lite.config.hf.start import with_weights
from megatron_lite.config.keys import (
    choices_text,
    expects,
    get_value,
    has_container,
    is_map,
    leaf_keys,
    schema_keys,
    shown,
    unknown_key,
)
from megatron_lite.config.overrides import check_form, key_of, parse, read
from megatron_lite.config.preset_folders import SHIPPED, PresetFolders, find_folders
from megatron_lite.config.presets import check_preset
from megatron_lite.config.rules.values import require_form
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import ConfigError, library_edge

SCHEMA = "megatron_lite_schema"  # first entry of the primary configurations' defaults
EXPERIMENT = "experiment"  # the only group that may stay empty
Setting = tuple[str, Any]  # a dotted key, and its value for OmegaConf
LAYOUT_NAME = re.compile(r"(?:dp(\d+)_?)?(?:tp(\d+)_?)?(?:pp(\d+))?")


def compose(script: str, overrides: list[str], folders: PresetFolders | None = None) -> RunConfig:
    """The configuration of one run: the script's primary configuration, then presets, then overrides.

    Args:
        script: name of an entry script, without `.py`.
        overrides: such as `model=gpt2_124m` (a preset) or `train.steps=1000` (a value). Settings of the weights in
            model.init_from take precedence over presets, but not over values.
        folders: where presets are; None = ours, and `./conf`.
    Returns:
        a typed configuration, complete but not yet validated; fields that are None are derived later.
    Raises:
        ConfigError: lists every unknown key, unknown preset and unreadable value among the overrides.
    """
    choice = choose(script, overrides, folders or find_folders())
    return with_weights(typed(choice), choice.explicit)


@dataclass(frozen=True)
class Choice:
    """The overrides of a command line, parsed and checked."""

    script: str
    folders: PresetFolders
    presets: tuple[str, ...]
    """In Hydra's syntax: `model=gpt2_124m`."""
    settings: tuple[Setting, ...]

    @property
    def explicit(self) -> set[str]:
        """Dotted keys of the single values."""
        return {key for key, _ in self.settings}


def choose(script: str, overrides: list[str], folders: PresetFolders) -> Choice:
    """Parse and check overrides.

    Raises:
        ConfigError: as `compose`.
    """
    scripts = folders.scripts()
    if script not in scripts:
        raise ConfigError(f"{shown(script)!r} is not a script; {choices_text(script, scripts)}")
    groups = folders.groups()
    presets: list[str] = []
    settings: list[Setting] = []
    problems: list[str] = []
    for override in (part for text in overrides for part in _spell_out_layout(text, groups)):
        try:
            if key_of(override) in groups:
                presets += _check_preset(override, groups, folders)
            else:
                settings += _check_setting(override, groups)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return Choice(script, folders, tuple(presets), tuple(settings))


def typed(choice: Choice) -> RunConfig:
    """The configuration from presets and values; without the settings of weights.

    Raises:
        ConfigError: a YAML file or an interpolation is wrong.
    """
    with _conf_edge(choice.script, choice.folders):
        composed = _composed(choice.script, choice.presets, choice.folders)
        config = _to_typed(copy.deepcopy(composed), choice.settings)
    require_form(config, "model.init_from")
    return config


def merged_presets(choice: Choice) -> list[tuple[str, str]]:
    """(name, package) of every file that Hydra merges, a later one over an earlier one: (`model/gpt_tiny`, `model`)."""
    with _conf_edge(choice.script, choice.folders), _hydra(choice.folders):
        loader = GlobalHydra.instance().config_loader()
        found = loader.compute_defaults_list(choice.script, list(choice.presets), RunMode.RUN)
        names = [(one.config_path or "", one.package or "") for one in found.defaults]
    return [(name, package) for name, package in names if choice.folders.file(name) is not None]


def change(config: RunConfig, overrides: list[str]) -> RunConfig:
    """Change single values of a complete configuration, such as `train.steps=1000`.

    Raises:
        ConfigError: lists every unknown key, unreadable value and preset among the overrides.
    """
    groups = PresetFolders().groups()
    settings: list[Setting] = []
    problems: list[str] = []
    for override in overrides:
        try:
            if key_of(override) in groups:
                raise ConfigError(
                    f"{shown(override)} names a preset, which would replace a whole group; set single values"
                )
            settings += _check_setting(override, groups)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    with _conf_edge():
        changed = _to_typed(as_node(config), settings)
    explicit = {key for key, _ in settings}
    require_form(changed, "model.init_from")
    return with_weights(changed, explicit) if "model.init_from" in explicit else changed


def override_key(word: str) -> str:
    """The dotted key or group that an override sets; the whole word if it sets none."""
    return word.lstrip("+").partition("=")[0]


def _spell_out_layout(override: str, groups: dict[str, list[str]]) -> Iterator[str]:
    """`parallel=dp3_tp1_pp2` without a file of that name stands for these three sizes; an omitted one is 1."""
    key, _, name = override.lstrip("+").partition("=")
    match = LAYOUT_NAME.fullmatch(name)
    if key != "parallel" or match is None or not name or name in groups[key]:
        yield override
        return
    yield "parallel=single"
    for axis, size in zip(("data", "tensor", "pipeline"), match.groups(), strict=True):
        yield f"parallel.{axis}_parallel_size={size or 1}"


def _check_preset(override: str, groups: dict[str, list[str]], folders: PresetFolders) -> list[str]:
    """Check an override that selects a preset, and return it for Hydra; empty for `experiment=null`."""
    group, options = key_of(override), groups[key_of(override)]
    parsed = parse(override)
    if parsed.is_sweep_override():
        raise ConfigError(f"{shown(override)} names several values for one run; start one run for each value")
    value = parsed.value()
    if value is None and group == EXPERIMENT:
        return []
    if isinstance(value, dict):
        raise ConfigError(f"{group}={{...}} names no preset; set single values as {group}.KEY=VALUE")
    names = value if isinstance(value, list) else [value]
    for name in names or [None]:
        if name not in options:
            wrong = "" if name is None else str(name)
            raise ConfigError(f"{shown(override)} is not a preset; {choices_text(wrong, options)}")
        file = folders.file(f"{group}/{name}")
        assert file is not None, f"{group}/{name} is listed, but has no file"
        check_preset(file, group)
    return [override.lstrip("+")]


def _check_setting(word: str, groups: dict[str, list[str]]) -> list[Setting]:
    """The settings of an override.

    Raises:
        ConfigError: its key or value is wrong.
    """
    check_form(word)
    key = key_of(word)
    if key.startswith("hydra"):
        raise ConfigError(f"{key} is not a setting; Hydra only composes here. The run folder is train.run_dir")
    if key not in schema_keys() and not is_map(key.rpartition(".")[0]):
        raise unknown_key(key, also=groups)
    return read(word)


@cache
def _register() -> None:
    Plugins.instance().register(OwnPresets)
    ConfigStore.instance().store(name=SCHEMA, node=RunConfig)


_OWN_FOLDER: ContextVar[Path | None] = ContextVar("own_folder", default=None)


class OwnPresets(SearchPathPlugin):
    """Makes Hydra search the user's folder first. `hydra.searchpath` would put it after ours."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        own = _OWN_FOLDER.get()
        if own is not None:
            search_path.prepend("presets of the user", f"file://{own}", anchor="main")


@contextmanager
def _hydra(folders: PresetFolders) -> Iterator[None]:
    """Hydra, ready to compose."""
    _register()
    token = _OWN_FOLDER.set(folders.own)
    try:
        with initialize_config_dir(str(SHIPPED), version_base="1.3"):
            yield
    finally:
        _OWN_FOLDER.reset(token)


@lru_cache(maxsize=32)
def _composed(script: str, presets: tuple[str, ...], folders: PresetFolders) -> DictConfig:
    """Hydra's result for the presets, cached: it is slow, and the runs of a sweep mostly share it. Never modify it."""
    with _hydra(folders):
        return hydra_compose(script, overrides=list(presets))


@contextmanager
def _conf_edge(script: str = "", folders: PresetFolders | None = None) -> Iterator[None]:
    """Convert exceptions of Hydra, OmegaConf or YAML to ConfigError, with better messages for known cases."""
    folders = folders or PresetFolders()
    where = folders.where(script) if script else "the configuration"
    with library_edge(ConfigError, f"{where} and its presets cannot be composed", "correct these files"):
        try:
            yield
        except ConfigCompositionException as error:
            raise _composition_error(error, folders) from error
        except HydraException as error:
            raise ConfigError(f"{where}: {_one_line(error)}; correct the file") from error
        except OmegaConfBaseException as error:
            raise _interpolation_error(error, script or where) from error
        except YAMLError as error:
            raise ConfigError(f"{where}, or one of its presets, is not YAML: {_one_line(error)}; correct it") from error


def _interpolation_error(error: OmegaConfBaseException, script: str) -> ConfigError:
    text = f"{error.full_key or script}: {shown(_one_line(error))}"  # it may contain a whole group
    if isinstance(error, InterpolationResolutionError | GrammarParseError):
        text += "; ${...} names another setting, such as ${model.name}; for the characters themselves write \\${...}"
    return ConfigError(text)


def _to_typed(composed: DictConfig, settings: Iterable[Setting]) -> RunConfig:
    with open_dict(composed):
        for key, value in settings:
            OmegaConf.update(composed, key, value, merge=True)
    config = OmegaConf.to_object(composed)
    assert isinstance(config, RunConfig)
    wrong = [
        f"{key}={shown(str(get_value(config, key)))} is not possible: {key} must be {expects(key)}"
        for key in leaf_keys()
        if not has_container(key, get_value(config, key))
    ]
    if wrong:  # OmegaConf converts the type of `${...}` values, except in lists and maps
        raise ConfigError(wrong)
    return config


def _composition_error(error: ConfigCompositionException, folders: PresetFolders) -> ConfigError:
    """Hydra gives the file and the key only in its text: keep the file, add a suggestion."""
    text = str(error)
    file = re.search(r"In '([^']+)'", text)
    key = re.search(r"full_key: (\S+)", text)
    where = f"{folders.where(file.group(1))}: " if file else ""
    if key and ("not in '" in text or isinstance(error.__cause__, ConfigKeyError)):
        return ConfigError(where + str(unknown_key(key.group(1))))
    if key and key.group(1) in schema_keys():
        return ConfigError(f"{where}{key.group(1)} must be {expects(key.group(1))}: {_one_line(error)}")
    return ConfigError(where + _one_line(error))


def _one_line(error: Exception) -> str:
    """The useful lines of a library's message."""
    lines = [line.strip() for line in str(error).splitlines()]
    noise = ("full_key:", "reference_type=", "object_type=", "See https", "Config search path", "provider=", "In '")
    return "; ".join(line for line in lines if line and not line.startswith(noise)) or type(error).__name__

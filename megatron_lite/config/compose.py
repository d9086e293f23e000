"""From preset names and `key=value` words to a typed configuration, or to one error that lists every wrong word.

Hydra composes (`initialize_config_dir` and `compose`, never `@hydra.main`, which would give every rank a working folder
of its own). It stops at the first wrong word, so the words are checked here before it sees them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, HydraException
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
    expects,
    get_value,
    has_container,
    is_map,
    leaf_keys,
    nearest,
    schema_keys,
    shown,
)
from megatron_lite.config.overrides import check_form, key_of, parse, read, unknown_key
from megatron_lite.config.presets import check_preset
from megatron_lite.config.rules.texts import require_form
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import ConfigError, library_edge

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"
EXPERIMENT = "experiment"  # the one group that may be left empty
Setting = tuple[str, Any]  # a dotted key, and its value as OmegaConf takes it
LAYOUT_NAME = re.compile(r"(?:dp(\d+)_?)?(?:tp(\d+)_?)?(?:pp(\d+))?")


def compose(script: str, overrides: list[str], conf_dir: Path = CONF_DIR) -> RunConfig:
    """The configuration of one run: `conf/<script>.yaml`, the presets it names, then the overrides.

    Args:
        script: name of an entry script, without `.py`.
        overrides: words such as `model=gpt2_124m` (a preset) or `train.steps=1000` (a value). The weights that
            model.init_from names stand between presets and values.
    Returns:
        a typed configuration, complete but not yet validated; fields that are None are still to be derived.
    Raises:
        ConfigError: with every unknown key, unknown preset and unreadable value among the words.
    """
    scripts = available_scripts(conf_dir)
    if script not in scripts:
        raise ConfigError(f"{shown(script)!r} is not a script; {_choices(script, scripts)}")
    groups = preset_groups(conf_dir)
    presets: list[str] = []
    settings: list[Setting] = []
    problems: list[str] = []
    for word in (word for text in overrides for word in _spell_out_layout(text, conf_dir)):
        try:
            if key_of(word) in groups:
                presets += _check_preset(word, groups, conf_dir)
            else:
                settings += _check_setting(word, groups)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    typed = _compose_checked(script, presets, settings, conf_dir)
    require_form(typed, "model.init_from")
    return with_weights(typed, {key for key, _ in settings})


def change(config: RunConfig, overrides: list[str], conf_dir: Path = CONF_DIR) -> RunConfig:
    """A complete configuration with single values changed, such as `train.steps=1000`.

    Raises:
        ConfigError: with every unknown key, unreadable value and preset among the words.
    """
    groups = preset_groups(conf_dir)
    settings: list[Setting] = []
    problems: list[str] = []
    for word in overrides:
        try:
            if key_of(word) in groups:
                raise ConfigError(f"{shown(word)} names a preset, which would replace a whole group; set single values")
            settings += _check_setting(word, groups)
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
    """The dotted key or group that a word sets; the whole word where it sets none."""
    return word.lstrip("+").partition("=")[0]


def available_scripts(conf_dir: Path = CONF_DIR) -> list[str]:
    """Names of the entry scripts: each has a primary configuration of its own name."""
    if not conf_dir.is_dir():
        raise ConfigError(f"{conf_dir} is missing; install megatron_lite from a checkout with `pip install -e .`")
    return sorted(path.stem for path in conf_dir.glob("*.yaml"))


def preset_groups(conf_dir: Path = CONF_DIR) -> dict[str, list[str]]:
    """Group name -> names of its presets: `model` -> [`gpt2_124m`, ...]."""
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(conf_dir.iterdir())
        if folder.is_dir()
    }


def _spell_out_layout(word: str, conf_dir: Path) -> Iterator[str]:
    """`parallel=dp3_tp1_pp2` without a file of that name means those three sizes, and 1 for one that is left out."""
    key, _, name = word.lstrip("+").partition("=")
    match = LAYOUT_NAME.fullmatch(name)
    if key != "parallel" or match is None or not name or (conf_dir / "parallel" / f"{name}.yaml").exists():
        yield word
        return
    yield "parallel=single"
    for axis, size in zip(("data", "tensor", "pipeline"), match.groups(), strict=True):
        yield f"parallel.{axis}_parallel_size={size or 1}"


def _check_preset(word: str, groups: dict[str, list[str]], conf_dir: Path) -> list[str]:
    """The word as Hydra is to see it; none where it asks for no experiment."""
    group, options = key_of(word), groups[key_of(word)]
    override = parse(word)
    if override.is_sweep_override():
        raise ConfigError(f"{shown(word)} names several values for one run; start one run for each value")
    value = override.value()
    if value is None and group == EXPERIMENT:
        return []
    if isinstance(value, dict):
        raise ConfigError(f"{group}={{...}} names no preset; set single values as {group}.KEY=VALUE")
    names = value if isinstance(value, list) else [value]
    for name in names or [None]:
        if name not in options:
            wrong = "" if name is None else str(name)
            raise ConfigError(f"{shown(word)} is not a preset; {_choices(wrong, options)}")
        check_preset(conf_dir / group / f"{name}.yaml", group)
    return [word.lstrip("+")]


def _check_setting(word: str, groups: dict[str, list[str]]) -> list[Setting]:
    """The settings that the word gives; ConfigError when its key or value is wrong."""
    check_form(word)
    key = key_of(word)
    if key.startswith("hydra"):
        raise ConfigError(f"{key} is not a setting; Hydra only composes here. The run folder is train.run_dir")
    if key not in schema_keys() and not is_map(key.rpartition(".")[0]):
        raise unknown_key(key, also=groups)
    return read(word)


def _choices(wrong: str, options: list[str]) -> str:
    guess = nearest(wrong, options)
    listed = f"choose one of {', '.join(options)}"
    return f"did you mean {guess}? ({listed})" if guess else listed


@cache
def _register_schema() -> None:
    ConfigStore.instance().store(name="schema", node=RunConfig)


def _compose_checked(script: str, presets: list[str], settings: list[Setting], conf_dir: Path) -> RunConfig:
    """Let Hydra compose the presets, and set values; what still fails lies in a YAML file or an interpolation."""
    _register_schema()
    with _conf_edge(script):
        return _to_typed(copy.deepcopy(_composed(script, tuple(presets), conf_dir)), settings)


@lru_cache(maxsize=32)
def _composed(script: str, presets: tuple[str, ...], conf_dir: Path) -> DictConfig:
    """What Hydra makes of the presets, which takes most of the time; the runs of a sweep mostly share it. Only read."""
    with initialize_config_dir(str(conf_dir), version_base="1.3"):
        return hydra_compose(script, overrides=list(presets))


@contextmanager
def _conf_edge(script: str = "the configuration") -> Iterator[None]:
    """Whatever Hydra, OmegaConf or YAML raises becomes a ConfigError; of what they are known to say, a better one."""
    with library_edge(ConfigError, f"conf/{script}.yaml and its presets cannot be composed", "see the files of conf/"):
        try:
            yield
        except ConfigCompositionException as error:
            raise _composition_error(error) from error
        except HydraException as error:
            raise ConfigError(f"conf/{script}.yaml: {_one_line(error)}; correct the file") from error
        except OmegaConfBaseException as error:
            raise _interpolation_error(error, script) from error
        except YAMLError as error:
            raise ConfigError(f"conf/ holds a file that is not YAML: {_one_line(error)}; correct it") from error


def _interpolation_error(error: OmegaConfBaseException, script: str) -> ConfigError:
    text = f"{error.full_key or script}: {shown(_one_line(error))}"  # it may hold all of a group
    if isinstance(error, InterpolationResolutionError | GrammarParseError):
        text += "; ${...} names another setting, such as ${model.name}; for the characters themselves write \\${...}"
    return ConfigError(text)


def _to_typed(composed: DictConfig, settings: list[Setting]) -> RunConfig:
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
    if wrong:  # OmegaConf converts what `${...}` stands for, but not into lists and maps
        raise ConfigError(wrong)
    return config


def _composition_error(error: ConfigCompositionException) -> ConfigError:
    """Hydra names the file and the key in its text only: keep the file, add the suggestion."""
    text = str(error)
    file = re.search(r"In '([^']+)'", text)
    key = re.search(r"full_key: (\S+)", text)
    where = f"conf/{file.group(1)}.yaml: " if file else ""
    if key and ("not in '" in text or isinstance(error.__cause__, ConfigKeyError)):
        return ConfigError(where + str(unknown_key(key.group(1))))
    if key and key.group(1) in schema_keys():
        return ConfigError(f"{where}{key.group(1)} must be {expects(key.group(1))}: {_one_line(error)}")
    return ConfigError(where + _one_line(error))


def _one_line(error: Exception) -> str:
    """The lines of a library's message that say something to a user."""
    lines = [line.strip() for line in str(error).splitlines()]
    noise = ("full_key:", "reference_type=", "object_type=", "See https", "Config search path", "provider=", "In '")
    return "; ".join(line for line in lines if line and not line.startswith(noise)) or type(error).__name__

"""From preset names and `key=value` words to a typed configuration, or to one error that lists every wrong word.

Hydra composes (`initialize_config_dir` and `compose`, never `@hydra.main`, which would give every rank a working folder
of its own). It stops at the first wrong word, so the words are checked here before it sees them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError
from yaml import YAMLError

from megatron_lite.config.frozen import as_node
from megatron_lite.config.hf.start import with_weights
from megatron_lite.config.keys import expects, is_group, is_map, nearest, nearest_key, schema_keys
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import ConfigError

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"
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
        raise ConfigError(f"{script!r} is not a script; {_choices(script, scripts)}")
    words = [word for text in overrides for word in _spell_out_layout(text, conf_dir)]
    accepted, problems = [], []
    for word in words:
        try:
            accepted += _check_word(word, conf_dir)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    explicit = {_parse(word).key_or_group for word in accepted}
    return with_weights(_compose_checked(script, accepted, conf_dir), explicit)


def change(config: RunConfig, words: list[str], conf_dir: Path = CONF_DIR) -> RunConfig:
    """A complete configuration with single values changed, such as `train.steps=1000`.

    Raises:
        ConfigError: with every unknown key, unreadable value and preset among the words.
    """
    changed, problems, explicit = as_node(config), [], set()
    for word in words:
        try:
            if _parse(word).key_or_group in preset_groups(conf_dir):
                raise ConfigError(f"{word} names a preset, which would replace a whole group; set single values")
            for accepted in map(_parse, _check_word(word, conf_dir)):
                OmegaConf.update(changed, accepted.key_or_group, accepted.value(), merge=True)
                explicit.add(accepted.key_or_group)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    typed = _to_typed(changed)
    return with_weights(typed, explicit) if "model.init_from" in explicit else typed


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


def _check_word(word: str, conf_dir: Path) -> list[str]:
    """The word as Hydra is to see it, several for a group; ConfigError when its key, preset or value is wrong."""
    override = _parse(word)
    key = override.key_or_group
    groups = preset_groups(conf_dir)
    if override.is_sweep_override():
        raise ConfigError(f"{word} names several values for one run; start one run for each value")
    if key.startswith("hydra"):
        raise ConfigError(f"{key} is not a setting; Hydra only composes here. The run folder is train.run_dir")
    text = word.lstrip("+")
    if key in groups:
        _check_preset(key, override.value(), groups[key])
        return [text]
    if is_map(key) or is_map(key.rpartition(".")[0]):
        return [_check_map(key, override.value(), text)]
    if key not in schema_keys():
        raise _unknown_key(key, also=groups)
    return _check_value(key, override.value(), text)


def _parse(word: str) -> Override:
    if word.startswith("-"):
        raise ConfigError(f"{word} is not an option; settings are written key=value, without dashes")
    if word.startswith("~"):
        raise ConfigError(f"{word} would remove a setting, which is not possible; set it to a value or to null")
    if "=" not in word:
        suggestion = nearest_key(word) or "train.steps"
        raise ConfigError(f"{word!r} has no value; settings are written key=value, such as {suggestion}=VALUE")
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        key, _, value = word.partition("=")
        raise ConfigError(
            f"{word} cannot be read ({_one_line(error)}); quote a text with special characters: '{key}=\"{value}\"'"
        ) from error


def _check_preset(group: str, value: Any, options: list[str]) -> None:
    if value is None:
        return
    names = value if isinstance(value, list) else [value]
    for name in names:
        if isinstance(name, dict):
            raise ConfigError(f"{group}={{...}} names no preset; set single values as {group}.KEY=VALUE")
        if str(name) not in options:
            raise ConfigError(f"{group}={name} is not a preset; {_choices(str(name), options)}")


def _check_value(key: str, value: Any, text: str) -> list[str]:
    """The override with its number in the type that the schema asks for (1e3 is a whole number, too)."""
    if isinstance(value, dict):
        return [word for name, part in value.items() for word in _check_part(f"{key}.{name}", part)]
    if isinstance(value, str) and "${" in value:
        return [text]  # an interpolation: known only once everything is composed
    if is_group(key):
        raise ConfigError(f"{text} is not possible: {key} is a group of settings; set single values as {key}.KEY=VALUE")
    if isinstance(value, float) and value.is_integer() and _accepts(key, int(value)) and not _accepts(key, value):
        return [f"{key}={int(value)}"]
    if not _accepts(key, value):
        raise ConfigError(f"{text} is not possible: {key} must be {expects(key)}")
    return [text]


def _check_map(key: str, value: Any, text: str) -> str:
    """A whole map, or one of its entries, whose name the schema does not know and Hydra has to be told to add."""
    entries = value if is_map(key) else {key: value}
    if not isinstance(entries, dict) or any(
        isinstance(entry, dict | list) or entry is None for entry in entries.values()
    ):
        wanted = expects(key) if is_map(key) else "a text"
        raise ConfigError(f"{text} is not possible: {key} must be {wanted}")
    return f"++{text}"


def _check_part(key: str, value: Any) -> list[str]:
    """One entry of `group={key:value,...}`; such groups hold only numbers, so the value needs no quotes."""
    if key not in schema_keys():
        raise _unknown_key(key)
    return _check_value(key, value, f"{key}={'null' if value is None else value}")


def _accepts(key: str, value: Any) -> bool:
    try:
        OmegaConf.update(OmegaConf.structured(RunConfig), key, value, merge=True)
    except ValidationError:
        return False
    return True


def _unknown_key(key: str, also: Any = ()) -> ConfigError:
    suggestion = nearest_key(key, also)
    if suggestion is None:
        return ConfigError(f"{key} is not a setting; megatron_lite/config/schema.py explains all of them")
    return ConfigError(f"{key} is not a setting; did you mean {suggestion}?")


def _choices(wrong: str, options: list[str]) -> str:
    guess = nearest(wrong, options)
    listed = f"choose one of {', '.join(options)}"
    return f"did you mean {guess}? ({listed})" if guess else listed


@cache
def _register_schema() -> None:
    ConfigStore.instance().store(name="schema", node=RunConfig)


def _compose_checked(script: str, words: list[str], conf_dir: Path) -> RunConfig:
    """Let Hydra compose; what still fails lies in a YAML file or an interpolation."""
    _register_schema()
    try:
        with initialize_config_dir(str(conf_dir), version_base="1.3"):
            composed = hydra_compose(script, overrides=words)
        return _to_typed(composed)
    except ConfigCompositionException as error:
        raise _composition_error(error) from error
    except HydraException as error:
        raise ConfigError(f"conf/{script}.yaml: {_one_line(error)}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or script}: {_one_line(error)}") from error
    except YAMLError as error:
        raise ConfigError(f"conf/ holds a file that is not YAML: {_one_line(error)}") from error


def _to_typed(composed: DictConfig) -> RunConfig:
    config = OmegaConf.to_object(composed)
    assert isinstance(config, RunConfig)
    return config


def _composition_error(error: ConfigCompositionException) -> ConfigError:
    """Hydra names the file and the key in its text only: keep the file, add the suggestion."""
    text = str(error)
    file = re.search(r"In '([^']+)'", text)
    key = re.search(r"full_key: (\S+)", text)
    where = f"conf/{file.group(1)}.yaml: " if file else ""
    if key and ("not in '" in text or isinstance(error.__cause__, ConfigKeyError)):
        return ConfigError(where + str(_unknown_key(key.group(1))))
    if key and key.group(1) in schema_keys():
        return ConfigError(f"{where}{key.group(1)} must be {expects(key.group(1))}: {_one_line(error)}")
    return ConfigError(where + _one_line(error))


def _one_line(error: Exception) -> str:
    """The lines of a library's message that say something to a user."""
    lines = [line.strip() for line in str(error).splitlines()]
    noise = ("full_key:", "reference_type=", "object_type=", "See https", "Config search path", "provider=", "In '")
    return "; ".join(line for line in lines if line and not line.startswith(noise)) or type(error).__name__

"""Reads values from a config.json of transformers, and collects what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_lite.config.keys import as_word

SUCH = "give the folder of such a model"
"""Not: change config.json, which then would no longer describe the weights."""
_SHOWN_CHARACTERS = 200


class ConfigReader:
    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.where = where
        self.problems: list[str] = []

    def use_aliases(self, aliases: Mapping[str, str]) -> None:
        """Resolve aliases of keys, as transformers does; a key whose two names have different values is refused."""
        for alias, key in aliases.items():
            if alias not in self.config:
                continue
            said = self.config[alias]
            if key in self.config and self.config[key] != said:
                self.refuse(alias, said, f"what {key}={as_word(self.config[key])} says, another name of the same")
            self.config = {**self.config, key: said}

    def value(self, key: str, default: Any, least: int = 1) -> Any:
        """A bool, an int or a float, as the default is; the default if missing."""
        return self.typed(key, self.config[key], default, least) if key in self.config else default

    def typed(self, key: str, found: Any, default: Any, least: int = 1) -> Any:
        """Like `value`, for a given value. null is valid only where the default is a number that may mean "none"."""
        if found is None and not default and not isinstance(default, bool):
            return default
        kinds: tuple[type, ...]
        if isinstance(default, bool):
            kinds, wanted = (bool,), "true or false"
        elif isinstance(default, float):
            kinds, wanted = (int, float), "a number >= 0"
        else:
            kinds, wanted = (int,), f"an integer >= {least}"
        right = isinstance(found, kinds) and isinstance(found, bool) is isinstance(default, bool)
        if not right or (not isinstance(default, bool) and not (0 if isinstance(default, float) else least) <= found):
            self.refuse(key, found, wanted)
            return default
        return float(found) if isinstance(default, float) else found

    def choice(self, key: str, default: Any, supported: tuple[Any, ...]) -> Any:
        found = self.config.get(key, default)
        if found is None and not default:
            return default
        if found not in supported:
            self.refuse(key, found, " or ".join(dict.fromkeys(map(as_word, supported))))
            return default
        return found

    def refuse(self, key: str, found: Any, supported: str) -> None:
        text = f"{self.where}: {key}={shown_value(found)} is not supported; supported: {supported}; {SUCH}"
        self.problems.append(text)


def shown_value(value: Any) -> str:
    text = as_word(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."

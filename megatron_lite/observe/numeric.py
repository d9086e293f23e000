"""Extract the numbers from the values that trackers are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numeric entries, which charts can show; nested ones get names such as `layer_grad_norm/layers.0`."""
    found: dict[str, float] = {}
    for name, value in values.items():
        plain = value.item() if hasattr(value, "item") else value
        if isinstance(plain, list | tuple):
            plain = {str(index): entry for index, entry in enumerate(plain)}
        if isinstance(plain, Mapping):
            found |= {f"{name}/{inner}": entry for inner, entry in numbers(plain).items()}
        elif isinstance(plain, int | float) and not isinstance(plain, bool):
            found[name] = plain
    return found

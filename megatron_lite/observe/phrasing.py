"""Helpers for the wording of messages."""

from __future__ import annotations


def counted(number: int, thing: str, things: str = "") -> str:
    """`1 step`, `0 steps`, `1,234 steps`."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def span(first: int, last: int) -> str:
    """`7` or `7 to 1,024`: the numbers from `first` to `last`."""
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"

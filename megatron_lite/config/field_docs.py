"""The meaning of each setting: the docstrings below the fields of the schema, which Python itself discards."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import is_dataclass
from enum import Enum
from functools import cache

from megatron_lite.config.keys import schema_keys
from megatron_lite.config.schema import RunConfig


@cache
def field_docs() -> dict[str, str]:
    """Dotted key -> its docstring on one line; for a group that of its field, or else of its class."""
    groups: dict[str, type] = {
        key: hint for key, hint in schema_keys().items() if isinstance(hint, type) and is_dataclass(hint)
    }
    found = {key: _on_one_line(hint.__doc__ or "") for key, hint in groups.items()}
    schemas: dict[str, type] = {"": RunConfig, **groups}
    for prefix, schema in schemas.items():
        for name, text in _docs_of_fields(schema):
            found[f"{prefix}.{name}" if prefix else name] = text
    return found


def _docs_of_fields(schema: type) -> Iterator[tuple[str, str]]:
    body = ast.parse(inspect.getsource(schema)).body[0]
    assert isinstance(body, ast.ClassDef)
    for field, doc in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(doc, ast.Expr):
            text = ast.literal_eval(doc.value)
            yield field.target.id, _on_one_line(text)


def member_comments(choices: type[Enum]) -> dict[str, str]:
    """Value -> its `explanation`, or the comment after it in the schema; empty if it has none."""
    lines = inspect.getsource(choices).splitlines()
    comments = {line.split("=")[0].strip(): line.partition("  # ")[2] for line in lines if "=" in line}
    return {str(member.value): getattr(member, "explanation", comments.get(member.name, "")) for member in choices}


def _on_one_line(text: str) -> str:
    return " ".join(text.split())

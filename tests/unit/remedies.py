"""Which tests obey which errors: read by test_remedies_of_errors.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Test = TypeVar("Test", bound=Callable[..., None])


def obeys(*places: str) -> Callable[[Test], Test]:
    """Of a test that does what the errors of these functions ask for, and gets on.

    Args:
        places: as `launch/nodes.py:own_node_rank`.
    """
    return lambda test: test

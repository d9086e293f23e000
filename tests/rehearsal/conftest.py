"""The warm process, once for each file of tests; they are skipped where the fake device cannot be built."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.rehearsal import stub
from tests.rehearsal.warm import Rehearsals


@pytest.fixture(scope="module")
def rehearsals() -> Iterator[Rehearsals]:
    if (reason := stub.why_not()) is not None:
        pytest.skip(reason)
    found = Rehearsals()
    yield found
    found.close()

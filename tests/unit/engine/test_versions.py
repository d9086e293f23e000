"""Guards of the engine that need no ranks."""

from __future__ import annotations

import pytest

from megatron_lite.engine.deepspeed_patches import require_right_deepspeed
from megatron_lite.errors import LaunchError


@pytest.mark.parametrize("version", ["0.19.8", "0.19.8+cpu", "0.20.0", "1.0"])
def test_deepspeed_from_the_floor_on(version: str) -> None:
    require_right_deepspeed(version)


@pytest.mark.parametrize("version", ["0.18.5", "0.19.2", "0.19.7.post1"])
def test_older_deepspeed_is_refused_with_the_reason(version: str) -> None:
    with pytest.raises(LaunchError, match=r"no number, .* in a pipeline are wrong; .*>=0\.19\.8"):
        require_right_deepspeed(version)

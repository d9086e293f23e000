"""Rules for what trackers read besides our settings."""

from __future__ import annotations

import os
from collections.abc import Iterator

from megatron_lite.config.keys import shown
from megatron_lite.config.rules.case import Case
from megatron_lite.config.schema import WandbMode

MODE_VARIABLE = "WANDB_MODE"
MODES = ("online", "offline", "disabled")  # the modes with the same meaning here; wandb has others for internal use


def wandb_mode_is_known(case: Case) -> Iterator[str]:
    """wandb reads its environment variable regardless of our setting, and fails on an unknown value."""
    mode = os.environ.get(MODE_VARIABLE)
    if mode and mode not in MODES and case.config.tracking.wandb is not WandbMode.disabled:
        yield (
            f"{MODE_VARIABLE}={shown(mode)} in the environment is not known; use {', '.join(MODES[:-1])} or "
            f"{MODES[-1]}, or unset it"
        )

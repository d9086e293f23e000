"""Whether another model.init_from means the same weights that a run began with."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_lite.files import file_xxh3


def same_weights(before: str | None, after: str | None) -> str | None:
    """Why a resumed run may ignore another model.init_from; None if it may not.

    The weights come from the run's checkpoint. So a missing folder does not prevent a resume, and a folder that was
    moved or is spelled differently is the same.
    """
    if before is None:
        return None
    is_local = before.startswith(("/", ".", "~")) or before.count("/") > 1  # otherwise it may be a name on the hub
    old = Path(before).expanduser()
    if not old.exists():
        return "the earlier one is gone; the weights come from the checkpoint" if is_local else None
    if after is None or not (new := Path(after).expanduser()).is_dir():
        return None
    return "" if os.path.samefile(old, new) or _content(old) == _content(new) else None


def _content(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and checksum of each file of a model."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return {path.name: (path.stat().st_size, file_xxh3(path)) for path in files}

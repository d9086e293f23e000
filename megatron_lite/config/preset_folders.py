"""Where presets are: in the package, and in the user's folder, `./conf` or `--conf DIR`, which takes precedence.

Imports neither Hydra nor torch: shell completion asks for names on each tab key.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.config.keys import choices_text, shown
from megatron_lite.errors import ConfigError, library_edge

SHIPPED = Path(__file__).resolve().parents[1] / "conf"
OWN = Path("conf")  # in the current folder


@dataclass(frozen=True)
class PresetFolders:
    """Presets by name. A preset of the user replaces ours with the same name."""

    own: Path | None = None
    """The user's folder, as an absolute path; it has the same groups as ours."""

    def scripts(self) -> list[str]:
        """Names of the entry scripts: each has a primary configuration with its name."""
        return sorted(path.stem for path in _files(SHIPPED))

    def groups(self) -> dict[str, list[str]]:
        """Group name -> names of its presets: `model` -> [`gpt2_124m`, ...]."""
        return {
            group: sorted({path.stem for folder in self._folders() for path in _files(folder / group)})
            for group in shipped_groups()
        }

    def file(self, name: str) -> Path | None:
        """File of a preset (`model/gpt_tiny`) or of a primary configuration (`pretrain_gpt`); None if there is none."""
        files = (folder / f"{name}.yaml" for folder in self._folders())
        return next((file for file in files if os.path.isfile(file)), None)

    def is_own(self, name: str) -> bool:
        """Whether that file is the user's."""
        return self.own is not None and os.path.isfile(self.own / f"{name}.yaml")

    def where(self, name: str) -> str:
        """That file's path for a message."""
        file = self.file(name)
        return f"{name}.yaml" if file is None else shown_path(file)

    def _folders(self) -> tuple[Path, ...]:
        return (SHIPPED,) if self.own is None else (self.own, SHIPPED)


def shipped_groups() -> list[str]:
    """Names of the groups in the package.

    Raises:
        ConfigError: the installed package is incomplete.
    """
    if not SHIPPED.is_dir():
        raise ConfigError(f"{SHIPPED} is missing; install megatron_lite again (`pip install .` in its checkout)")
    return sorted(path.name for path in SHIPPED.iterdir() if path.is_dir() and path.name != "__pycache__")


def find_folders(given: Path | None = None) -> PresetFolders:
    """Our folder, and the user's: the one given by --conf, else `./conf` if it holds presets of our groups.

    Raises:
        ConfigError: --conf is not a folder of presets.
    """
    if given is not None:
        own = Path(os.path.expanduser(given)).absolute()
        _require_presets(given, own)
        return PresetFolders(own)
    own = OWN.absolute()
    return PresetFolders(own if own != SHIPPED and _holds_presets(own) else None)


def _require_presets(given: Path, own: Path) -> None:
    if not os.path.isdir(own):  # unlike Path.is_dir, returns False for a name that is too long
        raise ConfigError(
            f"--conf {shown(str(given))} is not a folder (looked from {Path.cwd()}); give one with presets"
        )
    groups = shipped_groups()
    with library_edge(ConfigError, f"--conf {given} cannot be read", "give a folder that you may read"):
        folders = sorted(name for name in os.listdir(own) if os.path.isdir(own / name) and name[0] not in "._")
    problems = [
        f"--conf {given}: {shown(name)} is not a group of presets; {choices_text(name, groups)}"
        for name in folders
        if name not in groups
    ]
    if not problems and not _holds_presets(own):
        problems.append(
            f"--conf {given} holds no presets; put them into folders of groups, such as {given}/model/NAME.yaml"
        )
    if problems:
        raise ConfigError(problems)


def _holds_presets(own: Path) -> bool:
    """Whether a folder named `conf` has presets of our groups; it may belong to another program."""
    names = [path.name for path in _files(SHIPPED)]
    return any(_files(own / group) for group in shipped_groups()) or any(os.path.isfile(own / name) for name in names)


def _files(folder: Path) -> list[Path]:
    """Presets in a folder; empty if it does not exist or is not readable."""
    return [path for path in folder.glob("*.yaml") if os.path.isfile(path)]


def shown_path(file: Path) -> str:
    """A preset file in a message: relative to the current folder, or to the folder of our code."""
    for base in (Path.cwd(), SHIPPED.parents[1]):
        if file.is_relative_to(base):
            return str(file.relative_to(base))
    return str(file)

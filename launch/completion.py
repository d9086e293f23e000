"""Completion of verbs, scripts, groups, presets and keys in bash and zsh.

Shells call `megatron-lite complete -- WORDS...` to complete the last word, and offer the lines that it prints. This
runs on each press of the tab key, so nothing here imports Hydra or torch.
"""

from __future__ import annotations

import itertools
import typing
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Protocol

from launch.arguments import OPTIONS, Parser
from megatron_lite.config.keys import is_group, is_map, leaf_keys, schema_keys
from megatron_lite.config.preset_folders import PresetFolders, find_folders
from megatron_lite.errors import EXIT_OK, ConfigError

BASH = """\
# For ~/.bashrc: source <(megatron-lite completion bash)
_megatron_lite() {
  local line="${COMP_LINE:0:COMP_POINT}" word="" candidate start="" before
  [[ $line == *[[:space:]] ]] || word="${line##*[[:space:]]}"
  # bash splits words at the characters of COMP_WORDBREAKS and replaces the last part alone
  local part="${COMP_WORDS[COMP_CWORD]}"
  case $part in "=" | ":") part="" ;; esac
  start="${word%"$part"}"
  read -ra before <<<"${line%"$word"}"
  COMPREPLY=()
  while IFS= read -r candidate; do
    [[ $candidate == "$word"* ]] && COMPREPLY+=("${candidate#"$start"}")
  done < <("${COMP_WORDS[0]}" complete -- "${before[@]}" "$word" 2>/dev/null)
  if [[ ${#COMPREPLY[@]} -gt 0 && ${COMPREPLY[0]} == *[=.] ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -o default -F _megatron_lite megatron-lite
"""
ZSH = """\
#compdef megatron-lite
# For ~/.zshrc, behind compinit: source <(megatron-lite completion zsh)
_megatron_lite() {
  local -a found open closed
  found=("${(@f)$("${words[1]}" complete -- "${(@)words[1,CURRENT-1]}" "$PREFIX" 2>/dev/null)}")
  open=("${(@M)found:#*[=.]}")
  closed=("${(@)found:#*[=.]}")
  closed=("${(@)closed:#}")
  if (( ${#open} + ${#closed} == 0 )); then _files; return; fi
  (( ${#open} )) && compadd -Q -S '' -- "${open[@]}"
  (( ${#closed} )) && compadd -Q -- "${closed[@]}"
}
compdef _megatron_lite megatron-lite
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH}


class Choices(Protocol):
    """The attributes of a verb that this module reads."""

    @property
    def choices(self) -> tuple[str, ...]: ...


def main(argv: list[str]) -> int:
    """Print the script that sets up completion for a shell.

    Raises:
        ConfigError: an unsupported shell, or none.
    """
    parser = Parser(
        prog="python -m launch completion",
        description="Print what completes `megatron-lite` in a shell: source <(megatron-lite completion bash)",
    )
    parser.add_argument("shell", choices=list(SCRIPTS))
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors")
    print(SCRIPTS[parser.parse_args(argv).shell], end="")
    return EXIT_OK


def candidates(argv: list[str], verbs: Mapping[str, Choices]) -> list[str]:
    """Completions of the last word; empty if only the user knows them, such as for a file.

    Args:
        argv: `--`, the command itself, the complete words, and the word being typed.
    """
    *before, word = argv[2:] or [""]
    if before[-1:] and OPTIONS.get(before[-1]) is not None and OPTIONS[before[-1]].value:
        return _beginning(word, ["job"] if before[-1] == "--cfg" else [])
    folders = _folders(before)
    typed = [one for one in before if not one.startswith("-")]
    if not typed:
        return _beginning(word, [*folders.scripts(), *verbs, *OPTIONS])
    verb = typed[0]
    if verb not in verbs:
        return _settings(word, folders)
    return _of_verb(verb, typed[1:], word, folders, verbs[verb].choices)


def _of_verb(verb: str, typed: list[str], word: str, folders: PresetFolders, choices: tuple[str, ...]) -> list[str]:
    if choices and not typed:
        return _beginning(word, choices)
    if verb == "explain":
        return [] if typed else _beginning(word, _open_words(word, [*folders.groups(), *leaf_keys()]))
    if verb == "verify" and not typed:
        return _beginning(word, folders.scripts())
    takes_settings = verb in ("verify", "evaluate") or (verb, *typed[:1]) == ("data", "prepare")
    return _settings(word, folders) if typed and takes_settings else []


def _folders(before: list[str]) -> PresetFolders:
    """The preset folders, with the user's presets unless --conf is wrong, which the command itself will report."""
    given = next((after for option, after in itertools.pairwise(before) if option == "--conf"), None)
    try:
        return find_folders(None if given is None else Path(given))
    except ConfigError:
        return PresetFolders()


def _settings(word: str, folders: PresetFolders) -> list[str]:
    if word.startswith("-"):
        return _beginning(word, OPTIONS)
    key, equals, value = word.partition("=")
    if not equals:
        keys = [f"{group}=" for group in folders.groups()]
        keys += [f"{key}." if is_map(key) else f"{key}=" for key in leaf_keys()]
        return _beginning(word, _open_words(word, keys))
    done = value.rpartition(",")[0] + "," if "," in value else ""  # earlier values of a sweep
    return _beginning(word, (f"{key}={done}{name}" for name in _values(key, folders)))


def _open_words(word: str, keys: Iterable[str]) -> Iterator[str]:
    """Keys up to the next dot after what is typed: `optimizer.` first, then its settings."""
    for key in keys:
        dot = key.find(".", len(word))
        yield key if dot < 0 else key[: dot + 1]


def _values(key: str, folders: PresetFolders) -> list[str]:
    groups = folders.groups()
    if key in groups:
        return groups[key]
    hint = None if is_group(key) else schema_keys().get(key)
    for kind in (hint, *typing.get_args(hint)):
        if kind is bool:
            return ["true", "false"]
        if isinstance(kind, type) and issubclass(kind, Enum):
            return [str(member.value) for member in kind]
    return []


def _beginning(word: str, names: Iterable[str]) -> list[str]:
    return sorted({name for name in names if name.startswith(word)})

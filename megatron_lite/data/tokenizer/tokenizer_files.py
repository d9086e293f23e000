"""Read the files of a tokenizer, validate the fields that this project uses, and collect the files to copy along.

Plans read these files too, so this module needs neither torch nor the `tokenizers` library.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from megatron_lite.config.keys import nearest
from megatron_lite.data.tokenizer.roles import named_tokens
from megatron_lite.errors import ConfigError, DamagedFileError
from megatron_lite.state_files import Object, decode, read_bytes

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FOLDER = "tokenizer"  # inside prepared data
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENS_MAP_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
GENERATION_FILE = "generation_config.json"  # belongs to the model, but its sampling settings go along
CHAT_TEMPLATE_FOLDER = "additional_chat_templates"
DECISIVE_FILES = (  # all files that may affect ids, and the chat templates that checkpoints get
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENS_MAP_FILE,
    ADDED_TOKENS_FILE,
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
VOCABULARY_SUFFIXES = (".model", ".tiktoken", ".vocab", ".codes", ".bpe")
TEXT_FILES = ("merges.txt", "vocab.txt", "dict.txt")  # other .txt files of a folder are text, not a vocabulary
CARRIED_SUFFIXES = ("", ".json", ".jinja", ".md", *VOCABULARY_SUFFIXES)
NOT_CARRIED = ("config.json", "manifest.json", "prepared.json")  # belong to a model, a checkpoint, prepared data
LARGEST_CARRIED_BYTES = 64 * 2**20

T = TypeVar("T")


@dataclass(frozen=True)
class AddedEntry:
    """An entry of added_tokens in a tokenizer.json."""

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class Model:
    vocab: dict[str, int] | list[tuple[str, float]] = field(default_factory=dict)
    type: str | None = None
    unk_token: str | None = None
    unk_id: int | None = None

    def ids(self) -> dict[str, int]:
        if isinstance(self.vocab, dict):
            return self.vocab
        return {text: i for i, (text, _) in enumerate(self.vocab)}

    def unknown(self) -> str | None:
        """The token for text outside the vocabulary."""
        if self.unk_id is not None and isinstance(self.vocab, list) and 0 <= self.unk_id < len(self.vocab):
            return self.vocab[self.unk_id][0]
        return self.unk_token


@dataclass(frozen=True)
class Named:
    id: str
    type_id: int = 0


@dataclass(frozen=True)
class TemplateItem:
    SpecialToken: Named | None = None
    Sequence: Named | None = None


@dataclass(frozen=True)
class TemplateToken:
    tokens: list[str]


@dataclass(frozen=True)
class PostProcessor:
    """Adds special tokens to a text: TemplateProcessing, BertProcessing, RobertaProcessing, or a Sequence."""

    type: str
    single: list[TemplateItem] | str = field(default_factory=list)
    pair: list[TemplateItem] | str = field(default_factory=list)
    special_tokens: dict[str, TemplateToken] = field(default_factory=dict)
    cls: tuple[str, int] | None = None
    sep: tuple[str, int] | None = None
    processors: list[PostProcessor] = field(default_factory=list)


@dataclass(frozen=True)
class TokenizerJson:
    """The parts of a tokenizer.json that are read here; the `tokenizers` library reads all of it."""

    model: Model
    added_tokens: list[AddedEntry] = field(default_factory=list)
    post_processor: PostProcessor | None = None

    def ids(self) -> dict[str, int]:
        return {**self.model.ids(), **{entry.content: entry.id for entry in self.added_tokens}}


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer of a folder or hub name."""

    name: str
    """The value of data.tokenizer."""
    content: bytes
    """Its tokenizer.json."""
    spec: TokenizerJson
    settings: dict[str, Any]
    """special_tokens_map.json and tokenizer_config.json merged; the latter takes precedence."""
    others: dict[str, bytes]
    """Every other file of the folder that belongs to the tokenizer, by name."""


def read_folder(folder: Path, name: str) -> TokenizerFiles | None:
    """The tokenizer of a folder; None if it has no tokenizer.json.

    Raises:
        ConfigError: a file is damaged.
    """
    content = read_file(folder / TOKENIZER_FILE, name)
    if content is None:
        return None
    spec = parsed(content, TokenizerJson, str(folder / TOKENIZER_FILE), name)
    return TokenizerFiles(name, content, spec, read_settings(folder, name), carried(folder, name))


def require_some_file(folder: Path, name: str) -> None:
    """Refuse a folder without any tokenizer file, and a misspelled `train` before the hub is asked for it.

    Raises:
        ConfigError: the folder has no tokenizer file, or the name is almost `train`.
    """
    if not os.path.lexists(folder) and "/" not in name and nearest(name.lower(), ["train"]):
        raise cannot_open(name, "there is no such folder, and the setting that trains a tokenizer is spelled `train`")
    if not folder.is_dir():
        return
    known = (*DECISIVE_FILES, *TEXT_FILES)
    try:
        there = list(folder.iterdir())
    except OSError as error:
        raise cannot_open(name, f"{folder}: {error.strerror}") from error
    if any(path.name in known or path.suffix in VOCABULARY_SUFFIXES for path in there):
        return
    prepared = folder / TOKENIZER_FOLDER
    if (prepared / TOKENIZER_FILE).is_file():
        raise cannot_open(name, f"it is a folder of prepared data; its tokenizer is {prepared}")
    raise cannot_open(name, f"there is no {TOKENIZER_FILE} in it, nor any other tokenizer file")


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """The settings in the folder's own files, such as its special tokens."""
    settings: dict[str, Any] = {}
    for file_name in (TOKENS_MAP_FILE, TOKENIZER_CONFIG_FILE):
        content = read_file(folder / file_name, name)
        if content is not None:
            found = parsed(content, dict[str, Any], str(folder / file_name), name)
            settings |= {key: value for key, value in found.items() if value not in (None, "", {})}
    wrong = next((key for key, value in settings.items() if _is_malformed(key, value)), None)
    if wrong is not None:
        raise cannot_open(
            name, f"{wrong} in {folder / TOKENIZER_CONFIG_FILE} does not name a token: {settings[wrong]!r:.60}"
        )
    return settings


def _is_malformed(key: str, value: Any) -> bool:
    """Whether a setting that must name a token has another type."""
    if key not in NAMING_KEYS:
        return False
    content = value.get("content") if isinstance(value, dict) else value
    return not isinstance(content, str)


NAMING_KEYS = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""Keys of a tokenizer_config.json that name one token each."""


def parsed(content: bytes, kind: type[T], where: str, name: str) -> T:
    """
    Raises:
        ConfigError: `content` is not JSON, or its fields have other types.
    """
    try:
        return decode(content, kind, where)
    except DamagedFileError as error:
        raise cannot_open(name, str(error)) from error


def read_file(path: Path, name: str) -> bytes | None:
    try:
        return read_bytes(path)
    except DamagedFileError as error:
        raise cannot_open(name, str(error)) from error


def carried(folder: Path, name: str) -> dict[str, bytes]:
    """Files of a folder that are copied with its tokenizer, except tokenizer.json and tokenizer_config.json.

    Raises:
        ConfigError: one of them cannot be read, or the sampling settings are damaged.
    """
    found = {}
    for path in sorted(_candidates(folder)):
        content = read_file(path, name)
        if content is None:
            continue
        if path.name == GENERATION_FILE:
            _require_settings(content, path, name)
        found[path.relative_to(folder).as_posix()] = content
    return found


def _require_settings(content: bytes, path: Path, name: str) -> None:
    """Refuse a damaged file of sampling settings, before preparation copies it to where it is harder to replace."""
    try:
        decode(content, Object, str(path))
    except DamagedFileError as error:
        raise ConfigError(
            f"data.tokenizer={name} cannot be opened: {error}; restore that file, or remove it"
        ) from error


def _candidates(folder: Path) -> Iterator[Path]:
    try:
        paths = [*folder.iterdir(), *folder.glob(f"{CHAT_TEMPLATE_FOLDER}/*.jinja")]
        yield from (path for path in paths if _is_carried(path))
    except OSError as error:
        raise cannot_open(str(folder), f"{folder} cannot be listed ({error.strerror})") from error


def _is_carried(path: Path) -> bool:
    name = path.name
    if name.startswith(".") or name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, *NOT_CARRIED):
        return False
    if name.endswith((".index.json", ".safetensors")):
        return False
    kind = name in TEXT_FILES or path.suffix.lower() in CARRIED_SUFFIXES
    return kind and path.is_file() and path.stat().st_size <= LARGEST_CARRIED_BYTES


def known_name(settings: Mapping[str, Any], key: str, known: Mapping[str, int]) -> str | None:
    """The token that a setting names, if the vocabulary has it (transformers would add any other name as new)."""
    name = next(named_tokens(settings, (key,)), None)
    return name if name in known else None


def cannot_open(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"data.tokenizer={name} cannot be opened: {reason}; use `train`, or the folder or hub name of a tokenizer"
    )


def encoded(content: Any) -> bytes:
    """Indented JSON in UTF-8."""
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"

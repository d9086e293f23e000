"""The vocabulary size before any data is prepared: plans need it within milliseconds and without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from megatron_lite.config.lengths import TRAINED_SENTINELS
from megatron_lite.config.schema import DataConfig, RunConfig
from megatron_lite.data.corpus.source_names import resolve_sources
from megatron_lite.data.corpus.sources import Source
from megatron_lite.data.sidecar import read_sidecar
from megatron_lite.data.tokenizer.roles import trained_names
from megatron_lite.data.tokenizer.tokenizer_files import TOKENIZER_FILE, TokenizerJson, parsed, read_file
from megatron_lite.errors import ConfigError

TRAIN = "train"
T = TypeVar("T")
SMALLEST_BPE = 256 + len(trained_names())  # every byte, and the special tokens


def planned_vocab_size(config: RunConfig) -> int:
    """`known_vocab_size`, but an unknown size is an error.

    Raises:
        ConfigError: the size is unknown, or as for `known_vocab_size`.
    """
    size = known_vocab_size(config)
    if size is None:
        raise ConfigError(
            f"model.vocab_size=null cannot be derived from data.tokenizer={config.data.tokenizer}: no local file has "
            "the size; set model.vocab_size, or name a tokenizer folder that holds a tokenizer.json"
        )
    return size


def known_vocab_size(config: RunConfig) -> int | None:
    """True vocabulary size of the model, before padding; None if it is known only after the data is opened.

    From model.vocab_size; else data.tokenizer_vocab_size for a tokenizer that will be trained; else the tokenizer
    folder; else the sidecar of ready shards.

    Raises:
        ConfigError: a setting that it depends on is wrong.
    """
    if config.data.tokenizer != TRAIN:
        size = _size_of_folder(config.data.tokenizer)
        return size if config.model.vocab_size is None else model_vocab_size(config, None, size)
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    if any(source.is_text for source in resolve_sources(config.data.source, "data.source")):
        return trained_vocab_size(config.data)
    return _size_of_shards(config.data)


def model_vocab_size(config: RunConfig, known: int | None, needed: int | None) -> int:
    """model.vocab_size, or what is known without it.

    Args:
        needed: size of the tokenizer; None without a tokenizer.
    Raises:
        ConfigError: neither is known, or it cannot hold the tokenizer's tokens.
    """
    vocab_size = config.model.vocab_size or known
    if vocab_size is None:
        raise ConfigError(
            "model.vocab_size=null is unknown for ready shards without a tokenizer; set it, or name their tokenizer "
            "folder in data.tokenizer"
        )
    if needed is not None and needed > vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size} must hold the {needed} tokens of data.tokenizer={config.data.tokenizer}; "
            + ("name the tokenizer of model.init_from" if config.model.init_from else f"use {needed} or more, or null")
        )
    return vocab_size


def trained_vocab_size(data: DataConfig) -> int:
    """data.tokenizer_vocab_size, checked.

    Raises:
        ConfigError: it cannot hold the bytes and the special tokens.
    """
    if data.tokenizer_vocab_size < SMALLEST_BPE:
        raise ConfigError(
            f"data.tokenizer_vocab_size={data.tokenizer_vocab_size} is too small: a byte-level vocabulary holds 256 "
            f"bytes and the {len(trained_names())} special tokens of the objectives, {TRAINED_SENTINELS} sentinels "
            f"among them; use {SMALLEST_BPE} or more"
        )
    return data.tokenizer_vocab_size


def _size_of_folder(name: str) -> int | None:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        cached = _cached_hub_file(name)
        return _size_in_json(cached, name) if cached else None
    if (folder / TOKENIZER_FILE).is_file():
        return _size_in_json(folder / TOKENIZER_FILE, name)
    ids: set[int] = set()
    if (folder / "vocab.txt").is_file():  # BERT's WordPiece: one token per line
        ids.add(len((folder / "vocab.txt").read_bytes().removesuffix(b"\n").split(b"\n")) - 1)
    for file_name in ("vocab.json", "added_tokens.json"):
        if (folder / file_name).is_file():
            ids.update(_read(folder / file_name, dict[str, int], name).values())
    return max(ids) + 1 if ids else None


def _size_in_json(path: Path, name: str) -> int | None:
    ids = _read(path, TokenizerJson, name).ids().values()
    return max(ids) + 1 if ids else None


def _read(path: Path, kind: type[T], name: str) -> T:
    return parsed(read_file(path, name) or b"", kind, str(path), name)


def _cached_hub_file(name: str) -> Path | None:
    """The tokenizer.json of a hub name, if it is in the local cache. Never uses the network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:
        raise ConfigError(f"data.tokenizer={name} is neither a folder nor a hub name; correct the path") from None
    return Path(cached) if isinstance(cached, str) else None


def _size_of_shards(data: DataConfig) -> int | None:
    sizes = [sidecar["vocab_size"] for source in _shards(data) if (sidecar := read_sidecar(source.paths[0]))]
    return max(sizes) if sizes else None


def _shards(data: DataConfig) -> list[Source]:
    return [source for source in resolve_sources(data.source, "data.source") if not source.is_text]

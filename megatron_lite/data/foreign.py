"""Tokenizers without a tokenizer.json, which transformers reads, and why one cannot be opened."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_lite.data.hub import quiet_hub
from megatron_lite.errors import ConfigError

KIND_FILES = ("tokenizer_config.json", "config.json")  # one of them tells transformers the class
SENTENCEPIECE_FILES = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")


def read_through_transformers(name: str) -> tuple[bytes, dict[str, Any]]:
    """The tokenizer.json that transformers makes of a folder or hub name, and the names of its special tokens.

    Raises:
        ConfigError: it cannot be opened.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir() and (folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise cannot_open(name, f"it is not a folder (looked from {Path.cwd()})")
    from transformers import AutoTokenizer

    quiet_hub()  # after the import, which sets its own level
    try:
        opened = AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else name)
    except Exception as error:  # files of many kinds and the network: errors of many kinds
        raise cannot_open(name, _reason(folder, error)) from error
    backend = getattr(opened, "backend_tokenizer", None)
    if backend is None:
        raise cannot_open(name, "it has no fast version; save one as tokenizer.json")
    return str(backend.to_str()).encode(), dict(opened.special_tokens_map)


def _reason(folder: Path, error: Exception) -> str:
    """Of a failure of transformers, whose own words are about the last of all readers that it tried."""
    if folder.is_dir() and not _any_file(folder, KIND_FILES):
        for file_name, kind in (("vocab.txt", "BertTokenizer"), ("merges.txt", "GPT2Tokenizer"), *_SENTENCEPIECE_KINDS):
            if (folder / file_name).is_file():
                return (
                    f"nothing tells which kind its {file_name} is of; write the kind into {KIND_FILES[0]} beside it, "
                    f'such as {{"tokenizer_class": "{kind}"}}'
                )
    if _any_file(folder, SENTENCEPIECE_FILES) and find_spec("sentencepiece") is None:
        return "SentencePiece files need two more packages; run `pip install sentencepiece protobuf`"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


_SENTENCEPIECE_KINDS = (("spiece.model", "T5Tokenizer"), ("tokenizer.model", "LlamaTokenizer"))


def _any_file(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)


def cannot_open(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"data.tokenizer={name} cannot be opened: {reason}; use `train`, or the folder or hub name of a tokenizer"
    )

"""Tokenizers without a tokenizer.json: open them through transformers, and explain why one cannot be opened."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from megatron_lite.data.hub import quiet_hub
from megatron_lite.data.tokenizer.tokenizer_files import (
    TokenizerFiles,
    cannot_open,
    carried,
    read_folder,
    read_settings,
)
from megatron_lite.errors import ConfigError, library_edge

KIND_FILES = ("tokenizer_config.json", "config.json")  # transformers takes the tokenizer class from one of them
SENTENCEPIECE_FILES = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")


def read_through_transformers(name: str) -> TokenizerFiles:
    """The tokenizer.json that transformers creates for a folder or hub name, its settings, and the folder's files.

    Raises:
        ConfigError: it cannot be opened.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir() and (folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise cannot_open(name, f"it is not a folder (looked from {Path.cwd()})")
    own = read_settings(folder, name) if folder.is_dir() else {}
    from transformers import AutoTokenizer

    quiet_hub()  # after the import, which sets its own log level
    try:
        with library_edge(ConfigError, name):
            opened = AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else name)
    except ConfigError as error:
        raise cannot_open(name, _reason(folder, error)) from error
    if getattr(opened, "backend_tokenizer", None) is None:
        raise cannot_open(name, "it has no fast version; save one as tokenizer.json")
    with tempfile.TemporaryDirectory() as saved:
        what = f"data.tokenizer={name} cannot be saved as tokenizer.json"
        with library_edge(ConfigError, what, "name another tokenizer, or one that has a tokenizer.json"):
            opened.save_pretrained(saved)
        found = read_folder(Path(saved), name)
    if found is None:
        raise cannot_open(name, "transformers cannot convert it to a tokenizer.json; save one there yourself")
    others = found.others | (carried(folder, name) if folder.is_dir() else {})
    return replace(found, settings=own | found.settings, others=others)


def _reason(folder: Path, error: ConfigError) -> str:
    """Why transformers failed; its own message is only about the last of the readers that it tried."""
    if folder.is_dir() and not _any_file(folder, KIND_FILES):
        for file_name, kind in (("vocab.txt", "BertTokenizer"), ("merges.txt", "GPT2Tokenizer"), *_SENTENCEPIECE_KINDS):
            if (folder / file_name).is_file():
                return (
                    f"the tokenizer class of its {file_name} is unknown; write the class into {KIND_FILES[0]} beside "
                    f'it, such as {{"tokenizer_class": "{kind}"}}'
                )
    if _any_file(folder, SENTENCEPIECE_FILES) and find_spec("sentencepiece") is None:
        return "SentencePiece files need two more packages; run `pip install sentencepiece protobuf`"
    return str(error).partition(": ")[2]


_SENTENCEPIECE_KINDS = (("spiece.model", "T5Tokenizer"), ("tokenizer.model", "LlamaTokenizer"))


def _any_file(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)

"""Open, copy and extend any Hugging Face tokenizer.

Every tokenizer is a `tokenizers.Tokenizer`. Text never encodes to special tokens: a document that contains the name of
a special token, such as `<|endoftext|>` or `[MASK]`, gets the pieces of that string, not the token itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_lite.config.schema import DataConfig
from megatron_lite.data.special import SpecialTokens, Vocabulary
from megatron_lite.data.tokenizer.encoding import Encoder
from megatron_lite.data.tokenizer.foreign import read_through_transformers
from megatron_lite.data.tokenizer.framing import END_OF_DOCUMENT_KEY, DocumentEnds, document_ends
from megatron_lite.data.tokenizer.pieces import Pieces, read_pieces
from megatron_lite.data.tokenizer.roles import SETTING_OF_ROLE, named_tokens, names_text, resolve_names, sentinel_names
from megatron_lite.data.tokenizer.tokenizer_files import (
    DECISIVE_FILES,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TokenizerFiles,
    encoded,
    known_name,
    parsed,
    read_file,
    read_folder,
    require_some_file,
)
from megatron_lite.data.tokenizer.vocabulary import TRAIN
from megatron_lite.errors import ConfigError, library_edge

if TYPE_CHECKING:
    import tokenizers

DIGESTS_KEY = "extends"  # key of our tokenizer_config.json


class RoleNames(NamedTuple):
    """Names (texts) of the tokens that have a role."""

    begin: tuple[str, ...]
    """Before every document; empty = none."""
    eod: str
    roles: dict[str, str]
    """Role -> name, such as {"mask": "[MASK]"}."""
    sentinels: list[str]

    def all(self) -> list[str]:
        return [*self.begin, self.eod, *self.roles.values(), *self.sentinels]


class Tokenizer:
    """Encodes text to ids and back.

    Args:
        backend: the tokenizer; its truncation and padding are switched off.
        names: its tokens that have a role.
        files: the files that it was read from.
        digest: xxh3-128 of the tokenizer.json; recorded in the sidecars of shards.
    """

    def __init__(self, backend: tokenizers.Tokenizer, names: RoleNames, files: TokenizerFiles, digest: str) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.names = names
        self.files = files
        self.eod = names.eod
        self.digest = digest
        extends = files.settings.get(DIGESTS_KEY)
        self.extends = tuple(map(str, extends)) if isinstance(extends, list) else ()
        """Digests of the tokenizers that this one extends: it has all their ids."""
        ids = backend.get_vocab(with_added_tokens=True)
        self.special = _special_tokens(ids, names, files.settings)
        self.eod_id = ids[names.eod]
        self.vocab_size: int = 1 + max(ids.values())
        """One above the largest id: what an embedding needs, even where ids have gaps."""
        self._text_of_role = {ids[text]: text for text in names.all()}

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(json.loads(self._backend.to_str()), self._text_of_role, self.eod_id, self.files.name)

    def pieces(self) -> Pieces:
        """The text behind every id."""
        return read_pieces(json.loads(self._backend.to_str()), self.vocab_size, self._text_of_role)

    def vocabulary(self) -> Vocabulary:
        pieces = self.pieces()
        return Vocabulary(self.vocab_size, self.special, pieces.is_special, pieces.begins_word())

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any special token."""
        return [int(token) for token in self._encoder.encode([text])[0]]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; ids outside this vocabulary (padded rows) are skipped."""
        return str(self._backend.decode([int(i) for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=False))

    def encode_documents(self, documents: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Concatenated ids of all documents [sum of lengths], and the length of each [documents].

        Each document gets its begin tokens and its end-of-document token. The threads of the `tokenizers` library
        encode the documents in parallel.
        """
        tokens, lengths = self._encoder.encode(documents)
        around = np.array([self.eod_id, *self.special.begin], np.int32)  # between two documents
        stops = np.cumsum(lengths)
        tokens = np.insert(tokens, np.repeat(stops, len(around)), np.tile(around, len(stops)))
        return np.roll(tokens, len(around) - 1), lengths + len(
            around
        )  # moves the begin tokens after the last document to the front of the first


def _special_tokens(ids: Mapping[str, int], names: RoleNames, settings: Mapping[str, Any]) -> SpecialTokens:
    """Ids of the tokens that have a role."""
    named = (known_name(settings, key, ids) for key in ("bos_token", "eos_token"))
    bos, eos = (None if name is None else ids[name] for name in named)
    if len(names.begin) == 1:
        bos = ids[names.begin[0]]
    return SpecialTokens(
        eod=ids[names.eod],
        begin=tuple(ids[name] for name in names.begin),
        bos=bos,
        eos=None if eos == ids[names.eod] else eos,
        sentinels=tuple(ids[name] for name in names.sentinels),
        **{role: ids[name] for role, name in names.roles.items()},
    )


def open_tokenizer(name: str, data: DataConfig | None = None, *, is_decoder: bool = False) -> Tokenizer:
    """Open a tokenizer folder or hub name.

    A folder with a tokenizer.json is read directly. Others (vocab.json + merges.txt, vocab.txt, SentencePiece) and
    names of the hub go through transformers' AutoTokenizer.

    Args:
        data: decides what documents begin and end with (add_bos, eod_token); None = as the tokenizer does.
        is_decoder: the model reads a stream of documents, see `framing`.
    Raises:
        ConfigError: it cannot be opened, or has no end-of-document token.
    """
    return _opened(_read(name), data or DataConfig(), is_decoder)


def _read(name: str) -> TokenizerFiles:
    folder = Path(name).expanduser()
    found = read_folder(folder, name)
    if found is not None:
        return found
    require_some_file(folder, name)
    return read_through_transformers(name)


def _opened(files: TokenizerFiles, data: DataConfig, is_decoder: bool) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    ends = document_ends(files.spec, files.settings, data, is_decoder=is_decoder, name=files.name)
    known = set(files.spec.ids())
    roles = resolve_names(known, files.settings, files.spec.model.unknown())
    names = RoleNames(ends.begin, ends.eod, roles, sentinel_names(known))
    spec = {"added_tokens": [], **parsed(files.content, dict[str, Any], TOKENIZER_FILE, files.name)}
    for entry in spec["added_tokens"]:
        if entry["content"] in names.all():
            entry["special"] = True  # otherwise text inside documents would match it
    remedy = "use `train`, or the folder or hub name of a tokenizer"
    what = f"data.tokenizer={files.name} cannot be opened: its {TOKENIZER_FILE} is not a valid tokenizer"
    with library_edge(ConfigError, what, remedy):
        backend = Backend.from_str(json.dumps(spec))
    return Tokenizer(backend, names, files, xxhash.xxh3_128_hexdigest(files.content))


def save_tokenizer(name: str, folder: Path, data: DataConfig | None = None, *, is_decoder: bool = False) -> Tokenizer:
    """Copy a tokenizer with all its files into `folder`, so that prepared data does not depend on other folders.

    Returns the copy, opened with the same settings.
    """
    opened = open_tokenizer(name, data, is_decoder=is_decoder)
    write_files(folder, {**opened.files.others, TOKENIZER_FILE: opened.files.content})
    write_settings(folder, opened.files.settings, opened.names)
    return open_tokenizer(str(folder), data, is_decoder=is_decoder)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_settings(folder: Path, settings: Mapping[str, Any], names: RoleNames) -> None:
    """Write the tokenizer_config.json of a copy: the original settings, and the tokens that have a role here."""
    named = {key: names.roles[role] for role, key in SETTING_OF_ROLE.items() if role in names.roles}
    written = {"eos_token": names.eod, **settings, **named}
    if next(named_tokens(written, ("eos_token",)), None) != names.eod:
        written[END_OF_DOCUMENT_KEY] = names.eod
    (folder / TOKENIZER_CONFIG_FILE).write_bytes(encoded(written))


def save_extended(opened: Tokenizer, added: list[str], folder: Path) -> Tokenizer:
    """Save a copy of a tokenizer with special tokens appended. Their names decide their roles in the copy.

    Raises:
        ConfigError: its ids have gaps, so that the new tokens would get wrong ids.
    """
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(opened._backend.to_str())
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in added])
    ids = list(backend.get_vocab(with_added_tokens=True).values())
    if len(set(ids)) < len(ids):
        raise ConfigError(
            f"the ids of data.tokenizer={opened.files.name} have gaps, so {names_text(added)} cannot be appended; add "
            f"them by hand to model.vocab and added_tokens of its {TOKENIZER_FILE}, starting at id {opened.vocab_size}"
        )
    write_files(folder, {**opened.files.others, TOKENIZER_FILE: backend.to_str(pretty=True).encode()})
    settings = opened.files.settings | {DIGESTS_KEY: [*opened.extends, opened.digest]}
    write_settings(folder, settings, opened.names)
    write_settings(folder, settings, open_tokenizer(str(folder)).names)  # again, now with the new roles
    return open_tokenizer(str(folder))


def tokenizer_identity(data: DataConfig, ends: DocumentEnds | None, is_decoder: bool) -> Any:
    """Everything that determines the ids of documents: the tokenizer (size, files, or hub name) and the document ends.

    Args:
        ends: the document ends, if they are known before the tokenizer is opened.
    """
    facts: dict[str, Any]
    folder = Path(data.tokenizer).expanduser()
    if data.tokenizer == TRAIN:
        facts = {"train": data.tokenizer_vocab_size}
    elif not folder.is_dir():
        facts = {"name": data.tokenizer}  # the prepared folder keeps the first download
    else:
        contents = {name: read_file(folder / name, data.tokenizer) for name in DECISIVE_FILES}
        facts = {name: xxhash.xxh3_128_hexdigest(content) for name, content in contents.items() if content is not None}
    if ends is not None:
        return facts | {"documents": [*ends.begin, ends.eod]}
    return facts | {"documents": [data.add_bos, data.eod_token, is_decoder]}


def limit_threads(count: int | None) -> None:
    """Set the number of threads of the `tokenizers` library; works only before its first use in this process."""
    if count is not None:
        os.environ["RAYON_NUM_THREADS"] = str(count)

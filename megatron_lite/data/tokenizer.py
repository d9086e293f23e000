"""Tokenizers: train a byte-level BPE, or open any Hugging Face tokenizer.

Every tokenizer used here is one `tokenizers.Tokenizer`. Text is encoded as text: a document that contains the name of
a special token, such as `<|endoftext|>` or `[MASK]`, gets the pieces of that string and never the token itself.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_lite.data.foreign import cannot_open, read_through_transformers
from megatron_lite.data.pieces import Pieces, read_pieces, unknown_token
from megatron_lite.data.roles import (
    END_OF_TEXT,
    EOD_NAMES,
    SETTING_OF_ROLE,
    STANDARD_NAMES,
    named_tokens,
    resolve_names,
    resolve_roles,
    sentinel_names,
    trained_names,
)
from megatron_lite.data.special import Vocabulary
from megatron_lite.errors import ConfigError, DataError

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FOLDER = "tokenizer"  # inside prepared data
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENS_MAP_FILE = "special_tokens_map.json"
FILES = (  # all that may decide the ids of a folder
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENS_MAP_FILE,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
KEPT_TOKENS = ("bos_token", "unk_token")
KEPT_SETTINGS = ("model_max_length", "clean_up_tokenization_spaces", "chat_template")
PIECE_CHARACTERS = 2**18  # a longer document is encoded in pieces, so that one document uses all threads too


class RoleNames(NamedTuple):
    """Texts of the tokens that have a role."""

    eod: str
    roles: dict[str, str]
    """By role, such as {"mask": "[MASK]"}."""
    sentinels: list[str]

    def __contains__(self, text: object) -> bool:
        return text == self.eod or text in self.roles.values() or text in self.sentinels


class Tokenizer:
    """Encodes text to ids and back.

    Args:
        backend: the tokenizer; its truncation and padding are switched off.
        names: its tokens that have a role.
        digest: xxh3-128 of the tokenizer.json; shards remember it.
        extends: digests of the tokenizers that this one has all ids of, and more.
        settings: what else of its tokenizer_config.json its copies keep.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        names: RoleNames,
        digest: str,
        extends: tuple[str, ...] = (),
        settings: dict[str, Any] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # special tokens inside a text are text
        self._backend = backend
        self.names = names
        self.eod = names.eod
        self.digest = digest
        self.extends = extends
        self.settings = settings or {}
        ids = backend.get_vocab(with_added_tokens=True)
        self.special = resolve_roles(ids, names.roles, names.sentinels, names.eod)
        self.eod_id = ids[names.eod]
        self.vocab_size: int = 1 + max(ids.values())
        """One above the largest id: what an embedding needs, even where ids have gaps."""
        self._text_of_role = {ids[text]: text for text in (names.eod, *names.roles.values(), *names.sentinels)}
        self._has_role = np.zeros(self.vocab_size, np.bool_)
        self._has_role[list(self._text_of_role)] = True

    def pieces(self) -> Pieces:
        """The text behind every id."""
        return read_pieces(json.loads(self._backend.to_str()), self.vocab_size, self._text_of_role)

    def vocabulary(self) -> Vocabulary:
        pieces = self.pieces()
        return Vocabulary(self.vocab_size, self.special, pieces.is_special, pieces.begins_word())

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any special token."""
        tokens, _ = self.encode_documents([text], append_eod=False)
        return [int(token) for token in tokens]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; ids that are no token of this vocabulary (padded rows) are left out."""
        return str(self._backend.decode([int(i) for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=False))

    def encode_documents(
        self, documents: Sequence[str], *, append_eod: bool = True
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Ids of all documents one after another [sum of lengths], and the length of each [documents].

        The documents are encoded in parallel by the threads of the `tokenizers` library.
        """
        pieces: list[str] = []
        counts: list[int] = []
        for document in documents:
            parts = split_long(document, PIECE_CHARACTERS)
            pieces += parts
            counts.append(len(parts))
        encoded = [encoding.ids for encoding in self._backend.encode_batch_fast(pieces, add_special_tokens=False)]
        tokens, piece_lengths = _flattened(encoded)
        if self._has_role[tokens].any():
            for i in self._pieces_with_roles(tokens, piece_lengths):
                encoded[i] = self._encode_as_text(pieces[i])
            tokens, piece_lengths = _flattened(encoded)
        return _join(tokens, piece_lengths, counts, self.eod_id if append_eod else None)

    def _pieces_with_roles(
        self, tokens: npt.NDArray[np.int32], piece_lengths: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.intp]:
        """Numbers of the pieces in which a token with a role was found."""
        places = np.flatnonzero(self._has_role[tokens])
        return np.unique(np.searchsorted(np.cumsum(piece_lengths), places, side="right"))

    def _encode_as_text(self, text: str) -> list[int]:
        """Ids of a text that holds names of special tokens, cut inside each name.

        Vocabularies that hold a name as an ordinary piece too (`</s>` in Unigram and SentencePiece) would find it
        otherwise. A tokenizer that folds the case finds it in `</S>` as well.
        """
        longest_first = sorted(self._text_of_role.values(), key=len, reverse=True)
        names = "|".join(re.escape(name.strip("▁")) for name in longest_first)
        cuts = [0, *((m.start() + m.end()) // 2 for m in re.finditer(names, text, re.IGNORECASE)), len(text)]
        parts = [text[a:b] for a, b in pairwise(cuts)]
        encodings = self._backend.encode_batch_fast(parts, add_special_tokens=False)
        ids = list(chain.from_iterable(encoding.ids for encoding in encodings))
        for found in self._text_of_role.keys() & set(ids):
            raise DataError(
                f"the text {text[:40]!r}... gives the {'end-of-document' if found == self.eod_id else 'special'} token "
                f"{self._text_of_role[found]!r} itself; name another data.tokenizer, or other special tokens in its "
                f"{TOKENIZER_CONFIG_FILE}"
            )
        return ids


def split_long(text: str, size: int) -> list[str]:
    """Cut a very long text ahead of single spaces or line ends, where byte-level BPE starts a new word anyway."""
    if len(text) <= size:
        return [text]
    parts: list[str] = []
    begin = 0
    while len(text) - begin > size:
        gap = _LAST_WORD_GAP.search(text, begin + size // 2, begin + size)
        end = gap.start() + 1 if gap else begin + size
        parts.append(text[begin:end])
        begin = end
    return [*parts, text[begin:]]


_LAST_WORD_GAP = re.compile(r"\S[ \n](?=\S)")


def _flattened(encoded: list[list[int]]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """All ids one after another, and the length of each piece."""
    piece_lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    return np.fromiter(chain.from_iterable(encoded), np.int32, int(piece_lengths.sum())), piece_lengths


def _join(
    tokens: npt.NDArray[np.int32], piece_lengths: npt.NDArray[np.int64], counts: list[int], eod_id: int | None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Documents of `counts` pieces each, with the end-of-document token behind each, and their lengths."""
    extra = 0 if eod_id is None else 1
    bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    totals = np.concatenate([[0], np.cumsum(piece_lengths)])
    lengths = np.diff(totals[bounds]) + extra
    if eod_id is None:
        return tokens, lengths
    return np.insert(tokens, totals[bounds[1:]], eod_id), lengths


def train_bpe(texts: Iterator[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Train a byte-level BPE (Radford et al. 2019, GPT-2) and save it as a Hugging Face tokenizer folder.

    It has the special tokens of every objective, so that one set of shards serves them all. A small text may hold fewer
    words than `vocab_size` asks for; the vocabulary is then smaller.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=trained_names(),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / TOKENIZER_FILE))
    names = RoleNames(END_OF_TEXT, STANDARD_NAMES, [])
    write_settings(folder, names, bos_token=END_OF_TEXT, clean_up_tokenization_spaces=False)
    return open_tokenizer(str(folder))


def write_settings(folder: Path, names: RoleNames, **more: Any) -> None:
    """The tokenizer_config.json that names the tokens with a role."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": names.eod, **more}
    settings |= {key: names.roles[role] for role, key in SETTING_OF_ROLE.items() if role in names.roles}
    (folder / TOKENIZER_CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def open_tokenizer(name: str) -> Tokenizer:
    """Open a tokenizer folder or hub name.

    A folder with a tokenizer.json is read directly. Others (vocab.json + merges.txt, vocab.txt, SentencePiece) and
    names of the hub go through transformers' AutoTokenizer.

    Raises:
        ConfigError: it cannot be opened, or has no end-of-document token.
    """
    folder = Path(name).expanduser()
    if (folder / TOKENIZER_FILE).is_file():
        content = (folder / TOKENIZER_FILE).read_bytes()
        return _from_json(content, _settings_of(folder), name)
    return _from_transformers(name)


def _from_transformers(name: str) -> Tokenizer:
    prepared = Path(name).expanduser() / TOKENIZER_FOLDER
    if (prepared / TOKENIZER_FILE).is_file():
        raise cannot_open(name, f"it is a folder of prepared data; its tokenizer is {prepared}")
    content, settings = read_through_transformers(name)
    return _from_json(content, settings, name)


def save_tokenizer(name: str, folder: Path) -> Tokenizer:
    """Copy what `open_tokenizer(name)` opens into `folder`, so that prepared data never depends on another place."""
    source = Path(name).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if (source / TOKENIZER_FILE).is_file():
        (folder / TOKENIZER_FILE).write_bytes((source / TOKENIZER_FILE).read_bytes())
        opened = open_tokenizer(name)
    else:
        opened = _from_transformers(name)
        opened._backend.save(str(folder / TOKENIZER_FILE))
    write_settings(folder, opened.names, **opened.settings, **_extending(opened.extends))
    return open_tokenizer(str(folder))


def save_extended(opened: Tokenizer, names: list[str], folder: Path) -> Tokenizer:
    """A copy of a tokenizer with special tokens appended. The roles of the copy are those that the names have.

    Raises:
        ConfigError: its ids have gaps, into which the new tokens do not fit.
    """
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(opened._backend.to_str())
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    ids = list(backend.get_vocab(with_added_tokens=True).values())
    if len(set(ids)) < len(ids):
        raise ConfigError(
            f"the ids of {opened.vocab_size:,} tokens have gaps, into which {len(names)} new ones do not fit; add them "
            f"to the tokenizer by hand, from id {opened.vocab_size} on"
        )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / TOKENIZER_FILE))
    more = opened.settings | _extending((*opened.extends, opened.digest))
    write_settings(folder, opened.names, **more)
    write_settings(folder, open_tokenizer(str(folder)).names, **more)  # now the new roles too
    return open_tokenizer(str(folder))


def _extending(digests: tuple[str, ...]) -> dict[str, Any]:
    return {"extends": list(digests)} if digests else {}


def tokenizer_identity(name: str, vocab_size: int) -> Any:
    """What decides the ids that `data.tokenizer` gives: a size, a folder's files, or a hub name."""
    folder = Path(name).expanduser()
    if name == "train":
        return {"train": vocab_size}
    if not folder.is_dir():
        return {"name": name}  # what was downloaded first stays in the prepared folder
    files = [folder / file_name for file_name in FILES if (folder / file_name).is_file()]
    return {path.name: xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in files}


def limit_threads(count: int | None) -> None:
    """Threads of the `tokenizers` library; works only before its first use in this process."""
    if count is not None:
        os.environ["RAYON_NUM_THREADS"] = str(count)


def _from_json(content: bytes, settings: dict[str, Any], name: str) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        spec = json.loads(content)
        known = {entry["content"] for entry in spec.get("added_tokens", [])} | _vocabulary_names(spec)
        eod = _choose_eod(next(named_tokens(settings, ("eos_token", "sep_token")), None), known, name)
        names = RoleNames(eod, resolve_names(known, settings, unknown_token(spec)), sentinel_names(known))
        for entry in spec.get("added_tokens", []):
            if entry["content"] in names:
                entry["special"] = True  # else it would be found inside documents
        backend = Backend.from_str(json.dumps(spec))
    except ConfigError:
        raise
    except Exception as error:  # the Rust library raises plain Exception
        raise cannot_open(name, f"its {TOKENIZER_FILE} is no tokenizer ({error})") from None
    extends = tuple(settings.get("extends", ()))
    return Tokenizer(backend, names, xxhash.xxh3_128_hexdigest(content), extends, _kept(settings, known))


def _kept(settings: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """What copies keep beside the tokens with a role. A name that the tokenizer lacks would become a new token."""
    tokens = {key: next(named_tokens(settings, (key,)), None) for key in KEPT_TOKENS}
    kept = {key: name for key, name in tokens.items() if name in known}
    return kept | {key: settings[key] for key in KEPT_SETTINGS if key in settings}


def _vocabulary_names(spec: dict[str, Any]) -> set[str]:
    vocab = spec.get("model", {}).get("vocab", {})
    return set(vocab) if isinstance(vocab, dict) else {entry[0] for entry in vocab}


def _settings_of(folder: Path) -> dict[str, Any]:
    """What the folder's own files say about its special tokens."""
    settings: dict[str, Any] = {}
    for file_name in (TOKENS_MAP_FILE, TOKENIZER_CONFIG_FILE):
        if (folder / file_name).is_file():
            found = _read_settings(folder / file_name)
            settings |= {key: value for key, value in found.items() if value not in (None, "", {})}
    return settings


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise cannot_open(str(path.parent), f"its {path.name} cannot be read ({error})") from None
    if not isinstance(settings, dict):
        raise cannot_open(str(path.parent), f"its {path.name} holds no JSON object")
    return settings


def _choose_eod(eos: str | None, known: set[str], name: str) -> str:
    if eos is not None:
        if eos not in known:
            raise cannot_open(name, f"its {TOKENIZER_CONFIG_FILE} names the end token {eos!r}, which it does not have")
        return eos
    for candidate in EOD_NAMES:
        if candidate in known:
            return candidate
    raise cannot_open(name, f"it has no end-of-document token; name one as eos_token in its {TOKENIZER_CONFIG_FILE}")

"""The special tokens around a text: those that a tokenizer adds, and those around each document in the shards.

The post-processor of a tokenizer.json says which special tokens it adds to a text or a pair of texts (Llama 3 puts its
beginning-of-text token first, BERT adds [CLS] and [SEP], T5 appends </s>, GPT-2 and Qwen add nothing). A decoder is
trained on a stream of documents, so the shards contain the tokens that the tokenizer puts before each document; for
encoders, the objective adds the tokens around a window. Plans show this, so it needs neither torch nor `tokenizers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.config.schema import Architecture, DataConfig, RunConfig
from megatron_lite.data.tokenizer.roles import (
    CHAT_ENDS,
    DOCUMENT_ENDS,
    END_OF_TEXT,
    EOD_NAMES,
    named_tokens,
    trained_names,
)
from megatron_lite.data.tokenizer.tokenizer_files import (
    PostProcessor,
    TemplateItem,
    TokenizerJson,
    cannot_open,
    known_name,
    read_folder,
    require_some_file,
)
from megatron_lite.data.tokenizer.vocabulary import TRAIN
from megatron_lite.errors import ConfigError

FIRST, SECOND = "$A", "$B"
END_OF_DOCUMENT_KEY = "end_of_document"
"""Key of our tokenizer_config.json: the token that ends documents, if it is not the eos_token."""
SHOWN_NAMES = 12

Template = tuple[tuple[str, int], ...]
"""Token names and the texts $A and $B, each with its type id (segment)."""


@dataclass(frozen=True)
class Templates:
    """What a tokenizer adds to a text, and to a pair of texts."""

    single: Template = ((FIRST, 0),)
    pair: Template = ((FIRST, 0), (SECOND, 1))

    def ahead(self) -> tuple[str, ...]:
        """Tokens before a single text."""
        names = [name for name, _ in self.single]
        return tuple(names[: names.index(FIRST)]) if FIRST in names else ()


@dataclass(frozen=True)
class DocumentEnds:
    """Tokens around each document in the shards, by name."""

    begin: tuple[str, ...]
    """Empty if documents begin with their text."""
    eod: str


def templates_of(post: PostProcessor | None) -> Templates | None:
    """None if it is not supported: several templates, one inside the other."""
    if post is None:
        return Templates()
    if post.type == "Sequence":
        found = [templates_of(part) for part in post.processors]
        others = [templates for templates in found if templates != Templates()]
        return Templates() if not others else others[0] if len(others) == 1 else None
    if post.type in ("BertProcessing", "RobertaProcessing") and post.cls and post.sep:
        return _of_encoder(post.cls[0], post.sep[0], doubled=post.type == "RobertaProcessing")
    if post.type == "TemplateProcessing":
        return Templates(_items(post.single, post), _items(post.pair, post))
    return Templates()


def _of_encoder(cls: str, sep: str, *, doubled: bool) -> Templates:
    second = 0 if doubled else 1
    between = ((sep, 0), (sep, 0)) if doubled else ((sep, 0),)
    return Templates(
        ((cls, 0), (FIRST, 0), (sep, 0)),
        ((cls, 0), (FIRST, 0), *between, (SECOND, second), (sep, second)),
    )


def _items(items: list[TemplateItem] | str, post: PostProcessor) -> Template:
    if isinstance(items, str):  # the short form "[CLS] $A:0 [SEP]"
        words = [word.rpartition(":") if word[-2:-1] == ":" else (word, "", "0") for word in items.split()]
        return tuple((FIRST if name == "$" else name, int(kind)) for name, _, kind in words if kind.isdigit())
    found: list[tuple[str, int]] = []
    for item in items:
        if item.Sequence is not None:
            found.append((FIRST if item.Sequence.id == "A" else SECOND, item.Sequence.type_id))
        elif item.SpecialToken is not None:
            entry = post.special_tokens.get(item.SpecialToken.id)
            names = entry.tokens if entry is not None else [item.SpecialToken.id]
            found += [(name, item.SpecialToken.type_id) for name in names]
    return tuple(found)


def document_ends(
    spec: TokenizerJson, settings: dict[str, Any], data: DataConfig, *, is_decoder: bool, name: str
) -> DocumentEnds:
    """What documents begin and end with: from data.add_bos and data.eod_token, else from the tokenizer.

    Args:
        settings: content of its tokenizer_config.json.
        is_decoder: the model reads a stream of documents.
    Raises:
        ConfigError: the tokenizer lacks such a token.
    """
    ids = spec.ids()
    return DocumentEnds(_begin(spec, settings, ids, data.add_bos, is_decoder), _eod(spec, settings, ids, data, name))


def trained_ends(data: DataConfig) -> DocumentEnds:
    """The document ends for a tokenizer that is trained here.

    Raises:
        ConfigError: data.eod_token is not one of its special tokens.
    """
    eod = data.eod_token or END_OF_TEXT
    if eod not in trained_names():
        raise _unknown_eod(eod, TRAIN, trained_names())
    return DocumentEnds((END_OF_TEXT,) if data.add_bos else (), eod)


def _begin(
    spec: TokenizerJson, settings: dict[str, Any], ids: dict[str, int], add_bos: bool | None, is_decoder: bool
) -> tuple[str, ...]:
    if not is_decoder or add_bos is False:
        return ()
    templates = templates_of(spec.post_processor)
    ahead = templates.ahead() if templates is not None else ()
    if ahead and all(token in ids for token in ahead):
        return ahead
    wanted = add_bos or settings.get("add_bos_token") is True
    bos = known_name(settings, "bos_token", ids) if wanted else None
    if add_bos and bos is None:
        raise ConfigError(
            "data.add_bos=true needs a beginning-of-text token, but the tokenizer has none; name one as bos_token in "
            "its tokenizer_config.json, or set data.add_bos=false"
        )
    return (bos,) if bos is not None else ()


def _eod(spec: TokenizerJson, settings: dict[str, Any], ids: dict[str, int], data: DataConfig, name: str) -> str:
    special = [entry.content for entry in spec.added_tokens]
    if data.eod_token is not None:
        if data.eod_token not in ids or data.eod_token == spec.model.unknown():
            raise _unknown_eod(data.eod_token, name, special)
        return data.eod_token
    named = next(named_tokens(settings, (END_OF_DOCUMENT_KEY, "eos_token", "sep_token")), None)
    if named is not None:
        if named not in ids:
            raise cannot_open(
                name, f"its tokenizer_config.json names the end token {named!r}, which its vocabulary lacks"
            )
        return _not_of_a_turn(named, special, spec.model.unknown()) if END_OF_DOCUMENT_KEY not in settings else named
    usual = next((candidate for candidate in EOD_NAMES if candidate in ids), None)
    if usual is None:
        raise cannot_open(
            name,
            "it has no end-of-document token; name one as data.eod_token, or as eos_token in its tokenizer_config.json",
        )
    return usual


def _not_of_a_turn(eos: str, special: list[str], unknown: str | None) -> str:
    """The end-of-document token to use instead of `eos`, if `eos` ends a chat turn and the vocabulary has both."""
    if eos not in CHAT_ENDS:
        return eos
    return next((token for token in DOCUMENT_ENDS if token in special and token != unknown), eos)


def _unknown_eod(eod: str, name: str, special: list[str]) -> ConfigError:
    shown = ", ".join(special[:SHOWN_NAMES]) + (" ..." if len(special) > SHOWN_NAMES else "")
    return ConfigError(
        f"data.eod_token={eod} is not a token of data.tokenizer={name} that can end documents; "
        + (f"use one of its special tokens: {shown}" if special else "add it to the tokenizer")
    )


def reads_documents(config: RunConfig) -> bool:
    """Whether the model is trained on the stream of documents itself, from left to right (a decoder)."""
    return config.model.architecture is Architecture.decoder


def planned_ends(config: RunConfig) -> DocumentEnds | None:
    """What documents will begin and end with, without opening the tokenizer; None if its files do not say.

    Raises:
        ConfigError: data.add_bos or data.eod_token do not fit the tokenizer, or a file of it is damaged.
    """
    data = config.data
    if data.tokenizer == TRAIN:
        return trained_ends(data)
    folder = Path(data.tokenizer).expanduser()
    files = read_folder(folder, data.tokenizer)
    if files is None:
        require_some_file(folder, data.tokenizer)
        return None
    return document_ends(files.spec, files.settings, data, is_decoder=reads_documents(config), name=data.tokenizer)


def described_ends(config: RunConfig) -> str:
    """One line about the document ends, for the plan."""
    ends = planned_ends(config)
    if ends is None:
        wanted = {"data.add_bos": config.data.add_bos, "data.eod_token": config.data.eod_token}
        typed = [f"{key}={value}" for key, value in wanted.items() if value is not None]
        return ", ".join(["begin and end as the tokenizer says when it is opened", *typed])
    begin = f"begin with {' '.join(ends.begin)}" if ends.begin else "begin with their text"
    return f"{begin}, end with {ends.eod}"

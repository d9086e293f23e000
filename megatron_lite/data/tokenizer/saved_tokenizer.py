"""The tokenizer saved with a checkpoint: it adds the same special tokens to a text, or a pair, as training did.

Shards contain only text, so one set of them serves every objective. Which special tokens a model reads depends on the
run: a decoder reads the begin tokens of documents, an encoder [CLS] and [SEP], T5 the end of its text. Here the
tokenizer.json of the prepared data gets a post-processor that does the same, its mask and sentinel tokens absorb the
space before them as in training, and tokenizer_config.json names the tokens whose ids are in config.json. Files that
are already right stay unchanged, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from megatron_lite.config.schema import Architecture, ObjectiveName, RunConfig
from megatron_lite.data.special import SpecialTokens
from megatron_lite.data.tokenizer.framing import END_OF_DOCUMENT_KEY, FIRST, SECOND, Template, Templates, templates_of
from megatron_lite.data.tokenizer.roles import SETTING_OF_ROLE
from megatron_lite.data.tokenizer.tokenizer import DIGESTS_KEY
from megatron_lite.data.tokenizer.tokenizer_files import (
    ADDED_TOKENS_FILE,
    NAMING_KEYS,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TOKENS_MAP_FILE,
    TokenizerFiles,
    encoded,
    known_name,
    parsed,
    read_folder,
)
from megatron_lite.errors import ConfigError, DataError, library_edge

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

LOADER_KEYS = (  # would let transformers build another tokenizer than tokenizer.json describes
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "added_tokens_decoder",
    "auto_map",
    "backend",
    "fix_mistral_regex",
    "from_slow",
    "is_local",
    "legacy",
    "local_files_only",
    "merges_file",
    "name_or_path",
    "split_special_tokens",
    "special_tokens_map_file",
    "tokenizer_file",
    "tokenizer_object",
    "vocab_file",
)
LIST_KEYS = ("additional_special_tokens", "extra_special_tokens")
MASKING = (ObjectiveName.masked_lm, ObjectiveName.masked_lm_nsp, ObjectiveName.bart_denoising)
WITH_SENTINELS = (ObjectiveName.span_corruption, ObjectiveName.ul2)


def exported_tokens(special: SpecialTokens, config: RunConfig) -> SpecialTokens:
    """Replace `bos` and `eos` by those that the model was trained with: for an encoder-decoder, the tokens that its
    decoder learned to begin and end with; otherwise those of the tokenizer."""
    if config.model.architecture is not Architecture.encoder_decoder:
        return special
    if config.objective.name is ObjectiveName.bart_denoising:
        return replace(special, bos=special.cls, eos=special.sep)
    return replace(special, eos=special.eod)


def saved_files(folder: Path, config: RunConfig, special: SpecialTokens) -> dict[str, bytes]:
    """Name -> content of the files of a tokenizer for a checkpoint of this run.

    Args:
        folder: the tokenizer of the prepared data.
        special: the tokens of the prepared data.
    Raises:
        DataError: the folder holds no tokenizer, or a file of it is damaged.
    """
    try:
        files = read_folder(folder, str(folder))
        if files is None:
            raise DataError(f"{folder / TOKENIZER_FILE} is missing; remove {folder.parent} to prepare it again")
        spec = parsed(files.content, dict[str, Any], str(folder / TOKENIZER_FILE), str(folder))
    except ConfigError as error:
        raise DataError(f"{error}; remove {folder.parent} to prepare it again") from error
    ids = files.spec.ids()
    names = {i: name for name, i in ids.items()}
    changed = json.loads(json.dumps(spec))
    changed["post_processor"] = _post_processor(files, spec, _frame(config, special, names), ids)
    changed["truncation"] = changed["padding"] = None
    changed["added_tokens"] = _without_stray_spaces(spec, _placed_in_text(config, special), names, folder)
    is_same = changed == {"added_tokens": [], "truncation": None, "padding": None, "post_processor": None, **spec}
    content = files.content if is_same else encoded(changed)
    settings = _settings(files, config, special, names, is_same)
    return {
        **_consistent(files, settings, ids),
        TOKENIZER_FILE: content,
        TOKENIZER_CONFIG_FILE: encoded(settings),
    }


@dataclass(frozen=True)
class Frame:
    """The special tokens that training put around a text, and around a pair."""

    templates: Templates
    is_exact: bool = False
    """Training used pairs, so the pair template must match; otherwise the tokenizer's own pair template may stay."""
    ends: tuple[str, ...] = ()
    """Tokens that the tokenizer may also append to a text, because documents in the shards end with them."""


def _frame(config: RunConfig, special: SpecialTokens, names: dict[int, str]) -> Frame | None:
    """None if the vocabulary lacks the tokens: then the tokenizer stays unchanged."""
    is_decoder = config.model.architecture is Architecture.decoder
    ends = () if special.eod is None else (names[special.eod],)
    if is_decoder:
        begin = tuple((names[i], 0) for i in special.begin)
        return Frame(Templates((*begin, (FIRST, 0)), (*begin, (FIRST, 0), (SECOND, 0))), ends=ends)
    if config.model.architecture is Architecture.encoder or config.objective.name is ObjectiveName.bart_denoising:
        if special.cls is None or special.sep is None:
            return None
        cls, sep = names[special.cls], names[special.sep]
        makes_pairs = config.objective.name is ObjectiveName.masked_lm_nsp
        second = 1 if makes_pairs else 0
        single: Template = ((cls, 0), (FIRST, 0), (sep, 0))
        return Frame(Templates(single, (*single, (SECOND, second), (sep, second))), is_exact=makes_pairs)
    single = ((FIRST, 0), *((name, 0) for name in ends))
    return Frame(Templates(single, (*single, (SECOND, 0), *((name, 0) for name in ends))))


def _post_processor(
    files: TokenizerFiles, spec: dict[str, Any], frame: Frame | None, ids: dict[str, int]
) -> dict[str, Any] | None:
    """The tokenizer's own post-processor if it does what training did, else a new one."""
    own = spec.get("post_processor")
    if frame is None or _does(templates_of(files.spec.post_processor), frame):
        return own
    template = {
        "type": "TemplateProcessing",
        "single": _items(frame.templates.single),
        "pair": _items(frame.templates.pair),
        "special_tokens": {
            name: {"id": name, "ids": [ids[name]], "tokens": [name]}
            for name, _ in (*frame.templates.single, *frame.templates.pair)
            if name not in (FIRST, SECOND)
        },
    }
    byte_level = _byte_level(own)
    return {"type": "Sequence", "processors": [byte_level, template]} if byte_level else template


def _does(own: Templates | None, frame: Frame) -> bool:
    if own is None:
        return False
    wanted = frame.templates
    behind = tuple((name, 0) for name in frame.ends)
    if _names(own.single) not in (_names(wanted.single), _names(wanted.single + behind)):
        return False
    if frame.is_exact:
        return own.pair == wanted.pair
    allowed = {*_names(wanted.pair), *frame.ends}
    start = _names(wanted.single)[: _names(wanted.single).index(FIRST) + 1]
    return own.pair == wanted.pair or (_names(own.pair)[: len(start)] == start and {*_names(own.pair)} <= allowed)


def _names(template: Template) -> list[str]:
    return [name for name, _ in template]


def _items(template: Template) -> list[dict[str, Any]]:
    texts = {FIRST: "A", SECOND: "B"}
    return [
        {"Sequence": {"id": texts[name], "type_id": kind}}
        if name in texts
        else {"SpecialToken": {"id": name, "type_id": kind}}
        for name, kind in template
    ]


def _byte_level(own: dict[str, Any] | None) -> dict[str, Any] | None:
    """The ByteLevel part of a post-processor; it changes offsets into the text, but no ids."""
    if own is None:
        return None
    parts = own["processors"] if own["type"] == "Sequence" else [own]
    return next((part for part in parts if part["type"] == "ByteLevel"), None)


def _placed_in_text(config: RunConfig, special: SpecialTokens) -> tuple[int, ...]:
    """Special tokens that replace parts of a text in the model's input: the mask token or the sentinels."""
    if config.objective.name in MASKING and special.mask is not None:
        return (special.mask,)
    return special.sentinels if config.objective.name in WITH_SENTINELS else ()


def _without_stray_spaces(
    spec: dict[str, Any], tokens: Sequence[int], names: dict[int, str], folder: Path
) -> list[dict[str, Any]]:
    """The added tokens, with flags such that those in `tokens` replace a word together with the space before it.

    Args:
        folder: the tokenizer of the prepared data, for messages.
    """
    entries = {entry["id"]: dict(entry) for entry in spec.get("added_tokens", [])}
    for i in tokens:
        plain = {"content": names[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        entries.setdefault(i, {"id": i, **plain}).update(special=True)
    if tokens:
        first = entries[tokens[0]]
        flags = _fitting_flags(spec, first["content"], (first.get("lstrip", False), first.get("rstrip", False)), folder)
        for i in tokens:
            entries[i].update(lstrip=flags[0], rstrip=flags[1])
    return [entries[i] for i in sorted(entries)]


def _fitting_flags(spec: dict[str, Any], name: str, own: tuple[bool, bool], folder: Path) -> tuple[bool, bool]:
    """(lstrip, rstrip) such that `a <mask> c` has the tokens of `a b c`, with the mask in the place of ` b`."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    remedy = f"remove {folder.parent} to prepare it again"
    with library_edge(DataError, f"{folder / TOKENIZER_FILE} cannot be opened", remedy):
        backend = Backend.from_str(json.dumps(spec))
        for flags in (own, (True, False), (True, True), (False, False)):
            token = AddedToken(name, lstrip=flags[0], rstrip=flags[1], special=True, normalized=False)
            backend.add_special_tokens([token])
            if _replaces_a_word(backend, name):
                return flags
    return own


def _replaces_a_word(backend: Backend, name: str) -> bool:
    """Also true if the tokens of a word depend on the words before it, so that this test cannot decide."""
    texts = ("a", "a b", "a b c", f"a {name} c")
    one, two, whole, found = (backend.encode(text, add_special_tokens=False).ids for text in texts)
    if whole[: len(two)] != two or two[: len(one)] != one:
        return True
    return bool(found == [*one, backend.token_to_id(name), *whole[len(two) :]])


def _settings(
    files: TokenizerFiles, config: RunConfig, special: SpecialTokens, names: dict[int, str], is_same: bool
) -> dict[str, Any]:
    """The tokenizer_config.json: makes transformers use tokenizer.json unchanged, and names the tokens of training."""
    ids = files.spec.ids()
    dropped = (*LOADER_KEYS, *LIST_KEYS, *NAMING_KEYS, END_OF_DOCUMENT_KEY)
    settings = {
        key: value for key, value in files.settings.items() if key not in dropped and _is_known(key, value, ids)
    }
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_input_names"] = _inputs(config)
    settings |= {key: _known(files.settings[key], ids) for key in LIST_KEYS if key in files.settings}
    settings |= {key: name for key in NAMING_KEYS if (name := known_name(files.settings, key, ids)) is not None}
    roles = {key: getattr(special, role) for role, key in SETTING_OF_ROLE.items()}
    exported = exported_tokens(special, config)
    roles |= {"bos_token": exported.bos, "eos_token": special.eod if exported.eos is None else exported.eos}
    settings |= {key: names[i] for key, i in roles.items() if i is not None}
    if special.eod is not None and settings["eos_token"] != names[special.eod]:
        settings[END_OF_DOCUMENT_KEY] = names[special.eod]
    if not is_same:  # ids do not change, so shards of the original tokenizer still fit
        digest = xxhash.xxh3_128_hexdigest(files.content)
        settings[DIGESTS_KEY] = [*(found for found in files.settings.get(DIGESTS_KEY, []) if found != digest), digest]
    return settings


def _is_known(key: str, value: Any, ids: dict[str, int]) -> bool:
    """False for a model-specific setting that names an unknown token: it would be added as a new one."""
    return not (key.endswith("_token") and isinstance(value, str)) or value in ids


def _inputs(config: RunConfig) -> list[str]:
    """The inputs of the model. With token_type_ids, GPT-2 would add a segment embedding that was never trained."""
    has_segments = config.model.architecture is Architecture.encoder and config.model.num_segments >= 2
    return ["input_ids", *(["token_type_ids"] if has_segments else []), "attention_mask"]


def _known(tokens: Any, ids: dict[str, int]) -> Any:
    """The tokens of a list, or of a mapping by name, that are in the vocabulary."""
    if isinstance(tokens, dict):
        return {key: token for key, token in tokens.items() if _content(token) in ids}
    return [token for token in tokens if _content(token) in ids] if isinstance(tokens, list) else []


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _consistent(files: TokenizerFiles, settings: dict[str, Any], ids: dict[str, int]) -> dict[str, bytes]:
    """The other files; those that name tokens must agree with tokenizer_config.json: transformers reads both."""
    others = dict(files.others)
    if TOKENS_MAP_FILE in others:
        others[TOKENS_MAP_FILE] = encoded(_those(settings, (*NAMING_KEYS, "additional_special_tokens")))
    if ADDED_TOKENS_FILE in others:
        found = parsed(others[ADDED_TOKENS_FILE], dict[str, Any], ADDED_TOKENS_FILE, files.name)
        others[ADDED_TOKENS_FILE] = encoded({name: i for name, i in found.items() if ids.get(name) == i})
    return others


def _those(settings: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: settings[key] for key in keys if key in settings}

"""Which token has which role, in tokenizers of every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.data.shards.prepared import PreparedData
from megatron_lite.data.sidecar import read_sidecar
from megatron_lite.data.special import SpecialTokens
from megatron_lite.data.tokenizer.tokenizer import Tokenizer, open_tokenizer, save_tokenizer
from megatron_lite.errors import DataError


def unigram(folder: Path, special: list[str], settings: dict[str, Any] | None = None) -> Tokenizer:
    """A SentencePiece-like tokenizer whose special tokens are ordinary pieces too, as in T5's files."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyz<>/_[]", *"0123456789", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    vocab = [("<unk>", 0.0), *((text, -1.0) for text in special), *((letter, -5.0) for letter in letters)]
    backend = Backend(models.Unigram(vocab, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings or {}))
    return open_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["[PAD]", "[CLS]", "[SEP]", "[MASK]"], SpecialTokens(eod=3, cls=2, sep=3, mask=4, pad=1)),
        (["<s>", "<pad>", "</s>", "<mask>"], SpecialTokens(eod=3, cls=1, sep=3, mask=4, pad=2)),
        (
            ["<pad>", "</s>", "<extra_id_1>", "<extra_id_0>", "<extra_id_3>"],
            SpecialTokens(eod=2, sep=2, pad=1, sentinels=(4, 3)),  # in the order of their numbers, up to the first gap
        ),
        (["</s>", "▁<extra_id_0>"], SpecialTokens(eod=1, sep=1, sentinels=(2,))),
        (
            ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>"],
            SpecialTokens(eod=1, fim_prefix=2, fim_middle=3, fim_suffix=4),
        ),
        (
            ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"],
            SpecialTokens(eod=1, fim_prefix=2, fim_middle=3, fim_suffix=4),
        ),
        (["</s>", "[NLU]", "[NLG]", "[S2S]"], SpecialTokens(eod=1, sep=1, mode_r=2, mode_x=3, mode_s=4)),
    ],
)
def test_usual_names(tmp_path: Path, names: list[str], expected: SpecialTokens) -> None:
    assert unigram(tmp_path / "t", names).special == expected


def test_settings_decide_before_usual_names(tmp_path: Path) -> None:
    settings = {"mask_token": {"content": "<blank>", "lstrip": True}, "pad_token": "</s>", "cls_token": "gone"}
    special = unigram(tmp_path / "t", ["</s>", "<pad>", "<mask>", "<blank>", "<s>"], settings).special
    assert special == SpecialTokens(eod=1, cls=5, sep=1, mask=4, pad=1)


def test_special_tokens_map_is_read_too(tmp_path: Path) -> None:
    unigram(tmp_path / "t", ["</s>", "<blank>"])
    (tmp_path / "t" / "special_tokens_map.json").write_text('{"mask_token": "<blank>"}')
    assert open_tokenizer(str(tmp_path / "t")).special.mask == 2


def test_token_for_unknown_text_has_no_role(tmp_path: Path) -> None:
    opened = unigram(tmp_path / "t", ["</s>"], {"pad_token": "<unk>"})
    assert opened.special.pad is None
    assert 0 in opened.encode("é")
    assert not opened.vocabulary().is_special[0]


@pytest.mark.parametrize("text", ["a <extra_id_0> b", "<mask>", "</S><pad></s>", "x<pad>y<s>"])
def test_names_that_are_pieces_too_stay_text(tmp_path: Path, text: str) -> None:
    opened = unigram(tmp_path / "t", ["<s>", "<pad>", "</s>", "<mask>", "<extra_id_0>"])
    ids = opened.encode(text)
    assert not opened.vocabulary().is_special[ids].any()
    assert opened.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_text_that_encodes_to_a_special_token(tmp_path: Path) -> None:
    opened = unigram(tmp_path / "t", ["</s>"], {"mask_token": "a"})
    with pytest.raises(DataError) as error:
        opened.encode("a banana")
    assert str(error.value) == (
        "the text 'a banana'... encodes to the special token 'a' itself; name another data.tokenizer, or other special "
        "tokens in its tokenizer_config.json"
    )


def test_saved_copies_keep_the_roles(tmp_path: Path) -> None:
    opened = unigram(tmp_path / "t", ["</s>", "<blank>", "<extra_id_0>"], {"mask_token": "<blank>"})
    saved = save_tokenizer(str(tmp_path / "t"), tmp_path / "saved")
    assert saved.special == opened.special
    assert saved.special.mask == 2


def test_roles_of_a_folder_that_goes_through_transformers(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "the", "##n", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_max_length": 9}')
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    opened = open_tokenizer(str(tmp_path))
    assert opened.special == SpecialTokens(eod=3, cls=2, sep=3, mask=4, pad=0)
    vocabulary = opened.vocabulary()
    assert vocabulary.is_special.tolist() == [True, False, True, True, True, True, False, False, False]
    assert vocabulary.begins_word.tolist() == [True] * 7 + [False, True]
    assert opened.encode("then [MASK].")[0:2] == [6, 7]
    assert 4 not in opened.encode("then [MASK].")


def test_roles_stand_in_manifest_and_sidecar(
    prepared_corpus: tuple[PreparedData, RunConfig], config_for: Callable[..., RunConfig]
) -> None:
    prepared, _ = prepared_corpus
    tokenizer = prepared.open_tokenizer()
    assert tokenizer is not None
    assert prepared.special == tokenizer.special
    sidecar = read_sidecar(prepared.train[0].prefix)
    assert sidecar is not None
    assert SpecialTokens.from_facts(sidecar) == tokenizer.special
    assert SpecialTokens.from_facts({"eod_id": 7}) == SpecialTokens(eod=7)  # sidecars of the first version


def test_vocabulary_of_prepared_data(
    prepared_corpus: tuple[PreparedData, RunConfig], corpus: Path, config_for: Callable[..., RunConfig]
) -> None:
    prepared, _ = prepared_corpus
    vocabulary = prepared.vocabulary
    assert vocabulary.size == prepared.vocab_size == len(vocabulary.is_special) == len(vocabulary.begins_word)
    larger = prepare(config_for(corpus, vocab_size=1000), report=lambda line: None).vocabulary
    assert larger.size == 1000 == len(larger.is_special)
    assert larger.is_special[vocabulary.size :].all()
    assert larger.special == vocabulary.special


def test_vocabulary_of_shards_without_their_tokenizer(
    tmp_path: Path, prepared_corpus: tuple[PreparedData, RunConfig], config_for: Callable[..., RunConfig]
) -> None:
    made, _ = prepared_corpus
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"copy{suffix}").write_bytes(Path(f"{made.train[0].prefix}{suffix}").read_bytes())
    vocabulary = prepare(config_for(tmp_path / "copy"), report=lambda line: None).vocabulary
    assert vocabulary.special == made.special  # from the sidecar
    assert vocabulary.is_special is None
    assert vocabulary.begins_word is None

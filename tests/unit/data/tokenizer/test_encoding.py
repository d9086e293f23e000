"""Long documents: the ids of the whole are those of the pieces joined, for any text and any tokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from megatron_lite.data.tokenizer import encoding
from megatron_lite.data.tokenizer.encoding import KNOWN_PATTERNS, Encoder, cuts_are_local, split_long
from megatron_lite.data.tokenizer.tokenizer import open_tokenizer
from megatron_lite.errors import DataError
from tests.tokenizer_families import FAMILIES, LLAMA3_PATTERN, TEXTS, changed
from tests.unit.remedies import obeys

PIECE = 40
CUT = ("gpt2", "llama3", "qwen_chat", "smollm_chat", "bert", "roberta", "t5")
"""Families whose words end at a space between letters."""
ALPHABET = st.characters(exclude_categories=["Cs"]) | st.sampled_from("ab AB \n\t.▁Ġ'12漢字é")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Encoder]:
    folder = tmp_path_factory.mktemp("families")
    return {name: open_tokenizer(str(make(folder / name)))._encoder for name, make in FAMILIES.items()}


def both(encoder: Encoder, text: str, monkeypatch: pytest.MonkeyPatch | None = None) -> tuple[list[int], list[int]]:
    """Ids of the text whole, and as a long document."""
    with pytest.MonkeyPatch.context() as patch:
        whole = encoder.encode([text])[0].tolist()
        patch.setattr(encoding, "PIECE_CHARACTERS", PIECE)
        return whole, encoder.encode([text])[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@given(text=st.lists(st.text(ALPHABET, min_size=1, max_size=12), max_size=30).map(" ".join))
@example(text="a\n" * 80)
@example(text="漢字" * 60)
@example(text="def f(x):\n    return x + 1\n\n" * 8)
@example(text=" ".join(TEXTS[:2]))
@example(text="x </s> y <mask> z [SEP] word <extra_id_0> and <|endoftext|> so on " * 4)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_text_gives_the_ids_of_the_whole(encoders: dict[str, Encoder], family: str, text: str) -> None:
    whole, joined = both(encoders[family], text)
    assert joined == whole


@pytest.mark.parametrize("family", FAMILIES)
def test_which_tokenizers_cut(encoders: dict[str, Encoder], family: str) -> None:
    assert encoders[family].may_cut is (family in CUT or family in ("llama3_chat", "bart"))


def test_a_text_like_sentencepiece_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", PIECE)
    opened = open_tokenizer(str(FAMILIES["llama2"](tmp_path / "t")))
    for text in (" ".join(TEXTS), "a\nb\n" * 60, "漢字" * 80, "the </s> fox <s> jumps"):
        assert opened.decode(opened.encode(text)) == text


@pytest.mark.parametrize("text", ["x" * 1000, "ab " * 400, "\n" * 500, "é\n" * 300, " ".join(TEXTS)])
def test_split_long_loses_nothing(text: str) -> None:
    assert "".join(split_long(text, 64)) == text


def test_long_texts_are_cut_about_where_they_should(encoders: dict[str, Encoder]) -> None:
    """So that one document uses all threads: no piece of plain words is much longer than asked for."""
    parts = split_long("some words and more " * 500, 64)
    assert len(parts) > 100
    assert max(map(len, parts)) <= 64


def spec_with(base: Path, **parts: Any) -> dict[str, Any]:
    return {**json.loads((base / "tokenizer.json").read_text()), **parts}


def as_json(part: Any) -> Any:
    return json.loads(part.__getstate__())


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": as_json(normalizers.Prepend("▁"))},
        {"normalizer": as_json(normalizers.Strip())},
        {"normalizer": as_json(normalizers.Replace(Regex("a b"), "c"))},
        {"normalizer": as_json(normalizers.Replace("a b", "c"))},
        {"pre_tokenizer": None},
        {"pre_tokenizer": as_json(pre_tokenizers.Metaspace(split=False))},
        {"pre_tokenizer": as_json(pre_tokenizers.ByteLevel(use_regex=False))},
        {"pre_tokenizer": as_json(pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated"))},
        {"pre_tokenizer": as_json(pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "merged_with_next"))},
    ],
)
def test_what_may_reach_over_a_space_is_encoded_whole(tmp_path: Path, parts: dict[str, Any]) -> None:
    base = FAMILIES["gpt2"](tmp_path / "t")
    assert cuts_are_local(spec_with(base))
    assert not cuts_are_local(spec_with(base, **parts))


@pytest.mark.parametrize("change", [{"content": "lamp jumps"}, {"content": "lamp", "rstrip": True}])
def test_added_tokens_that_reach_over_a_space_forbid_cuts(tmp_path: Path, change: dict[str, Any]) -> None:
    base = FAMILIES["gpt2"](tmp_path / "t")
    plain = {"id": 340, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    spec = spec_with(base)
    spec["added_tokens"].append(plain | change)
    assert not cuts_are_local(spec)
    encoder = Encoder(spec, {0: "<|endoftext|>"}, 0, "t")
    whole, joined = both(encoder, "the quick lamp jumps over " * 10)
    assert joined == whole
    assert 340 in whole


def test_the_probe_finds_what_the_structure_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "cuts_are_local", lambda spec: True)
    spec = spec_with(FAMILIES["llama2"](tmp_path / "t"))
    assert not Encoder(spec, {2: "</s>"}, 2, "t").may_cut


def test_known_patterns_are_those_of_the_families() -> None:
    assert LLAMA3_PATTERN in KNOWN_PATTERNS
    assert r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+" in KNOWN_PATTERNS


@pytest.mark.parametrize("family", FAMILIES)
def test_no_text_gives_a_special_token(encoders: dict[str, Encoder], family: str) -> None:
    """Whole names, halves of names and names in a row."""
    encoder = encoders[family]
    names = list(encoder._roles.values())
    generator = random.Random(3)
    text = "".join(generator.choice([*names, " ", "a", "\n", *(name.upper() for name in names)]) for _ in range(300))
    ids = encoder.encode([text])[0]
    assert not set(ids.tolist()) & encoder._roles.keys()


def test_a_bpe_that_merges_the_name_of_a_special_token(tmp_path: Path) -> None:
    backend = Backend(models.BPE())
    backend.train_from_iterator(["</s>"] * 9, trainers.BpeTrainer(vocab_size=20, show_progress=False))
    assert backend.encode("</s>").tokens == ["</s>"]
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    opened = open_tokenizer(str(changed(tmp_path, eos_token="</s>")))
    ids = opened.encode("</s></s>")
    assert opened.eod_id not in ids
    assert opened.decode(ids).replace(" ", "") == "</s></s>"


@obeys("megatron_lite/data/tokenizer/encoding.py:_encode_together")
def test_what_the_library_cannot_encode_is_an_error_of_ours(encoders: dict[str, Encoder]) -> None:
    with pytest.raises(DataError, match=r"data\.tokenizer=.* cannot encode a text of up to 3 characters, 'a.*split or"):
        encoders["gpt2"].encode(["the fox", "a\ud800b"])
    assert len(encoders["gpt2"].encode(["the fox"])[1]) == 1

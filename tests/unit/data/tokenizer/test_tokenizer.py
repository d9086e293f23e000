"""Training and opening tokenizers; text that looks like a special token stays text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers

from megatron_lite.config.compose import compose
from megatron_lite.config.schema import RunConfig
from megatron_lite.data.tokenizer.bpe import train_bpe
from megatron_lite.data.tokenizer.framing import planned_ends
from megatron_lite.data.tokenizer.roles import trained_names
from megatron_lite.data.tokenizer.tokenizer import Tokenizer, open_tokenizer, save_tokenizer
from megatron_lite.data.tokenizer.tokenizer_files import require_some_file
from megatron_lite.data.tokenizer.vocabulary import SMALLEST_BPE, planned_vocab_size
from megatron_lite.errors import ConfigError, DataError
from tests.unit.data.conftest import document
from tests.unit.remedies import obeys

TEXTS = [document(i) for i in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_bpe(iter(TEXTS), 490, path)
    return path


@pytest.fixture
def bpe(folder: Path) -> Tokenizer:
    return open_tokenizer(str(folder))


def test_trained_size_and_eod(bpe: Tokenizer) -> None:
    assert bpe.vocab_size == 490
    assert (bpe.eod, bpe.eod_id) == ("<|endoftext|>", 0)


def test_training_is_repeatable(folder: Path, tmp_path: Path) -> None:
    train_bpe(iter(TEXTS), 490, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "text", ["", "plain", " leading and\n\ttabs  ", "größe 漢字 🙂", "\x00\u2028\u0085\x0c", TEXTS[7]]
)
def test_any_text_comes_back(bpe: Tokenizer, text: str) -> None:
    assert bpe.decode(bpe.encode(text)) == text


def test_name_of_the_eod_in_a_text_is_text(bpe: Tokenizer) -> None:
    text = "before<|endoftext|>after <|endoftext|>"
    ids = bpe.encode(text)
    assert bpe.eod_id not in ids
    assert bpe.decode(ids) == text


def test_name_of_any_special_token_in_a_text_is_text(folder: Path, tmp_path: Path) -> None:
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<|pad|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    opened = open_tokenizer(str(tmp_path))
    assert opened.vocab_size == 491
    assert 490 not in opened.encode("a <|pad|> b")
    assert opened.decode([490]) == "<|pad|>"


@pytest.mark.parametrize("name", trained_names())
def test_name_of_a_special_token_gives_the_pieces_of_its_letters(bpe: Tokenizer, name: str) -> None:
    text = f"a{name}b {name} {name}{name}\n"
    ids = bpe.encode(text)
    assert not bpe.vocabulary().is_special[ids].any()
    assert bpe.decode(ids) == text


def test_every_trained_tokenizer_has_every_role(bpe: Tokenizer) -> None:
    special = bpe.special
    assert [bpe.decode([i]) for i in (special.cls, special.sep, special.mask, special.pad)] == [
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "[PAD]",
    ]
    assert [bpe.decode([i]) for i in (special.mode_r, special.mode_s, special.mode_x)] == ["[NLU]", "[S2S]", "[NLG]"]
    assert [bpe.decode([i]) for i in (special.fim_prefix, special.fim_suffix, special.fim_middle)] == [
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
    ]
    assert bpe.decode(special.sentinels) == "".join(f"<extra_id_{i}>" for i in range(100))
    assert bpe.vocabulary().is_special.sum() == len(trained_names()) == 111


def test_smallest_trained_vocabulary_is_bytes_and_special_tokens(tmp_path: Path) -> None:
    smallest = train_bpe(iter(TEXTS), SMALLEST_BPE, tmp_path)
    assert smallest.vocab_size == SMALLEST_BPE
    assert smallest.decode(smallest.encode("any größe")) == "any größe"


def test_documents_get_one_eod_each(bpe: Tokenizer) -> None:
    documents = ["one", "", "a <|endoftext|> b", "two words"]
    tokens, lengths = bpe.encode_documents(documents)
    assert lengths.sum() == len(tokens)
    ends = np.cumsum(lengths)
    assert np.flatnonzero(tokens == bpe.eod_id).tolist() == (ends - 1).tolist()
    parts = np.split(tokens, ends[:-1])
    assert [part[:-1].tolist() for part in parts] == [bpe.encode(text) for text in documents]


def test_ids_agree_with_transformers(bpe: Tokenizer, folder: Path) -> None:
    from transformers import AutoTokenizer

    peer = AutoTokenizer.from_pretrained(str(folder))
    assert all(bpe.encode(text) == peer(text, add_special_tokens=False)["input_ids"] for text in TEXTS)
    assert peer.eos_token_id == bpe.eod_id


def test_decode_leaves_out_padded_rows(bpe: Tokenizer) -> None:
    assert bpe.decode([*bpe.encode("word"), 490, 622]) == "word"


def test_truncation_and_padding_of_a_folder_are_switched_off(folder: Path, bpe: Tokenizer, tmp_path: Path) -> None:
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(5)
    backend.enable_padding(length=5)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert open_tokenizer(str(tmp_path)).encode(TEXTS[0]) == bpe.encode(TEXTS[0])


@pytest.mark.parametrize("name", ["Train", "TRAIN", "trian", "traim"])
def test_a_slip_of_train_asks_no_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"data.tokenizer={name} .* is spelled `train`; use `train`, or the folder"):
        require_some_file(Path(name), name)
    for other in ("gpt2", "t5", f"owner/{name}"):
        require_some_file(Path(other), other)
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=r"there is no tokenizer\.json in it"):
        require_some_file(Path(name), name)


def gpt2_folder(folder: Path) -> Path:
    """vocab.json and merges.txt, as GPT-2 was published."""
    folder.mkdir()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, "th", "the", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return folder


def test_folder_without_tokenizer_json_goes_through_transformers(tmp_path: Path) -> None:
    name = str(gpt2_folder(tmp_path / "gpt2"))
    opened = open_tokenizer(name)
    assert opened.vocab_size == 259
    assert opened.eod_id == 258
    assert opened.decode(opened.encode("the other <|endoftext|>")) == "the other <|endoftext|>"
    assert 257 in opened.encode("the")
    assert 258 not in opened.encode("<|endoftext|>")
    saved = save_tokenizer(name, tmp_path / "saved")
    assert saved.encode("the other") == opened.encode("the other")
    assert open_tokenizer(str(tmp_path / "saved")).digest == saved.digest
    config = RunConfig()
    config.data.tokenizer = name
    assert planned_vocab_size(config) == 259


def save_word_tokenizer(folder: Path, vocab: dict[str, int], **config: str) -> Path:
    folder.mkdir()
    backend = Backend(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.normalizer = normalizers.Lowercase()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_eod_that_is_an_ordinary_piece_of_the_vocabulary(tmp_path: Path) -> None:
    """As in SentencePiece vocabularies: no added token, but a piece of the same text."""
    folder = save_word_tokenizer(tmp_path / "t", {"[UNK]": 0, "</s>": 1, "word": 2}, eos_token="</s>")
    opened = open_tokenizer(str(folder))
    assert opened.eod_id == 1
    tokens, _ = opened.encode_documents(["word </s> word", "word", "</S> word </s>"])
    assert tokens.tolist() == [2, 0, 2, 1, 2, 1, 0, 2, 0, 1]


@obeys("megatron_lite/data/tokenizer/encoding.py:_refuse_roles")
def test_text_that_encodes_to_the_end_of_document_token(tmp_path: Path) -> None:
    folder = save_word_tokenizer(tmp_path / "t", {"[UNK]": 0, "word": 1}, eos_token="[UNK]")
    with pytest.raises(
        DataError, match=r"the text 'strange'\.\.\. encodes to the end-of-document token '\[UNK\]' itself"
    ):
        open_tokenizer(str(folder)).encode("strange")
    other = save_word_tokenizer(tmp_path / "other", {"[UNK]": 0, "word": 1, "</s>": 2}, eos_token="</s>")
    assert open_tokenizer(str(other)).encode("strange") == [0]


def test_vocabulary_with_gaps_counts_the_largest_id(tmp_path: Path) -> None:
    folder = save_word_tokenizer(tmp_path / "t", {"[UNK]": 0, "</s>": 1, "word": 1000}, eos_token="</s>")
    config = RunConfig()
    config.data.tokenizer = str(folder)
    assert open_tokenizer(str(folder)).vocab_size == planned_vocab_size(config) == 1001


def test_folder_without_an_eod(tmp_path: Path) -> None:
    folder = save_word_tokenizer(tmp_path / "t", {"[UNK]": 0, "word": 1})
    with pytest.raises(
        ConfigError, match=r"it has no end-of-document token; name one as data.eod_token, or as eos_token in its"
    ):
        open_tokenizer(str(folder))


def test_eod_is_the_one_that_the_folder_names(tmp_path: Path) -> None:
    vocab = {"[UNK]": 0, "</s>": 1, "[SEP]": 2, "end": 3}
    folder = save_word_tokenizer(tmp_path / "t", vocab)
    config = folder / "tokenizer_config.json"
    for settings, eod_id in (
        ({"eos_token": "end"}, 3),
        ({"eos_token": {"content": "end", "lstrip": False}}, 3),
        ({"eos_token": None, "sep_token": "[SEP]"}, 2),
        ({}, 1),  # the first of the usual names
    ):
        config.write_text(json.dumps(settings))
        assert open_tokenizer(str(folder)).eod_id == eod_id
    for content, fault in (
        ("{", r".*tokenizer_config\.json is damaged: Input data was truncated"),
        ("[]", r".*tokenizer_config\.json is damaged: Expected `object`, got `array`"),
        ('{"eos_token": 7}', r"eos_token in .*tokenizer_config\.json does not name a token: 7"),
        (
            '{"eos_token": "other"}',
            r"its tokenizer_config\.json names the end token 'other', which its vocabulary lacks",
        ),
    ):
        config.write_text(content)
        with pytest.raises(ConfigError, match=rf"cannot be opened: {fault}"):
            open_tokenizer(str(folder))


@pytest.mark.parametrize("content", ["{}", "not json", "[1]", '{"model": {"type": "BPE", "vocab": {"</s>": 0}}}'])
@obeys("megatron_lite/data/tokenizer/tokenizer.py:_opened")
def test_broken_tokenizer_json(tmp_path: Path, folder: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    said = rf"data\.tokenizer={tmp_path} cannot be opened: .*; use `train`, or the folder or hub name of a tokenizer"
    with pytest.raises(ConfigError, match=said):
        open_tokenizer(str(tmp_path))
    assert open_tokenizer(str(folder)).vocab_size == 490


def test_missing_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"missing cannot be opened: it is not a folder .*; use `train`, or the folder"
    ):
        open_tokenizer(str(tmp_path / "missing"))
    (tmp_path / "config.json").write_text("{}")
    said = rf"data\.tokenizer={tmp_path} cannot be opened: there is no tokenizer\.json in it, nor any other"
    with pytest.raises(ConfigError, match=said):
        open_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match=said):  # the dry run knows it, too
        planned_ends(compose("pretrain_gpt", [f"data.tokenizer={tmp_path}"]))


@pytest.mark.parametrize(("kind", "file_name"), [("BertTokenizer", "vocab.txt"), ("GPT2Tokenizer", "merges.txt")])
@obeys("megatron_lite/data/tokenizer/tokenizer_files.py:cannot_open")
def test_files_of_an_unknown_kind(tmp_path: Path, kind: str, file_name: str) -> None:
    """As Megatron's --vocab-file and --merge-file name them: nothing beside them says of which kind they are."""
    letters = ["a", "b", "Ġ", "ab"]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, "##b"]))
    (tmp_path / "vocab.json").write_text(json.dumps({text: i for i, text in enumerate([*letters, "<|endoftext|>"])}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    for other in {"vocab.txt", "merges.txt"} - {file_name}:
        (tmp_path / other).unlink()
    with pytest.raises(ConfigError) as error:
        open_tokenizer(str(tmp_path))
    remedy = f'{{"tokenizer_class": "{kind}"}}'
    assert str(error.value) == (
        f"data.tokenizer={tmp_path} cannot be opened: the tokenizer class of its {file_name} is unknown; write the "
        f"class into tokenizer_config.json beside it, such as {remedy}; use `train`, or the folder or hub name of a "
        "tokenizer"
    )
    (tmp_path / "tokenizer_config.json").write_text(remedy)
    opened = open_tokenizer(str(tmp_path))
    assert opened.decode(opened.encode("ab")) == "ab"


def test_sentencepiece_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_lite.data.tokenizer.foreign.find_spec", lambda name: None)
    (tmp_path / "spiece.model").write_bytes(b"\n\x0b")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(ConfigError, match=r"need two more packages; run `pip install sentencepiece protobuf`; use `tr"):
        open_tokenizer(str(tmp_path))

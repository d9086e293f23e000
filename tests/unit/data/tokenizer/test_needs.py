"""Tokenizers that lack what an objective needs: refused with the command that adds it, and that command."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from megatron_lite.config.schema import ObjectiveName, RunConfig
from megatron_lite.data.__main__ import main
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.data.shards.prepared import PreparedData, load_prepared
from megatron_lite.data.special import SpecialTokens
from megatron_lite.data.tokenizer.needs import add_tokens, require_tokens
from megatron_lite.data.tokenizer.tokenizer import open_tokenizer
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.objectives.build import build_objective
from tests.unit.remedies import obeys

ConfigFor = Callable[..., RunConfig]
TEXT = "the mask <extra_id_3> [MASK] [CLS] <fim_prefix> goes"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A byte-level BPE that has nothing but the end of documents, as GPT-2."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(
        models.BPE({piece: i for i, piece in enumerate([*letters, "th", "the"])}, [("t", "h"), ("th", "e")])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "bare").mkdir()
    backend.save(str(tmp_path / "bare" / "tokenizer.json"))
    return tmp_path / "bare"


@pytest.mark.parametrize("objective", ["causal_lm", "prefix_lm"])
def test_language_models_need_nothing(bare: Path, objective: str) -> None:
    require_tokens(open_tokenizer(str(bare)).special, objective, tokenizer=str(bare), folder=bare)


def test_a_trained_tokenizer_has_everything(prepared_corpus: tuple[PreparedData, RunConfig]) -> None:
    prepared, _ = prepared_corpus
    for objective in ObjectiveName:
        require_tokens(prepared.special, objective, tokenizer="train", folder=prepared.tokenizer_dir, num_sentinels=100)


@pytest.mark.parametrize(
    ("objective", "missing"),
    [
        ("masked_lm", "[CLS], [SEP], [MASK]"),
        ("masked_lm_nsp", "[CLS], [SEP], [MASK], [PAD]"),
        ("bart_denoising", "[CLS], [SEP], [MASK], [PAD]"),
        ("span_corruption", "[PAD], <extra_id_0>, <extra_id_1>, <extra_id_2>"),
        ("ul2", "[PAD], [NLU], [S2S], [NLG], <extra_id_0>, <extra_id_1>, <extra_id_2>"),
        ("fill_in_the_middle", "<fim_prefix>, <fim_suffix>, <fim_middle>"),
    ],
)
@obeys("megatron_lite/data/tokenizer/needs.py:require_tokens")
def test_refusal_names_a_command_that_helps(
    tmp_path: Path, bare: Path, capsys: pytest.CaptureFixture[str], objective: str, missing: str
) -> None:
    before = open_tokenizer(str(bare))
    with pytest.raises(ConfigError) as error:
        require_tokens(before.special, objective, tokenizer=str(bare), folder=bare, num_sentinels=3)
    command = f"python -m megatron_lite.data add-tokens --objective {objective} {bare} FOLDER"
    assert str(error.value) == (
        f"data.tokenizer={bare} lacks {missing}, which objective.name={objective} needs; add them with `{command}` and "
        "set data.tokenizer=FOLDER"
    )
    folder = tmp_path / "extended"
    assert main(shlex.split(command.replace("FOLDER", str(folder)))[3:]) == 0
    assert f"use it with data.tokenizer={folder}" in capsys.readouterr().out
    after = open_tokenizer(str(folder))
    require_tokens(after.special, objective, tokenizer=str(folder), folder=folder, num_sentinels=3)
    assert after.eod_id == before.eod_id
    assert after.encode(TEXT) == before.encode(TEXT)
    assert after.vocabulary().is_special[before.vocab_size :].all()


def test_more_sentinels_than_usual(tmp_path: Path, prepared_corpus: tuple[PreparedData, RunConfig]) -> None:
    prepared, _ = prepared_corpus
    with pytest.raises(ConfigError) as error:
        require_tokens(
            prepared.special, "span_corruption", tokenizer="train", folder=prepared.tokenizer_dir, num_sentinels=120
        )
    assert str(error.value) == (
        "data.tokenizer=train lacks <extra_id_100>, <extra_id_101>, <extra_id_102>, <extra_id_103>, <extra_id_104>, "
        "<extra_id_105> ... <extra_id_119> (20 tokens), which objective.name=span_corruption needs; add them with "
        "`python -m megatron_lite.data add-tokens --objective span_corruption --sentinels 120 "
        f"{prepared.tokenizer_dir} FOLDER` and set data.tokenizer=FOLDER"
    )
    added, copy = add_tokens(str(prepared.tokenizer_dir), tmp_path / "new", "span_corruption", 120)
    assert len(added) == 20
    assert len(copy.special.sentinels) == 120


def test_ul2_without_mode_tokens(bare: Path) -> None:
    special = replace(open_tokenizer(str(bare)).special, pad=0, sentinels=(1, 2, 3))
    require_tokens(special, "ul2", tokenizer="x", folder=bare, num_sentinels=3, mode_tokens=False)
    with pytest.raises(ConfigError, match=r"lacks \[NLU\], \[S2S\], \[NLG\], which objective\.name=ul2 needs"):
        require_tokens(special, "ul2", tokenizer="x", folder=bare, num_sentinels=3)


def test_shards_without_their_tokenizer() -> None:
    with pytest.raises(ConfigError) as error:
        require_tokens(SpecialTokens(), "fill_in_the_middle", tokenizer="train", folder=None)
    assert str(error.value) == (
        "data.tokenizer=train lacks <|endoftext|>, <fim_prefix>, <fim_suffix>, <fim_middle>, which "
        "objective.name=fill_in_the_middle needs: the shards came without their tokenizer; name its folder in "
        "data.tokenizer"
    )


def copied_alone(prepared: PreparedData, folder: Path) -> Path:
    """The pair and its sidecar, which holds the roles, without the tokenizer."""
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{prepared.train[0].prefix}{suffix}", folder / f"copy{suffix}")
    return folder / "copy"


@pytest.mark.parametrize("objective", ["masked_lm", "masked_lm_nsp"])
def test_masking_needs_the_tokenizer_itself(
    tmp_path: Path, prepared_corpus: tuple[PreparedData, RunConfig], config_for: ConfigFor, objective: str
) -> None:
    made, _ = prepared_corpus
    source = copied_alone(made, tmp_path)
    alone, named = config_for(source), config_for(source, tokenizer=str(made.tokenizer_dir))
    alone.objective.name = named.objective.name = ObjectiveName(objective)
    expected = (
        f"data.tokenizer=train provides no tokenizer, which objective.name={objective} needs to mask only "
        "ordinary tokens: the shards came without theirs; name its folder in data.tokenizer"
    )
    said: list[str] = []
    with pytest.raises(ConfigError) as error:
        prepare(alone, report=said.append)
    assert str(error.value) == expected
    assert said == []  # before a text is read
    folder = prepare(config_for(source), report=said.append).folder  # shards that another objective made ready
    with pytest.raises(ConfigError) as error:
        load_prepared(folder, alone)
    assert str(error.value) == expected
    assert prepare(named, report=said.append).vocabulary.is_special is not None


@pytest.mark.parametrize("objective", sorted(set(ObjectiveName) - {"masked_lm", "masked_lm_nsp"}))
def test_the_roles_alone_do_for_the_others(
    tmp_path: Path, prepared_corpus: tuple[PreparedData, RunConfig], config_for: ConfigFor, objective: str
) -> None:
    config = config_for(copied_alone(prepared_corpus[0], tmp_path), seq_length=32)
    config.objective.name = ObjectiveName(objective)
    config.objective.permute_sentences = False
    prepared = prepare(config, report=lambda line: None)
    assert prepared.tokenizer_dir is None
    build_objective(config.objective, config.data, prepared.vocabulary)


@obeys("megatron_lite/data/tokenizer/needs.py:no_sentences")
def test_missing_sentence_ends_are_reported_before_a_token_is_read(
    tmp_path: Path, prepared_corpus: tuple[PreparedData, RunConfig], config_for: ConfigFor
) -> None:
    made, _ = prepared_corpus
    source = copied_alone(made, tmp_path)
    alone, named = config_for(source), config_for(source, tokenizer=str(made.tokenizer_dir))
    alone.objective.name = named.objective.name = ObjectiveName.bart_denoising
    said: list[str] = []
    with pytest.raises(DataError, match=r"copy has no sentence boundaries, .*; name its folder in data\.tokenizer"):
        prepare(alone, report=said.append)
    assert said == []
    folder = prepare(config_for(source), report=said.append).folder  # shards that another objective made ready
    with pytest.raises(DataError, match="copy has no sentence boundaries"):
        load_prepared(folder, alone)
    assert prepare(named, report=said.append).train[0].sentences is not None


def test_opening_prepared_data_leaves_the_tokenizer_closed(
    prepared_corpus: tuple[PreparedData, RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank opens it; the tables are made where they are asked for."""
    made, config = prepared_corpus

    def refuse(name: str) -> None:
        raise AssertionError(f"opened {name}")

    monkeypatch.setattr("megatron_lite.data.shards.prepared.open_tokenizer", refuse)
    config.objective.name = ObjectiveName.masked_lm
    prepared = load_prepared(made.folder, config)
    with pytest.raises(AssertionError, match="opened"):
        _ = prepared.vocabulary


def test_only_what_is_missing_is_added(tmp_path: Path, bare: Path) -> None:
    first, _ = add_tokens(str(bare), tmp_path / "a", "masked_lm")
    second, copy = add_tokens(str(tmp_path / "a"), tmp_path / "b", "span_corruption")
    third, _ = add_tokens(str(tmp_path / "b"), tmp_path / "c", "bart_denoising")
    assert first == ["[CLS]", "[SEP]", "[MASK]"]
    assert second == ["[PAD]", *(f"<extra_id_{i}>" for i in range(100))]
    assert third == []
    assert copy.vocab_size == 363
    assert copy.decode(copy.special.sentinels[:2]) == "<extra_id_0><extra_id_1>"


def test_copy_works_in_transformers(tmp_path: Path, bare: Path) -> None:
    from transformers import AutoTokenizer

    _, copy = add_tokens(str(bare), tmp_path / "new", "masked_lm")
    peer = AutoTokenizer.from_pretrained(str(tmp_path / "new"))
    assert (peer.cls_token_id, peer.mask_token_id) == (copy.special.cls, copy.special.mask)
    assert len(peer) == copy.vocab_size


def test_shards_of_the_original_go_with_the_copy(
    tmp_path: Path, bare: Path, corpus: Path, config_for: ConfigFor
) -> None:
    made = prepare(config_for(corpus, tokenizer=str(bare)), report=lambda line: None)
    add_tokens(str(made.tokenizer_dir), tmp_path / "a", "masked_lm")
    add_tokens(str(tmp_path / "a"), tmp_path / "b", "ul2")
    prepared = prepare(config_for(made.train[0].prefix, tokenizer=str(tmp_path / "b")), report=lambda line: None)
    assert prepared.special.mask is not None
    assert prepared.special.mode_s is not None
    assert prepared.open_tokenizer().extends == open_tokenizer(str(tmp_path / "b")).extends


def test_remedy_for_ready_shards_with_their_tokenizer(
    tmp_path: Path, bare: Path, corpus: Path, config_for: ConfigFor
) -> None:
    """It names the tokenizer beside the shards, which is not a word of the command line."""
    config = config_for(corpus, tokenizer=str(bare), cache_dir=str(tmp_path / "my data"))
    made = prepare(config, report=lambda line: None)
    config = config_for(made.train[0].prefix)
    config.objective.name = ObjectiveName.masked_lm_nsp
    with pytest.raises(ConfigError) as error:
        prepare(config, report=lambda line: None)
    command = f"python -m megatron_lite.data add-tokens --objective masked_lm_nsp '{made.tokenizer_dir}' FOLDER"
    assert str(error.value) == (
        "data.tokenizer=train lacks [CLS], [SEP], [MASK], [PAD], which objective.name=masked_lm_nsp needs; add them "
        f"with `{command}` and set data.tokenizer=FOLDER"
    )
    assert main(shlex.split(command.replace("FOLDER", str(tmp_path / "new")))[3:]) == 0
    config.data.tokenizer = str(tmp_path / "new")
    assert prepare(config, report=lambda line: None).special.mask is not None


@pytest.mark.parametrize("what", ["file", "full"])
@obeys("megatron_lite/data/tokenizer/needs.py:add_tokens")
def test_destination_is_never_overwritten(
    tmp_path: Path, bare: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    target = tmp_path / "target"
    if what == "full":
        target.mkdir()
    (target / "x" if what == "full" else target).write_text("mine")
    assert main(["add-tokens", "--objective", "masked_lm", str(bare), str(target)]) == 2
    assert capsys.readouterr().err == f"{target} exists and will not be overwritten; name a new folder\n"
    assert main(["add-tokens", "--objective", "masked_lm", str(bare), str(tmp_path / "new")]) == 0


def test_wrong_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, message in (
        ("train", "is not an existing tokenizer; name a folder"),
        ("/nowhere/x", "cannot be opened"),
    ):
        assert main(["add-tokens", "--objective", "masked_lm", source, str(tmp_path / "new")]) == 2
        assert f"data.tokenizer={source} {message}" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@obeys("megatron_lite/data/tokenizer/tokenizer.py:save_extended")
def test_gaps_that_new_tokens_do_not_fit_into(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"[UNK]": 0, "</s>": 1, "a": 5}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(ConfigError) as error:
        add_tokens(str(tmp_path), tmp_path / "new", "masked_lm_nsp")
    assert str(error.value) == (
        f"the ids of data.tokenizer={tmp_path} have gaps, so [CLS], [MASK], [PAD] cannot be appended; add them by hand "
        "to model.vocab and added_tokens of its tokenizer.json, starting at id 6"
    )
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    for number, name in enumerate(("[CLS]", "[MASK]", "[PAD]"), start=6):
        spec["model"]["vocab"][name] = number
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        spec["added_tokens"].append({"id": number, "content": name, "special": True, **flags})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    opened = open_tokenizer(str(tmp_path))
    assert (opened.special.cls, opened.special.mask, opened.special.pad, opened.vocab_size) == (6, 7, 8, 9)
    require_tokens(opened.special, "masked_lm_nsp", tokenizer=str(tmp_path), folder=tmp_path)

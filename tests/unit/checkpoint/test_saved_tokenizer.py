"""What a checkpoint's tokenizer does to a text or a pair is what training did, for every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_lite.checkpoint.hf_files import folder_files
from megatron_lite.config.derived import resolve
from megatron_lite.config.schema import ModelConfig, ObjectiveName, RunConfig
from megatron_lite.data.samples.sample_types import SentencePair, Text
from megatron_lite.data.shards.indexed import IndexedReader
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.data.shards.prepared import PreparedData
from megatron_lite.data.tokenizer.framing import described_ends
from megatron_lite.data.tokenizer.tokenizer import Tokenizer, open_tokenizer
from megatron_lite.data.tokenizer.vocabulary import known_vocab_size
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.objectives.build import build_objective
from tests.tiny_models import BART, BERT, GPT2, LLAMA, ROBERTA, T5
from tests.tokenizer_families import CHAT_TEMPLATE, FAMILIES, TEXTS, changed
from tests.unit.remedies import obeys

TRAINED = "train"
CASES: dict[str, tuple[ModelConfig, ObjectiveName]] = {
    "gpt2": (GPT2, ObjectiveName.causal_lm),
    "llama2": (LLAMA, ObjectiveName.causal_lm),
    "llama3": (LLAMA, ObjectiveName.prefix_lm),
    "llama3_chat": (LLAMA, ObjectiveName.causal_lm),
    "qwen_chat": (LLAMA, ObjectiveName.causal_lm),
    "smollm_chat": (LLAMA, ObjectiveName.causal_lm),
    "bert": (BERT, ObjectiveName.masked_lm_nsp),
    "roberta": (ROBERTA, ObjectiveName.masked_lm),
    "bart": (BART, ObjectiveName.bart_denoising),
    "t5": (T5, ObjectiveName.span_corruption),
}
OURS = ("gpt2", "llama2", "bert", "roberta", "bart", "t5")
"""Families that are trained with a tokenizer of ours too: one for all of them."""


@dataclass
class Saved:
    """A checkpoint's tokenizer, beside what made the shards."""

    config: RunConfig
    prepared: PreparedData
    folder: Path
    documents: list[list[int]]
    """The shards."""

    @cached_property
    def theirs(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def ours(self) -> Tokenizer:
        return open_tokenizer(str(self.prepared.tokenizer_dir))

    def json(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.folder / name).read_text()))


Save = Callable[..., Saved]


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Save:
    made: dict[Any, Saved] = {}

    def saved(family: str, trained: bool = False, **data: Any) -> Saved:
        key = (family, trained, *data.items())
        if key not in made:
            made[key] = _save(tmp_path_factory.mktemp("saved"), family, trained, data)
        return made[key]

    return saved


def _save(folder: Path, family: str, trained: bool, data: dict[str, Any]) -> Saved:
    model, objective = CASES[family]
    tokenizer = data.pop("tokenizer", None) or (TRAINED if trained else str(FAMILIES[family](folder / "tokenizer")))
    (folder / "text.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    config = RunConfig(model=model)
    config.objective = replace(config.objective, name=objective)
    config.data = replace(
        config.data,
        source=str(folder / "text.txt"),
        cache_dir=str(folder / "cache"),
        tokenizer=tokenizer,
        tokenizer_vocab_size=420,
        validation_fraction=0.1,
        seq_length=32,
        **data,
    )
    prepared = prepare(config, report=lambda line: None)
    if family == "roberta":  # transformers counts its positions from the padding token
        config.model = replace(model, position_offset=prepared.special.pad + 1)
    carried = prepared.tokenizer_files(config)
    files = folder_files(
        resolve(config), carried, vocab_size=prepared.vocab_size, tokens=prepared.special, dtype="float32"
    )
    checkpoint = folder / "checkpoint"
    for name, content in files.items():
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(content)
    readers = [IndexedReader(shard.prefix) for shard in (*prepared.train, *prepared.validation)]
    shards = [reader.document(i).tolist() for reader in readers for i in range(reader.num_documents)]
    return Saved(config, prepared, checkpoint, shards)


ALL = [(family, False) for family in CASES] + [(family, True) for family in OURS]
every_family = pytest.mark.parametrize(("family", "trained"), ALL)
DECODERS = [case for case in ALL if CASES[case[0]][0] in (GPT2, LLAMA)]


@pytest.mark.parametrize(("family", "trained"), DECODERS)
def test_documents_of_a_decoder_are_what_the_tokenizer_makes_of_their_text(
    save: Save, family: str, trained: bool
) -> None:
    saved = save(family, trained)
    theirs, eod = saved.theirs, saved.prepared.special.eod
    made = [[*theirs(text)["input_ids"], eod] for text in TEXTS]
    assert sorted(made) == sorted(saved.documents)
    pair = theirs(TEXTS[0], TEXTS[1])["input_ids"]
    assert pair[: len(made[0]) - 1] == made[0][:-1]  # a pair begins as a document does


@every_family
def test_text_and_pair_are_what_the_objective_reads(save: Save, family: str, trained: bool) -> None:
    """Labels hold the text as it is, whatever was hidden of it."""
    saved = save(family, trained)
    theirs, special, ours = saved.theirs, saved.prepared.special, saved.ours
    first, second = (np.array(ours.encode(text), np.int64) for text in ("the quick fox", "over a dog"))
    config = saved.config
    if config.objective.name is ObjectiveName.masked_lm_nsp:
        objective = build_objective(config.objective, config.data, saved.prepared.vocabulary)
        made = objective.example(SentencePair(first, second, True), 7)
        segments, used = made.inputs[1], made.inputs[2]
        pair = theirs("the quick fox", "over a dog")
        assert pair["input_ids"] == made.labels[:used].tolist()
        assert pair["token_type_ids"] == segments[:used].tolist()
        assert theirs("the quick fox")["input_ids"] == [special.cls, *first, special.sep]
    elif config.objective.name in (ObjectiveName.masked_lm, ObjectiveName.bart_denoising):
        objective = build_objective(config.objective, config.data, saved.prepared.vocabulary)
        text = ours.encode(" ".join(TEXTS))[: objective.shape.tokens]
        made = objective.example(Text(np.array(text, np.int64), np.zeros(1, np.int64)), 7)
        assert [special.cls, *text, special.sep] == made.labels.tolist()
        assert theirs("the quick fox")["input_ids"] == [special.cls, *first, special.sep]
    elif config.objective.name is ObjectiveName.span_corruption:
        assert theirs("the quick fox")["input_ids"] == [*first, special.eod]
        assert theirs("the quick fox", "over a dog")["input_ids"] == [*first, special.eod, *second, special.eod]
    else:
        assert theirs("the quick fox")["input_ids"] == [*special.begin, *first]


@every_family
def test_ids_agree(save: Save, family: str, trained: bool) -> None:
    saved = save(family, trained)
    theirs, config = saved.theirs, saved.json("config.json")
    for role in ("bos", "eos", "pad"):
        if f"{role}_token_id" in config:
            assert config[f"{role}_token_id"] == getattr(theirs, f"{role}_token_id"), role
    if (saved.folder / "generation_config.json").exists():
        generation = saved.json("generation_config.json")
        stops = generation.pop("eos_token_id")
        assert (stops if isinstance(stops, list) else [stops])[0] == theirs.eos_token_id
        assert all(config[key] == value for key, value in generation.items() if key.endswith("_token_id"))
        if saved.config.objective.name is not ObjectiveName.bart_denoising:
            assert saved.prepared.special.eod in (stops if isinstance(stops, list) else [stops])
    assert len(theirs) == saved.ours.vocab_size


MASKS = [case for case in ALL if case[0] in ("bert", "roberta", "bart", "t5")]


@pytest.mark.parametrize(("family", "trained"), MASKS)
def test_a_mask_or_sentinel_takes_the_place_of_a_word_and_its_space(save: Save, family: str, trained: bool) -> None:
    saved = save(family, trained)
    special, ours = saved.prepared.special, saved.ours
    token = special.sentinels[0] if family == "t5" else special.mask
    name = ours.decode([token]).strip()
    whole, one, two = (ours.encode(text) for text in ("the quick brown fox", "the quick", "the quick brown"))
    found = saved.theirs(f"the quick {name} fox", add_special_tokens=False)["input_ids"]
    assert found == [*one, token, *whole[len(two) :]]


@every_family
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\t▁Ġ<|>[]aé漢"), max_size=60))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_text_is_encoded_as_in_training(save: Save, family: str, trained: bool, text: str) -> None:
    """But for the names of special tokens: in training they are text, and a user's `[MASK]` has to be the token."""
    saved = save(family, trained)
    assume(not any(name in text for name in saved.theirs.added_tokens_encoder))
    assert saved.theirs(text, add_special_tokens=False)["input_ids"] == saved.ours.encode(text)


@pytest.mark.parametrize(
    ("family", "bos", "eos", "eod"),
    [
        ("smollm_chat", "<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        ("qwen_chat", None, "<|im_end|>", "<|endoftext|>"),
        ("llama3_chat", "<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"),
    ],
)
def test_a_chat_tokenizer_keeps_its_eos_and_its_template(
    save: Save, family: str, bos: str | None, eos: str, eod: str
) -> None:
    saved = save(family)
    theirs = saved.theirs
    assert (theirs.bos_token, theirs.eos_token, saved.ours.decode([saved.prepared.special.eod])) == (bos, eos, eod)
    assert {document[-1] for document in saved.documents} == {saved.prepared.special.eod}
    assert theirs.get_chat_template() == CHAT_TEMPLATE
    eod_id = theirs.convert_tokens_to_ids(eod)
    assert saved.json("generation_config.json")["eos_token_id"] == [theirs.eos_token_id, eod_id]
    again = open_tokenizer(str(saved.folder))  # as data.tokenizer of the next run
    assert again.eod == eod


def test_smollm_keeps_ids_and_every_file(save: Save) -> None:
    saved = save("smollm_chat")
    generation = saved.json("generation_config.json")
    assert (generation["temperature"], generation["top_p"], generation["do_sample"]) == (0.2, 0.9, True)
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, [2, 0])
    assert "_from_model_config" not in generation
    config = saved.json("config.json")
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    source = Path(saved.config.data.tokenizer)
    names = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    there = {path.relative_to(saved.folder).as_posix() for path in saved.folder.rglob("*") if path.is_file()}
    assert names <= there
    for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja", "LICENSE", "tokenizer.json"):
        assert (saved.folder / name).read_bytes() == (source / name).read_bytes()
    assert saved.theirs.all_special_tokens == AutoTokenizer.from_pretrained(source).all_special_tokens[:3]


@pytest.mark.parametrize(("family", "add_bos"), [("llama3", False), ("gpt2", True), ("qwen_chat", None)])
def test_add_bos_decides(save: Save, family: str, add_bos: bool | None) -> None:
    saved = save(family, add_bos=add_bos)
    begin = saved.documents[0][:1]
    bos = saved.theirs.bos_token_id
    assert (begin == [bos]) is bool(add_bos)
    assert saved.theirs("the quick")["input_ids"][:1] == (begin if add_bos else saved.ours.encode("the quick")[:1])


def test_eod_token_decides(save: Save) -> None:
    saved = save("llama3", eod_token="<|eot_id|>")
    eod = saved.theirs.convert_tokens_to_ids("<|eot_id|>")
    assert {document[-1] for document in saved.documents} == {eod}
    assert saved.theirs.eos_token == "<|end_of_text|>"
    assert saved.json("generation_config.json")["eos_token_id"] == [saved.theirs.eos_token_id, eod]
    assert saved.prepared.folder != save("llama3").prepared.folder


def test_a_pair_gets_its_segments_only_where_the_model_has_them(save: Save) -> None:
    assert "token_type_ids" in save("bert").theirs("a", "b")
    assert "token_type_ids" not in save("gpt2").theirs("a", "b")
    assert "token_type_ids" not in save("roberta").theirs("a", "b")


def test_add_bos_token_of_the_settings_counts(tmp_path: Path) -> None:
    """As of LLaMA 2, whose tokenizer.json need not say it."""
    folder = FAMILIES["llama2"](tmp_path / "t")
    spec = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    assert open_tokenizer(str(folder), is_decoder=True).special.begin == (1,)
    assert open_tokenizer(str(changed(folder, add_bos_token=False)), is_decoder=True).special.begin == ()


@pytest.mark.parametrize(("family", "add_bos"), [("llama3", None), ("llama3", False), ("qwen_chat", None)])
@obeys("megatron_lite/data/shards/shard_ends.py:_adds_bos")
def test_ready_shards_say_themselves_what_documents_begin_and_end_with(
    save: Save, tmp_path: Path, family: str, add_bos: bool | None
) -> None:
    """Moved away from what made them, with their tokenizer named anew."""
    made = save(family, add_bos=add_bos, **({"eod_token": "<|im_end|>"} if family == "qwen_chat" else {}))
    for suffix in (".bin", ".idx"):
        (tmp_path / f"pair{suffix}").write_bytes(Path(f"{made.prepared.train[0].prefix}{suffix}").read_bytes())
    config = replace(made.config, data=replace(made.config.data, add_bos=None, eod_token=None))
    config.data.source, config.data.cache_dir = str(tmp_path / "pair"), str(tmp_path / "cache")
    again = prepare(config, report=lambda line: None)
    assert again.special == made.prepared.special
    assert again.tokenizer_files(config) == made.prepared.tokenizer_files(made.config)
    config.data.add_bos = not made.prepared.special.begin
    if family == "llama3":
        said = r"its documents begin with(out)? a beginning-of-text token, but those .*; set data.add_bos="
        with pytest.raises(DataError, match=said) as error:
            prepare(config, report=lambda line: None)
        config.data.add_bos = "set data.add_bos=true" in str(error.value)
        assert prepare(config, report=lambda line: None).special == made.prepared.special


@pytest.mark.parametrize("family", ["llama3", "t5", "bert"])
def test_a_damaged_file_is_one_error_that_names_it(tmp_path: Path, family: str) -> None:
    """Cut, filled with zeros, of other types, or nested without end: whatever is wrong, and wherever it is read."""
    folder = FAMILIES[family](tmp_path / "t")
    deep = b'{"a":' * 5000 + b"1" + b"}" * 5000
    wrong: list[Any] = [b"", b"\0" * 90, b"[1]", b"{}", b"\xff\xfe", deep, b"null"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        whole = path.read_bytes()
        for content in [*wrong, whole[: len(whole) // 2], whole[:-3], *_of_other_types(whole)]:
            path.write_bytes(content)
            messages = [_failure(read, folder) for read in (_plan, _open)]
            assert all(message is None or str(folder) in message for message in messages)
        path.write_bytes(whole)


def _of_other_types(whole: bytes) -> list[bytes]:
    """The file with each field, two levels deep, of another type."""
    content = json.loads(whole)
    changed = [{**content, key: value} for key in content for value in (7, "x", [3], {"a": 1}, None)]
    inner = [(key, name) for key, value in content.items() if isinstance(value, dict) for name in list(value)[:9]]
    changed += [{**content, key: {**content[key], name: value}} for key, name in inner for value in (7, ["x"], None)]
    return [json.dumps(one).encode() for one in changed]


def _failure(read: Callable[[Path], None], folder: Path) -> str | None:
    try:
        read(folder)
    except (ConfigError, DataError) as error:
        return str(error)
    return None


def _plan(folder: Path) -> None:
    config = RunConfig()
    config.data.tokenizer = str(folder)
    known_vocab_size(config)
    described_ends(config)


def _open(folder: Path) -> None:
    opened = open_tokenizer(str(folder), is_decoder=True)
    opened.encode_documents(["the quick"])
    opened.vocabulary()


def test_the_plan_says_what_documents_begin_and_end_with(tmp_path: Path) -> None:
    config = RunConfig()
    assert described_ends(config) == "begin with their text, end with <|endoftext|>"
    config.data.add_bos = True
    assert described_ends(config) == "begin with <|endoftext|>, end with <|endoftext|>"
    config.data.tokenizer = str(FAMILIES["llama3_chat"](tmp_path / "llama3"))
    config.data.add_bos = None
    assert described_ends(config) == "begin with <|begin_of_text|>, end with <|end_of_text|>"
    config.data.eod_token = "<|eot_id|>"
    assert described_ends(config) == "begin with <|begin_of_text|>, end with <|eot_id|>"
    config.data.eod_token = "</s>"
    with pytest.raises(ConfigError) as error:
        described_ends(config)
    assert str(error.value) == (
        f"data.eod_token=</s> is not a token of data.tokenizer={config.data.tokenizer} that can end documents; use one "
        "of its special tokens: <|begin_of_text|>, <|end_of_text|>, <|eot_id|>"
    )
    config.data.eod_token = "<|end_of_text|>"  # obeyed
    assert described_ends(config).endswith("end with <|end_of_text|>")


def test_add_bos_without_such_a_token(tmp_path: Path) -> None:
    config = RunConfig()
    config.data.tokenizer, config.data.add_bos = str(FAMILIES["qwen_chat"](tmp_path / "t")), True
    with pytest.raises(ConfigError, match=r"data\.add_bos=true needs .*name one as bos_token in its tokenizer_config"):
        described_ends(config)
    changed(tmp_path / "t", bos_token="<|im_start|>")  # obeyed
    assert described_ends(config) == "begin with <|im_start|>, end with <|endoftext|>"


def test_fill_in_the_middle_leaves_the_beginning_of_text_ahead(save: Save) -> None:
    saved = save("llama3")
    config = replace(saved.config.objective, name=ObjectiveName.fill_in_the_middle, fim_fraction=1.0)
    special = replace(saved.prepared.special, fim_prefix=900, fim_suffix=901, fim_middle=902)
    data = replace(saved.config.data, seq_length=40)
    objective = build_objective(config, data, replace(saved.prepared.vocabulary, special=special))
    window = np.array([*saved.documents[0][:9], special.eod, *saved.documents[1]] * 2, np.int64)[:41]
    made = objective.example(Text(window), 5).inputs[0].tolist()
    assert made[0] == special.begin[0]
    prefixes = [i for i, token in enumerate(made) if token == 900]
    assert len(prefixes) >= 2
    assert all(made[i - 1] == special.begin[0] for i in prefixes)

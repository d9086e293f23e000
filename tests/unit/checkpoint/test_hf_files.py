"""The files beside the tensors, as transformers' Auto classes read them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from megatron_lite.checkpoint.hf_files import model_files
from megatron_lite.config.derived import resolve, resolve_model
from megatron_lite.config.hf import NoCounterpart
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import Architecture, ModelConfig, ObjectiveName, RunConfig
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.data.shards.prepared import PreparedData
from megatron_lite.data.tokenizer.tokenizer import open_tokenizer
from tests.tiny_models import BERT, GPT2, LLAMA, T5

TEXTS = ["alpha beta\n\n  gamma, it 's ", "größe 🙂 <b>", "def f(x):\n\treturn x"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("\n\n".join(f"alpha beta gamma delta {i}" for i in range(40)), encoding="utf-8")
    config = RunConfig()
    config.data = replace(
        config.data,
        source=str(folder / "text.txt"),
        cache_dir=str(folder / "cache"),
        tokenizer_vocab_size=500,
        validation_fraction=0.2,
    )
    return prepare(config, report=lambda line: None)


OBJECTIVES = {
    Architecture.decoder: ObjectiveName.causal_lm,
    Architecture.encoder: ObjectiveName.masked_lm_nsp,
    Architecture.encoder_decoder: ObjectiveName.span_corruption,
}


def with_objective(model: ModelConfig, objective: ObjectiveName | None = None) -> ResolvedConfig:
    config = replace(RunConfig(), model=model)
    config.objective = replace(config.objective, name=objective or OBJECTIVES[model.architecture])
    return resolve(config)


def written(folder: Path, prepared: PreparedData, model: ModelConfig) -> Path:
    config = with_objective(model)
    files = model_files(config, vocab_size=prepared.vocab_size, tokens=prepared.special, dtype="bfloat16")
    for name, content in {**prepared.tokenizer_files(config), **files}.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("model", [GPT2, LLAMA, BERT, T5], ids=["gpt2", "llama", "bert", "t5"])
def test_the_tokenizer_gives_the_same_ids_beside_any_model(
    tmp_path: Path, prepared: PreparedData, model: ModelConfig
) -> None:
    """config.json names a model whose own kind of tokenizer is another one."""
    ours = prepared.open_tokenizer()
    assert ours is not None
    theirs = AutoTokenizer.from_pretrained(written(tmp_path, prepared, model))
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    special = ours.special
    ids = (theirs.eos_token_id, theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id, theirs.pad_token_id)
    assert ids == (special.eod, special.cls, special.sep, special.mask, special.pad)
    assert len(theirs) == ours.vocab_size
    again = open_tokenizer(str(tmp_path))  # it may be data.tokenizer of the next run, and shards fit it
    assert ours.digest in (again.digest, *again.extends)


def test_the_files_are_those_of_the_auto_classes(tmp_path: Path, prepared: PreparedData) -> None:
    config = AutoConfig.from_pretrained(written(tmp_path, prepared, T5))
    assert (config.model_type, config.d_kv, config.vocab_size) == ("t5", 16, prepared.vocab_size)
    assert str(config.dtype) == "torch.bfloat16"
    generation = GenerationConfig.from_pretrained(tmp_path)
    assert generation.decoder_start_token_id == prepared.special.pad
    assert generation.eos_token_id == prepared.special.eod


def test_an_encoder_has_no_generation_config_and_another_model_no_files(prepared: PreparedData) -> None:
    config = with_objective(BERT, ObjectiveName.masked_lm_nsp)
    files = model_files(config, vocab_size=9, tokens=prepared.special, dtype="float32")
    assert files.keys() == {"config.json"}
    assert b"BertForPreTraining" in files["config.json"]
    config.model = resolve_model(replace(T5, attention_scale=True))
    with pytest.raises(NoCounterpart):
        model_files(config, vocab_size=9, tokens=prepared.special, dtype="float32")


def test_shards_without_a_tokenizer_bring_no_files(prepared: PreparedData) -> None:
    assert replace(prepared, tokenizer_dir=None).tokenizer_files(RunConfig()) == {}


def test_what_a_foreign_tokenizer_says_of_itself_is_kept(tmp_path: Path) -> None:
    source, cache = tmp_path / "foreign", tmp_path / "cache"
    source.mkdir()
    backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "alpha": 3, "beta": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    backend.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "bos_token": {"content": "<s>"}, "eos_token": "</s>",'
        ' "unk_token": "<unk>", "cls_token": "<absent>", "model_max_length": 77, "chat_template": "{{ messages }}"}'
    )
    (tmp_path / "text.txt").write_text("\n\n".join(["alpha beta"] * 3 + ["beta alpha"] * 3), encoding="utf-8")
    config = RunConfig()
    config.data = replace(
        config.data,
        source=str(tmp_path / "text.txt"),
        cache_dir=str(cache),
        tokenizer=str(source),
        validation_fraction=0.5,
    )
    ready = prepare(config, report=lambda line: None)
    theirs = AutoTokenizer.from_pretrained(written(tmp_path, ready, LLAMA))
    assert theirs("alpha gamma beta")["input_ids"] == [0, 3, 2, 4]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2)
    assert (theirs.model_max_length, theirs.chat_template, len(theirs)) == (77, "{{ messages }}", 5)

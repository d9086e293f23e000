"""model.init_from: what the weights decide, what the user may decide, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as fuzzing
from hypothesis import strategies as st
from omegaconf import OmegaConf

from launch.cli import main
from megatron_lite.config.compose import change, compose
from megatron_lite.config.frozen import freeze, load_frozen
from megatron_lite.config.hf.folder import STATE_FILE, local_folder
from megatron_lite.config.schema import ModelConfig, PositionEmbedding, RunConfig
from megatron_lite.data.tokenizer.vocabulary import known_vocab_size
from megatron_lite.errors import CheckpointError, ConfigError
from tests.tiny_models import BART, BERT, GPT2, LLAMA, T5, T5_V1_1
from tests.unit.config.hf_folders import write_folder, write_safetensors, write_tokenizer
from tests.unit.remedies import obeys


@cache
def base(script: str) -> RunConfig:
    return compose(script, [])


def config_of(folder: Path | str, *words: str, script: str = "pretrain_gpt") -> RunConfig:
    """As `compose` would make it, at a tenth of the time."""
    return change(base(script), [f"model.init_from={folder}", *words])


def problems_of(folder: Path | str, *words: str, script: str = "pretrain_gpt") -> Sequence[str]:
    with pytest.raises(ConfigError) as caught:
        config_of(folder, *words, script=script)
    return caught.value.problems


def test_the_weights_decide_above_presets_and_below_words(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "llama", replace(LLAMA, num_query_groups=2, attention_dropout=0.25))
    words = ["model=gpt2_124m", "model.hidden_dropout=0.5", "model.init_std=0.1"]
    config = compose("pretrain_gpt", [f"model.init_from={folder}", *words])
    model = config.model
    assert (model.hidden_size, model.num_layers, model.num_query_groups, model.vocab_size) == (32, 2, 2, 50)
    assert model.position_embedding is PositionEmbedding.rotary
    assert (model.attention_dropout, model.hidden_dropout, model.init_std) == (0.25, 0.5, 0.1)
    assert (model.name, model.init_from) == ("llama", str(folder))
    assert config.data.tokenizer == str(folder)


def test_a_preset_leaves_nothing_behind(tmp_path: Path) -> None:
    """The fields that the family of the weights does not have are those of no preset."""
    folder = write_folder(tmp_path / "gpt2", GPT2)
    model = compose("pretrain_gpt", [f"model.init_from={folder}", "model=llama_tiny"]).model
    assert (model.num_query_groups, model.attention_bias, model.tie_embeddings) == (None, True, True)


def test_words_that_agree_are_welcome(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "llama", LLAMA)
    words = ["model.hidden_size=32", "model.head_size=8", "model.num_query_groups=null", "model.name=mine"]
    config = config_of(folder, *words, "model.max_position_embeddings=4096", "data.tokenizer=train")
    assert config.model.max_position_embeddings == 4096  # no table of the weights is of this length
    assert config.model.name == "mine"
    assert config.data.tokenizer == "train"


def test_words_that_contradict_are_all_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "gpt2", GPT2)
    words = ["model.num_layers=3", "model.activation=relu", "model.tie_embeddings=false", "model.vocab_size=51"]
    assert set(problems_of(folder, *words, "model.max_position_embeddings=48", "model.num_attention_heads=4")) == {
        f"model.{key}={typed} contradicts model.init_from={folder}, whose weights (GPT2LMHeadModel) have {found}; "
        f"leave model.{key} out, or set model.init_from=null"
        for key, typed, found in (
            ("num_layers", 3, 2),
            ("activation", "relu", "gelu_tanh"),
            ("tie_embeddings", "false", "true"),
            ("vocab_size", 51, 50),
            ("max_position_embeddings", 48, 24),
        )
    }


def test_the_wrong_script_names_the_right_one(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "bert", BERT)
    assert problems_of(folder) == [
        f"model.init_from={folder} is a model of pretrain_bert (BertForPreTraining), not of pretrain_gpt; run "
        "pretrain_bert"
    ]


def test_a_next_sentence_head_is_there_or_not_trained(tmp_path: Path) -> None:
    bare = write_folder(tmp_path / "bare", BERT)
    assert "needs a next-sentence head" in problems_of(bare, script="pretrain_bert")[0]
    config_of(bare, "objective.name=masked_lm", script="pretrain_bert")
    config_of(write_folder(tmp_path / "whole", BERT, next_sentence=True), script="pretrain_bert")


def test_a_tokenizer_that_is_not_there_must_be_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "gpt2", GPT2, tokens=0)
    assert problems_of(folder) == [
        f"model.init_from={folder} holds no tokenizer, and its embeddings belong to one; name that in data.tokenizer "
        "(data.tokenizer=train, typed, trains another)"
    ]
    assert config_of(folder, "data.tokenizer=elsewhere").data.tokenizer == "elsewhere"


def test_a_tokenizer_with_more_tokens_than_the_weights_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "gpt2", GPT2)
    assert known_vocab_size(config_of(folder)) == 50  # of which the tokenizer needs 40
    write_tokenizer(folder, 51)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=50 must hold the 51 tokens of data\.tokenizer="):
        known_vocab_size(config_of(folder))


def test_what_holds_no_weights_is_refused(tmp_path: Path) -> None:
    assert "is not a folder" in problems_of(tmp_path / "nowhere")[0]
    assert "holds no config.json" in problems_of(tmp_path)[0]
    folder = write_folder(tmp_path / "gpt2", GPT2)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert "neither model.safetensors nor model.safetensors.index.json" in problems_of(folder)[0]
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert "holds no model.safetensors" in problems_of(folder)[0]
    (folder / "pytorch_model.bin").touch()
    assert "safe_serialization=True" in problems_of(folder)[0]
    (folder / "config.json").write_text("[]")
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        config_of(folder)


def test_an_unsupported_config_names_file_and_key(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "llama", LLAMA)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}))
    assert problems_of(folder) == [
        f"model.init_from: {folder / 'config.json'}: rope_scaling.rope_type=yarn is not supported; supported: default, "
        "positions without scaling; give the folder of such a model"
    ]


def test_tensors_tell_whether_t5_has_a_head_of_its_own(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "t5", T5_V1_1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))  # by transformers 5
    assert not config_of(folder, script="pretrain_t5").model.tie_embeddings


@obeys("megatron_lite/config/hf/folder.py:_under_our_names")
def test_a_checkpoint_under_our_own_names(tmp_path: Path) -> None:
    model = replace(T5, attention_scale=True, hidden_dropout=0.3, vocab_size=None)
    run = replace(RunConfig(), script="pretrain_t5", model=model)
    (tmp_path / STATE_FILE).parent.mkdir()
    plain = OmegaConf.to_container(OmegaConf.structured(run), enum_to_str=True)
    (tmp_path / STATE_FILE).write_text(json.dumps({"format": 1, "hugging_face": False, "config": plain}))
    write_safetensors(tmp_path / "model.safetensors", {"embedding.weight": (61, 32)})
    words = ["data.tokenizer=train"]
    found = config_of(tmp_path, *words, script="pretrain_t5").model
    differing = {key for key, value in asdict(found).items() if value != asdict(model)[key]}
    assert differing == {"name", "init_from", "vocab_size"}
    assert found.vocab_size == 61
    assert "contradicts" in problems_of(tmp_path, "model.attention_scale=false", *words, script="pretrain_t5")[0]
    other = shutil.copytree(tmp_path, tmp_path.with_name("other"))
    for damaged in ({}, {"model": {"num_layers": "many"}}):
        (tmp_path / STATE_FILE).write_text(json.dumps({"format": 1, "hugging_face": False, "config": damaged}))
        message = problems_of(tmp_path, *words, script="pretrain_t5")[0]
        assert "describes no model" in message
        assert message.endswith("; give another checkpoint")
        assert config_of(other, *words, script="pretrain_t5").model.vocab_size == 61


LATE: dict[str, tuple[ModelConfig, str, str, dict[str, Any]]] = {
    "an untied BART": (BART, "pretrain_t5", "tie_word_embeddings=false", {"tie_word_embeddings": False}),
    "a tensor too many": (GPT2, "pretrain_gpt", "transformer.h.1.ln_1.bias [32] is left over", {"n_layer": 1}),
    "a tensor that is missing": (LLAMA, "pretrain_gpt", "q_proj.bias [32] is missing", {"attention_bias": True}),
    "nested too deeply": (GPT2, "pretrain_gpt", "config.json is damaged: it is nested too deeply", {}),
}


@pytest.mark.parametrize("fault", LATE)
def test_all_that_needs_no_weights_is_found_before_the_start(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, script, problem, flags = LATE[fault]
    folder = write_folder(tmp_path / "m", model)
    config = json.loads((folder / "config.json").read_text()) | flags
    (folder / "config.json").write_text(json.dumps(config) if flags else '{"a":' * 100_000)
    words = [f"model.init_from={folder}", f"train.run_dir={tmp_path / 'run'}", "launcher.device=cpu"]
    assert main([script, *words, "data.seq_length=16", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["", " ", "~nobody-of-this-name/x", "x" * 5000, "a\0b"])
def test_a_name_that_no_folder_can_have(name: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.init_from="):
        local_folder(name)


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    """transformers would apply it."""
    folder = write_folder(tmp_path / "m", GPT2)
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter beside its weights (adapter_config.json)" in problems_of(folder)[0]


@given(data=st.data())
@fuzzing(max_examples=40, deadline=None)
def test_any_damage_of_config_json_is_an_error_of_ours(data: st.DataObject) -> None:
    with TemporaryDirectory() as parent:
        folder = write_folder(Path(parent, "m"), data.draw(st.sampled_from([GPT2, LLAMA])))
        file = folder / "config.json"
        content = file.read_bytes()
        position = data.draw(st.integers(0, len(content) - 1))
        other = data.draw(
            st.one_of(st.binary(max_size=2), st.sampled_from([b"[" * 9999, b"{}", b"null", b"-1", b'"x"']))
        )
        file.write_bytes(content[:position] + other + content[position + data.draw(st.integers(0, 5)) :])
        with suppress(ConfigError, CheckpointError):
            config_of(folder)


def test_a_frozen_configuration_needs_the_folder_no_more(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "gpt2", GPT2)
    config = config_of(folder)
    path = freeze(config, tmp_path / "run")
    for file in folder.iterdir():
        file.unlink()
    assert load_frozen(path) == config
    assert change(load_frozen(path), ["train.steps=7"]).model == config.model
    other = write_folder(tmp_path / "other", replace(GPT2, num_layers=1))
    assert change(load_frozen(path), [f"model.init_from={other}"]).model.num_layers == 1


def test_a_name_of_the_hub_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder, asked = write_folder(tmp_path / "snapshot", GPT2), []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name != "org/small":
            raise OSError("no network\nat all")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    config = config_of("org/small")
    assert (config.model.name, config.model.init_from, config.model.hidden_size) == ("small", "org/small", 32)
    assert config.data.tokenizer == str(folder)
    assert asked[0][0] == "org/small"
    assert not any(pattern.endswith(".bin") for pattern in asked[0][1])
    (problem,) = problems_of("org/other")
    assert "the hub does not give it (OSError: no network)" in problem
    assert "hf download org/other --local-dir FOLDER" in problem


def test_it_is_known_without_torch(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "gpt2", GPT2)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "t1"}')
    code = (
        "import sys; from launch.cli import main; "
        f"code = main(['pretrain_gpt', 'model.init_from={folder}', 'launcher.device=cpu', 'data.seq_length=16', "
        "'train.run_dir=run', '--dry-run']); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"starts from      {folder}" in done.stdout
    assert "folders of transformers' GPT2LMHeadModel" in done.stdout

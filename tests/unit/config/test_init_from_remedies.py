"""model.init_from: whoever does what an error says begins with the weights, or without."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_lite.checkpoint.fit import require_fit
from megatron_lite.config.derived import resolve
from megatron_lite.config.hf.folder import foreign_tokenizers, read_weights
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.data.tokenizer.vocabulary import known_vocab_size
from megatron_lite.errors import CheckpointError, ConfigError
from tests.tiny_models import BERT, GPT2, LLAMA
from tests.unit.checkpoint.starts import begin, write_start
from tests.unit.config.hf_folders import write_folder, write_tokenizer
from tests.unit.config.test_init_from import config_of, problems_of
from tests.unit.remedies import obeys

HF = "megatron_lite/config/hf"
Change = Callable[[Path], object]


def changed(folder: Path, **flags: object) -> None:
    """The config.json of a folder."""
    file = folder / "config.json"
    config = {key: value for key, value in (json.loads(file.read_text()) | flags).items() if value is not ...}
    file.write_text(json.dumps(config))


@obeys(f"{HF}/start.py:with_weights")
def test_settings_that_contradict(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", GPT2)
    (problem,) = problems_of(folder, "model.num_layers=3")
    assert problem.endswith("; leave model.num_layers out, or set model.init_from=null")
    assert config_of(folder).model.num_layers == 2
    assert config_of("null", "model.num_layers=3").model.num_layers == 3


@obeys(f"{HF}/start.py:with_weights")
def test_another_script_and_another_objective(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", BERT)
    assert problems_of(folder)[0].endswith("; run pretrain_bert")
    (problem,) = problems_of(folder, script="pretrain_bert")
    assert problem.endswith("lack; use objective=masked_lm")
    assert config_of(folder, "objective.name=masked_lm", script="pretrain_bert").model.num_segments == 2


@obeys(f"{HF}/start.py:with_weights", "megatron_lite/data/tokenizer/vocabulary.py:model_vocab_size")
def test_tokenizers(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", GPT2, tokens=0)
    assert "name that in data.tokenizer (data.tokenizer=train, typed, trains another)" in problems_of(folder)[0]
    config_of(folder, "data.tokenizer=train")
    other = write_folder(tmp_path / "other", GPT2)
    write_tokenizer(other, 51)
    named = config_of(folder, f"data.tokenizer={other}")
    with pytest.raises(ConfigError, match=r"; name the tokenizer of model\.init_from"):
        known_vocab_size(named)
    write_tokenizer(other, 50)
    assert known_vocab_size(named) == 50


def two_models(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")


def into_an_index(folder: Path, file: str) -> None:
    names = read_weights(str(folder)).tensors
    index = {"weight_map": dict.fromkeys(names, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def without(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def under_another_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")


def back(folder: Path) -> None:
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")


DAMAGED: dict[str, tuple[Change, str, Change]] = {  # what is done to the folder, what is told, how it is obeyed
    "no config.json": (without("config.json"), "give a folder that transformers' save_pretrained wrote", lambda _: 0),
    "damaged config.json": (lambda folder: (folder / "config.json").write_text("{"), "; copy it again", lambda _: 0),
    "no weights": (without("model.safetensors"), "; give a folder with weights", lambda _: 0),
    "cut off": (cut, "; copy it again from where it came", lambda _: 0),
    "another family": (lambda folder: changed(folder, model_type="opt"), "; give the folder of such a", lambda _: 0),
    "another class": (lambda folder: changed(folder, architectures=["X"]), "; give the folder of such a", lambda _: 0),
    "not computed": (lambda folder: changed(folder, is_causal=False), "; give the folder of such a", lambda _: 0),
    "unknown key": (lambda folder: changed(folder, odd=1), "give the config.json that was saved with", lambda _: 0),
    "other tensors": (lambda folder: changed(folder, n_layer=1), "; give the folder of such a model", lambda _: 0),
    "two models": (two_models, "; remove those that are left over", without("model-00001-of-00002.safetensors")),
    "a lost file": (
        lambda folder: into_an_index(folder, "model-00001-of-00001.safetensors"),
        "remove those that are left over",
        lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors"),
    ),
    "no index": (under_another_name, "or rename a file that holds all of it", back),
    "adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "; merge it with peft (merge_and_unload, then save_pretrained) and give that folder",
        without("adapter_config.json"),  # as of a folder that was saved again
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
@obeys(
    f"{HF}/folder.py:read_weights",
    f"{HF}/folder.py:_read_json",
    f"{HF}/folder.py:_require_safetensors",
    f"{HF}/folder.py:local_folder",
    f"{HF}/headers.py:_require_one_model",
    f"{HF}/headers.py:_damaged",
    f"{HF}/settings.py:_family",
    "megatron_lite/models/hf/forms.py:require_none",
)
def test_folders_that_are_not_what_was_saved(name: str, tmp_path: Path) -> None:
    change, told, obey = DAMAGED[name]
    folder = write_folder(tmp_path / "m", GPT2)
    whole = shutil.copytree(folder, tmp_path / "whole")
    change(folder)
    with pytest.raises((ConfigError, CheckpointError)) as error:
        require_fit(whole_config(folder))
    assert told in str(error.value)
    obey(folder)
    again = any(words in told for words in ("give", "copy")) and "adapter" not in name
    require_fit(whole_config(whole if again else folder))  # a folder as it was saved: the copy of before


def whole_config(folder: Path) -> ResolvedConfig:
    return resolve(replace(config_of(folder), script="pretrain_gpt"), world_size=1, device="cpu")


@obeys(f"{HF}/folder.py:local_folder")
def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", GPT2)
    assert "give a Hugging Face folder, or a checkpoint" in problems_of(f"{folder}/config.json")[0]
    with pytest.raises(ConfigError, match="; correct the path"):
        read_weights("x" * 5000)
    with pytest.raises(ConfigError, match=r"give one, or leave model.init_from out"):
        read_weights(" ")
    assert config_of(folder).model.init_from == str(folder)


@obeys(f"{HF}/folder.py:_require_safetensors")
def test_pickled_weights_are_converted(tmp_path: Path) -> None:
    import transformers

    folder = write_start(tmp_path / "m", "gpt2")
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError) as error:
        begin(folder, "gpt2")
    call = str(error.value).partition("convert it with transformers: ")[2].partition(", with the class")[0]
    call = call.replace("AutoModel", "transformers.GPT2LMHeadModel").replace("FOLDER", repr(str(tmp_path / "new")))
    eval(call, {"transformers": transformers})
    shutil.copy(folder / "config.json", tmp_path / "new")
    begin(tmp_path / "new", "gpt2")


def test_a_folder_as_it_was_saved_has_no_sign_of_another_family(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", LLAMA)
    assert list(foreign_tokenizers(read_weights(str(folder)))) == []
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
    assert len(list(foreign_tokenizers(read_weights(str(folder))))) == 1

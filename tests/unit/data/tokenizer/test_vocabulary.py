"""The vocabulary's size before there is data."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.tokenizer.vocabulary import planned_vocab_size
from megatron_lite.errors import ConfigError
from tests.unit.remedies import obeys

ConfigFor = Callable[..., RunConfig]
REPOSITORY = Path(__file__).resolve().parents[4]


def test_given_by_the_model(config_for: ConfigFor) -> None:
    assert planned_vocab_size(config_for("embedded", vocab_size=50_304)) == 50_304


def test_of_a_tokenizer_that_will_be_trained(config_for: ConfigFor) -> None:
    assert planned_vocab_size(config_for("embedded", tokenizer_vocab_size=8192)) == 8192


@obeys("megatron_lite/data/tokenizer/vocabulary.py:trained_vocab_size")
def test_too_small_to_train(config_for: ConfigFor) -> None:
    with pytest.raises(ConfigError) as error:
        planned_vocab_size(config_for("embedded", tokenizer_vocab_size=366))
    assert str(error.value) == (
        "data.tokenizer_vocab_size=366 is too small: a byte-level vocabulary holds 256 bytes and the 111 "
        "special tokens of the objectives, 100 sentinels among them; use 367 or more"
    )
    assert planned_vocab_size(config_for("embedded", tokenizer_vocab_size=367)) == 367


@pytest.mark.parametrize(
    ("files", "size"),
    [
        (
            {"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 7}}, "added_tokens": [{"id": 9, "content": "</s>"}]}},
            10,
        ),
        ({"tokenizer.json": {"model": {"vocab": [["a", 0.0], ["b", -1.0]]}}}, 2),
        ({"vocab.json": {"a": 0, "b": 1}, "added_tokens.json": {"c": 2}}, 3),
    ],
)
def test_of_a_tokenizer_folder(tmp_path: Path, config_for: ConfigFor, files: dict[str, object], size: int) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert planned_vocab_size(config_for("embedded", tokenizer=str(tmp_path))) == size


@pytest.mark.parametrize("ending", ["", "\n"])
def test_of_a_wordpiece_folder(tmp_path: Path, config_for: ConfigFor, ending: str) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[SEP]\nword" + ending)
    assert planned_vocab_size(config_for("embedded", tokenizer=str(tmp_path))) == 3


@obeys("megatron_lite/data/tokenizer/vocabulary.py:_cached_hub_file")
def test_unknown(tmp_path: Path, config_for: ConfigFor) -> None:
    for name in (str(tmp_path), "nobody/no_such_tokenizer"):
        with pytest.raises(ConfigError, match=rf"model\.vocab_size=null cannot be derived from data\.tokenizer={name}"):
            planned_vocab_size(config_for("embedded", tokenizer=name))
    with pytest.raises(ConfigError, match=r"data\.tokenizer=/no/such/folder is neither a folder nor a hub name"):
        planned_vocab_size(config_for("embedded", tokenizer="/no/such/folder"))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[SEP]")
    assert planned_vocab_size(config_for("embedded", tokenizer=str(tmp_path))) == 2


def test_broken_tokenizer_json(tmp_path: Path, config_for: ConfigFor) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.*tokenizer\.json is damaged: Input data was truncated"):
        planned_vocab_size(config_for("embedded", tokenizer=str(tmp_path)))


def test_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from megatron_lite.data.tokenizer.vocabulary import planned_vocab_size; "
        "from megatron_lite.config.schema import RunConfig; planned_vocab_size(RunConfig()); "
        "sys.exit(bool({'torch', 'numpy', 'tokenizers', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0

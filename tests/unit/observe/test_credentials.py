"""What looks like a credential, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lite.config.keys import leaf_keys
from megatron_lite.observe.credentials import SECRET_KEY, assigned_secrets, has_url_secret, without_secrets


def test_secrets_are_masked_and_ordinary_keys_are_not() -> None:
    config = {
        "hub_token": "hf_x",
        "API_KEY": "k",
        "train": {"generate_tokens": 40, "password": "p"},
        "data": {"source": ["https://me:pw@host/x.txt", "a.txt"], "path": Path("x")},
    }
    assert without_secrets(config) == {
        "hub_token": "***",
        "API_KEY": "***",
        "train": {"generate_tokens": 40, "password": "***"},
        "data": {"source": ["https://***@host/x.txt", "a.txt"], "path": "x"},
    }


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "apikey"]
)
def test_names_of_credentials(name: str) -> None:
    assert SECRET_KEY.search(name)


@pytest.mark.parametrize(
    "name", [*leaf_keys(), "NCCL_DEBUG", "TOKENIZERS_PARALLELISM", "KEYBOARD", "AWS_ACCESS_KEY_ID"]
)
def test_names_of_other_things(name: str) -> None:
    assert not SECRET_KEY.search(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pw@host/x", True),
        ("s3://id:key@bucket/x", True),
        ("/here/s3:/id:key@bucket/x", True),
        ("https://hf_token@host/x", True),
        ("see ftp://:pw@host", True),
        ("hdfs://user@namenode/x", False),
        ("https://host:8080/a@b", False),
        ("https://host/x?mail=me@host", False),
        ("me@host:/folder", False),
    ],
)
def test_addresses(text: str, expected: bool) -> None:
    assert has_url_secret(text) is expected


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("export WANDB_API_KEY=abc", ["WANDB_API_KEY"]),
        ("export HF_TOKEN='abc def' OTHER=1", ["HF_TOKEN"]),
        ("--export=ALL,HF_TOKEN=x,DB_PASSWORD=y", ["HF_TOKEN", "DB_PASSWORD"]),
        ("--export=HF_TOKEN=x", ["HF_TOKEN"]),
        ("export HF_TOKEN=$(cat ~/.token)", []),
        ('export HF_TOKEN="$TOKEN"', []),
        ("export HF_TOKEN=`cat x`", []),
        ("export HF_TOKEN=", []),
        ("source /apps/env.sh; export NCCL_DEBUG=INFO", []),
    ],
)
def test_lines_that_give_a_value(line: str, names: list[str]) -> None:
    assert list(assigned_secrets(line)) == names

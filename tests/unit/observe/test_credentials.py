"""What looks like a credential, and what does not."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.messages import error_text, leave_error, show_error, show_traceback
from megatron_lite.config.keys import leaf_keys
from megatron_lite.errors import RunEnd
from megatron_lite.observe import credentials
from megatron_lite.observe.console import Forgiving
from megatron_lite.observe.credentials import (
    SECRET_KEY,
    assigned_secrets,
    has_url_secret,
    looks_secret,
    names_secret,
    redacted,
    secrets_in_line,
    tracked_settings,
    without_secrets,
)
from megatron_lite.observe.markers import leave_marker


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


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Credentials in the environment, by the name of the variable or in an address."""
    values = {"AWS_SESSION_TOKEN": "planted-1", "DB_PASS": "planted-2 and more", "SLURM_JWT": "planted-3"}
    values |= {"HTTPS_PROXY": "http://me:planted-4@proxy:80", "SHORT_PASS": "of", "SSH_AUTH_SOCK": str(Path.cwd())}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    credentials._own_secrets.cache_clear()
    yield
    credentials._own_secrets.cache_clear()


TOLD = (
    f"no answer of https://me:planted-0@host/x (planted-1, planted-2 and more, planted-3): planted-4 hf_planted12 in "
    f"{Path.cwd()} of 12 rows"
)


@pytest.mark.usefixtures("planted")
def test_what_anybody_says_is_shown_without_credentials() -> None:
    assert redacted(TOLD) == f"no answer of https://***@host/x (***, ***, ***): *** *** in {Path.cwd()} of 12 rows"


@pytest.mark.usefixtures("planted")
def test_words_of_the_end_hold_no_credentials(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Wherever the message of an exception may go: marker, error file, terminal, log."""
    leave_marker(tmp_path, RunEnd.FAILED, TOLD)
    try:
        raise ValueError(TOLD)
    except ValueError as error:
        leave_error(tmp_path / "error.txt", error_text(error, debug=True))
        show_error(error)
        show_traceback()
        print("".join(traceback.format_exception(error)), file=Forgiving(1), flush=True)
    shown = capfd.readouterr()
    files = [path.read_text() for path in tmp_path.iterdir()]
    for text in (shown.out, shown.err, *files):
        assert "https://***@host/x" in text
        assert "planted" not in text
    assert len(files) == 2


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


@pytest.mark.parametrize(
    "name",
    ["AWS_SESSION_TOKEN", "DB_PASS", "MYSQL_PWD", "GITHUB_PAT", "SENTRY_DSN", "OPENAI_KEY", "PGPASSWORD", "NETRC",
     "AZURE_STORAGE_CONNECTION_STRING", "SLACK_WEBHOOK", "SLACK_WEBHOOK_URL", "MY_PASSPHRASE", "AUTH_BEARER",
     "TOKEN_FOR_HUB", "GOOGLE_APPLICATION_CREDENTIALS", "SECRET_SAUCE", "REGISTRY_AUTH", "JWT", "DB_PASSWORD_FILE"],
)  # fmt: skip
def test_variables_of_credentials(name: str) -> None:
    assert names_secret(name)


@pytest.mark.parametrize(
    "name",
    ["NCCL_DEBUG", "OMP_NUM_THREADS", "PATH", "LD_LIBRARY_PATH", "HF_HOME", "TOKENIZERS_PARALLELISM", "XAUTHORITY",
     "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "AWS_ACCESS_KEY_ID", "BYPASS_CACHE", "KEYBOARD"],
)  # fmt: skip
def test_variables_of_other_things(name: str) -> None:
    assert not names_secret(name)


@pytest.mark.parametrize(
    "value",
    ["hf_abcdefghijkl", "ghp_0123456789abcdef", "AKIAIOSFODNN7EXAMPLE", "0123456789abcdef0123456789abcdef01234567",
     "https://me:pw@host", "Bearer sk-abcdefgh1234", "eyJhbGciOi.eyJzdWIiOi.SflKxw", "wJalrXUtnFEMI7K7MDENGbPxRfi1",
     "-----BEGIN RSA PRIVATE KEY-----"],
)  # fmt: skip
def test_values_of_credentials(value: str) -> None:
    assert looks_secret(value)


@pytest.mark.parametrize(
    "value",
    ["INFO", "1", "lo,eth0", "/apps/OpenMPI-4.1.5/lib64:/usr/lib", "max_split_size_mb:512,expandable_segments:True",
     "python3.11", "=".join(["a"] * 20), "https://proxy:8080", "ThisIsAVeryLongNameOfAClass1", ""],
)  # fmt: skip
def test_values_of_other_things(value: str) -> None:
    assert not looks_secret(value)


@pytest.mark.parametrize(
    "line",
    ["wandb login 0123456789abcdef", "wandb login --relogin abcdef", "huggingface-cli login --token hf_x",
     "docker login -u me -p hunter2 registry.io", "export DB_PASS=hunter2", "tool --api-key hunter2", "tool --pass=x",
     "curl -H 'Authorization: Bearer abc' https://host", "curl -u me:hunter2 https://host", "sshpass -p x ssh host",
     "echo machine host login me password hunter2 > ~/.netrc", "echo hunter2 | docker login --password-stdin reg.io",
     "env X=ghp_0123456789abcdef true", "set-key wJalrXUtnFEMI7K7MDENGbPxRfi1"],
)  # fmt: skip
def test_lines_with_credentials(line: str) -> None:
    assert list(secrets_in_line(line))
    assert not any(secret in text for text in secrets_in_line(line) for secret in ("hunter2", "0123456789", "wJal"))


@pytest.mark.parametrize(
    "line",
    ["wandb login", 'wandb login "$WANDB_API_KEY"', "wandb login --relogin --host=https://wandb.example.com",
     "docker login registry.io", "module load cuda/12.1", "source /apps/env.sh", 'curl -u "me:$DB_PASS" https://host',
     "export HF_TOKEN=$(cat ~/.token)", "bash --login", "cat ~/.token | docker login --password-stdin registry.io",
     "--constraint=h100", "--export=ALL", "git checkout 0123456789abcdef0123456789abcdef01234567"],
)  # fmt: skip
def test_lines_without_credentials(line: str) -> None:
    assert list(secrets_in_line(line)) == []


def test_trackers_see_what_is_listed() -> None:
    config = {"model": {"num_layers": 2}, "launcher": {"name": "slurm", "setup": ["x"], "environment": {"A": "planted"},
              "account": "project"}, "novel": {"a": 1}}  # fmt: skip
    assert tracked_settings(config) == {"model": {"num_layers": 2}, "launcher": {"name": "slurm"}}

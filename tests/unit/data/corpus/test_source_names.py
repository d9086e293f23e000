"""What a name in data.source means, what is said about one that means nothing, and that the remedies work."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import socket
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_lite.config.schema import DataConfig, RunConfig
from megatron_lite.data.corpus.readers import read_documents
from megatron_lite.data.corpus.source_names import (
    OTHER_SUFFIXES,
    kind_of,
    require_sources,
    resolve_source,
    resolve_sources,
)
from megatron_lite.data.corpus.sources import HALF, SourceKind
from megatron_lite.errors import ConfigError, DataError
from tests.unit.remedies import obeys

ConfigFor = Callable[..., RunConfig]


def refusal(name: str) -> str:
    with pytest.raises(DataError) as error:
        resolve_source(name, "data.source")
    return str(error.value)


def texts(name: str, config_for: ConfigFor) -> list[str]:
    config = config_for(name)
    return [text for text, _, _ in read_documents(resolve_source(name, "data.source"), config.data)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_kinds_follow_from_names(folder: Path) -> None:
    for name in ("a.TXT", "a.jsonl.zst", "a.json", "ready.bin", "ready.idx", "folder/x.csv"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "part.parquet").mkdir()  # a folder of Spark's
    (folder / "part.parquet" / "x.parquet").touch()
    kinds = {
        "embedded": SourceKind.embedded,
        "a.TXT": SourceKind.text,
        "./a.TXT/": SourceKind.text,
        "a.jsonl.zst": SourceKind.jsonl,
        "a.json": SourceKind.jsonl,
        "a.j*": SourceKind.jsonl,
        "ready": SourceKind.shards,
        str(folder / "ready.idx"): SourceKind.shards,
        "folder": SourceKind.dataset,
        "folder/": SourceKind.dataset,
        "part.parquet": SourceKind.dataset,
        "owner/name-v1.5": SourceKind.dataset,
        "wikitext": SourceKind.dataset,
    }
    assert {name: resolve_source(name, "data.source").kind for name in kinds} == kinds
    assert kind_of("a.parquet.gz") is None


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("s3://b/x.jsonl", "download it, as with `aws s3 cp s3://b/x.jsonl .`, and name the file"),
        ("gs://b/x.jsonl", "download it, as with `gcloud storage cp gs://b/x.jsonl .`, and name the file"),
        ("https://host/x.txt", "download it, as with `curl -LO https://host/x.txt`, and name the file"),
        ("HTTP://host/x.txt", "download it and name the file"),
        ("ftp://host/x.txt", "download it and name the file"),
        ("hf://datasets/owner/name/x.jsonl", "for this Hugging Face dataset use owner/name"),
        ("hf://owner/name", "download it and name the file"),
    ],
)
def test_addresses(name: str, remedy: str) -> None:
    assert refusal(name) == f"data.source={name} is a URL, but sources are read from local files; {remedy}"
    if " use " in remedy:
        assert resolve_source(remedy.rsplit(" ", 1)[1], "data.source").kind is SourceKind.dataset


@obeys("megatron_lite/data/corpus/source_names.py:_path")
def test_address_of_a_file_here(folder: Path) -> None:
    (folder / "x.txt").write_text("x")
    remedy = refusal(f"file://{folder}/x.txt").rsplit(" use ", 1)[1]
    assert resolve_source(remedy, "data.source").paths == (folder / "x.txt",)


@pytest.mark.parametrize(
    "name",
    [
        "missing.txt",
        "missing/deeper/a.jsonl",
        "/missing/a.parquet",
        "x.jsonl.zst",
        "owner/x.json",
        "a.txt.bz2",
        "a.txt/",
    ],
)
@obeys("megatron_lite/data/corpus/source_names.py:_missing")
def test_missing_file(name: str, folder: Path) -> None:
    with pytest.raises(DataError, match=rf"data\.source\[1\]={name}: .* is not a file \(looked from .*\); correct"):
        resolve_sources(["embedded", name], "data.source")
    (folder / "here.txt").write_text("x")
    assert resolve_sources(["embedded", "here.txt"], "data.source")


@pytest.mark.parametrize(
    "name", [f"corpus{suffix}" for suffix in OTHER_SUFFIXES] + ["/missing/corpus", "a/b/c", "my corpus"]
)
def test_missing_place_that_is_no_name_of_the_hub(name: str, folder: Path) -> None:
    assert refusal(name).startswith(f"data.source={name} does not exist (looked from {folder}); use embedded, a .txt, ")


@pytest.mark.parametrize("name", ["Embedded", "EMBEDDED", "embeded", "embbeded", "embedded_"])
@obeys("megatron_lite/data/corpus/source_names.py:_refuse_slip")
def test_a_slip_of_the_source_that_is_built_in_asks_no_hub(name: str) -> None:
    assert "the built-in source is spelled embedded; use embedded, or name" in refusal(name)
    assert resolve_source("embedded", "data.source").kind is SourceKind.embedded  # the remedy works
    assert resolve_source(f"owner/{name}", "data.source").kind is SourceKind.dataset


def test_names_of_the_hub_are_left_alone() -> None:
    for name in ("wikitext", "imdb", "embeddings-benchmark", "train"):
        assert resolve_source(name, "data.source").kind is SourceKind.dataset


@pytest.mark.parametrize("name", ["-a/b", "a--b/c", "a..b/c", "a/b:c", "a/b c", "x" * 300, "größe/corpus"])
def test_what_cannot_be_a_name_of_the_hub(name: str) -> None:
    assert refusal(name).startswith(f"data.source={name}")


@obeys("megatron_lite/data/corpus/source_names.py:require_utf8")
def test_names_that_no_file_has(folder: Path) -> None:
    assert "this user does not exist; write the path without ~" in refusal("~nobody_of_this_name/x.txt")
    assert " names no file; use embedded" in refusal("")
    assert " names no file; use embedded" in refusal("a\0.txt")
    assert "File name too long; correct the path" in refusal("x" * 300 + ".txt")
    (folder / "bad\udcff.txt").write_text("x")
    for name in ("bad\udcff.txt", "b*.txt"):
        assert refusal(name) == "'bad\\udcff.txt': the name of this file is not UTF-8; rename it"
    os.rename("bad\udcff.txt", "good.txt")
    assert resolve_source("good.txt", "data.source")


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch, config_for: ConfigFor) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "x.txt").write_text("home")
    assert texts("~/x.txt", config_for) == texts("~/*.txt", config_for) == ["home"]


@obeys("megatron_lite/data/corpus/source_names.py:_missing")
def test_links(folder: Path) -> None:
    (folder / "x.txt").symlink_to("nowhere.txt")
    assert refusal("x.txt").endswith("x.txt is a link to nowhere.txt, which does not exist; correct the link")
    (folder / "nowhere.txt").write_text("x")
    assert resolve_source("x.txt", "data.source")


@pytest.fixture
def as_unprivileged_user() -> Iterator[None]:
    """Root may read everything."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_permission_denied(folder: Path, request: pytest.FixtureRequest) -> None:
    path = folder / "a.txt"
    path.write_text("secret")
    path.chmod(0)
    request.getfixturevalue("as_unprivileged_user")
    assert refusal(str(path)).endswith("cannot be read: Permission denied; correct the path or its permissions")


def test_what_is_no_file(folder: Path, config_for: ConfigFor) -> None:
    os.mkfifo("pipe.jsonl")
    message = refusal("pipe.jsonl")
    assert message.endswith(
        "is a pipe, but a source is read several times; write its output to a file and name that file"
    )
    assert "is a device, but" in refusal("/dev/null")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.txt")
        assert "is a socket, but" in refusal("s.txt")


def test_files_of_other_forms(folder: Path) -> None:
    for suffix, remedy in OTHER_SUFFIXES.items():
        (folder / f"a{suffix}").write_text("x")
        assert refusal(f"a{suffix}").endswith(f"a{suffix} has an unknown file format; {remedy}")
    (folder / "a.parquet.gz").write_text("x")
    assert "unpack it and name the files that were in it" in refusal("a.parquet.gz")
    (folder / "a.xyz").write_text("x")
    assert "a.xyz has an unknown file format; use embedded, a .txt" in refusal("a.xyz")


@obeys("megatron_lite/data/corpus/source_names.py:_kind_of_file")
def test_what_is_done_to_files_of_other_forms(folder: Path, config_for: ConfigFor) -> None:
    """The remedies are obeyed."""
    (folder / "x.txt").write_text("packed")
    with zipfile.ZipFile("a.zip", "w") as packed:
        packed.write("x.txt", "from_zip.txt")
    assert "unpack it and name the files that were in it" in refusal("a.zip")
    zipfile.ZipFile("a.zip").extractall()
    assert texts("from_zip.txt", config_for) == ["packed"]
    (folder / "a.md").write_text("# plain")
    assert "give it a name that ends in .txt" in refusal("a.md")
    os.rename("a.md", "a.md.txt")
    assert texts("a.md.txt", config_for) == ["# plain"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".arrow"])
def test_a_table_in_a_folder_of_its_own(
    folder: Path, config_for: ConfigFor, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remedy for tables that only `datasets` reads."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hf_cache")
    table = datasets.Dataset.from_dict({"text": ["one", "two"], "id": [1, 2]})
    if suffix == ".arrow":
        table.save_to_disk(str(folder / "saved"))
        shutil.copy(next((folder / "saved").glob("*.arrow")), folder / "a.arrow")
    else:
        table.to_csv(f"a{suffix}", sep="," if suffix == ".csv" else "\t")
    assert "put it into a separate folder and name that folder" in refusal(f"a{suffix}")
    (folder / "own").mkdir()
    os.rename(f"a{suffix}", f"own/a{suffix}")
    assert texts("own", config_for) == ["one", "two"]


@obeys("megatron_lite/data/corpus/source_names.py:_kind_of_file")
def test_one_json_array(folder: Path, config_for: ConfigFor) -> None:
    (folder / "a.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=1))
    message = refusal("a.json")
    assert "a.json is one JSON array; write one object per line, as with `python -c " in message
    command = message.split("`")[1].replace("python", "python3", 1)
    subprocess.run(command, shell=True, check=True)
    assert texts("a.jsonl", config_for) == ["one", "two"]


@obeys("megatron_lite/data/corpus/source_names.py:resolve_source")
def test_empty_files(folder: Path) -> None:
    for name in ("a.txt", "a.jsonl.gz", "a.parquet"):
        (folder / name).touch()
        assert refusal(name) == f"{name} (of data.source={name}) is empty; name a file that holds text"
    assert "matches only empty files; name files that hold text" in refusal("*.txt")
    (folder / "b.txt").write_text("text")
    for name in ("b.txt", "*.txt"):
        assert resolve_source(name, "data.source").kind is SourceKind.text


@obeys("megatron_lite/data/corpus/source_names.py:_pattern")
def test_patterns(folder: Path, config_for: ConfigFor) -> None:
    assert refusal("*.jsonl") == f"data.source=*.jsonl matches no file (looked from {folder}); correct the pattern"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "a.jsonl").write_text('{"text": "one"}')
    (folder / "deep" / "b.jsonl.gz").touch()
    assert texts("deep/**/a*", config_for) == ["one"]
    (folder / "deep" / "c.txt").write_text("two")
    assert "matches files of several formats (" in refusal("deep/*.*")
    assert [s.kind for s in resolve_sources(["deep/**/*.jsonl", "deep/*.txt"], "data.source")] == ["jsonl", "text"]
    message = refusal("de*")
    assert message.endswith("deep is a folder; use a pattern of files, such as de*/*.*")
    (folder / "deep" / "b.jsonl.gz").unlink()
    assert texts("de*/*.*", config_for) == ["two"]


@obeys("megatron_lite/data/corpus/source_names.py:_pattern", "megatron_lite/data/corpus/source_names.py:_pair")
def test_patterns_of_shards_and_halves_of_pairs(folder: Path) -> None:
    for name in ("a.bin", "a.idx", "b.bin", "b.idx"):
        (folder / name).touch()
    message = refusal("*.bin")
    assert message.endswith("Megatron shards must be named one by one; use data.source=[a,b]")
    names = message.split("[")[1].rstrip("]").split(",")
    assert [source.kind for source in resolve_sources(names, "data.source")] == ["shards", "shards"]
    (folder / "a.idx").unlink()
    for name in ("a", "a.bin", "a.idx"):
        assert refusal(name).endswith(f"a.idx does not exist; {HALF}")
    (folder / "a.idx").touch()  # copied
    for name in ("a", "a.bin", "a.idx", "b"):
        assert resolve_source(name, "data.source").kind is SourceKind.shards


@obeys("megatron_lite/data/corpus/source_names.py:_dataset_folder")
def test_folders_without_data_files(folder: Path) -> None:
    (folder / "f").mkdir()
    assert "is a folder without data files: it holds nothing; name a folder of files that" in refusal("f")
    for name in ("README.md", "LICENSE", ".hidden.jsonl"):
        (folder / "f" / name).write_text("x")
    assert "it holds only .md, files without a suffix; name a folder" in refusal("f")
    for name in ("x.bin", "x.idx"):
        (folder / "f" / name).touch()
    remedy = refusal("f").rsplit(" use the prefix ", 1)[1]
    assert resolve_source(remedy, "data.source").kind is SourceKind.shards


def test_all_that_is_wrong_is_said_at_once(folder: Path) -> None:
    data = DataConfig(source=["missing.txt", "embedded", "s3://b/x"], validation_source="other.jsonl")
    with pytest.raises(DataError) as error:
        require_sources(data)
    assert [line.split("=")[0] for line in str(error.value).split("\n")] == [
        "data.source[0]",
        "data.source[2]",
        "data.validation_source",
    ]
    require_sources(DataConfig(source=["embedded", "owner/name"]))


def test_empty_list() -> None:
    with pytest.raises(ConfigError, match=r"data\.source=\[\] names no source"):
        resolve_sources([], "data.source")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=20) | st.from_regex(r"\A[a-z~./*\[\]:\\%]{0,12}(\.txt|\.jsonl|/)?\Z"))
def test_any_name_is_a_source_or_refused(name: str) -> None:
    assume("~" not in name and ".." not in name and "**" not in name and not name.startswith("/"))  # no other folders
    with suppress(DataError):
        assert resolve_source(name, "data.source").name == name


@obeys("megatron_lite/data/corpus/source_names.py:_several_forms")
def test_a_folder_with_files_of_several_forms(folder: Path, config_for: ConfigFor) -> None:
    """`datasets` would read one of them and pass over the other."""
    for name, content in (("mixed/a.jsonl", '{"text": "one"}'), ("mixed/in/b.txt", "two"), ("mixed/c.jsonl", "")):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(content)
    (folder / "mixed" / "dataset_infos.json").write_text("{}")
    message = refusal("mixed")
    assert "mixed is a folder with files of several formats (" in message
    remedy = re.findall(r"data\.source='\[(.*)\]'", message)[0].split(",")
    assert {Path(pattern).name for pattern in remedy} == {"*.jsonl", "*.txt"}
    assert sorted(text for pattern in remedy for text in texts(pattern, config_for)) == ["one", "two"]
    (folder / "mixed" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: '*.jsonl'\n---\nAbout it.\n"
    )
    assert texts("mixed", config_for) == ["one"]
    (folder / "mixed" / "README.md").write_text("data_files\n")
    (folder / "mixed" / "d.csv").write_text("text\nthree\n")
    assert "move the others to a folder that you add to the sources" in refusal("mixed")


@obeys("megatron_lite/data/corpus/sources.py:dangling")
@obeys("megatron_lite/data/corpus/sources.py:visible_files")
@pytest.mark.parametrize("target", ["gone.jsonl", "other"])
def test_a_link_within_a_folder_that_cannot_be_followed(folder: Path, target: str) -> None:
    (folder / "other").mkdir()
    (folder / "parts").mkdir()
    (folder / "parts" / "a.jsonl").write_text('{"text": "one"}')
    (folder / "parts" / "z.jsonl").symlink_to(folder / target)
    message = refusal("parts")
    assert f"parts/z.jsonl is a link to {'the folder ' * (target == 'other')}{folder / target}" in message
    (folder / "parts" / "z.jsonl").unlink()
    assert resolve_source("parts", "data.source").kind is SourceKind.dataset


@obeys("megatron_lite/data/corpus/streams.py:require_no_other_mark")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_text_that_says_that_it_is_not_utf8(folder: Path, encoding: str, packed: bool, config_for: ConfigFor) -> None:
    content = "\ufeffgrößer, on one line".encode(encoding)
    path = folder / ("it's.txt.gz" if packed else "it's.txt")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError) as error:
        texts(path.name, config_for)
    name = "UTF-16" if "16" in encoding else "UTF-32"
    assert f"{path.name} (of data.source={path.name}) is {name}, by its byte order mark; convert it" in str(error.value)
    command = re.findall("`(.*)`", str(error.value))[0]
    if packed:
        command = f"""gzip -dc "it's.txt.gz" | {command} > OUT.txt"""
    subprocess.run(command, shell=True, check=True)
    assert texts("OUT.txt", config_for) == ["größer, on one line"]

"""Errors of checkpoints: following their remedies works."""

from __future__ import annotations

import re
import shlex
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_lite.checkpoint import export, loading, parity, state, tensor_files
from megatron_lite.checkpoint import folder as folders
from megatron_lite.checkpoint.__main__ import main
from megatron_lite.checkpoint.folder import require_space
from megatron_lite.checkpoint.fragments import Transfer
from megatron_lite.checkpoint.tensor_files import WHOLE_COPY, TensorReader
from megatron_lite.checkpoint.tensors import difference
from megatron_lite.config.frozen import as_containers
from megatron_lite.config.hf.headers import entries_of
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import CheckpointError, DiskError
from megatron_lite.files import bytes_below
from tests.distributed.reference_models import CASES
from tests.unit.checkpoint.examples import SHARD, STATE, save
from tests.unit.checkpoint.hf_checkpoints import save_model
from tests.unit.checkpoint.starts import begin
from tests.unit.remedies import obeys

DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises((CheckpointError, DiskError)) as error:
        action()
    return str(error.value)


@obeys("megatron_lite/checkpoint/loading.py:newest_complete")
@pytest.mark.usefixtures("one_rank")
def test_a_run_whose_checkpoints_are_all_damaged(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    whole = shutil.copytree(save(checkpoints, 100), tmp_path / "whole")
    (checkpoints / "step_00000100" / SHARD).unlink()
    message = refusal(lambda: loading.newest_complete(checkpoints, lambda line: None))
    assert message.endswith(
        "; restore a complete one, or move them away to start from scratch (or give another train.run_dir)"
    )
    assert loading.newest_complete(tmp_path / "another" / "checkpoints", pytest.fail) is None
    shutil.move(checkpoints / "step_00000100", tmp_path / "away")
    (checkpoints / folders.LATEST).unlink()
    assert loading.newest_complete(checkpoints, pytest.fail) is None
    shutil.copytree(whole, checkpoints / "step_00000100")
    found = loading.newest_complete(checkpoints, pytest.fail)
    assert found is not None
    assert found[0] == checkpoints / "step_00000100"


@obeys("megatron_lite/checkpoint/loading.py:require_complete")
@pytest.mark.usefixtures("one_rank")
def test_a_named_checkpoint_that_is_damaged(tmp_path: Path) -> None:
    folder, other = save(tmp_path, 100), save(tmp_path, 200)
    content = (folder / SHARD).read_bytes()
    for damaged in (content[:-1], content[:-1] + b"\x07"):
        (folder / SHARD).write_bytes(damaged)
        message = refusal(lambda: loading.require_complete(folder))
        assert message.endswith("; restore an undamaged copy, or name another checkpoint")
        loading.require_complete(other)
        (folder / SHARD).write_bytes(content)
        loading.require_complete(folder)


@obeys("megatron_lite/checkpoint/folder.py:require_space")
def test_a_disk_without_room_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = tmp_path / "my run" / "checkpoints"
    for step in (100, 200, 300):
        save(checkpoints, step, replace(STATE, config=as_containers(RunConfig())))
    room = needed = bytes_below(checkpoints / "step_00000300")
    room += bytes_below(checkpoints) - 1
    elsewhere = tmp_path / "other disk"

    def usage(path: Path) -> DiskUsage:
        return DiskUsage(0, 0, room - (0 if path.is_relative_to(elsewhere) else bytes_below(checkpoints)))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    elsewhere.mkdir()
    message = refusal(lambda: require_space(checkpoints, needed))
    require_space(elsewhere / "run" / "checkpoints", needed)  # named in train.run_dir
    command = re.findall(r"`python -m megatron_lite\.checkpoint (prune .*)` removes the others now", message)[0]
    assert main(shlex.split(command.replace(" N", " 2"))) == 0
    require_space(checkpoints, needed)


@obeys("megatron_lite/checkpoint/state.py:require_format")
def test_a_checkpoint_of_another_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr(state, "FORMAT", state.FORMAT + 1)
        folder = save(tmp_path, 100)
        assert state.read_state(folder).step == 100  # by the version that wrote it
    assert refusal(lambda: state.read_state(folder)).endswith("; use the version that wrote it")


@obeys("megatron_lite/checkpoint/tensor_files.py:__init__", "megatron_lite/checkpoint/tensor_files.py:read")
@obeys("megatron_lite/checkpoint/tensor_files.py:whole", "megatron_lite/checkpoint/tensors.py:_bytes")
def test_files_of_tensors_that_are_damaged(tmp_path: Path) -> None:
    """After their headers were read; each time an undamaged copy is restored."""
    file = save(tmp_path, 100) / "model-00001-of-00002.safetensors"
    entries, content = entries_of(file), file.read_bytes()
    read = torch.zeros(2, 4)

    def read_box() -> None:
        with TensorReader(entries) as reader:
            reader.read([Transfer("wte.weight", (1, 0), read)])

    def read_whole() -> None:
        with TensorReader(entries) as reader:
            assert reader.whole("wte.weight").shape == (3, 4)

    def compare() -> None:
        assert difference(entries["wte.weight"], entries["wte.weight"]) is None

    other_names = content.replace(b"wte.weight", b"wpe.weight")
    for action, damaged in (
        (read_box, content[:20]),
        (read_box, other_names),
        (read_whole, other_names),
        (compare, content[:-8]),
    ):
        file.write_bytes(damaged)
        message = refusal(action)
        assert message.startswith(str(file))
        assert message.endswith(f"; {WHOLE_COPY}")
        file.write_bytes(content)
        action()
    assert read.tolist() == [[4.0, 5.0, 6.0, 7.0], [8.0, 9.0, 10.0, 11.0]]
    assert WHOLE_COPY == tensor_files.WHOLE_COPY == "restore an undamaged copy"


@obeys("megatron_lite/checkpoint/parity.py:_described")
def test_a_model_folder_without_its_config(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for content, remedy in ((None, "; restore it"), ("{", "; restore an undamaged copy")):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_text(content)
        assert refusal(lambda: parity._described(tmp_path)).endswith(remedy)
        file.write_text('{"vocab_size": 9}')
        assert parity._described(tmp_path) == {"vocab_size": 9}


@obeys("megatron_lite/checkpoint/parity.py:_theirs")
def test_a_folder_that_transformers_cannot_read_or_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    folder = save_model(tmp_path, CASES["gpt2"])
    reading = parity._Reading(folder, "GPT2LMHeadModel", every_tensor=True)
    inputs = {"tokens": torch.zeros(1, 4, dtype=torch.long)}

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a fault of that version")

    for name, what in (("from_pretrained", "cannot read"), ("forward", "cannot compute with")):
        with monkeypatch.context() as other_version:
            other_version.setattr(transformers.GPT2LMHeadModel, name, fail)
            message = refusal(lambda: parity._theirs(reading, inputs))
            assert f" {what} {folder}: RuntimeError: a fault of that version; " in message
            assert message.endswith("; install the transformers of constraints.txt and try again")
    assert len(parity._theirs(reading, inputs)) == 1


@obeys("megatron_lite/checkpoint/export.py:_configuration")
def test_export_of_settings_of_another_version(tmp_path: Path) -> None:
    ours = replace(STATE, config=as_containers(RunConfig()))
    other = replace(ours, config=ours.config | {"flavour": 1})
    message = refusal(lambda: export._configuration(tmp_path, other))
    assert message.endswith("; export it with the version that wrote it")
    assert export._configuration(tmp_path, ours).train.steps == RunConfig().train.steps  # as that version would


@obeys("megatron_lite/checkpoint/export.py:_convert", "megatron_lite/checkpoint/export.py:_edit")
def test_export_of_damaged_files(tmp_path: Path) -> None:
    damaged, other = save(tmp_path / "checkpoints", 100), save(tmp_path / "checkpoints", 200)
    out = tmp_path / "out"
    out.mkdir()
    (damaged / SHARD).write_bytes(b"{}")
    (damaged / "config.json").write_text("{")
    for action in (
        lambda source: export._convert(source / SHARD, out / SHARD, torch.bfloat16),
        lambda source: export._edit(source / "config.json", lambda content: content | {"torch_dtype": "bfloat16"}),
    ):
        assert refusal(lambda action=action: action(damaged)).endswith("; export another checkpoint of the run")
        action(other)
    message = refusal(lambda: export._convert(other / SHARD, tmp_path / "missing" / SHARD, torch.bfloat16))
    assert message.endswith("; free some space, or give another OUT")
    assert export._convert(other / SHARD, out / SHARD, torch.bfloat16) == 8


@obeys("megatron_lite/checkpoint/export.py:_require_counterpart")
def test_a_model_that_transformers_does_not_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES["gpt2"]
    save_model(tmp_path / "checkpoints", replace(case, model=replace(case.model, scale_tied_head=True)))
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 2
    told = re.search(r"; go on with it here, by model\.init_from=(\S+)", capsys.readouterr().err)
    assert told is not None
    config = begin(Path(told[1]), "gpt2")
    assert config.model.scale_tied_head
    assert config.model.num_layers == case.model.num_layers

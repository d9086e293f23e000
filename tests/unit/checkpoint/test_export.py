"""`python -m megatron_lite.checkpoint export`: what it writes transformers reads as we do, or it writes nothing."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from safetensors.torch import load_file
from torch import Tensor

from megatron_lite.checkpoint import export as export_module
from megatron_lite.checkpoint import parity
from megatron_lite.checkpoint.__main__ import EXPORT_DTYPES, main
from megatron_lite.config.hf.headers import tensors_of
from megatron_lite.errors import CheckpointError
from megatron_lite.files import file_xxh3
from megatron_lite.models.hf import stored_form
from megatron_lite.models.stored import StoredForm
from tests.distributed.reference_models import CASES, VOCAB_SIZE
from tests.tiny_models import T5
from tests.unit.checkpoint.hf_checkpoints import save_model
from tests.unit.remedies import obeys

FAMILIES = {
    "gpt2": "float32",
    "gpt2_untied": "float16",
    "llama": "bfloat16",
    "llama_tied": "float16",
    "bert": "bfloat16",
    "bert_without_pairs": "float32",
    "roberta": "bfloat16",
    "t5": "float16",
    "t5_v1_1": "bfloat16",
    "bart": "float32",
}
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: object) -> tuple[int, str, str]:
        code = main(["export", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def refused(found: tuple[int, str, str], out: Path) -> str:
    """The message, and nothing else anywhere."""
    code, _, error = found
    assert code == 2
    assert error.count("\n") == 1, "one message, no traceback"
    assert not out.exists()
    assert not list(out.parent.glob(".*")), "nothing is left of the attempt"
    return error


def plant(monkeypatch: pytest.MonkeyPatch, fault: Callable[[dict[str, Tensor]], object]) -> None:
    """Let the exported file of weights have a fault."""
    save = export_module.save_file

    def save_with_fault(tensors: dict[str, Tensor], *args: object, **settings: object) -> None:
        fault(tensors)
        save({name: tensor.contiguous() for name, tensor in tensors.items()}, *args, **settings)

    monkeypatch.setattr(export_module, "save_file", save_with_fault)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_in_some_type(name: str, tmp_path: Path, command: Command) -> None:
    folder, out, dtype = save_model(tmp_path / "checkpoints", CASES[name]), tmp_path / "out", FAMILIES[name]
    code, printed, error = command(tmp_path, out, "--dtype", dtype)
    assert code == 0, error
    assert f"in {dtype}: step 100 of {folder}" in printed
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == dtype
    expected = {path.name for path in folder.iterdir()} - {"training", "manifest.json"}
    assert {path.name for path in out.iterdir()} == expected
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert after.keys() == before.keys()
    for tensor, values in after.items():
        assert torch.equal(values, before[tensor].to(getattr(torch, dtype))), tensor


def test_files_are_converted_one_by_one(tmp_path: Path, command: Command) -> None:
    folder = save_model(tmp_path / "checkpoints", CASES["llama"], largest_bytes=20_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    (folder / "config.json").chmod(0o600)
    code, _, error = command(folder, tmp_path / "deep" / "out", "--dtype", "bfloat16")
    assert code == 0, error
    tensors = tensors_of(tmp_path / "deep" / "out")
    assert {entry.dtype for entry in tensors.values()} == {"BF16"}
    index = json.loads((tmp_path / "deep" / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(entry.offsets[1] - entry.offsets[0] for entry in tensors.values())
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "deep").rglob("*")), "wider than a part of it"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "out")
    assert model.dtype is torch.bfloat16


@obeys("megatron_lite/checkpoint/export.py:_require_equal")
def test_a_query_in_the_key_s_place_is_refused(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault that shapes do not show: our form of the files is not that of transformers."""

    def swapped(*args: object) -> StoredForm:
        form = stored_form(*args)  # type: ignore[arg-type]
        names = {"q_proj": "k_proj", "k_proj": "q_proj"}

        def other(target: str) -> str:
            *path, part, kind = target.split(".")
            return ".".join([*path, names.get(part, part), kind])

        return replace(form, pieces=tuple(replace(piece, target=other(piece.target)) for piece in form.pieces))

    save_model(tmp_path / "checkpoints", CASES["llama_multi_head"])
    with monkeypatch.context() as other_version:
        other_version.setattr(parity, "stored_form", swapped)
        error = refused(command(tmp_path, tmp_path / "out"), tmp_path / "out")
    assert "LlamaForCausalLM of transformers" in error
    assert "computes logits from it that differ from ours by " in error
    assert "; install the transformers of constraints.txt and export again; " in error
    assert command(tmp_path, tmp_path / "out")[0] == 0


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("gpt2", "transformer.h.1.attn.c_proj.weight"),
        ("bert", "cls.seq_relationship.weight"),  # which only the next-sentence logits show
        ("bert", "bert.embeddings.token_type_embeddings.weight"),  # which only segments show
        ("t5", "decoder.block.2.layer.1.EncDecAttention.v.weight"),
    ],
)
def test_a_wrong_tensor_is_refused(
    name: str, tensor: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "checkpoints", CASES[name])
    plant(monkeypatch, lambda tensors: tensors.update({tensor: tensors[tensor].flip(-1)}))
    error = refused(command(tmp_path, tmp_path / "out", "--dtype", "bfloat16"), tmp_path / "out")
    assert "that differ from ours by " in error


def test_other_rules_of_computation_are_refused(tmp_path: Path, command: Command) -> None:
    """config.json says another activation than the run had, and the manifest agrees with it."""
    folder = save_model(tmp_path / "checkpoints", CASES["gpt2"])
    config, manifest = folder / "config.json", folder / "manifest.json"
    config.write_text(config.read_text().replace("gelu_new", "relu"))
    assert "is damaged: config.json is " in refused(command(folder, tmp_path / "out"), tmp_path / "out")
    content = json.loads(manifest.read_text())
    content["files"]["config.json"] = {"bytes": config.stat().st_size, "xxh3": file_xxh3(config)}
    manifest.write_text(json.dumps(content))
    assert "that differ from ours by " in refused(command(folder, tmp_path / "out"), tmp_path / "out")


@obeys("megatron_lite/checkpoint/parity.py:_theirs")
def test_a_tensor_that_transformers_misses_is_named(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would draw one at random."""
    save_model(tmp_path / "checkpoints", CASES["gpt2"])
    with monkeypatch.context() as other_version:
        plant(other_version, lambda tensors: tensors.pop("transformer.ln_f.bias"))
        error = refused(command(tmp_path, tmp_path / "out"), tmp_path / "out")
    assert " have different tensors (missing keys: transformer.ln_f.bias)" in error
    assert "; install the transformers of constraints.txt and try again" in error
    assert command(tmp_path, tmp_path / "out")[0] == 0


@obeys("megatron_lite/checkpoint/export.py:_rounded")
def test_a_number_too_large_for_the_type_is_named() -> None:
    with pytest.raises(
        CheckpointError, match=r"^head holds 1e\+06, but the largest float16 is 6.55e\+04; use --dtype bfloat16"
    ):
        export_module._rounded(torch.tensor([1.0, -1e6]), torch.float16, "head")
    assert (
        export_module._rounded(torch.tensor([1.0, -1e6]), torch.bfloat16, "head").isfinite().all()
    )  # the remedy works
    for number in (3.4e38, float("inf"), float("nan")):
        for kind in (torch.float16, torch.bfloat16):
            with pytest.raises(CheckpointError, match="; export a checkpoint whose weights are finite"):
                export_module._rounded(torch.tensor([1.0, number]), kind, "head")


@obeys("megatron_lite/checkpoint/export.py:export")
def test_what_exists_is_not_overwritten(tmp_path: Path, command: Command) -> None:
    save_model(tmp_path / "checkpoints", CASES["gpt2"])
    (tmp_path / "out").mkdir()
    code, _, error = command(tmp_path, tmp_path / "out")
    assert code == 2
    assert error.startswith(f"error: OUT={tmp_path}/out exists, and export never overwrites; remove it")
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "out").rmdir()
    (tmp_path / "file").touch()
    code, _, error = command(tmp_path, tmp_path / "file" / "out")
    assert code == 2
    assert error.endswith("; free some space, or give another folder\n")
    assert command(tmp_path, tmp_path / "out")[0] == 0


@obeys("megatron_lite/checkpoint/export.py:_whole_checkpoint")
def test_a_damaged_checkpoint_is_refused_and_in_a_run_skipped(tmp_path: Path, command: Command) -> None:
    folder = save_model(tmp_path / "checkpoints", CASES["gpt2"])
    other = Path(shutil.copytree(folder, tmp_path / "other" / folder.name))
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"abcd")
    fault = "model.safetensors has other content than the manifest says"
    assert f"{folder} is damaged: {fault}; export another" in refused(
        command(folder, tmp_path / "out"), tmp_path / "out"
    )
    code, printed, error = command(tmp_path, tmp_path / "out")
    assert code == 2
    assert f"Skipping step_00000100: {fault}" in printed
    told = re.search(r"holds no complete checkpoint; `python -m megatron_lite\.checkpoint (verify .*)` shows", error)
    assert told is not None
    assert main(told[1].split()) == 1
    assert command(other, tmp_path / "out")[0] == 0


def test_a_model_without_a_counterpart_is_refused_with_the_reason(tmp_path: Path, command: Command) -> None:
    case = replace(CASES["t5"], model=replace(T5, attention_scale=True))
    folder = save_model(tmp_path / "checkpoints", case)
    error = refused(command(tmp_path, tmp_path / "out"), tmp_path / "out")
    assert f"{folder} has no counterpart in transformers: T5ForConditionalGeneration of transformers has " in error
    assert "model.attention_scale=true" in error


@obeys("megatron_lite/checkpoint/parity.py:require_transformers")
def test_without_transformers(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "checkpoints", CASES["gpt2"])
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "transformers", None)
        error = refused(command(tmp_path, tmp_path / "out"), tmp_path / "out")
    told = re.search(r"; pip install '(.*)'", error)
    assert told is not None
    assert Requirement(told[1]).specifier.contains(transformers.__version__)  # as installed here
    assert command(tmp_path, tmp_path / "out")[0] == 0


@obeys("megatron_lite/checkpoint/export.py:_whole_checkpoint")
def test_no_checkpoint(tmp_path: Path, command: Command) -> None:
    error = refused(command(tmp_path, tmp_path / "out"), tmp_path / "out")
    assert error.startswith(f"error: {tmp_path} holds no checkpoint; give a checkpoint, a run folder")
    folder = save_model(tmp_path / "checkpoints", CASES["gpt2"])
    for path in (folder, tmp_path, tmp_path / "checkpoints"):
        assert export_module._whole_checkpoint(path, pytest.fail)[0] == folder


def test_the_types_of_the_command_are_those_of_the_module() -> None:
    assert tuple(export_module.DTYPES) == EXPORT_DTYPES


def test_samples_never_hold_padding() -> None:
    """By which transformers' RoBERTa counts its positions."""
    found = parity.random_inputs(T5, VOCAB_SIZE, pad_id=5)
    assert found.keys() == {"tokens", "decoder_tokens"}
    assert not any((tensor == 5).any() for tensor in found.values())


def test_what_is_allowed_grows_with_the_logits() -> None:
    assert parity.max_of([torch.tensor([0.5, -36.0]), torch.tensor([[7.0]])]) == 36.0
    assert math.isnan(parity.max_of([torch.tensor([1.0, math.nan]), torch.tensor([2.0])]))

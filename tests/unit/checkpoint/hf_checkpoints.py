"""Checkpoints of tiny models with random weights, as a run leaves them: a Hugging Face folder and the run's state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from megatron_lite.checkpoint.folder import begin, publish
from megatron_lite.checkpoint.hf_files import model_files
from megatron_lite.checkpoint.state import STATE_FILE
from megatron_lite.checkpoint.tensor_files import index_of, split_into_files
from megatron_lite.config.derived import resolve
from megatron_lite.config.frozen import as_containers
from megatron_lite.config.hf import NoCounterpart
from megatron_lite.config.hf.headers import INDEX_FILE
from megatron_lite.config.schema import ObjectiveConfig, ObjectiveName, RunConfig
from megatron_lite.models.hf import stored_form
from megatron_lite.models.stored import same_names
from megatron_lite.parallel.context import ParallelContext
from tests.distributed.reference_models import TOKEN_IDS, VOCAB_SIZE, Case, random_weights
from tests.stored_tensors import to_stored
from tests.unit.checkpoint.examples import STATE

STEP = 100


def save_model(checkpoints: Path, case: Case, largest_bytes: int = 2**30) -> Path:
    """A published checkpoint of this case."""
    config = resolve(RunConfig(model=case.model, objective=ObjectiveConfig(name=_objective(case))))
    weights = random_weights(
        {name: one.shard_spec.full_shape for name, one in case.flat(ParallelContext.single()).named_parameters()}
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    documents: Mapping[str, bytes] = {}
    try:
        documents = model_files(config, vocab_size=VOCAB_SIZE, tokens=TOKEN_IDS, dtype="float32")
        form = stored_form(config.model, shapes)
    except NoCounterpart:
        form = same_names(shapes)
    temporary = begin(checkpoints, STEP)
    (temporary / "training").mkdir()
    state = replace(STATE, config=as_containers(config), hugging_face=bool(documents))
    (temporary / STATE_FILE).write_text(state.as_text())
    for name, content in documents.items():
        (temporary / name).write_bytes(content)
    _write_tensors(temporary, to_stored(weights, form), largest_bytes)
    save_file(weights, temporary / "training" / "exp_avg.safetensors")
    return publish(temporary, {})


def _objective(case: Case) -> ObjectiveName:
    """What export reads off it: whether there is a next-sentence head."""
    return ObjectiveName.masked_lm_nsp if case.next_sentence else ObjectiveName.causal_lm


def _write_tensors(folder: Path, stored: Mapping[str, Tensor], largest_bytes: int) -> None:
    files = split_into_files(
        "model", same_names({name: tuple(one.shape) for name, one in stored.items()}), largest_bytes
    )
    for file in files:
        save_file({name: stored[name] for name in file.shapes}, folder / file.name, metadata={"format": "pt"})
    index = index_of(files)
    if index is not None:
        (folder / INDEX_FILE).write_text(index)

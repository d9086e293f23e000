"""Folders of transformers with random weights, to be changed and begun with."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_lite.checkpoint.fit import require_start
from megatron_lite.checkpoint.parity import Parity, compare_start
from megatron_lite.config.compose import change, compose
from megatron_lite.config.derived import resolve, resolve_model
from megatron_lite.config.hf import counterpart, hf_config
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import RunConfig
from megatron_lite.models.hf import stored_form
from megatron_lite.models.shapes import parameter_shapes
from tests.distributed.reference_models import CASES, TOKEN_IDS, VOCAB_SIZE, Case, random_weights
from tests.stored_tensors import to_stored


@cache
def tensors_of_case(name: str) -> dict[str, Tensor]:
    """By transformers' names."""
    case = CASES[name]
    model = resolve_model(case.model)
    shapes = parameter_shapes(model, VOCAB_SIZE, next_sentence=case.next_sentence)
    stored = to_stored(random_weights(shapes), stored_form(model, shapes))
    return {name: tensor.contiguous() for name, tensor in stored.items()}


def config_of_case(case: Case) -> dict[str, Any]:
    model = resolve_model(case.model)
    found = hf_config(model, vocab_size=VOCAB_SIZE, tokens=TOKEN_IDS, next_sentence=case.next_sentence)
    return json.loads(json.dumps(found))


def write_start(
    folder: Path,
    name: str,
    tensors: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
    **flags: object,
) -> Path:
    """The folder of a case.

    Args:
        tensors: changes them in place.
        flags: of config.json, to be added or replaced; `...` removes one.
    """
    folder.mkdir(exist_ok=True, parents=True)
    config = {key: value for key, value in (config_of_case(CASES[name]) | flags).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    changed = dict(tensors_of_case(name))
    tensors(changed)
    copies = {key: tensor.clone().contiguous() for key, tensor in changed.items()}  # which may share memory
    save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@cache
def _base(script: str) -> RunConfig:
    return compose(script, [])


def begin(folder: Path, name: str, *words: str) -> ResolvedConfig:
    """What a launcher does before it starts anything: the configuration, or an error."""
    case = CASES[name]
    script = counterpart(resolve_model(case.model), next_sentence=case.next_sentence).script
    objective = ["objective.name=masked_lm"] if script == "pretrain_bert" and not case.next_sentence else []
    given = [f"model.init_from={folder}", "data.tokenizer=train", f"train.run_dir={folder / 'run'}", *objective]
    config = resolve(change(_base(script), [*given, *words]), world_size=1, device="cpu")
    require_start(config)
    return config


def parity_of(folder: Path, name: str, *words: str) -> Parity:
    """Begin, and compare logits with those of transformers."""
    return compare_start(folder, begin(folder, name, *words))


def reread(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")

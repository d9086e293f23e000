"""Small checkpoints that stand for those of a run, written without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from megatron_lite.checkpoint.folder import begin, publish
from megatron_lite.checkpoint.state import STATE_FILE, CheckpointState, Layout, OptimizerState

Tensors = Mapping[str, npt.NDArray[np.generic]]

STATE = CheckpointState(
    step=100,
    samples=3200,
    layout=Layout(2, 2, 2, 1, sequence_parallel=False),
    precision="fp32",
    optimizer=OptimizerState("adamw", 100, ("exp_avg", "exp_avg_sq")),
    loss_scale=None,
    data_fingerprint="b5c1",
    hugging_face=True,
    validation_loss=None,
)
WEIGHTS: Tensors = {
    "wte.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "ln_f.bias": np.zeros(4, np.float32),
}
SHARD = "model-00002-of-00002.safetensors"


def write_content(temporary: Path, state: CheckpointState, weights: Tensors = WEIGHTS, fill: float = 0.0) -> None:
    """What the ranks write: two shards of weights, and moments that are all `fill`."""
    (temporary / "training").mkdir()
    (temporary / STATE_FILE).write_text(state.as_text())
    (temporary / "config.json").write_text('{"model_type": "gpt2"}')
    for number, (name, tensor) in enumerate(weights.items(), start=1):
        save_file({name: tensor}, temporary / f"model-{number:05d}-of-{len(weights):05d}.safetensors")
    for moment in state.optimizer.moments:
        save_file(
            {name: np.full_like(tensor, fill) for name, tensor in weights.items()},
            temporary / f"training/{moment}.safetensors",
        )


def save(checkpoints: Path, step: int, state: CheckpointState = STATE, **content: object) -> Path:
    """A published checkpoint of this step."""
    temporary = begin(checkpoints, step)
    write_content(temporary, replace(state, step=step, samples=32 * step), **content)  # type: ignore[arg-type]
    return publish(temporary, {})

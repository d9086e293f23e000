"""Samples per second of each objective's loader on one core, on the embedded corpus.

Reading, drawing, masking and stacking into tensors, as a run does before each step.
"""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path
from typing import NamedTuple

from megatron_lite.config.compose import compose
from megatron_lite.config.derived import resolve
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.rules.objective import OBJECTIVES
from megatron_lite.data.samples.batch import micro_batches
from megatron_lite.data.samples.loader import training_dataset
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.objectives.build import build_objective

SEQ_LENGTH = 512
BATCH = 32
TURN_SECONDS = 0.5


class Loading(NamedTuple):
    """The speed of one objective's loader."""

    objective: str
    samples_per_second: tuple[float, ...]  # CPU-seconds, one figure a turn
    tokens_per_sample: int  # that the model reads


def measure(cache_dir: Path, turns: int) -> list[Loading]:
    """Every objective in turn. Prepares the corpus in `cache_dir` if it does not exist."""
    return [
        _loading(config, turns)
        for script, names in OBJECTIVES.items()
        for config in (_config(script, name.value, cache_dir) for name in names)
    ]


def _config(script: str, objective: str, cache_dir: Path) -> ResolvedConfig:
    words = [f"objective={objective}", f"data.seq_length={SEQ_LENGTH}", f"data.cache_dir={cache_dir}"]
    return resolve(compose(script, words), device="cpu")


def _loading(config: ResolvedConfig, turns: int) -> Loading:
    prepared = prepare(config, report=lambda line: None)
    objective = build_objective(config.objective, config.data, prepared.vocabulary)
    dataset = training_dataset(prepared, config, objective.shape)
    firsts = count(0, BATCH)

    def turn() -> float:
        start, samples = time.process_time(), 0
        while time.process_time() - start < TURN_SECONDS:
            first = next(firsts)
            micro_batches(dataset, objective, range(first, first + BATCH), BATCH, config.train.seed)
            samples += BATCH
        return samples / (time.process_time() - start)

    turn()  # opens files, fills caches
    speeds = tuple(turn() for _ in range(turns))
    return Loading(config.objective.name.value, speeds, config.tokens_per_sample)

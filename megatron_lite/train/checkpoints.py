"""The checkpoints of one run: what lies in them, and how training begins from one."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import deepspeed
import torch
from omegaconf import OmegaConf

from megatron_lite.checkpoint.fragments import WEIGHT
from megatron_lite.checkpoint.loading import load
from megatron_lite.checkpoint.plan import Plan, Shapes, shapes_of_all_ranks
from megatron_lite.checkpoint.retention import Kept
from megatron_lite.checkpoint.saving import Saver, as_document
from megatron_lite.checkpoint.state import CheckpointState, Layout, OptimizerState
from megatron_lite.config.derived import has_next_sentence_head
from megatron_lite.config.frozen import as_node
from megatron_lite.config.hf import generation_config, hf_config
from megatron_lite.config.schema import ModelConfig, RunConfig
from megatron_lite.data.prepared import PreparedData
from megatron_lite.models.hf import NoCounterpart, stored_form
from megatron_lite.models.stored import Shape, StoredForm
from megatron_lite.optim.moments import moments_of
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.train.engine import Engine
from megatron_lite.train.startup import code_fingerprint


@dataclass
class Checkpoints:
    """Built once the engine is; everything here is called on every rank alike."""

    engine: Engine
    data_fingerprint: str
    shapes: Shapes
    saver: Saver

    @classmethod
    def of(cls, folder: Path, engine: Engine, prepared: PreparedData, report: Callable[[str], None]) -> Checkpoints:
        """A collective of all ranks. `report` is told where a checkpoint will be no model folder of transformers."""
        config, shapes = engine.config, shapes_of_all_ranks(engine.shards.shapes())
        form, documents = None, {}
        try:
            documents = _documents(config, prepared)
            form = _hugging_face(config.model)
        except NoCounterpart as reason:
            report(f"checkpoints keep the weights under our own names: {reason}")
        train = config.train
        saver = Saver(
            folder,
            Plan.of(shapes, form),
            documents,
            Kept(train.keep_last, train.keep_every, train.keep_best),
            asynchronous=train.async_save,
        )
        return cls(engine, prepared.fingerprint, shapes, saver)

    def restore(self, folder: Path, state: CheckpointState, *, moments: bool, loss_scale: bool) -> None:
        """Weights, and as asked for the optimizer's moments and fp16's loss scale.

        Raises:
            CheckpointError: the files hold other tensors than the model has.
        """
        shards = self.engine.shards
        plan = Plan.of(self.shapes, _hugging_face(self.engine.config.model) if state.hugging_face else None)
        if moments:
            shards.prepare()
        load(folder, plan, shards.fragments(), (WEIGHT, *state.optimizer.moments) if moments else (WEIGHT,))
        if moments:
            shards.updates = state.optimizer.step
        if loss_scale and state.loss_scale is not None:
            shards.loss_scale = state.loss_scale
        shards.weights_changed()

    def save(self, step: int, samples: int, validation_loss: float | None) -> Path:
        """Write a checkpoint, or begin to; the folder that it will be.

        Args:
            step: finished optimizer steps.
            samples: consumed in them.
            validation_loss: where the run was validated after this very step.
        """
        config, shards = self.engine.config, self.engine.shards
        state = CheckpointState(
            step=step,
            samples=samples,
            layout=layout_of(config, self.engine.context),
            precision=str(config.train.precision),
            optimizer=OptimizerState(str(config.optimizer.name), shards.updates, moments_of(config.optimizer)),
            loss_scale=shards.loss_scale,
            data_fingerprint=self.data_fingerprint,
            hugging_face=self.saver.plan.hugging_face,
            validation_loss=validation_loss,
            config=OmegaConf.to_container(as_node(config), enum_to_str=True),  # type: ignore[arg-type]  # a mapping
            versions={
                "megatron_lite": code_fingerprint(),
                "torch": torch.__version__,
                "deepspeed": deepspeed.__version__,
                "python": platform.python_version(),
            },
        )
        return self.saver.save(shards.fragments(), state)


def layout_of(config: RunConfig, context: ParallelContext) -> Layout:
    topology = context.topology
    return Layout(
        topology.data_parallel_size,
        topology.tensor_parallel_size,
        topology.pipeline_parallel_size,
        config.parallel.zero_stage,
        config.parallel.sequence_parallel,
    )


def _hugging_face(model: ModelConfig) -> Callable[[Mapping[str, Shape]], StoredForm]:
    return partial(stored_form, model)


def _documents(config: RunConfig, prepared: PreparedData) -> dict[str, bytes]:
    """config.json and generation_config.json, for transformers."""
    described = hf_config(
        config.model,
        vocab_size=prepared.vocab_size,
        tokens=prepared.special,
        next_sentence=has_next_sentence_head(config),
    )
    found = {"config.json": as_document(described)}
    generation = generation_config(described)
    return found if generation is None else found | {"generation_config.json": as_document(generation)}

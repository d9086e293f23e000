"""The checkpoints of one run: what they contain, and how training starts from one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_lite.checkpoint.file_plan import FilePlan, Shapes, shapes_of_all_ranks
from megatron_lite.checkpoint.fit import weights_of
from megatron_lite.checkpoint.fragments import WEIGHT, Fragment
from megatron_lite.checkpoint.hf_files import folder_files
from megatron_lite.checkpoint.loading import load, newest_complete, start_from
from megatron_lite.checkpoint.resume import ResumeReport, describe, without_environment
from megatron_lite.checkpoint.retention import Kept
from megatron_lite.checkpoint.saving import Saver
from megatron_lite.checkpoint.state import CheckpointState, Layout, OptimizerState
from megatron_lite.config.frozen import as_containers
from megatron_lite.config.resolved import ResolvedConfig, ResolvedModel
from megatron_lite.data.samples.skips import Skips
from megatron_lite.data.shards.prepared import PreparedData
from megatron_lite.data.tokenizer.tokenizer_files import GENERATION_FILE
from megatron_lite.engine.engine import Engine
from megatron_lite.models.hf import NoCounterpart, stored_form
from megatron_lite.models.stored import Shape, StoredForm
from megatron_lite.observe.console import Console
from megatron_lite.observe.logged import LoggedLines
from megatron_lite.optim.batch_ramp import BEGINNING, Origin
from megatron_lite.optim.moments import moments_of
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.train.startup import versions


@dataclass(frozen=True)
class Start:
    """Where an attempt starts: from a checkpoint of the run, or before the first step."""

    folder: Path | None = None
    report: ResumeReport | None = None
    """Set whenever `folder` is."""
    state: CheckpointState | None = None
    """Set whenever `folder` is."""

    @classmethod
    def find(
        cls,
        checkpoints: Path,
        config: ResolvedConfig,
        context: ParallelContext,
        prepared: PreparedData,
        console: Console,
        reason_against: Callable[[CheckpointState], str | None],
    ) -> Start:
        """The newest complete checkpoint, if there is one. A collective of all ranks.

        Args:
            reason_against: returns why the run cannot resume from a checkpoint, or None.
        Raises:
            CheckpointError: it belongs to a run with another configuration; on every rank alike.
        """
        found = newest_complete(checkpoints, console.print, reason_against)
        if found is None:
            return cls()
        folder, state = found
        return cls(folder, describe(state, config, layout_of(config, context), prepared.fingerprint, folder), state)

    @property
    def origin(self) -> Origin:
        return BEGINNING if self.report is None else self.report.origin

    @property
    def step(self) -> int:
        return self.origin.step


@dataclass
class Checkpoints:
    """Saves and loads checkpoints of an engine. Every method must be called on all ranks."""

    engine: Engine
    data_fingerprint: str
    shapes: Shapes
    saver: Saver
    newest_step: int = 0
    """Step of the newest checkpoint that this attempt has loaded, saved or started to save."""
    comparable_from: int = 1
    """As of `CheckpointState`."""

    @classmethod
    def of(
        cls,
        folder: Path,
        engine: Engine,
        prepared: PreparedData,
        report: Callable[[str], None],
        on_failure: Callable[[], None] = lambda: None,
        guard: Callable[[], None] = lambda: None,
    ) -> Checkpoints:
        """A collective of all ranks.

        Args:
            report: called with a line if transformers will not be able to load the checkpoints.
            on_failure: called on each rank, by another thread, as soon as a save has failed.
            guard: called before each change to the folder; raises if this process has lost the run folder.
        """
        config, shapes = engine.config, shapes_of_all_ranks(engine.shards.shapes())
        carried = prepared.tokenizer_files(config)
        try:
            documents = folder_files(
                config, carried, vocab_size=prepared.vocab_size, tokens=prepared.special, dtype="float32"
            )
            plan = FilePlan.of(shapes, _hugging_face(config.model))
        except NoCounterpart as reason:
            documents = {name: content for name, content in carried.items() if name != GENERATION_FILE}
            plan = FilePlan.of(shapes, None)
            report(f"checkpoints keep the weights under our own names: {reason}")
        train = config.train
        saver = Saver(
            folder,
            plan,
            documents,
            Kept(train.keep_last, train.keep_every, train.keep_best),
            asynchronous=train.async_save,
            on_failure=on_failure,
            guard=guard,
        )
        return cls(engine, prepared.fingerprint, shapes, saver)

    def begin(self, start: Start) -> None:
        """Load the checkpoint, or in a new run the weights of model.init_from.

        Raises:
            CheckpointError: the tensors in the files do not match the model.
        """
        if start.report is not None and start.state is not None and start.folder is not None:
            self._restore(start.folder, start.state, start.report)
        elif self.engine.config.model.init_from is not None:
            take_initial_weights(self.engine, self.shapes)

    @property
    def folder(self) -> Path:
        """The folder that contains all checkpoints of the run."""
        return self.saver.checkpoints

    def restore_earlier(self, folder: Path, state: CheckpointState) -> None:
        """Load an earlier checkpoint of this run, maybe saved with other settings; no save may be in progress."""
        config, layout = self.engine.config, layout_of(self.engine.config, self.engine.context)
        report = describe(state, config, layout, self.data_fingerprint, folder)
        self._restore(folder, state, report)

    def _restore(self, folder: Path, state: CheckpointState, report: ResumeReport) -> None:
        shards, kinds = self.engine.shards, [WEIGHT]
        if report.load_moments:
            kinds += state.optimizer.moments
        load(folder, _plan(self.engine, self.shapes, state.hugging_face), _fragments(self.engine, *kinds), kinds)
        if report.load_moments:
            shards.updates = state.optimizer.step
        else:
            for moment in _fragments(self.engine, *moments_of(self.engine.config.optimizer)):
                moment.values.zero_()
            shards.updates = 0
        if report.load_loss_scale and state.loss_scale is not None:
            shards.loss_scale = state.loss_scale
        shards.weights_changed()
        self.newest_step = state.step
        self.comparable_from = report.comparable_from

    def save(
        self,
        step: int,
        samples: int,
        skips: Skips,
        validation_loss: float | None,
        logged: LoggedLines | None = None,
    ) -> Path:
        """Write a checkpoint, or start to write one in the background.

        Args:
            step: finished optimizer steps.
            samples: number of samples consumed in these steps.
            skips: the samples that the run leaves out.
            validation_loss: None unless the model was validated after exactly this step.
            logged: the lines that were logged up to this step, on the writing rank.
        Returns:
            the folder of the checkpoint, which may not be complete yet
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
            skipped=tuple((window.first, window.stop) for window in skips.before(skips.index(samples))),
            config=as_containers(without_environment(config)),
            metrics=logged,
            comparable_from=self.comparable_from,
            versions=versions(),
        )
        folder = self.saver.save(shards.fragments(), state)
        self.newest_step = step
        return folder


def take_weights(engine: Engine, folder: Path, state: CheckpointState) -> None:
    """Load only the weights of a checkpoint into the model. A collective of all ranks.

    Raises:
        CheckpointError: the tensors in the files do not match the model.
    """
    plan = _plan(engine, shapes_of_all_ranks(engine.shards.shapes()), state.hugging_face)
    load(folder, plan, _fragments(engine, WEIGHT), [WEIGHT])
    engine.shards.weights_changed()


def take_initial_weights(engine: Engine, shapes: Shapes) -> None:
    """Load the weights that model.init_from names into the model.

    Raises:
        CheckpointError: the tensors in the files do not match the model.
    """
    model = engine.config.model
    weights = weights_of(engine.config)
    form = _plan(engine, shapes, weights.has_hf_names).sets[WEIGHT].form
    described = model if weights.has_hf_names else None
    start_from(weights.tensors, form, _fragments(engine, WEIGHT), f"model.init_from={model.init_from}", described)
    engine.shards.weights_changed()


def _plan(engine: Engine, shapes: Shapes, hugging_face: bool) -> FilePlan:
    return FilePlan.of(shapes, _hugging_face(engine.config.model) if hugging_face else None)


def _fragments(engine: Engine, *kinds: str) -> list[Fragment]:
    return [fragment for fragment in engine.shards.fragments() if fragment.kind in kinds]


def layout_of(config: ResolvedConfig, context: ParallelContext) -> Layout:
    topology = context.topology
    return Layout(
        topology.data_parallel_size,
        topology.tensor_parallel_size,
        topology.pipeline_parallel_size,
        config.parallel.zero_stage,
        config.parallel.sequence_parallel,
    )


def _hugging_face(model: ResolvedModel) -> Callable[[Mapping[str, Shape]], StoredForm]:
    return partial(stored_form, model)

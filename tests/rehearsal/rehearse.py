"""One rank of a real run on the fake device, act by act; everything that it records goes into a `Recording`."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed.runtime.zero.partition_parameters
import deepspeed.runtime.zero.partitioned_param_coordinator
import deepspeed.runtime.zero.utils
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine

from megatron_lite.checkpoint.file_plan import FilePlan, shapes_of_all_ranks
from megatron_lite.checkpoint.loading import load
from megatron_lite.checkpoint.retention import Kept
from megatron_lite.checkpoint.saving import Saver
from megatron_lite.checkpoint.state import CheckpointState, OptimizerState
from megatron_lite.config.lengths import sentinels_needed
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import Architecture
from megatron_lite.engine.build import build_engine
from megatron_lite.engine.engine import Engine
from megatron_lite.engine.gradient_norms import sequence_losses, stage_memory_bytes
from megatron_lite.engine.hooks import EngineHooks, PendingUpdate
from megatron_lite.engine.phases import EnginePhases
from megatron_lite.engine.pipeline_schedule import Instruction
from megatron_lite.engine.task import Task, build_task
from megatron_lite.optim.batch_ramp import BatchSchedule
from megatron_lite.optim.moments import moments_of
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.train.checkpoints import layout_of
from megatron_lite.train.generate import generate
from megatron_lite.train.preview import predicted_tokens
from megatron_lite.verify.equivalence import synthetic_batches, synthetic_vocabulary
from tests.rehearsal.fake_cuda import as_rank
from tests.rehearsal.plan import minimum_wire_bytes, planned_bytes
from tests.rehearsal.record import Act, Recording
from tests.rehearsal.recorder import FakeDevice


def rehearse(config: ResolvedConfig, rank: int, *, acts: Sequence[str] = ()) -> Recording:
    """Run these acts (all of them if none is named) as this rank; an exception becomes `Recording.error`."""
    recording = Recording()
    began = time.process_time()
    try:
        with as_rank(rank, config.topology) as fake, tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
            _Rehearsal(config, fake, recording, Path(folder)).run(acts)
    except BaseException:
        recording.error = traceback.format_exc()
    recording.cpu_seconds = time.process_time() - began
    return recording


class _Phases(EnginePhases):
    """Tells the fake device which instruction of the schedule the engine executes."""

    fake: FakeDevice

    def instruction(self, instruction: Instruction, *, evaluating: bool = False) -> None:
        self.fake.phase = instruction.action.value
        super().instruction(instruction, evaluating=evaluating)

    def reduce(self) -> None:
        self.fake.phase = "reduce"
        super().reduce()

    def optimizer(self) -> None:
        self.fake.phase = "optimizer"
        super().optimizer()


@dataclass
class _Judge:
    """Stands for the judge of spikes: skips every update."""

    seen: list[PendingUpdate] = field(default_factory=list)

    def __call__(self, update: PendingUpdate) -> bool:
        self.seen.append(update)
        return True


class _Rehearsal:
    def __init__(self, config: ResolvedConfig, fake: FakeDevice, recording: Recording, folder: Path) -> None:
        self.config, self.fake, self.recording, self.folder = config, fake, recording, folder
        self.schedule = BatchSchedule(config.train)
        self.vocab_size = config.model.vocab_size or 0
        self.vocabulary = synthetic_vocabulary(
            self.vocab_size, sentinels_needed(config.objective, config.data.seq_length)
        )

    def run(self, names: Sequence[str]) -> None:
        with self._act("build"), _deepspeed_without_peers():
            self._build()
        self.recording.planned_bytes = planned_bytes(self.config, self.engine)
        self.recording.minimum_wire_bytes = minimum_wire_bytes(self.config, self.engine)
        for name in names or ACTS:
            with self._act(name) as act, _deepspeed_without_peers():
                act.result = str(ACTS[name](self))

    def _act(self, name: str) -> Any:
        self.recording.acts[name] = act = Act()
        return self.fake.recording(act)

    def _build(self) -> None:
        config = self.config
        self.context = ParallelContext.build(
            config.topology,
            device=torch.device("cuda", 0),
            sequence_parallel=config.parallel.sequence_parallel,
            seed=config.train.seed,
        )
        self.task: Task = build_task(config, self.context, self.vocabulary)
        batch = self.schedule.at(0).global_batch_size
        self.engine: Engine = build_engine(config, self.context, self.task, global_batch_size=batch)
        phases = _Phases(self.engine._phases._heartbeat)
        phases.fake = self.fake
        self.engine._phases = phases
        self.recording.num_micro_batches = config.num_micro_batches(batch)
        reads = self.context.is_first_stage or self.context.is_last_stage
        count = self.recording.num_micro_batches if reads else 0
        self._batches = synthetic_batches(self.task.objective, self.vocabulary, 0, count, config)

    def _step(self, hooks: EngineHooks | None = None, *, measure_update: bool = False) -> Any:
        """`hooks`: for this step only."""
        with mock.patch.object(self.engine, "_hooks", hooks or self.engine._hooks):
            return self.engine.train_step(list(self._batches), self.schedule.at(0), 1e-4, measure_update=measure_update)

    # The acts: what a run does with its engine.

    def first_step(self) -> Any:
        """It allocates the state of the optimizer; here it also does what `verify` asks for."""
        gradients: dict[str, torch.Tensor] = {}
        check = EngineHooks(after_reduction=lambda engine: gradients.update(engine.full_gradients()))
        return self._step(check), len(gradients)

    def step(self) -> Any:
        """One like all others of a run; nothing of it is logged."""
        return self._step()

    def spike(self) -> Any:
        """A step that is judged and dropped; its losses and norms are reported."""
        judge = _Judge()
        result = self._step(EngineHooks(before_update=judge))
        losses = sequence_losses(self.task.loss.sequences, self.context, self.config.train.global_batch_size)
        return result, judge.seen, len(losses), len(self.engine.meter.recent_grad_norms(3))

    def evaluation(self) -> Any:
        return self.engine.evaluate(list(self._batches), self.recording.num_micro_batches)

    def generation(self) -> Any:
        if self.config.model.architecture is Architecture.decoder:
            length = self.config.data.seq_length
            return generate(self.engine, [5, 6], num_tokens=2, seq_length=length, vocab_size=self.vocab_size)
        sample = synthetic_batches(self.task.objective, self.vocabulary, 0, 1, self.config)[0]
        return predicted_tokens(self.engine, sample).shape

    def save(self) -> Any:
        """The copy to host memory, and the files that a thread writes from it."""
        shards = self.engine.shards
        self._plan = FilePlan.of(shapes_of_all_ranks(shards.shapes()), None)
        self._saver = Saver(self.folder, self._plan, {}, Kept(1, 0, 0), asynchronous=True)
        self._saver._is_writer = True  # whichever rank this is: there is no other
        optimizer = OptimizerState(str(self.config.optimizer.name), shards.updates, moments_of(self.config.optimizer))
        precision = str(self.config.train.precision)
        layout = layout_of(self.config, self.context)
        state = CheckpointState(1, 1, layout, precision, optimizer, shards.loss_scale, "", False, None)
        self._saved = self._saver.save(shards.fragments(), state)
        self._saver.wait()
        return shards.updates

    def rollback(self) -> Any:
        """Back to the saved state, as after a spike; then a step whose figures are logged."""
        engine = self.engine
        load(self._saved, self._plan, engine.shards.fragments(), self._plan.sets)
        engine.shards.updates = 1
        engine.shards.weights_changed()
        engine.meter.forget()
        result = self._step(measure_update=True)
        return result, len(engine.meter.figures().grad_norm), stage_memory_bytes(self.context)


ACTS: dict[str, Callable[[_Rehearsal], Any]] = {
    "first_step": _Rehearsal.first_step,
    "step": _Rehearsal.step,
    "evaluation": _Rehearsal.evaluation,
    "spike": _Rehearsal.spike,
    "generation": _Rehearsal.generation,
    "save": _Rehearsal.save,
    "rollback": _Rehearsal.rollback,
    "last_step": _Rehearsal.step,  # nothing has been left behind
}


def _buffers_as_agreed(engine: Any, stage: int) -> Any:
    """In place of DeepSpeed's message with shapes, which only a real peer can send: `StageBoundary` knows them."""
    dtype = next(engine.module.parameters()).dtype
    wanted = engine.module.input_boundary.empty(engine.micro_batch_size, dtype, engine.device)
    made = [engine._allocate_or_extend_buffers(i, list(one.shape), one.dtype) for i, one in enumerate(wanted)]
    return made[0] if len(made) == 1 else tuple(made)


def _deepspeed_without_peers() -> Any:
    """Leave out the places where DeepSpeed compares what ranks have received from each other: nobody sends anything."""
    return mock.patch.object(PipelineEngine, "_recv_tensor_meta", _buffers_as_agreed)


for _module in (
    deepspeed.runtime.zero.utils,
    deepspeed.runtime.zero.partitioned_param_coordinator,
    deepspeed.runtime.zero.partition_parameters,
):
    for _name in ("assert_ints_same_as_other_ranks", "assert_lst_len_same_as_other_ranks"):
        if hasattr(_module, _name):
            setattr(_module, _name, lambda *_: None)

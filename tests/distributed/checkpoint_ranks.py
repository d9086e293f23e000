"""Functions that the ranks of the checkpoint tests run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.checkpoint import loading
from megatron_lite.checkpoint.file_plan import FilePlan, files_of, shapes_of_all_ranks
from megatron_lite.checkpoint.fragments import WEIGHT, Region, transfers
from megatron_lite.checkpoint.loading import load, newest_complete
from megatron_lite.checkpoint.retention import Kept
from megatron_lite.checkpoint.saving import Saver
from megatron_lite.checkpoint.state import CheckpointState, OptimizerState
from megatron_lite.config.schema import RunConfig
from megatron_lite.data.samples.batch import MicroBatch
from megatron_lite.data.samples.skips import Skips
from megatron_lite.data.shards.prepared import PreparedData
from megatron_lite.engine.engine import Engine
from megatron_lite.engine.inference import forward_through_stages
from megatron_lite.engine.shards import Shards
from megatron_lite.engine.step_result import StepResult
from megatron_lite.optim.batch_ramp import BatchStep
from megatron_lite.optim.moments import moments_of
from megatron_lite.train.checkpoints import Checkpoints, Start, layout_of
from megatron_lite.train.generate import generate
from megatron_lite.verify.synthetic import synthetic_vocabulary
from tests.distributed.layout_ranks import synthetic_engine, train_steps

KEEP_ALL = Kept(keep_last=0, keep_every=0, keep_best=0)


@dataclass
class Link:
    """Results of one run of a chain: what it loaded and what it saved."""

    loaded_step: int
    steps: list[StepResult]
    """Steps up to the saved checkpoint and the steps after it."""
    written: int
    """Number of elements that this rank writes to a checkpoint."""
    elements: int
    """Number of elements in all files of the checkpoint."""

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]

    @property
    def loss_scales(self) -> list[tuple[float, bool]]:
        """Loss scale of each step, and whether the step was skipped."""
        return [(step.loss_scale, step.skipped) for step in self.steps]


def link_rank(
    config: RunConfig, vocab_size: int, folder: Path, copy: Path, steps: tuple[int, int], mutation: str | None
) -> Link:
    """Resume `folder`'s checkpoint if there is one, save it again in `copy`, train, save in `folder`, train on.

    Args:
        steps: number of steps before and after the second save.
    """
    with MUTATIONS[mutation]() if mutation else nullcontext():
        return _link(config, vocab_size, folder, copy, *steps)


def _link(config: RunConfig, vocab_size: int, folder: Path, copy: Path, ahead: int, behind: int) -> Link:
    engine, batches_from = synthetic_engine(config, vocab_size)
    plan = FilePlan.of(shapes_of_all_ranks(engine.shards.shapes()), None, largest_bytes=20_000)
    first = resume(engine, plan, folder)
    if first:
        save(engine, plan, copy, first, asynchronous=True)
    steps = train_steps(engine, batches_from, config, first, ahead)
    save(engine, plan, folder, first + ahead, asynchronous=False)
    steps += train_steps(engine, batches_from, config, first + ahead, behind)
    elements = sum(math.prod(shape) for tensors in plan.sets.values() for shape in tensors.form.shapes.values())
    return Link(first, steps, written_elements(engine, plan), elements)


def written_elements(engine: Engine, plan: FilePlan) -> int:
    """Number of elements that this rank writes in a save."""
    owned = [one.of_owned(one.owned_values) for one in engine.shards.fragments()]
    return sum(
        transfer.view.numel()
        for kind, tensors in plan.sets.items()
        for transfer in transfers([one for one in owned if one.kind == kind], tensors.form)
    )


def copy_rank(config: RunConfig, vocab_size: int, source: Path, target: Path) -> None:
    """Load the checkpoint in `source` and save it in `target`."""
    engine, _ = synthetic_engine(config, vocab_size)
    plan = FilePlan.of(shapes_of_all_ranks(engine.shards.shapes()), None, largest_bytes=20_000)
    save(engine, plan, target, resume(engine, plan, source), asynchronous=False)


def resume(engine: Engine, plan: FilePlan, folder: Path) -> int:
    """Load the newest checkpoint if there is one; return its step, or 0."""
    found = newest_complete(folder, print)
    if found is None:
        return 0
    path, state = found
    load(path, plan, engine.shards.fragments(), (WEIGHT, *state.optimizer.moments))
    engine.shards.updates = state.optimizer.step
    if state.loss_scale is not None:
        engine.shards.loss_scale = state.loss_scale
    engine.shards.weights_changed()
    return state.step


def save(engine: Engine, plan: FilePlan, folder: Path, step: int, *, asynchronous: bool) -> None:
    saver = Saver(folder, plan, {}, KEEP_ALL, asynchronous=asynchronous)
    saver.save(engine.shards.fragments(), state_of(engine, step))
    saver.wait()
    dist.barrier()


def state_of(engine: Engine, step: int) -> CheckpointState:
    config = engine.config
    return CheckpointState(
        step=step,
        samples=step * config.train.global_batch_size,
        layout=layout_of(config, engine.context),
        precision=str(config.train.precision),
        optimizer=OptimizerState(str(config.optimizer.name), engine.shards.updates, moments_of(config.optimizer)),
        loss_scale=engine.shards.loss_scale,
        data_fingerprint="synthetic",
        hugging_face=False,
        validation_loss=None,
        config={"train": asdict(config.train)["steps"]},
    )


def _moments_swapped() -> AbstractContextManager[object]:
    other = {"exp_avg": "exp_avg_sq", "exp_avg_sq": "exp_avg"}

    def files(kind: str, names: Iterable[str]) -> list[str]:
        return files_of(other.get(kind, kind), names)

    return mock.patch.object(loading, "files_of", files)


def _slice_shifted_by_one() -> AbstractContextManager[object]:
    of = Shards._region

    def region(shards: Shards, *arguments: object) -> Region | None:
        found = of(shards, *arguments)  # type: ignore[arg-type]
        return replace(found, offset=found.offset - 1) if found and found.offset else found

    return mock.patch.object(Shards, "_region", region)


def _updates_forgotten() -> AbstractContextManager[object]:
    return mock.patch.object(Shards, "updates", property(Shards.updates.fget, lambda shards, count: None))


MUTATIONS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "moments_swapped": _moments_swapped,
    "slice_shifted_by_one": _slice_shifted_by_one,
    "updates_forgotten": _updates_forgotten,
}


@dataclass
class RoundTrip:
    """Logits of the first micro-batch, full and without padding, on ranks of the last stage; empty on others."""

    batch: MicroBatch
    before: list[Tensor]
    """With the weights of model.init_from: [b, s, v], and [b, 2] of a next-sentence head."""
    after: list[Tensor]
    """With the weights in the checkpoint."""


def round_trip_rank(config: RunConfig, vocab_size: int, folder: Path) -> RoundTrip:
    """Start with the weights of model.init_from, train all steps, and save a checkpoint in `folder`."""
    engine, batches_from = synthetic_engine(config, vocab_size)
    checkpoints = Checkpoints.of(folder, engine, prepared_data(vocab_size), print)
    checkpoints.begin(Start())
    batch = batches_from(0, 1)[0]
    before = full_logits(engine, batch, vocab_size)
    steps = config.train.steps
    train_steps(engine, batches_from, config, 0, steps)
    after = full_logits(engine, batch, vocab_size)
    checkpoints.save(steps, steps * config.train.global_batch_size, Skips(), None)
    checkpoints.saver.wait()
    return RoundTrip(batch, before, after)


def prepared_data(vocab_size: int) -> PreparedData:
    """Only what checkpoints need: the roles of special tokens, without a tokenizer."""
    special = synthetic_vocabulary(vocab_size).special
    return PreparedData(Path(), (), (), (), (), None, None, vocab_size, special, "synthetic", 0.0)


def full_logits(engine: Engine, batch: MicroBatch, vocab_size: int) -> list[Tensor]:
    outputs = forward_through_stages(engine, batch.inputs)
    if outputs is None:
        return []
    own, *others = [outputs] if isinstance(outputs, Tensor) else outputs
    slices = [torch.empty_like(own) for _ in range(engine.context.tensor_size)]
    dist.all_gather(slices, own.contiguous(), group=engine.context.tensor_group)
    return [torch.cat(slices, -1)[..., :vocab_size], *others]


@dataclass
class OnText:
    """Results of a model on a text."""

    train_loss: float
    """Of a step with learning rate 0."""
    validation_loss: float
    """After that step."""
    next_token: int
    """The most likely token after a prompt."""


def on_text_rank(config: RunConfig, vocab_size: int, windows: Tensor, prompt: list[int], folder: Path) -> OnText:
    """Results of the weights of model.init_from.

    Args:
        windows: [global batch, s + 1] tokens.
    """
    engine, _ = synthetic_engine(config, vocab_size)
    Checkpoints.of(folder, engine, prepared_data(vocab_size), print).begin(Start())
    batches = [
        MicroBatch((part[:, :-1].contiguous(),), part[:, 1:].contiguous(), torch.ones(len(part), part.shape[1] - 1))
        for part in windows.split(config.train.micro_batch_size)
    ]
    train_loss = engine.train_step(batches, BatchStep(0, len(windows)), 0.0).loss
    validation_loss = engine.evaluate(batches, len(batches)).loss
    length = config.data.seq_length
    continued = generate(engine, prompt, num_tokens=1, seq_length=length, vocab_size=vocab_size, top_k=1)
    return OnText(train_loss, validation_loss, continued[-1])

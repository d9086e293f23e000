"""Pipeline schedules: what one stage does with the micro-batches of a batch, as instructions in order.

Pure generators that know nothing of tensors or processes; another schedule is another generator. A schedule yields
ticks, each a list of instructions. All stages have equally many ticks, and a send and the receive that it meets lie in
the same tick on both stages. Two things follow:

- Sends block until they are received, so of two neighbours that exchange tensors in a tick one must send first and the
  other receive first, or both would wait for ever.
- Between two ticks no message is under way: all ranks can agree on something there (a collective cannot block).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Action(StrEnum):
    LOAD = "load"  # the micro-batch: inputs on the first stage, labels on the last
    RECEIVE = "receive"  # activations of the stage before
    FORWARD = "forward"
    SEND = "send"  # activations to the next stage
    RECEIVE_GRAD = "receive_grad"  # of what was sent, from the next stage
    BACKWARD = "backward"
    SEND_GRAD = "send_grad"  # of what was received, to the stage before


@dataclass(frozen=True)
class Instruction:
    action: Action
    micro_batch: int
    """0 = the first of the batch."""
    buffer: int
    """Which of the stage's buffers holds the activations of this micro-batch."""


Tick = list[Instruction]


def one_forward_one_backward(stage: int, stages: int, micro_batches: int) -> Iterator[Tick]:
    """1F1B (PipeDream-Flush, arXiv 2006.09503): one stage's part of a training batch.

    Stage i computes the forward pass of micro-batch k in tick i + 2k, and its backward pass in tick
    2 stages - 1 - i + 2k. So forward and backward passes alternate once the pipeline is full, and stage i holds the
    activations of at most stages - i micro-batches. What a tick computes is sent in the next one.
    """
    first_backward = 2 * stages - 1 - stage
    buffers = num_training_buffers(stage, stages, micro_batches)

    def pass_at(tick: int, first: int) -> int | None:
        return _micro_batch((tick - first) // 2, micro_batches)

    for tick in range(2 * (micro_batches + stages - 1)):
        if (tick - stage) % 2 == 0:
            steps = _forward_tick(stage, stages, pass_at(tick, stage), pass_at(tick - 1, first_backward))
        else:
            steps = _backward_tick(stage, stages, pass_at(tick, first_backward), pass_at(tick - 1, stage))
        yield [Instruction(action, micro_batch, micro_batch % buffers) for action, micro_batch in steps]


def _forward_tick(stage: int, stages: int, forward: int | None, computed: int | None) -> Iterator[tuple[Action, int]]:
    """The stage before is at a backward pass: it receives first and sends then, so here the send comes first.

    Args:
        computed: micro-batch whose backward pass was the tick before.
    """
    if computed is not None and stage > 0:
        yield Action.SEND_GRAD, computed
    if forward is None:
        return
    if stage > 0:
        yield Action.RECEIVE, forward
    if stage in (0, stages - 1):
        yield Action.LOAD, forward
    yield Action.FORWARD, forward


def _backward_tick(stage: int, stages: int, backward: int | None, computed: int | None) -> Iterator[tuple[Action, int]]:
    """The next stage is at a forward pass: it sends first and receives then, so here the receive comes first.

    Args:
        computed: micro-batch whose forward pass was the tick before.
    """
    is_last = stage == stages - 1
    if backward is not None and not is_last:
        yield Action.RECEIVE_GRAD, backward
    if computed is not None and not is_last:
        yield Action.SEND, computed
    if backward is not None:
        yield Action.BACKWARD, backward


def num_training_buffers(stage: int, stages: int, micro_batches: int) -> int:
    """Micro-batches whose activations a stage holds at a time under 1F1B; at least two, for one arrives while the one
    before is still in use."""
    return max(2, min(stages - stage, micro_batches))


NUM_EVALUATION_BUFFERS = 2


def forward_only(stage: int, stages: int, micro_batches: int) -> Iterator[Tick]:
    """One stage's part of an evaluation: stage i computes micro-batch k in tick i + k, and sends it in the next."""
    is_first, is_last = stage == 0, stage == stages - 1

    def instruction(action: Action, micro_batch: int) -> Instruction:
        return Instruction(action, micro_batch, micro_batch % NUM_EVALUATION_BUFFERS)

    for tick in range(micro_batches + stages - 1):
        forward = _micro_batch(tick - stage, micro_batches)
        finished = _micro_batch(tick - 1 - stage, micro_batches)
        loads = [instruction(Action.LOAD, forward)] if forward is not None and (is_first or is_last) else []
        send = [instruction(Action.SEND, finished)] if finished is not None and not is_last else []
        receive = [instruction(Action.RECEIVE, forward)] if forward is not None and not is_first else []
        # Even stages send first, odd ones receive first: of two neighbours one is always ready for the other.
        exchange = [*send, *receive] if stage % 2 == 0 else [*receive, *send]
        compute = [instruction(Action.FORWARD, forward)] if forward is not None else []
        yield [*loads, *exchange, *compute]


def _micro_batch(index: int, micro_batches: int) -> int | None:
    """None = the pipeline is filling or draining: this stage has nothing to compute."""
    return index if 0 <= index < micro_batches else None

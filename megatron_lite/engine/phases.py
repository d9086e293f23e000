"""What the engine is doing, for the heartbeat: which instruction, of which micro-batch.

The flat engine says it in its own loop; DeepSpeed's pipeline engine is wrapped, for its loop is not ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepspeed.runtime.pipe import schedule

from megatron_lite.observe.heartbeat import Heartbeat, Phase


class EnginePhases:
    """Counts the micro-batches of a step or an evaluation; each method enters a phase."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._enter = heartbeat.enter
        self.begin()

    def begin(self, *, evaluating: bool = False) -> None:
        """A step, or an evaluation, starts: its next micro-batch is the first."""
        self._forward_phase = Phase.EVALUATE if evaluating else Phase.FORWARD
        self._forwards = self._backwards = 0

    def forward(self) -> None:
        self._forwards += 1
        self._enter(self._forward_phase, self._forwards)

    def backward(self) -> None:
        self._backwards += 1
        self._enter(Phase.BACKWARD, self._backwards)

    def send(self) -> None:
        self._enter(Phase.SEND)

    def receive(self) -> None:
        self._enter(Phase.RECEIVE)

    def reduce(self) -> None:
        self._enter(Phase.REDUCE)

    def optimizer(self) -> None:
        self._enter(Phase.OPTIMIZER)

    def watch(self, pipeline_engine: Any) -> None:
        """Let DeepSpeed's engine enter them, one for each instruction of its schedule.

        Loading a micro-batch has none of its own: its tensors are in memory, and a forward pass follows.
        """
        entries = {
            schedule.ForwardPass: self.forward,
            schedule.BackwardPass: self.backward,
            schedule.SendActivation: self.send,
            schedule.SendGrad: self.send,
            schedule.RecvActivation: self.receive,
            schedule.RecvGrad: self.receive,
            schedule.ReduceGrads: self.reduce,
            schedule.ReduceTiedGrads: self.reduce,
            schedule.OptimizerStep: self.optimizer,
        }
        executed = pipeline_engine._INSTRUCTION_MAP  # of its class; what we set is of the instance
        pipeline_engine._INSTRUCTION_MAP = {
            instruction: _entering(entries[instruction], execute) if instruction in entries else execute
            for instruction, execute in executed.items()
        }
        pipeline_engine._aggregate_total_loss = _entering(self.reduce, pipeline_engine._aggregate_total_loss)


def _entering(enter: Callable[[], None], execute: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        enter()
        return execute(*args, **kwargs)

    return run

"""What the engine is doing, for the heartbeat: which instruction of its schedule, of which micro-batch."""

from __future__ import annotations

from megatron_lite.engine.pipeline_schedule import Action, Instruction
from megatron_lite.observe.heartbeat import Heartbeat, Phase

PHASES = {
    Action.FORWARD: Phase.FORWARD,
    Action.BACKWARD: Phase.BACKWARD,
    Action.SEND: Phase.SEND,
    Action.SEND_GRAD: Phase.SEND,
    Action.RECEIVE: Phase.RECEIVE,
    Action.RECEIVE_GRAD: Phase.RECEIVE,
}
"""Loading has none: the tensors of a micro-batch are in memory already, and a forward pass follows."""
COMPUTING = (Action.FORWARD, Action.BACKWARD)


class EnginePhases:
    """Enters the phases of a step or of an evaluation."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat

    def instruction(self, instruction: Instruction, *, evaluating: bool = False) -> None:
        """It is about to be executed; in an evaluation a forward pass is the evaluation itself."""
        phase = PHASES.get(instruction.action)
        if phase is None:
            return
        if evaluating and phase is Phase.FORWARD:
            phase = Phase.EVALUATE
        self._heartbeat.enter(phase, instruction.micro_batch + 1 if instruction.action in COMPUTING else None)

    def reduce(self) -> None:
        self._heartbeat.enter(Phase.REDUCE)

    def optimizer(self) -> None:
        self._heartbeat.enter(Phase.OPTIMIZER)

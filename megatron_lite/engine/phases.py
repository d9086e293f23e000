"""Reports to the heartbeat what the engine is doing: which instruction of its schedule, for which micro-batch."""

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
"""LOAD has no phase: the micro-batch is already in memory, and a forward pass follows at once."""
COMPUTING = (Action.FORWARD, Action.BACKWARD)


class EnginePhases:
    """Sets the heartbeat's phase during a step or an evaluation."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat

    def instruction(self, instruction: Instruction, *, evaluating: bool = False) -> None:
        """Report an instruction that is about to be executed; forward passes of an evaluation are its own phase."""
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

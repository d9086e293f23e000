"""Choose one of the two engines by ZeRO stage."""

from __future__ import annotations

from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import Compile
from megatron_lite.engine.compiler import require_compiler
from megatron_lite.engine.engine import Engine
from megatron_lite.engine.flat import FlatEngine
from megatron_lite.engine.hooks import EngineHooks
from megatron_lite.engine.pipelined import PipelinedEngine
from megatron_lite.engine.task import Task
from megatron_lite.observe.heartbeat import Heartbeat
from megatron_lite.parallel.context import ParallelContext


def build_engine(
    config: ResolvedConfig,
    context: ParallelContext,
    task: Task,
    *,
    global_batch_size: int,
    heartbeat: Heartbeat | None = None,
    hooks: EngineHooks | None = None,
) -> Engine:
    """The engine for this ZeRO stage. A collective of all ranks.

    Args:
        global_batch_size: of the first step, in sequences.
        heartbeat: None = progress is not watched.
        hooks: None = no hooks.
    Raises:
        LaunchError: this machine lacks what `train.compile` needs.
    """
    if config.train.compile is Compile.blocks:
        require_compiler(context.device)
    engine = FlatEngine if config.parallel.zero_stage >= 2 else PipelinedEngine
    return engine(config, context, task, global_batch_size, heartbeat or Heartbeat(), hooks or EngineHooks())

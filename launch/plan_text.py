"""The text of `--dry-run`: everything that would happen."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence

from launch import sweep
from launch.arguments import Arguments
from launch.base import LaunchPlan
from launch.sweep import Point
from megatron_lite.config.changes import table
from megatron_lite.config.schema import RunConfig
from megatron_lite.data.corpus.source_names import require_sources
from megatron_lite.data.tokenizer.vocabulary import known_vocab_size
from megatron_lite.planning.plan import describe

LISTED_NODES = 8  # largest number of nodes whose commands are all shown
NODE_RANK = "launcher.node_rank="


def headline(config: RunConfig) -> str:
    count = config.launcher.num_processes
    processes = "1 process" if count == 1 else f"{count} processes"
    return f"{config.script}: {config.model.name} on {processes} ({config.launcher.device})"


def dry_run_text(points: list[Point], plans: list[LaunchPlan], arguments: Arguments) -> str:
    """The whole plan; for a sweep the plan of the first run, and the folders of the others."""
    if len(plans) == 1:
        return plan_text(plans[0], arguments)
    folders = sweep.table(points, [(str(plan.run_dir),) for plan in plans], ("run folder",))
    return f"{len(plans)} runs, of which the first is planned below\n{folders}\n\n{plan_text(plans[0], arguments)}"


def plan_text(plan: LaunchPlan, arguments: Arguments) -> str:
    """Everything that would happen, for --dry-run."""
    require_sources(plan.config.data)
    lines = [f"{headline(plan.config)}; dry run, nothing is started", ""]
    lines += [describe(plan.config, known_vocab_size(plan.config)), ""]
    lines += ["writes", *(f"  {path}" for path in plan.files), ""]
    if plan.own_presets:
        lines += ["presets of your own", *(f"  {line}" for line in plan.own_presets), ""]
    if plan.changes:
        lines += ["changed since the run in this folder last ran", *(f"  {line}" for line in table(plan.changes)), ""]
    if names := plan.config.launcher.pass_environment:
        lines += [f"taken from this environment for every rank: {', '.join(names)}", ""]
    lines += ["environment of every rank", *(f"  {name}={value}" for name, value in sorted(plan.env.items())), ""]
    return "\n".join([*lines, *_commands(plan, arguments)])


def _commands(plan: LaunchPlan, arguments: Arguments) -> Iterator[str]:
    if plan.rank_envs:
        last = plan.num_processes - 1
        yield f"command of each rank, with RANK and LOCAL_RANK from 0 to {last}, WORLD_SIZE={last + 1}"
        yield f"  {plan.command_line()}"
    elif plan.job:
        yield from ("on every node", f"  {_typed_again(arguments, None)}", "which there writes the file above and runs")
        yield f"  {plan.command_line()}"
    elif plan.node_argvs:
        yield from _commands_of_nodes("on each node", plan.node_argvs, arguments)
    else:
        yield from ("command", f"  {plan.command_line()}")
        if plan.by_hand:
            yield from _commands_of_nodes("or, without ssh, on each host", plan.by_hand, arguments)
        if plan.batch_script is not None:
            yield from ("", plan.batch_script.name)
            yield from (f"  {line}".rstrip() for line in plan.files[plan.batch_script].splitlines())


def _commands_of_nodes(where: str, argvs: Sequence[Sequence[str]], arguments: Arguments) -> Iterator[str]:
    """What to type on each node and what that runs; for many nodes only the first and the last."""
    ranks = range(len(argvs)) if len(argvs) <= LISTED_NODES else (0, len(argvs) - 1)
    yield where if len(argvs) <= LISTED_NODES else f"{where}, here the first and the last of {len(argvs)}"
    yield from (f"  {_typed_again(arguments, rank)}" for rank in ranks)
    yield "which there writes the file above and runs"
    yield from (f"  {shlex.join(argvs[rank])}" for rank in ranks)


def _typed_again(arguments: Arguments, node_rank: int | None) -> str:
    """The command line without --dry-run, for one of several nodes."""
    words = [] if arguments.config_file is None else ["--config", str(arguments.config_file)]
    if arguments.conf is not None:
        words += ["--conf", str(arguments.conf)]
    words += [arguments.script] if arguments.script is not None else []
    words += [override for override in arguments.overrides if not override.startswith(NODE_RANK)]
    if node_rank is not None:
        words.append(f"{NODE_RANK}{node_rank}")
    return shlex.join([sys.executable, "-m", "launch", *words])

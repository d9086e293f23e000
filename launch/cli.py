"""`python -m launch SCRIPT [SETTING ...]`: compose, check, plan, and start the ranks or say what would be started.

`python -m launch --config FILE` takes what an earlier run has frozen, and so repeats or resumes it. The commands of
`launch/follow.py` tell what has become of a run.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from launch import follow, sweep, verification, watching
from launch.arguments import VERIFY_FLAG, Arguments, parse, usage
from launch.base import Launcher, LaunchPlan
from launch.hostfile import with_hosts
from launch.machine import choose_device, choose_world_size, device_of_nodes, require_capacity, visible_gpus
from launch.messages import show_error
from launch.processes import SIGNALS
from launch.registry import LAUNCHERS
from launch.slurm import scheduler
from launch.sweep import Point
from megatron_lite.config.changes import table
from megatron_lite.config.compose import available_scripts, change, compose
from megatron_lite.config.derived import (
    data_parallel_size,
    fill_in,
    given_processes,
    ranks_per_replica,
    resolve,
    spans_machines,
)
from megatron_lite.config.frozen import check_run_folder, load_frozen
from megatron_lite.config.keys import nearest, shown
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import RunConfig
from megatron_lite.config.validate import validate
from megatron_lite.data.corpus.source_names import require_sources
from megatron_lite.data.tokenizer.framing import described_ends
from megatron_lite.data.tokenizer.vocabulary import known_vocab_size
from megatron_lite.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    ConfigError,
    MegatronLiteError,
    RunEnd,
    disk_error,
    end_of,
)
from megatron_lite.observe.console import forgive_output
from megatron_lite.planning.placement import placement_warnings
from megatron_lite.planning.plan import describe

SHOW_CURSOR = "\x1b[?25h"
PROGRAM = "python -m launch SCRIPT"
LISTED_NODES = 8  # up to which the command of each one is shown
NODE_RANK = "launcher.node_rank="
ASKED_TO_END = {RunEnd.PREEMPTED, *(128 + number for number in SIGNALS)}


def main(argv: list[str]) -> int:
    """Run one command line; returns the exit code."""
    debug = "--debug" in argv
    try:
        command = argv[0] if argv else ""
        if command in follow.COMMANDS:
            return follow.main(argv)
        if command == "evaluate":
            from launch import evaluation  # it imports what no other command needs, and this module

            return evaluation.main(argv[1:])
        return watching.main(argv) if command in watching.COMMANDS else _launch(parse(argv))
    except MegatronLiteError as error:
        show_error(error, debug=debug)
        return end_of(error)
    except OSError as error:
        problem = disk_error(error)
        if problem is None:
            raise
        show_error(problem, debug=debug)
        return problem.end


def _launch(arguments: Arguments) -> int:
    if arguments.help:
        print(usage(PROGRAM))
        return EXIT_OK
    if arguments.words[:1] == ["verify"]:
        arguments = replace(arguments, words=arguments.words[1:], verify=True)
    points = sweep.expand(arguments.words)
    plans = sweep.build_all(points, lambda point: _plan(point, arguments))
    sweep.require_own_folders(points, [plan.run_dir for plan in plans])
    if arguments.dry_run:
        print(_dry_run_text(points, plans, arguments))
        if plans[0].batch_script is not None and scheduler.answers():
            print(f"\nslurm says: {scheduler.rehearse(plans[0].files[plans[0].batch_script])}")
        return EXIT_OK
    if len(plans) == 1:
        return _start(plans[0], arguments)
    return _start_all(points, plans, arguments)


def _launcher(config: ResolvedConfig, arguments: Arguments) -> Launcher:
    return verification.LAUNCHER if arguments.verify else LAUNCHERS[config.launcher.name]()


def _plan(point: Point, arguments: Arguments) -> LaunchPlan:
    """What is going to be done for one run, once everything about it has been checked."""
    typed = _typed(replace(arguments, words=list(point.overrides)))
    if arguments.verify:
        typed = verification.on_this_machine(typed)
    config = sweep.in_own_folder(resolve_for_this_machine(typed), point)
    if arguments.verify:
        config = verification.in_own_folder(config)
    if arguments.debug:
        config = replace(config, debug=True)
    if point.varied:  # a single run asks its data at once; the later ones of a sweep would ask theirs hours later
        require_sources(config.data)
        described_ends(config)
    changes = check_run_folder(config, config.run_dir)
    if config.model.init_from is not None:
        from megatron_lite.checkpoint.fit import require_start  # numpy, which a run without weights need not wait for

        require_start(config)
    plan = replace(_launcher(config, arguments).plan(config), changes=tuple(changes))
    if arguments.verify:
        plan = replace(plan, argv=(*plan.argv, VERIFY_FLAG))
    if not arguments.dry_run and plan.batch_script is None:
        require_capacity(config.processes_per_node, config.launcher.device)
    return plan


def _start(plan: LaunchPlan, arguments: Arguments) -> int:
    for warning in placement_warnings(plan.config):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{_headline(plan.config)}; run folder {plan.run_dir}", flush=True)
    try:
        return _launcher(plan.config, arguments).run(plan)
    finally:
        if sys.stdout.isatty():  # the progress bar hides the cursor, and a rank that is killed cannot show it again
            print(SHOW_CURSOR, end="", flush=True)


def _start_all(points: list[Point], plans: list[LaunchPlan], arguments: Arguments) -> int:
    """Start the runs of a sweep in turn. One that fails does not keep the next from starting; a request to end does."""
    codes: list[int] = []
    environment = dict(os.environ)
    for point, plan in zip(points, plans, strict=True):
        print(f"run {len(codes) + 1} of {len(plans)}: {point.name}", flush=True)
        try:
            codes.append(_start(plan, arguments))
        except MegatronLiteError as error:
            show_error(error, debug=arguments.debug)
            codes.append(end_of(error))
        os.environ.clear()  # of what the launcher has set for the ranks of this run
        os.environ.update(environment)
        if codes[-1] in ASKED_TO_END:
            break
    ends = [str(code) for code in codes] + ["not started"] * (len(plans) - len(codes))
    rows = [(end, str(plan.run_dir)) for end, plan in zip(ends, plans, strict=True)]
    print(sweep.table(points, rows, ("exit code", "run folder")), flush=True)
    return next((code for code in codes if code != EXIT_OK), EXIT_OK)


def _typed(arguments: Arguments) -> RunConfig:
    """The configuration that the words describe, or that an earlier run has frozen."""
    if arguments.config_file is not None:
        if arguments.words and "=" not in arguments.words[0]:
            raise ConfigError(f"--config {arguments.config_file} names its script; leave out {arguments.words[0]}")
        return change(load_frozen(arguments.config_file), arguments.words)
    script, words = _split_script(arguments.words)
    return compose(script, words)


def _split_script(words: list[str]) -> tuple[str, list[str]]:
    scripts = available_scripts()
    if not words or "=" in words[0]:
        raise ConfigError(f"no script is named; write `{PROGRAM} [SETTING ...]` with one of {', '.join(scripts)}")
    commands = (*follow.COMMANDS, *watching.COMMANDS, "evaluate", "verify")
    begun = [command for command in commands if len(words[0]) > 2 and command.startswith(words[0])]
    guess = begun[0] if begun else nearest(words[0], commands)
    if guess is not None and words[0] not in scripts:
        raise ConfigError(f"{shown(words[0])} is neither a command nor a script; did you mean {guess}?")
    return words[0].removesuffix(".py"), words[1:]


def resolve_for_this_machine(config: RunConfig) -> ResolvedConfig:
    """Fill in what the machine decides, the number of processes and the device, and check everything.

    Raises:
        ConfigError: settings do not fit each other.
        LaunchError: launcher.device=cuda with too few GPUs.
    """
    config = with_hosts(config)
    if spans_machines(config):
        filled = fill_in(config, device=device_of_nodes(config.launcher))
        validate(filled)
        return resolve(filled)
    gpus = visible_gpus() if config.launcher.device != "cpu" else 0
    world_size = choose_world_size(config, gpus) or given_processes(config)
    if world_size is None:
        world_size = data_parallel_size(config) * ranks_per_replica(config)
    filled = fill_in(config, world_size=world_size, device=choose_device(config.launcher.device, world_size, gpus))
    validate(filled)
    return resolve(filled)


def _headline(config: ResolvedConfig) -> str:
    count = config.launcher.num_processes
    processes = "1 process" if count == 1 else f"{count} processes"
    return f"{config.script}: {config.model.name} on {processes} ({config.launcher.device})"


def _dry_run_text(points: list[Point], plans: list[LaunchPlan], arguments: Arguments) -> str:
    """Everything that would happen; of the runs of a sweep the first one, and where the others' folders lie."""
    if len(plans) == 1:
        return plan_text(plans[0], arguments)
    folders = sweep.table(points, [(str(plan.run_dir),) for plan in plans], ("run folder",))
    return f"{len(plans)} runs, of which the first is planned below\n{folders}\n\n{plan_text(plans[0], arguments)}"


def plan_text(plan: LaunchPlan, arguments: Arguments) -> str:
    """Everything that would happen, for --dry-run."""
    require_sources(plan.config.data)
    lines = [f"{_headline(plan.config)}; dry run, nothing is started", ""]
    lines += [describe(plan.config, known_vocab_size(plan.config)), ""]
    lines += ["writes", *(f"  {path}" for path in plan.files), ""]
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
    """What is typed on each node and what that runs; of many nodes the first and the last."""
    ranks = range(len(argvs)) if len(argvs) <= LISTED_NODES else (0, len(argvs) - 1)
    yield where if len(argvs) <= LISTED_NODES else f"{where}, here the first and the last of {len(argvs)}"
    yield from (f"  {_typed_again(arguments, rank)}" for rank in ranks)
    yield "which there writes the file above and runs"
    yield from (f"  {shlex.join(argvs[rank])}" for rank in ranks)


def _typed_again(arguments: Arguments, node_rank: int | None) -> str:
    """The command line without --dry-run, for one of several nodes."""
    words = [word for word in arguments.words if not word.startswith(NODE_RANK)]
    if arguments.config_file is not None:
        words = ["--config", str(arguments.config_file), *words]
    if node_rank is not None:
        words.append(f"{NODE_RANK}{node_rank}")
    return shlex.join([sys.executable, "-m", "launch", *words])


def run() -> None:
    """The console entry."""
    forgive_output()  # of a full disk, and of `--dry-run | head`, which has seen enough
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before there was anything to end
        sys.exit(EXIT_INTERRUPTED)

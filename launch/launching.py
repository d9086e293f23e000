"""`python -m launch SCRIPT [SETTING ...]`: compose, validate, plan, and start the ranks or show what would be started.

`python -m launch --config FILE` uses an earlier run's frozen configuration, to repeat or resume it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace

from launch import sweep, verification
from launch.arguments import VERIFY_FLAG, Arguments
from launch.base import Launcher, LaunchPlan
from launch.hostfile import with_hosts
from launch.machine import choose_device, choose_world_size, device_of_nodes, require_capacity, visible_gpus
from launch.messages import show_error
from launch.plan_text import dry_run_text, headline
from launch.processes import SIGNALS
from launch.registry import LAUNCHERS
from launch.slurm import scheduler
from launch.sweep import Point
from megatron_lite.config.compose import Choice, change, choose, compose, merged_presets
from megatron_lite.config.derived import (
    data_parallel_size,
    fill_in,
    given_processes,
    ranks_per_replica,
    resolve,
    spans_machines,
)
from megatron_lite.config.frozen import check_run_folder, load_frozen
from megatron_lite.config.origins import annotated, origins, origins_of_frozen
from megatron_lite.config.preset_folders import PresetFolders, find_folders
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import RunConfig
from megatron_lite.config.validate import validate
from megatron_lite.data.corpus.source_names import require_sources
from megatron_lite.data.tokenizer.framing import described_ends
from megatron_lite.errors import EXIT_OK, ConfigError, MegatronLiteError, RunEnd, end_of
from megatron_lite.planning.placement import placement_warnings

SHOW_CURSOR = "\x1b[?25h"
PROGRAM = "python -m launch SCRIPT"
ASKED_TO_END = {RunEnd.PREEMPTED, *(128 + number for number in SIGNALS)}


def launch(arguments: Arguments) -> int:
    """Run one command line; returns the exit code.

    Raises:
        MegatronLiteError: any user error that can be found before the ranks start.
    """
    points = sweep.expand(arguments.overrides)
    if arguments.show_config:
        configs = sweep.build_all(points, lambda point: _resolved(_of_point(arguments, point), point))
        for point, config in zip(points, configs, strict=True):
            print("\n".join(_annotated(point, config, arguments)))
        return EXIT_OK
    plans = sweep.build_all(points, lambda point: _plan(point, _of_point(arguments, point)))
    sweep.require_own_folders(points, [plan.run_dir for plan in plans])
    if arguments.dry_run:
        print(dry_run_text(points, plans, arguments))
        if plans[0].batch_script is not None and scheduler.answers():
            print(f"\nslurm says: {scheduler.rehearse(plans[0].files[plans[0].batch_script])}")
        return EXIT_OK
    if len(plans) == 1:
        return _start(plans[0], arguments)
    return _start_all(points, plans, arguments)


def _of_point(arguments: Arguments, point: Point) -> Arguments:
    """The command line of one run of a sweep."""
    return replace(arguments, overrides=list(point.overrides))


def _annotated(point: Point, config: RunConfig, arguments: Arguments) -> Iterator[str]:
    """The configuration of one run as `--cfg job` prints it."""
    arguments = _of_point(arguments, point)
    if arguments.config_file is not None:
        found = origins_of_frozen(load_frozen(arguments.config_file), arguments.overrides, config)
    else:
        found = origins(_choice(arguments), config)
    if point.varied:
        yield from ("---", f"# {point.name}")
    yield from annotated(config, found)


def _launcher(config: ResolvedConfig, arguments: Arguments) -> Launcher:
    return verification.LAUNCHER if arguments.verify else LAUNCHERS[config.launcher.name]()


def _resolved(arguments: Arguments, point: Point) -> ResolvedConfig:
    """The configuration of one run, resolved and validated."""
    typed = _typed(arguments)
    if arguments.verify:
        typed = verification.on_this_machine(typed)
    config = sweep.in_own_folder(resolve_for_this_machine(typed), point)
    if arguments.verify:
        config = verification.in_own_folder(config)
    return replace(config, debug=True) if arguments.debug else config


def _plan(point: Point, arguments: Arguments) -> LaunchPlan:
    """The plan of one run, after everything about it has been checked."""
    config = _resolved(arguments, point)
    if point.varied:  # otherwise later runs of a sweep would check their data only hours later
        require_sources(config.data)
        described_ends(config)
    changes = check_run_folder(config, config.run_dir)
    if config.model.init_from is not None:
        from megatron_lite.checkpoint.fit import require_start  # imports numpy; only runs with weights need it

        require_start(config)
    plan = _launcher(config, arguments).plan(config)
    plan = replace(plan, changes=tuple(changes), own_presets=_own_presets(arguments))
    if arguments.verify:
        plan = replace(plan, argv=(*plan.argv, VERIFY_FLAG))
    if not arguments.dry_run and plan.batch_script is None:
        require_capacity(config.processes_per_node, config.launcher.device)
    return plan


def _start(plan: LaunchPlan, arguments: Arguments) -> int:
    for warning in placement_warnings(plan.config):
        print(f"warning: {warning}", file=sys.stderr)
    for line in plan.own_presets:
        print(f"preset of your own: {line}")
    print(f"{headline(plan.config)}; run folder {plan.run_dir}", flush=True)
    try:
        return _launcher(plan.config, arguments).run(plan)
    finally:
        if sys.stdout.isatty():  # the progress bar hides the cursor, and a killed rank cannot show it again
            print(SHOW_CURSOR, end="", flush=True)


def _start_all(points: list[Point], plans: list[LaunchPlan], arguments: Arguments) -> int:
    """Start the runs of a sweep in turn. The sweep continues after a failed run, but not after a request to stop."""
    codes: list[int] = []
    environment = dict(os.environ)
    for point, plan in zip(points, plans, strict=True):
        print(f"run {len(codes) + 1} of {len(plans)}: {point.name}", flush=True)
        try:
            codes.append(_start(plan, arguments))
        except MegatronLiteError as error:
            show_error(error, debug=arguments.debug)
            codes.append(end_of(error))
        os.environ.clear()  # remove what the launcher has set for the ranks of this run
        os.environ.update(environment)
        if codes[-1] in ASKED_TO_END:
            break
    ends = [str(code) for code in codes] + ["not started"] * (len(plans) - len(codes))
    rows = [(end, str(plan.run_dir)) for end, plan in zip(ends, plans, strict=True)]
    print(sweep.table(points, rows, ("exit code", "run folder")), flush=True)
    return next((code for code in codes if code != EXIT_OK), EXIT_OK)


def _typed(arguments: Arguments) -> RunConfig:
    """The configuration that the overrides describe, or that an earlier run has frozen."""
    if arguments.config_file is not None:
        if arguments.script is not None:
            raise ConfigError(f"--config {arguments.config_file} names its script; leave out {arguments.script}")
        return change(load_frozen(arguments.config_file), arguments.overrides)
    return compose(_script(arguments), arguments.overrides, find_folders(arguments.conf))


def _script(arguments: Arguments) -> str:
    if arguments.script is None:
        scripts = ", ".join(PresetFolders().scripts())
        raise ConfigError(f"no script is named; write `{PROGRAM} [SETTING ...]` with one of {scripts}")
    return arguments.script.removesuffix(".py")


def _choice(arguments: Arguments) -> Choice:
    return choose(_script(arguments), arguments.overrides, find_folders(arguments.conf))


def _own_presets(arguments: Arguments) -> tuple[str, ...]:
    """The user's preset files that are part of the run's configuration."""
    folders = find_folders(arguments.conf)
    if folders.own is None or arguments.config_file is not None:
        return ()
    names = [name for name, _ in merged_presets(_choice(arguments)) if folders.is_own(name)]
    ours = PresetFolders()
    return tuple(
        folders.where(name) + (f", instead of {ours.where(name)}" if ours.file(name) is not None else "")
        for name in dict.fromkeys(names)
    )


def resolve_for_this_machine(config: RunConfig) -> ResolvedConfig:
    """Fill in what depends on the machine, the number of processes and the device, and validate everything.

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

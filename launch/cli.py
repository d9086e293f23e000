"""`python -m launch SCRIPT [SETTING ...]`: compose, check, plan, and start the ranks or say what would be started.

`python -m launch --config FILE` takes what an earlier run has frozen, and so repeats or resumes it. The commands of
`launch/follow.py` tell what has become of a run.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from launch import follow, verification
from launch.arguments import VERIFY_FLAG, Arguments, parse, usage
from launch.base import LaunchPlan
from launch.machine import choose_device, choose_world_size, device_of_nodes, require_capacity, visible_gpus
from launch.messages import show_error
from launch.registry import LAUNCHERS
from launch.slurm import scheduler
from megatron_lite.config.compose import available_scripts, change, compose
from megatron_lite.config.derived import configured_processes, data_parallel_size, ranks_per_replica, resolve
from megatron_lite.config.frozen import check_run_folder, load_frozen
from megatron_lite.config.launcher import LauncherName
from megatron_lite.config.schema import RunConfig
from megatron_lite.config.validate import validate
from megatron_lite.data.vocabulary import known_vocab_size
from megatron_lite.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_USER_ERROR, ConfigError, MegatronLiteError
from megatron_lite.planning.plan import describe

SHOW_CURSOR = "\x1b[?25h"
PROGRAM = "python -m launch SCRIPT"


def main(argv: list[str]) -> int:
    """Run one command line; returns the exit code."""
    debug = "--debug" in argv
    try:
        return follow.main(argv) if argv[:1] and argv[0] in follow.COMMANDS else _launch(parse(argv))
    except MegatronLiteError as error:
        show_error(error, debug=debug)
        return EXIT_USER_ERROR


def _launch(arguments: Arguments) -> int:
    if arguments.help:
        print(usage(PROGRAM))
        return EXIT_OK
    if arguments.words[:1] == ["verify"]:
        arguments = replace(arguments, words=arguments.words[1:], verify=True)
    config = resolve_for_this_machine(_typed(arguments))
    if arguments.verify:
        config = verification.in_own_folder(config)
    if arguments.debug:
        config = replace(config, debug=True)
    assert config.train.run_dir is not None
    check_run_folder(config, Path(config.train.run_dir))
    launcher = verification.LAUNCHER if arguments.verify else LAUNCHERS[config.launcher.name]()
    plan = launcher.plan(config)
    if arguments.verify:
        plan = replace(plan, argv=(*plan.argv, VERIFY_FLAG))
    if arguments.dry_run:
        print(plan_text(plan))
        if plan.batch_script is not None and scheduler.answers():
            print(f"\nslurm says: {scheduler.rehearse(plan.files[plan.batch_script])}")
        return EXIT_OK
    if plan.batch_script is None:
        require_capacity(plan.num_processes, config.launcher.device)
    print(f"{_headline(config)}; run folder {plan.run_dir}", flush=True)
    try:
        return launcher.run(plan)
    finally:
        if sys.stdout.isatty():  # the progress bar hides the cursor, and a rank that is killed cannot show it again
            print(SHOW_CURSOR, end="", flush=True)


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
    return words[0].removesuffix(".py"), words[1:]


def resolve_for_this_machine(config: RunConfig) -> RunConfig:
    """Fill in what the machine decides, the number of processes and the device, and check everything.

    Raises:
        ConfigError: settings do not fit each other.
        LaunchError: launcher.device=cuda with too few GPUs.
    """
    if config.launcher.name is LauncherName.slurm:  # this machine is not the one
        world_size, device = wanted_processes(config), device_of_nodes(config.launcher)
    else:
        gpus = visible_gpus() if config.launcher.device != "cpu" else 0
        world_size = choose_world_size(config, gpus) or wanted_processes(config)
        device = choose_device(config.launcher.device, world_size, gpus)
    resolved = resolve(config, world_size=world_size, device=device)
    validate(resolved)
    return resolved


def wanted_processes(config: RunConfig) -> int:
    """Processes that the settings ask for: those of the launcher, or else the layout's."""
    return configured_processes(config.launcher) or data_parallel_size(config) * ranks_per_replica(config)


def _headline(config: RunConfig) -> str:
    count = config.launcher.num_processes
    processes = "1 process" if count == 1 else f"{count} processes"
    return f"{config.script}: {config.model.name} on {processes} ({config.launcher.device})"


def plan_text(plan: LaunchPlan) -> str:
    """Everything that would happen, for --dry-run."""
    lines = [f"{_headline(plan.config)}; dry run, nothing is started", ""]
    lines += [describe(plan.config, known_vocab_size(plan.config)), ""]
    lines += ["writes", *(f"  {path}" for path in plan.files), ""]
    lines += ["environment of every rank", *(f"  {name}={value}" for name, value in sorted(plan.env.items())), ""]
    if plan.rank_envs:
        last = plan.num_processes - 1
        lines.append(f"command of each rank, with RANK and LOCAL_RANK from 0 to {last}, WORLD_SIZE={last + 1}")
    else:
        lines.append("command")
    lines.append(f"  {plan.command_line()}")
    if plan.batch_script is not None:
        lines += [
            "",
            plan.batch_script.name,
            *(f"  {line}".rstrip() for line in plan.files[plan.batch_script].splitlines()),
        ]
    return "\n".join(lines)


def run() -> None:
    """The console entry."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(code)
    except KeyboardInterrupt:  # before there was anything to end
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # `--dry-run | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit

"""Shared by the entry scripts: get the configuration from a command line or a frozen file, and run a function on it.

A script runs in three ways: forked or started by a launcher (`--config FILE`), by torchrun or deepspeed with its own
settings (each rank composes the same configuration), or by hand as a single process.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from launch.arguments import Arguments, parse
from launch.environment import ERROR_FILE, apply, is_count, rank_environment, require_numbers, use_own_extensions_folder
from launch.machine import choose_device, visible_gpus
from launch.messages import error_text, leave_error
from launch.preparation import ready_data
from launch.processes import die_with
from megatron_lite.config.compose import compose
from megatron_lite.config.derived import fill_in, ranks_per_replica, resolve
from megatron_lite.config.frozen import check_run_folder, freeze, load_frozen, unwritable
from megatron_lite.config.preset_folders import find_folders
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import RunConfig
from megatron_lite.config.validate import validate
from megatron_lite.data import FOLDER_VARIABLE
from megatron_lite.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    ConfigError,
    DeviceFailedError,
    LaunchError,
    MegatronLiteError,
    RunEnd,
    RunFolderInUseError,
    RunFolderLostError,
    disk_error,
    end_of,
    memory_error,
)
from megatron_lite.faults import Fault, fault_of
from megatron_lite.observe.credentials import redacted
from megatron_lite.observe.markers import clear_markers, free_reserve, leave_marker, reserve_space
from megatron_lite.observe.run_lock import Claim, Role, RunLock, join, own_attempt, take

# torchrun and deepspeed end the other ranks within about a second of the first failure, so a rank that lives longer
# is not one of several with the same error.
SILENCE_SECONDS = 3.0
YIELD_SECONDS = 3.0  # within which a rank that failed by itself has ended, and so is the first to end
# Set by torchrun and by deepspeed, which leave their ranks running when they are killed.
STARTED_BY_OTHERS = frozenset({"TORCHELASTIC_RUN_ID", "LOCAL_SIZE"})


def run_script(
    main_function: Callable[[ResolvedConfig, Claim], RunEnd | None], script: str, argv: list[str] | None = None
) -> int:
    """Run `main_function` on the configuration that the command line describes; returns the exit code.

    Meanwhile rank 0 holds the lock of the run folder, however the script was started.

    A user error is shown once per job, without a traceback unless --debug, and ends every rank with the exit code of
    its `RunEnd`, which the run folder's marker also names.

    Args:
        script: name of the entry script, without `.py`: it has a configuration of the same name.
        argv: arguments of the command line; None = those of this process.
    """
    words = sys.argv[1:] if argv is None else argv
    if "LOCAL_SIZE" in os.environ:  # set by deepspeed
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
    terminal = os.dup(2)  # keeps the user's stderr when the run redirects its own output to a log
    debug, config, claim = "--debug" in words, None, None
    try:
        require_numbers(os.environ)
        arguments = parse(words)
        if arguments.help or arguments.version:
            return _show(script, arguments)
        if arguments.dry_run or arguments.show_config:
            return _ask_launcher(words if arguments.config_file else [script, *words])
        file = arguments.config_file
        config = _own_config(script, arguments) if file is None else _frozen_config(file, arguments)
        debug = config.debug
        _enter(config)
        if arguments.verify:
            _certify(config)
            return RunEnd.DONE
        claim = _claim(config, terminal)
        _get_ready(config, is_frozen=file is not None)
        return _task(arguments, main_function)(config, claim) or RunEnd.DONE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        return _end_by(error, config, claim, terminal, debug=debug)
    finally:
        if isinstance(claim, RunLock):
            free_reserve(claim.run_dir)
            claim.release()
        os.close(terminal)


def pretrain(config: ResolvedConfig, claim: Claim) -> RunEnd:
    """Train as configured; called in every rank."""
    from megatron_lite.train.run import train  # seconds of imports, which a mistyped argument need not wait for

    return train(config, claim)


Task = Callable[[ResolvedConfig, Claim], RunEnd | None]


def _task(arguments: Arguments, train: Task) -> Task:
    """The task of this rank: training or evaluation."""
    return train if arguments.evaluate is None else partial(_evaluate, arguments.evaluate, arguments.all)


def _evaluate(folder: Path, one_pass: bool, config: ResolvedConfig, claim: Claim) -> RunEnd:
    from megatron_lite.train.evaluate_checkpoint import evaluate_checkpoint  # takes seconds to import

    return evaluate_checkpoint(config, claim, folder, one_pass=one_pass)


def _certify(config: ResolvedConfig) -> None:
    from megatron_lite.verify.layout_check import check_layout  # takes seconds to import

    check_layout(config)


def _rank() -> int:
    """Rank of this process; 0 if the environment variable is not a number, which `require_numbers` has refused."""
    value = os.environ.get("RANK", "0")
    return int(value) if is_count(value) else 0


def _show(script: str, arguments: Arguments) -> int:
    from launch.usage import script_help, versions

    if _rank() == 0:
        print(versions() if arguments.version else script_help(script, f"python {script}.py", arguments.conf))
    return EXIT_OK


def _ask_launcher(argv: list[str]) -> int:
    from launch.cli import main  # reuse the launcher's own plan of these settings

    return main(argv) if _rank() == 0 else EXIT_OK


def _frozen_config(file: Path, arguments: Arguments) -> ResolvedConfig:
    """The configuration that the launcher has composed, validated and frozen, for exactly this world size."""
    if arguments.overrides:  # here they would leave no trace; launchers apply and freeze them
        raise ConfigError(f"--config {file} is complete; leave out {' '.join(arguments.overrides)}")
    config = load_frozen(file)
    world_size = _world_size(config)
    validate(config, world_size)
    return resolve(replace(config, debug=config.debug or arguments.debug), world_size=world_size)


def _own_config(script: str, arguments: Arguments) -> ResolvedConfig:
    """Compose as the launcher does, for the world size that torchrun or deepspeed has set, or for one process."""
    config = compose(script, arguments.overrides, find_folders(arguments.conf))
    world_size = _world_size(config)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    gpus = visible_gpus() if config.launcher.device != "cpu" else 0
    # the processes exist already: settings for their number apply to our launchers only
    config = replace(config, launcher=replace(config.launcher, num_processes=None))
    filled = fill_in(config, world_size=world_size, device=choose_device(config.launcher.device, local_size, gpus))
    validate(filled, world_size)
    resolved = resolve(filled)
    check_run_folder(resolved, resolved.run_dir)
    if resolved.model.init_from is not None:
        from megatron_lite.checkpoint.fit import require_start  # imports numpy; only runs with weights need it

        require_start(resolved)
    return replace(resolved, debug=resolved.debug or arguments.debug)


def _world_size(config: RunConfig) -> int:
    """Number of processes of this job. A script that was started directly is a single process.

    Raises:
        LaunchError: the layout needs several processes, and nobody has started them; or srun has started several that
            are not connected.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))  # SLURM_NTASKS is also set in a batch script
    if tasks > 1:
        raise LaunchError(
            f"srun has started {tasks} processes of {config.script}.py, each a world of its own, without WORLD_SIZE; "
            f"use `python -m launch {config.script} launcher=slurm ...`, or one task per node that runs torchrun: "
            f"`srun --ntasks-per-node=1 torchrun --nproc-per-node GPUS ... {config.script}.py ...`"
        )
    parallel = config.parallel
    data = parallel.data_parallel_size or 1
    needed = data * ranks_per_replica(config)
    if needed > 1:
        raise LaunchError(
            f"{config.script}.py was started as 1 process, but the layout needs {needed} = {data} data x "
            f"{parallel.tensor_parallel_size} tensor x {parallel.pipeline_parallel_size} pipeline; start it with "
            f"`python -m launch {config.script} ...` or `torchrun --nproc-per-node {needed} {config.script}.py ...`"
        )
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"})
    return 1


def _enter(config: ResolvedConfig) -> None:
    """Set the variables that libraries read at import. A launcher has already done so for its own ranks."""
    if not STARTED_BY_OTHERS.isdisjoint(os.environ):
        die_with(os.getppid())
    world_size = os.environ["WORLD_SIZE"]
    one_machine = os.environ.get("LOCAL_WORLD_SIZE", world_size) == world_size
    apply(rank_environment(config, one_machine=one_machine), overwrite=False)
    use_own_extensions_folder(config.run_dir)


def _claim(config: ResolvedConfig, terminal: int) -> Claim:
    """The lock of the run folder: rank 0 takes it, the others check that their own rank 0 holds it.

    Raises:
        RunFolderInUseError: another run holds it; raised on every rank.
    """
    run_dir = config.run_dir
    if _rank() != 0:
        return join(run_dir, own_attempt())

    def say(line: str) -> None:
        os.write(terminal, (line + "\n").encode())

    def end(text: str) -> None:  # even while other threads run: nothing that this process writes is wanted any more
        with contextlib.suppress(OSError):
            say(f"error: {text}")
        os._exit(RunEnd.CONFIG_ERROR)

    try:
        lock = take(run_dir, Role.rank, own_attempt(), report=say)
    except OSError as error:
        raise unwritable(run_dir, error) from error
    reserve_space(run_dir)
    lock.keep(on_loss=end)
    return lock


def _end_by(
    error: Exception, config: ResolvedConfig | None, claim: Claim | None, terminal: int, *, debug: bool
) -> RunEnd:
    """Record an error in the run folder, and show it to the user."""
    if isinstance(error, OSError):
        error = disk_error(error) or error
    error = memory_error(error) or error
    end = end_of(error)
    if not isinstance(error, MegatronLiteError):
        _leave_marker(config, claim, RunEnd.FAILED, f"rank {_rank()}: {type(error).__name__}: {error}")
        _tell_failure(error, config, terminal)
        return RunEnd.FAILED
    _leave_marker(config, claim, end, str(error), error.node if isinstance(error, DeviceFailedError) else None)
    # Another run holds the folder: its launcher would show our files as its own.
    is_foreign = isinstance(error, RunFolderInUseError | RunFolderLostError)
    _tell(error_text(error, debug=debug), terminal, None if is_foreign else os.environ.get(ERROR_FILE))
    return end


def _get_ready(config: ResolvedConfig, *, is_frozen: bool) -> None:
    if not is_frozen:
        _make_ready(config)
    elif FOLDER_VARIABLE not in os.environ:  # no launcher on this machine does it
        _prepare_data(config)


def _make_ready(config: ResolvedConfig) -> None:
    """Do what a launcher does before it starts the ranks."""
    _prepare_data(config)
    if _rank() == 0:
        freeze(config, config.run_dir)
        clear_markers(config.run_dir)


def _prepare_data(config: ResolvedConfig) -> None:
    """Prepare the data if it was not done before the start: one rank builds it, the others wait for its lock."""
    is_first = _rank() == 0
    folder = ready_data(config, lambda line: print(line, flush=True) if is_first else None)
    os.environ[FOLDER_VARIABLE] = str(folder)


def _leave_marker(
    config: ResolvedConfig | None, claim: Claim | None, end: RunEnd, message: str, node: str | None = None
) -> None:
    """Leave a marker for later readers of the run folder, unless another attempt holds the folder."""
    if config is None or claim is None or not claim.is_ours():
        return
    with contextlib.suppress(OSError):  # a full or lost disk: the error itself is still shown
        leave_marker(config.run_dir, end, message, node=node)


def _tell(text: str, terminal: int, error_file: str | None) -> None:
    """Show a user error once per job: through our launcher's file, or from rank 0, or from the only rank alive."""
    if error_file:
        with contextlib.suppress(OSError):  # a full disk: then show it here
            leave_error(Path(error_file), text)
            return
    if _rank() != 0:
        time.sleep(SILENCE_SECONDS)
    os.write(terminal, (text + "\n").encode())


def _tell_failure(error: Exception, config: ResolvedConfig | None, terminal: int) -> None:
    """Report an internal failure: traceback in this rank's log, and a line by the launcher or on the terminal.

    A rank that has only lost another one waits for that one to end first: launchers report the first rank that ends,
    and connections close before a process has ended.
    """
    text = redacted(traceback.format_exc())
    if fault_of(error) is Fault.peer:
        time.sleep(YIELD_SECONDS)
    log = _append_to_log(text, config)
    if log is None:
        os.write(terminal, text.encode())
    elif ERROR_FILE not in os.environ:
        said = redacted(f"{type(error).__name__}: {error}")
        os.write(terminal, f"error: rank {_rank()} failed: {said}; see {log}\n".encode())


def _append_to_log(text: str, config: ResolvedConfig | None) -> Path | None:
    """Append the text to this rank's log and return the log; None if there is no log yet."""
    if config is None:
        return None
    log = config.run_dir / "logs" / f"rank-{_rank()}.log"
    try:
        with log.open("a") as file:
            file.write(text)
    except OSError:
        return None
    return log

"""`python -m megatron_lite.checkpoint`: `inspect`, `verify`, `diff`, `prune` or `export` checkpoints."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_lite.checkpoint.folder import candidates, newest_complete, problem, read_manifest, step_of
from megatron_lite.checkpoint.inspection import (
    Inspection,
    all_problems,
    candidates_of,
    checkpoints_of,
    inspect,
    is_checkpoint,
    locate,
    setting_changes,
    state_differences,
    tensor_differences,
    verify_command,
)
from megatron_lite.checkpoint.retention import Kept, drop, examine, to_drop
from megatron_lite.config.changes import table
from megatron_lite.config.keys import require_command
from megatron_lite.errors import EXIT_OK, EXIT_USER_ERROR, CheckpointError, MegatronLiteError
from megatron_lite.files import bytes_below, size_text
from megatron_lite.observe.run_lock import Role, own_attempt, take

EXIT_DIFFERENT = 1
"""Exit code if checkpoints differ, or if a checkpoint does not match its manifest."""
PROGRAM = "python -m megatron_lite.checkpoint"
EXPORT_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str]) -> int:
    """Run one command; returns the exit code."""
    try:
        return run_command(argv)
    except MegatronLiteError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def run_command(argv: list[str], program: str = PROGRAM) -> int:
    """
    Args:
        program: as which it was called.
    Raises:
        MegatronLiteError: what is wrong with the command or the checkpoints.
    """
    require_command(argv, COMMANDS, program)
    arguments = _parser(program).parse_args(argv)
    return COMMANDS[arguments.command](arguments)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description="Manage checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect_command = commands.add_parser("inspect", help="show the contents of a checkpoint")
    _add_path(inspect_command, "path")
    inspect_command.add_argument("--tensors", action="store_true", help="also list tensor names, types and shapes")
    inspect_command.add_argument("--json", action="store_true", help="print JSON")
    verify_command = commands.add_parser("verify", help="read all files and compare them with the manifests")
    verify_command.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, or a run folder for all of them")
    diff_command = commands.add_parser("diff", help="compare two checkpoints: settings, state and tensors")
    _add_path(diff_command, "first")
    _add_path(diff_command, "second")
    diff_command.add_argument("--only-tensors", action="store_true", help="ignore settings and state")
    prune_command = commands.add_parser("prune", help="remove checkpoints of a run; never the newest complete one")
    prune_command.add_argument("path", type=Path, metavar="PATH", help="a run folder, or its checkpoints folder")
    prune_command.add_argument(
        "--keep-last", type=_count, required=True, help="number of newest checkpoints to keep; 0 = all"
    )
    prune_command.add_argument("--keep-every", type=_count, default=0, help="also keep multiples of this many steps")
    prune_command.add_argument(
        "--keep-best", type=_count, default=0, help="also keep this many with the lowest validation loss"
    )
    prune_command.add_argument("--dry-run", action="store_true", help="only show what would be removed")
    export_command = commands.add_parser(
        "export", help="write a Hugging Face folder, and check that transformers computes the same"
    )
    _add_path(export_command, "path")
    export_command.add_argument("out", type=Path, metavar="OUT", help="the folder to create")
    export_command.add_argument(
        "--dtype", choices=EXPORT_DTYPES, default="float32", help="dtype of the written weights"
    )
    return parser


def _add_path(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument(name, type=Path, help="a checkpoint, or a run folder for its newest complete one")


def _count(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word!r} must be a whole number >= 0")
    return int(word)


def _inspect(arguments: argparse.Namespace) -> int:
    found = inspect(locate(arguments.path))
    if arguments.json:
        print(json.dumps(found.as_json(tensors=arguments.tensors), indent=1))
        return EXIT_OK
    for name, text in found.lines():
        print(f"{name:<15} {text}")
    if arguments.tensors:
        _print_tensors(found)
    return EXIT_OK


def _print_tensors(found: Inspection) -> None:
    for kind in found.kinds:
        print(f"\n{kind.name}")
        for name, tensor in kind.tensors.items():
            print(f"  {name}  {tensor.dtype} [{', '.join(map(str, tensor.shape))}]")


def _verify(arguments: argparse.Namespace) -> int:
    folders = candidates_of(arguments.path)
    leftovers = sorted(checkpoints_of(arguments.path).glob(".step_*"))
    if not folders and not leftovers:
        raise CheckpointError(
            f"{arguments.path} holds no checkpoint; give a checkpoint, or a run folder that has checkpoints"
        )
    damaged = 0
    for folder in folders:
        problems = all_problems(folder)
        damaged += bool(problems)
        print(f"{folder.name}  {'damaged' if problems else _content(folder)}", flush=True)
        for found in problems:
            print(f"  {found}")
    for leftover in sorted(set(leftovers) - set(folders)):
        print(f"{leftover.name}  a save or removal that is in progress or was killed: the next save removes it")
    return EXIT_DIFFERENT if damaged else EXIT_OK


def _content(folder: Path) -> str:
    records = read_manifest(folder)
    return f"complete: {len(records)} files, {size_text(sum(record.bytes for record in records.values()))}"


def _diff(arguments: argparse.Namespace) -> int:
    first, second = inspect(locate(arguments.first)), inspect(locate(arguments.second))
    different = False
    if not arguments.only_tensors:
        for title, lines in (
            ("settings", table(setting_changes(first, second))),
            ("state", state_differences(first.state, second.state)),
        ):
            if lines:
                print("\n".join([title, *(f"  {line}" for line in lines)]), flush=True)
                different = True
    return EXIT_DIFFERENT if _print_tensor_differences(first, second) or different else EXIT_OK


def _print_tensor_differences(first: Inspection, second: Inspection) -> bool:
    """Print the differences; return whether there are any."""
    equal = differing = 0
    for name, text in tensor_differences(first, second):
        if text is None:
            equal += 1
            continue
        if not differing:
            print("tensors")
        differing += 1
        print(f"  {name}: {text}", flush=True)
    print(f"{differing} tensors differ, {equal} are bitwise equal" if differing else f"{equal} tensors, bitwise equal")
    return differing > 0


def _prune(arguments: argparse.Namespace) -> int:
    """Keeps all checkpoints after the newest complete one: another version of megatron_lite may have written them."""
    checkpoints = checkpoints_of(arguments.path)
    if is_checkpoint(arguments.path) or not candidates(checkpoints):
        raise CheckpointError(f"{arguments.path} holds no checkpoints of a run; give a run folder")
    newest = newest_complete(checkpoints, print, problem)
    if newest is None:
        raise CheckpointError(
            f"{checkpoints} holds no complete checkpoint, so nothing is removed; {verify_command(checkpoints)} shows "
            "what is wrong with each"
        )
    kept = Kept(arguments.keep_last, arguments.keep_every, arguments.keep_best)
    folders = {step_of(folder): folder for folder in candidates(checkpoints)}
    steps = to_drop([examine(folder) for folder in folders.values()], kept, newest[1].step)
    going = [folders[step] for step in steps if step < newest[1].step]
    freed = sum(bytes_below(folder) for folder in going)
    for folder in folders.values():
        print(f"{'remove' if folder in going else 'keep':<6}  {folder.name}")
    if not arguments.dry_run:
        with _locked(checkpoints.parent):
            drop(going)
    print(f"{'would free' if arguments.dry_run else 'freed'} {size_text(freed)}")
    return EXIT_OK


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Hold the lock of the run folder; a folder of checkpoints outside a run folder has no lock.

    Raises:
        RunFolderInUseError: the run is active, and prunes its checkpoints itself.
    """
    if not any(run_dir.glob("config-*.yaml")):
        yield
        return
    lock = take(run_dir, Role.command, own_attempt(), report=print)
    try:
        yield
    finally:
        lock.release()


def _export(arguments: argparse.Namespace) -> int:
    from megatron_lite.checkpoint.export import export  # imports torch, which no other command needs

    done = export(arguments.path, arguments.out, arguments.dtype, print)
    print(f"{arguments.out}  {size_text(done.bytes)} in {arguments.dtype}: step {done.step:,} of {done.source}")
    parity = done.parity
    print(f"{parity.reader} computes the same {parity.outputs} from it (largest difference {parity.difference:.2g})")
    return EXIT_OK


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "inspect": _inspect,
    "verify": _verify,
    "diff": _diff,
    "prune": _prune,
    "export": _export,
}


def run() -> None:
    """The entry point of the console command."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # the reader closed the pipe, as in `inspect --tensors | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit does not fail


if __name__ == "__main__":
    run()

"""Rules on who starts the processes, where, and for how long."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_lite.config.keys import shown
from megatron_lite.config.launcher import LauncherConfig, LauncherName
from megatron_lite.config.rules.case import PROCESSES, Case, either, nearest_multiples

SECONDS_TO_CONCLUDE = 30
"""Time between the end of the ranks' grace period and the job's time limit: to kill remaining ranks and to requeue."""
LONGEST_JOB_SECONDS = 3650 * 86400
MOST_PLAIN_MINUTES = 14 * 24 * 60
# Forms of sbatch's --time: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS
TIME_FORMS = re.compile(
    r"(?:(?P<days>\d{1,6})-)?(?P<first>\d{1,9})(?::(?P<second>\d{1,9}))?(?::(?P<third>\d{1,9}))?", re.ASCII
)
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# sbatch options for which we have a setting, or which the job's script depends on.
OWN_OPTIONS = {
    "--job-name": "launcher.job_name",
    "--nodes": "launcher.nodes",
    "--gres": "launcher.gpus_per_node",
    "--gpus-per-node": "launcher.gpus_per_node",
    "--time": "launcher.time",
    "--partition": "launcher.partition",
    "--account": "launcher.account",
    "--qos": "launcher.qos",
    "--signal": "launcher.grace_seconds",
    "--dependency": "launcher.chain",
    "--output": None,
    "--open-mode": None,
    "--ntasks": None,
    "--ntasks-per-node": None,
    "--requeue": None,
    "--no-requeue": None,
    "--array": None,
    "--wrap": None,
}


def job_seconds(time: str) -> int | None:
    """Seconds of a time limit as Slurm reads it; None if it has none of Slurm's forms."""
    found = TIME_FORMS.fullmatch(time)
    if found is None:
        return None
    first, second, third = (int(found[name] or 0) for name in ("first", "second", "third"))
    if found["days"] is not None:
        return int(found["days"]) * 86400 + first * 3600 + second * 60 + third
    return first * 3600 + second * 60 + third if found["third"] is not None else first * 60 + second


def nodes_need_a_launcher_of_nodes(case: Case) -> Iterator[str]:
    launcher = case.config.launcher
    if launcher.name is LauncherName.local and case.sound("launcher.nodes") and launcher.nodes > 1:
        yield (
            f"launcher.nodes={launcher.nodes} needs a launcher of several machines, and launcher.name=local starts "
            "processes of this one; use launcher=slurm, torchrun or deepspeed, or launcher.nodes=1"
        )


def processes_fill_the_nodes(case: Case) -> Iterator[str]:
    """num_processes = nodes x processes_per_node."""
    launcher = case.config.launcher
    count = launcher.num_processes
    if not case.sound(*PROCESSES) or count is None:
        return
    nodes, here = launcher.nodes, launcher.processes_per_node or launcher.gpus_per_node
    if here is not None and nodes * here != count:
        key = "gpus_per_node" if launcher.processes_per_node is None else "processes_per_node"
        yield (
            f"launcher.num_processes={count} must be launcher.nodes x launcher.{key} = {nodes} x {here} = "
            f"{nodes * here}; leave launcher.num_processes out"
        )
    elif count < nodes:
        yield f"launcher.nodes={nodes} is more than the {count} processes of the layout; use at most {count}"
    elif count % nodes:
        yield (
            f"launcher.nodes={nodes} must divide the {count} processes of the layout; use a layout of "
            f"{either(nearest_multiples(count, nodes))} processes, or another launcher.nodes"
        )


def processes_have_gpus(case: Case) -> Iterator[str]:
    launcher = case.config.launcher
    processes, gpus = launcher.processes_per_node, launcher.gpus_per_node
    if not case.sound(*PROCESSES) or processes is None or gpus is None:
        return
    if processes > gpus:
        yield (
            f"launcher.processes_per_node={processes} is more than launcher.gpus_per_node={gpus}, and each process "
            f"needs a GPU; use at most {gpus}, or leave launcher.gpus_per_node out to compute on CPUs"
        )


def time_is_slurms(case: Case) -> Iterator[str]:
    time = case.config.launcher.time
    if time is None:
        return
    seconds = job_seconds(time)
    if not seconds:
        yield (
            f"launcher.time={_shown(time)} is not a time limit; use minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or "
            "D-HH:MM:SS, such as 24:00:00"
        )
    elif seconds > LONGEST_JOB_SECONDS:
        yield f"launcher.time={time} is longer than {LONGEST_JOB_SECONDS // 86400} days; use a shorter limit"
    elif time.isdecimal() and int(time) > MOST_PLAIN_MINUTES:
        yield (
            f"launcher.time={time} is {int(time) // 1440} days of minutes; YAML reads 24:00:00 as 86400 unless it is "
            "quoted: write time: '24:00:00', or a limit of days as D-HH:MM:SS"
        )


def grace_fits_the_time(case: Case) -> Iterator[str]:
    launcher = case.config.launcher
    seconds = job_seconds(launcher.time) if launcher.time is not None else None
    if not seconds or not case.sound("launcher.grace_seconds"):
        return
    most = seconds - SECONDS_TO_CONCLUDE
    if most <= 0:
        yield (
            f"launcher.time={launcher.time} is too short to train and to end in; use more than "
            f"{launcher.grace_seconds + SECONDS_TO_CONCLUDE:g} seconds"
        )
    elif launcher.grace_seconds >= most:
        yield (
            f"launcher.grace_seconds={launcher.grace_seconds:g} leaves no time to train within "
            f"launcher.time={launcher.time}, the last {SECONDS_TO_CONCLUDE} s of which requeue the job; use less than "
            f"{most}"
        )


def chains_are_slurms(case: Case) -> Iterator[str]:
    launcher = case.config.launcher
    if case.sound("launcher.chain") and launcher.chain > 1 and launcher.name is not LauncherName.slurm:
        yield (
            f"launcher.chain={launcher.chain} submits jobs to slurm, and launcher.name={launcher.name.value} has none; "
            "use launcher=slurm, or launcher.chain=1"
        )


def batch_options_are_lines(case: Case) -> Iterator[str]:
    """A line of the batch script holds one option, and sbatch interprets backslashes."""
    launcher = case.config.launcher
    for key in ("partition", "account", "qos", "job_name"):
        value = getattr(launcher, key)
        if value is not None and (not value.strip() or not _is_line(value)):
            yield f"launcher.{key}={_shown(value)} must be one line of text without backslashes; use a name, or null"
    run_dir = case.config.train.run_dir if case.sound("train.run_dir") else None
    if launcher.name is LauncherName.slurm and run_dir is not None and not _is_line(run_dir):
        yield (
            f"train.run_dir={_shown(run_dir)} must be one line without backslashes with launcher=slurm, which writes "
            "it into a line of its script; give another folder"
        )
    yield from _options(launcher, "sbatch_options", "--constraint=h100")
    yield from _options(launcher, "srun_arguments", "--cpu-bind=none")


def _options(launcher: LauncherConfig, key: str, example: str) -> Iterator[str]:
    for option in getattr(launcher, key):
        name = re.split(r"[=\s]", option, maxsplit=1)[0]
        if not option.startswith("--") or not _is_line(option):
            yield (
                f"launcher.{key} holds {_shown(option)}, which is not an option of one line that begins with `--`; "
                f"write it like {example}"
            )
        elif key == "sbatch_options" and name in OWN_OPTIONS:
            setting = OWN_OPTIONS[name]
            remedy = f"set {setting}" if setting else "leave it out: the launcher sets it"
            yield f"launcher.{key} holds {option}, which is the launcher's own; {remedy}"


def environment_has_names(case: Case) -> Iterator[str]:
    for name in case.config.launcher.environment:
        if not VARIABLE.fullmatch(name):
            yield (
                f"launcher.environment holds {_shown(name)}, which is not a name of a variable; use letters, digits "
                "and _"
            )


def passed_variables_have_names(case: Case) -> Iterator[str]:
    launcher = case.config.launcher
    for name in launcher.pass_environment:
        if not VARIABLE.fullmatch(name):
            yield (
                f"launcher.pass_environment holds {_named(name)}, and takes names of variables alone; write NAME, and "
                "`export NAME=...` in the shell that launches"
            )
        elif name in launcher.environment:
            yield (
                f"launcher.pass_environment names {name}, to which launcher.environment gives a value; leave one of "
                "the two out"
            )


def _named(text: str) -> str:
    """The option's name without its value, which may be a secret."""
    return f"{text.partition('=')[0]}=..." if "=" in text else _shown(text)


def mounts_are_pairs(case: Case) -> Iterator[str]:
    launcher = case.config.launcher
    if launcher.container_mounts and launcher.container is None:
        yield (
            f"launcher.container_mounts={launcher.container_mounts} needs launcher.container; name an image, or leave "
            "the mounts out"
        )
    for mount in launcher.container_mounts:
        if not mount.startswith("/") or ":/" not in mount or "," in mount:
            yield (
                f"launcher.container_mounts holds {_shown(mount)}, which is not a pair of folders; write it like "
                "/host/folder:/container/folder, one entry a mount"
            )


def _is_line(text: str) -> bool:
    return text.isprintable() and "\\" not in text


def _shown(text: str) -> str:
    """On one line, for a message."""
    return shown(text if text.isprintable() and text else repr(text))


LAUNCHER_RULES = (
    nodes_need_a_launcher_of_nodes,
    processes_fill_the_nodes,
    processes_have_gpus,
    time_is_slurms,
    grace_fits_the_time,
    chains_are_slurms,
    batch_options_are_lines,
    environment_has_names,
    passed_variables_have_names,
    mounts_are_pairs,
)

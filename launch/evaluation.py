"""`python -m launch evaluate CHECKPOINT [SETTING ...]`: how well a checkpoint predicts held-out text, without training.

It starts the ranks of a run under any layout, to evaluate instead of training. They use a run folder of their own: the
original one is only read, and a training run in it may continue meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.arguments import ALL_FLAG, EVALUATE_FLAG, Parser
from launch.base import Launcher, LaunchPlan
from launch.launching import resolve_for_this_machine
from launch.local import LocalLauncher
from launch.machine import require_capacity
from launch.preparation import Prepare
from launch.registry import LAUNCHERS
from megatron_lite.checkpoint.folder import candidates, quick_problem
from megatron_lite.checkpoint.inspection import checkpoints_of, is_checkpoint
from megatron_lite.checkpoint.state import read_state
from megatron_lite.config.compose import change, compose, override_key
from megatron_lite.config.derived import run_directory
from megatron_lite.config.frozen import check_run_folder, from_containers, has_trained, render
from megatron_lite.config.hf.folder import CONFIG_FILE, Weights, read_weights
from megatron_lite.config.keys import shown
from megatron_lite.config.launcher import LauncherConfig, LauncherName
from megatron_lite.config.preset_folders import PresetFolders, find_folders
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.rules.values import require_form
from megatron_lite.config.schema import (
    BatchRampConfig,
    Compile,
    OptimizerConfig,
    OptimizerName,
    RunConfig,
    TrackingConfig,
)
from megatron_lite.data.corpus.source_names import require_sources
from megatron_lite.data.tokenizer.vocabulary import TRAIN, planned_vocab_size
from megatron_lite.errors import EXIT_OK, CheckpointError, ConfigError, DataError
from megatron_lite.observe.evaluation import EVALUATION_FILE, EvaluationReport
from megatron_lite.state_files import read_object

FOLDER = Path("runs") / "evaluations"
WARM_MODULES = ("torch", "torch._dynamo", "megatron_lite.train.evaluate_checkpoint")
PRESETS = ("parallel", "launcher", "objective")
"""Groups for which another preset can be chosen; the checkpoint determines the others."""
TEXT = ("data.source", "data.validation_source")
OF_WEIGHTS = ("data.tokenizer", "data.tokenizer_vocab_size")


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    folder: Path
    """Folder with the weights."""
    config: RunConfig
    """The configuration that the weights were trained with, or one that fits them."""
    weights: Weights
    fingerprint: str | None = None
    """Fingerprint of the training data; None = unknown."""

    @property
    def name(self) -> str:
        """Name of the evaluation's folder."""
        parts = self.folder.absolute().parts
        of_run = is_checkpoint(self.folder) and len(parts) > 2 and parts[-2] == "checkpoints"
        return f"{parts[-3]}-{parts[-1]}" if of_run else parts[-1]


def main(argv: Sequence[str]) -> int:
    """Run one command line, without the word `evaluate`; returns the exit code.

    Raises:
        MegatronLiteError: any user error that can be found before the ranks start.
    """
    arguments = _parser().parse_intermixed_args(argv)
    overrides = arguments.settings
    subject = find_subject(arguments.checkpoint)
    config = replace(configured(subject, overrides, arguments.conf), debug=arguments.debug)
    is_own_text = all(override_key(override) not in TEXT for override in overrides)
    if not is_own_text:
        require_sources(config.data)  # the preparation would find it too, but after seconds of imports
    launcher = _launcher(config, _preparation(subject.fingerprint if is_own_text else None))
    plan = _with_flags(launcher.plan(config), [EVALUATE_FLAG, str(subject.folder), *[ALL_FLAG] * arguments.all])
    if arguments.dry_run:
        print(_plan_text(subject, plan))
        return EXIT_OK
    require_capacity(config.processes_per_node, config.launcher.device)
    result = plan.run_dir / EVALUATION_FILE
    result.unlink(missing_ok=True)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result only
        code = launcher.run(plan)
    if code == EXIT_OK:
        report = read_object(result, EvaluationReport)
        assert report is not None, f"the ranks have left no {result}"
        print(report.as_json() if arguments.json else report.table())
    return code


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m launch evaluate",
        description="Loss, perplexity and accuracy of a checkpoint on held-out text, without a training step.",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a run folder for its newest checkpoint, the folder of a step, or a Hugging Face model folder",
    )
    parser.add_argument(
        "settings",
        nargs="*",
        default=[],  # otherwise argparse reports these as required if the checkpoint is missing
        metavar="SETTING",
        help="data.source=FILE evaluates on that text instead of what the run holds out; train.eval_batches=N, "
        "parallel=dp1, launcher=torchrun and the like",
    )
    parser.add_argument("--conf", type=Path, metavar="DIR", help="presets of your own; ./conf if not given")
    parser.add_argument("--all", action="store_true", help="each held-out sample once, not train.eval_batches batches")
    parser.add_argument("--json", action="store_true", help="the same for programs")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors")
    return parser


def find_subject(path: str) -> Subject:
    """Find the checkpoint or model folder that a path means.

    Raises:
        ConfigError: it is not a folder, or has no weights.
        CheckpointError: the checkpoint is damaged.
    """
    folder = Path(os.path.expanduser(path))
    if not os.path.isdir(folder):  # unlike Path.is_dir, returns False for a name that is too long
        raise ConfigError(
            f"{shown(path)} is not a folder (looked from {Path.cwd()}); give a run folder, the folder of a step such "
            "as RUN/checkpoints/step_00000100, or a Hugging Face model folder"
        )
    if not is_checkpoint(folder):
        saved = candidates(checkpoints_of(folder))
        if not saved and (folder / CONFIG_FILE).is_file():
            return _of_transformers(folder)
        if not saved:
            raise ConfigError(
                f"{path} holds no checkpoint; give a run folder that has saved one, the folder of a step such as "
                "RUN/checkpoints/step_00000100, or a Hugging Face model folder"
            )
        folder = saved[0]
    return _of_checkpoint(folder)


def _of_checkpoint(folder: Path) -> Subject:
    problem = quick_problem(folder)
    if problem is not None:
        whole = next((other for other in candidates(folder.parent) if quick_problem(other) is None), None)
        remedy = "bring back a whole copy" + (f", or evaluate {whole}" if whole is not None else "")
        raise CheckpointError(f"{folder} is damaged: {problem}; {remedy}")
    state = read_state(folder)
    try:
        config = from_containers(state.config)
    except ConfigError as error:
        remedy = "evaluate it with the version of megatron_lite that wrote it"
        raise CheckpointError(f"{folder}: {error}; {remedy}") from error
    return Subject(folder, config, read_weights(str(folder)), state.data_fingerprint)


def _of_transformers(folder: Path) -> Subject:
    weights = read_weights(str(folder))
    return Subject(folder, compose(weights.script, [f"model.init_from={folder}"]), weights)


def configured(subject: Subject, overrides: Sequence[str], conf: Path | None = None) -> ResolvedConfig:
    """The configuration for the evaluation's ranks.

    Args:
        conf: folder with the user's presets; None = `./conf`.
    Raises:
        ConfigError: lists every wrong override, or every setting that does not fit.
    """
    keys = {override_key(override) for override in overrides}
    _check_keys(subject, keys)
    presets = [override for override in overrides if override_key(override) in PRESETS]
    config = _with_presets(_for_this_machine(subject.config), presets, find_folders(conf))
    config = change(config, [override for override in overrides if override not in presets])
    if config.launcher.name is LauncherName.slurm:
        raise ConfigError(
            "launcher.name=slurm cannot evaluate, for the answer would come when the job ends; use launcher=torchrun "
            "within a job of yours, or launcher=local"
        )
    require_form(config, "train.run_dir")
    own_folder = str(run_directory(config)) if "train.run_dir" in keys and config.train.run_dir else None
    if own_folder is not None and has_trained(Path(own_folder)):
        raise ConfigError(f"train.run_dir={own_folder} holds a run; give the evaluation another folder, or none")
    config = _without_training(_with_text(config, subject, keys))
    _require_fitting_tokenizer(config, subject)
    resolved = resolve_for_this_machine(config)
    digest = hashlib.sha256(f"{subject.folder.absolute()}\n{render(resolved)}".encode()).hexdigest()[:8]
    run_dir = own_folder or str(FOLDER / f"{subject.name}-{digest}")
    resolved = replace(resolved, train=replace(resolved.train, run_dir=run_dir))
    check_run_folder(resolved, Path(run_dir))
    return resolved


def _for_this_machine(config: RunConfig) -> RunConfig:
    """Drop the launcher's settings for the machines of the training run; overrides may set others."""
    launcher = LauncherConfig(threads_per_process=config.launcher.threads_per_process)
    return replace(config, launcher=launcher)


def _check_keys(subject: Subject, keys: set[str]) -> None:
    fixed = [key for key in sorted(keys) if key.partition(".")[0] == "model" and key != "model.vocab_pad_multiple"]
    if subject.weights.has_tokenizer:
        fixed += [key for key in OF_WEIGHTS if key in keys]
    problems = [f"{key} is decided by the weights of {subject.folder}; leave it out" for key in fixed]
    if subject.fingerprint is None and keys.isdisjoint(TEXT):
        problems.append(f"{subject.folder} is not a checkpoint of a run and has no held-out text; add data.source=FILE")
    if problems:
        raise ConfigError(problems)


def _with_presets(config: RunConfig, overrides: Sequence[str], folders: PresetFolders) -> RunConfig:
    """The configuration with whole groups replaced by presets."""
    if not overrides:
        return config
    composed = compose(config.script, list(overrides), folders)
    return replace(config, **{group: getattr(composed, group) for group in map(override_key, overrides)})


def _with_text(config: RunConfig, subject: Subject, keys: set[str]) -> RunConfig:
    """The configuration with all of the given text held out, encoded with the model's tokenizer."""
    model = replace(config.model, vocab_size=subject.weights.settings["vocab_size"])
    data = config.data
    named = next((key for key in reversed(TEXT) if key in keys), None)
    if named is not None:
        text: Any = data.validation_source if named == "data.validation_source" else data.source
        data = replace(data, source=text, validation_source=text, weights=None)
        if subject.weights.has_tokenizer:
            data = replace(data, tokenizer=str(subject.weights.folder.absolute()))
    return replace(config, model=model, data=data)


def _require_fitting_tokenizer(config: RunConfig, subject: Subject) -> None:
    if config.data.tokenizer == TRAIN:
        return
    rows = config.model.vocab_size
    size = planned_vocab_size(replace(config, model=replace(config.model, vocab_size=None)))
    if rows is not None and size is not None and size > rows:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer} has {size} tokens, and the weights of {subject.folder} have rows "
            f"for {rows}; name the tokenizer that they were trained with"
        )


def _without_training(config: RunConfig) -> RunConfig:
    """The configuration with a minimal optimizer, and nothing that happens after training."""
    return replace(
        config,
        optimizer=OptimizerConfig(name=OptimizerName.sgd, warmup_steps=0),
        parallel=replace(config.parallel, offload_optimizer=False),
        train=replace(config.train, batch_ramp=BatchRampConfig(), run_dir=None, compile=Compile.none),
        tracking=TrackingConfig(progress=False, plot=False),
    )


def _preparation(fingerprint: str | None) -> Prepare:
    """Prepares the text, and reports errors before the ranks start.

    Args:
        fingerprint: the data must have it, if it is the run's held-out data; None = other text.
    """

    def prepare_text(config: ResolvedConfig) -> Path:
        from megatron_lite.data.samples.loader import (
            held_out_datasets,  # takes seconds to import, and only this process needs it
        )
        from megatron_lite.data.shards.prepare import prepare
        from megatron_lite.objectives.build import build_objective

        prepared = prepare(config, report=lambda line: print(line, flush=True))
        if fingerprint is not None and prepared.fingerprint != fingerprint:
            raise DataError(
                f"data.source holds other tokens now (fingerprint {prepared.fingerprint}) than the run was trained on "
                f"({fingerprint}), so what it held out is unknown; bring back the earlier files, or name the text: "
                "data.source=FILE"
            )
        held_out_datasets(prepared, config, build_objective(config.objective, config.data, prepared.vocabulary).shape)
        return prepared.folder

    return prepare_text


def _launcher(config: ResolvedConfig, prepare: Prepare) -> Launcher:
    if config.launcher.name is LauncherName.local:
        return LocalLauncher(warm_modules=WARM_MODULES, prepare=prepare)
    return LAUNCHERS[config.launcher.name](prepare=prepare)  # type: ignore[call-arg]  # Slurm's, which is refused


def _with_flags(plan: LaunchPlan, flags: Sequence[str]) -> LaunchPlan:
    """The plan with ranks that evaluate instead of training."""
    return replace(
        plan,
        argv=(*plan.argv, *flags),
        node_argvs=tuple((*argv, *flags) for argv in plan.node_argvs),
        by_hand=tuple((*argv, *flags) for argv in plan.by_hand),
    )


def _plan_text(subject: Subject, plan: LaunchPlan) -> str:
    config = plan.config
    separate = config.data.validation_source
    rows = [
        ("checkpoint", str(subject.folder)),
        ("text", f"held-out documents of {config.data.source}" if separate is None else str(separate)),
        ("processes", f"{config.launcher.num_processes} ({config.launcher.device})"),
        ("writes", str(plan.run_dir)),
        ("command", shlex.join(plan.argv)),
    ]
    return "\n".join(f"{label:<15} {value}" for label, value in rows)

"""From a step of a run to the documents and the text of its batch: `python -m launch trace RUN --step N`.

None of this is logged: the frozen configuration and the prepared data determine every sample by its index. Imports no
torch.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.arguments import Parser
from megatron_lite.config.schema import RunConfig
from megatron_lite.data.samples.loader import examples
from megatron_lite.data.samples.provenance import DocumentPart, Provenance, merged
from megatron_lite.data.samples.skips import stretches
from megatron_lite.data.shards.prepare import prepared_folder
from megatron_lite.data.shards.prepared import MANIFEST, PreparedData, load_prepared, tokens_of
from megatron_lite.errors import EXIT_OK, DataError
from megatron_lite.objectives.base import Objective
from megatron_lite.objectives.build import build_objective
from megatron_lite.objectives.shown import Shown, on_one_line, show
from megatron_lite.train.step_samples import (
    StepSamples,
    read_config,
    rolled_back_samples,
    samples_of_step,
    trained_on,
)

SHOWN_CHARACTERS = 300
SHOWN_DOCUMENTS = 20


@dataclass(frozen=True)
class Question:
    """What the user wants to know."""

    run_dir: Path
    step: int | None
    """Counted from 1; None if `sample` is given."""
    sample: int | None
    """Global index of one sample."""
    is_rolled_back: bool
    """Show the version of the step that a rollback discarded ..."""
    rollback: int | None
    """... this rollback, counted from 1; None = the latest."""
    shown: int
    """Number of samples whose documents and text are shown."""
    full: bool
    """Show each text in full, and what the objective made of it."""
    data: Path | None
    """Folder of the prepared data; None = the configured one."""


@dataclass(frozen=True)
class Answer:
    question: Question
    config: Path
    data: Path
    samples: StepSamples
    parts: dict[int, list[DocumentPart]]
    """Documents of every sample."""
    texts: dict[int, str]
    """Texts of the shown samples."""
    made: dict[int, Shown]
    """Inputs and targets that the objective made of these; empty unless requested."""


def main(words: Sequence[str]) -> int:
    """Answer one question on the command line; returns the exit code.

    Raises:
        ConfigError: an argument is invalid.
        DataError: the step does not exist, or its data is gone.
    """
    parser = Parser(prog="python -m launch trace", description="Which documents and text a step of a run trained on.")
    parser.add_argument("run", metavar="RUN_FOLDER", type=Path)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--step", type=int, help="step of the run, from 1")
    which.add_argument("--sample", type=int, help="one sample, by its global number, from 0")
    parser.add_argument(
        "--rolled-back",
        nargs="?",
        const=0,
        type=int,
        metavar="ROLLBACK",
        help="the version of the step that this rollback (from 1; default: the latest) took back",
    )
    parser.add_argument("--samples", type=int, default=4, help="samples to show (default %(default)s)")
    parser.add_argument("--text", action="store_true", help="all of their text, and what the objective made of it")
    parser.add_argument("--json", action="store_true", help="one JSON object, with all documents of the step")
    parser.add_argument("--data", type=Path, help="the prepared folder, if it is not where the run had it")
    arguments = parser.parse_args(words)
    question = Question(
        run_dir=arguments.run,
        step=arguments.step,
        sample=arguments.sample,
        is_rolled_back=arguments.rolled_back is not None,
        rollback=arguments.rolled_back or None,
        shown=arguments.samples,
        full=arguments.text,
        data=arguments.data,
    )
    answer = trace(question)
    try:
        print(as_json(answer) if arguments.json else "\n".join(as_lines(answer)), flush=True)
    except BrokenPipeError:  # `trace ... | head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    return EXIT_OK


def trace(question: Question) -> Answer:
    """Find the documents and texts of a step or a sample.

    Raises:
        DataError: the run, step or sample does not exist, or its data is gone.
    """
    if question.shown < 0:
        raise DataError(f"--samples {question.shown} is negative; give 0 or more")
    path, config = read_config(question.run_dir, question.step)
    samples = _samples(question, config)
    prepared = _prepared(question, path, config)
    objective = build_objective(config.objective, config.data, prepared.vocabulary)
    provenance = Provenance.of(prepared, config, objective.shape)
    shown = samples.indices[: question.shown]
    return Answer(
        question,
        path,
        prepared.folder,
        samples,
        {index: provenance.documents(index) for index in samples.indices},
        {index: provenance.text(index) for index in shown},
        _made(provenance, objective, config, shown) if question.full else {},
    )


def _samples(question: Question, config: RunConfig) -> StepSamples:
    if question.sample is not None:
        if question.sample < 0:
            raise DataError(f"--sample {question.sample} is negative; give 0 or more")
        if question.is_rolled_back:
            raise DataError(
                f"--rolled-back asks for a version of a step, not of --sample {question.sample}; give --step"
            )
        return StepSamples([question.sample], None)
    assert question.step is not None
    if question.is_rolled_back:
        return rolled_back_samples(question.run_dir, config, question.step, question.rollback)
    return samples_of_step(question.run_dir, config, question.step)


def _prepared(question: Question, path: Path, config: RunConfig) -> PreparedData:
    """Open the data that the run read.

    Raises:
        DataError: it does not exist, or other data is in its place.
    """
    folder = question.data or _own_folder(config)
    remedy = f"make it again with `python -m megatron_lite.data prepare --config {shlex.quote(str(path))}`"
    if not (folder / MANIFEST).is_file():
        raise DataError(
            f"{folder} holds no prepared data of {question.run_dir} (looked from {Path.cwd()}); {remedy}, or name its "
            "folder with --data"
        )
    prepared = load_prepared(folder, config)
    fingerprint = trained_on(question.run_dir)
    if fingerprint not in (None, prepared.fingerprint) and tokens_of(fingerprint) == tokens_of(prepared.fingerprint):
        raise DataError(
            f"{question.run_dir} was trained by a version that let sources take turns in another order; trace it with "
            "that version"
        )
    if fingerprint not in (None, prepared.fingerprint):
        raise DataError(
            f"{folder} holds other tokens (fingerprint {prepared.fingerprint}) than {question.run_dir} was trained on "
            f"({fingerprint}): data.source or its tokenizer has changed since; bring the old one back and {remedy}"
        )
    return prepared


def _own_folder(config: RunConfig) -> Path:
    try:
        return prepared_folder(config)
    except DataError as error:  # a source is gone, and its content determines the folder's name
        raise DataError(f"{error}; or name the prepared folder with --data, which needs no source") from None


def _made(provenance: Provenance, objective: Objective, config: RunConfig, indices: list[int]) -> dict[int, Shown]:
    made = examples(provenance.dataset, objective, indices, config.train.seed)
    return {index: show(objective, one, provenance.decode) for index, one in zip(indices, made, strict=True)}


def as_json(answer: Answer) -> str:
    """One JSON object: the full text of every shown sample, and all documents of the step."""
    question = answer.question
    document: dict[str, Any] = {
        "run": str(question.run_dir),
        "config": answer.config.name,
        "data": str(answer.data),
        "step": question.step,
        "rollback": answer.samples.rollback,
        "ranges": list(stretches(answer.samples.indices)),
        "samples": [_sample_entry(answer, index) for index in answer.texts],
        "documents": merged(answer.parts),
    }
    return json.dumps(document, ensure_ascii=False)


def _sample_entry(answer: Answer, index: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"sample": index, "documents": list(map(asdict, answer.parts[index]))}
    entry["text"] = answer.texts[index]
    return entry | asdict(answer.made[index]) if index in answer.made else entry


def as_lines(answer: Answer) -> list[str]:
    """Lines for a terminal."""
    lines = [_headline(answer), f"settings {answer.config.name}, data {answer.data}"]
    for index in answer.texts:
        lines += _sample_lines(answer, index)
    hidden = len(answer.parts) - len(answer.texts)
    if hidden:
        lines.append(f"{hidden:,} more samples; show them with --samples {len(answer.parts)}")
    documents = merged(answer.parts)
    lines.append(f"documents of all {len(answer.parts):,} samples: {len(documents):,}")
    lines += [_document_line(one) for one in documents[:SHOWN_DOCUMENTS]]
    if len(documents) > SHOWN_DOCUMENTS:
        lines.append(f"  {len(documents) - SHOWN_DOCUMENTS:,} more; --json gives all")
    return lines


def _headline(answer: Answer) -> str:
    question, samples = answer.question, answer.samples
    numbers = " and ".join(f"{first} to {stop - 1}" for first, stop in stretches(samples.indices))
    if question.step is None:
        return f"sample {samples.indices[0]} of {question.run_dir}"
    version = "" if samples.rollback is None else f", as it was before rollback {samples.rollback} took it back"
    return f"step {question.step} of {question.run_dir}{version}: {len(samples.indices):,} samples, {numbers}"


def _sample_lines(answer: Answer, index: int) -> list[str]:
    text = on_one_line(answer.texts[index])
    if not answer.question.full and len(text) > SHOWN_CHARACTERS:
        text = f"{text[:SHOWN_CHARACTERS]} ..."
    lines = [f"sample {index}", *map(_part_line, answer.parts[index]), f"  text: {text}"]
    if index in answer.made:
        lines += [f"  {line}" for line in answer.made[index].lines()]
    return lines


def _part_line(part: DocumentPart) -> str:
    return f"  {_where(part.source, part.file, part.document)}: {_tokens(part.first_token, part.tokens)}"


def _document_line(document: dict[str, Any]) -> str:
    where = _where(document["source"], document["file"], document["document"])
    tokens = _tokens(document["first_token"], document["tokens"])
    samples: list[int] = document["samples"]
    if len(samples) == 1:
        return f"  {where}: {tokens}, in {samples[0]}"
    return f"  {where}: within {tokens}, in {', '.join(map(str, samples))}"


def _where(source: str, file: str, document: int) -> str:
    of = "" if Path(source).expanduser().absolute() == Path(file) else f" (of {source})"
    return f"{file}{of}, document {document}"


def _tokens(first: int, count: int) -> str:
    return f"tokens {first} to {first + count - 1}"

"""`python -m launch trace`: from a step of a run folder to its documents and texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.cli import main
from megatron_lite.config.frozen import freeze
from megatron_lite.config.schema import BatchRampConfig, ObjectiveName, RunConfig
from megatron_lite.data.__main__ import main as data_main
from megatron_lite.data.samples.loader import examples
from megatron_lite.data.samples.provenance import Provenance, merged
from megatron_lite.data.samples.skips import Rollback, Window, write_rollbacks
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.data.shards.prepared import PreparedData
from megatron_lite.objectives.base import Objective
from megatron_lite.objectives.build import build_objective
from megatron_lite.observe.metrics_writer import EventWriter, MetricsWriter
from megatron_lite.train.step_samples import config_of
from tests.unit.data.conftest import document
from tests.unit.remedies import obeys

REPOSITORY = Path(__file__).resolve().parents[3]
Capture = pytest.CaptureFixture[str]


def sentences(number: int) -> str:
    return ". ".join(word.capitalize() for word in document(number).split(" "))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "one.txt").write_text("\n\n".join(sentences(i) for i in range(150)))
    rows = [json.dumps({"text": sentences(i)}) for i in range(500, 650)]
    (folder / "two.jsonl").write_text("\n".join(rows))
    return folder


def config_of_run(sources: Path, objective: str = "causal_lm") -> RunConfig:
    config = RunConfig()
    config.data.source = [str(sources / "one.txt"), str(sources / "two.jsonl")]
    config.data.cache_dir = str(sources / "cache")
    config.data.tokenizer_vocab_size, config.data.seq_length, config.data.validation_fraction = 510, 32, 0.1
    config.objective.name = ObjectiveName(objective)
    config.train.steps, config.train.global_batch_size = 40, 8
    return config


def write_run(folder: Path, config: RunConfig, steps: int) -> PreparedData:
    """A run folder as if so many steps of 8 samples had been trained."""
    frozen = freeze(config, folder).name
    prepared = prepare(config, report=lambda line: None)
    events = EventWriter(folder / "events.jsonl")
    events.write("start", 0, {"data_fingerprint": prepared.fingerprint, "config": frozen})
    events.close()
    metrics = MetricsWriter(folder / "metrics.jsonl")
    for step in range(1, steps + 1):
        metrics.write(step, {"loss": 1.0, "samples": 8 * step, "global_batch_size": 8})
    metrics.close()
    return prepared


def opened(config: RunConfig) -> tuple[Provenance, Objective]:
    prepared = prepare(config, report=lambda line: None)
    objective = build_objective(config.objective, config.data, prepared.vocabulary)
    return Provenance.of(prepared, config, objective.shape), objective


def traced(capsys: Capture, *words: Any) -> dict[str, Any]:
    assert main(["trace", *map(str, words), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def refusal(capsys: Capture, *words: Any) -> str:
    assert main(["trace", *map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.strip().removeprefix("error: ")


@pytest.mark.parametrize("name", list(ObjectiveName))
def test_a_step_is_shown_as_the_objective_makes_it(sources: Path, tmp_path: Path, capsys: Capture, name: str) -> None:
    config = config_of_run(sources, name)
    write_run(tmp_path, config, 10)
    found = traced(capsys, tmp_path, "--step", 5, "--text", "--samples", 8)
    assert found["ranges"] == [[32, 40]]
    provenance, objective = opened(config)
    made = examples(provenance.dataset, objective, range(32, 40), config.train.seed)
    for index, example, entry in zip(range(32, 40), made, found["samples"], strict=True):
        assert entry["sample"] == index
        assert entry["documents"] == list(map(asdict, provenance.documents(index)))
        assert entry["text"] == provenance.text(index)
        inputs = dict(zip((field.name for field in objective.inputs), example.inputs, strict=True))
        assert entry["reads"].keys() == inputs.keys()
        tokens = inputs["tokens"][: inputs.get("lengths")]
        assert entry["reads"]["tokens"] == provenance.decode(tokens)
        counted = np.flatnonzero(example.loss_weights)
        assert entry["predicted"] == len(counted)
        positions = [run["position"] for run in entry["predicts"]]
        assert positions == [int(p) for p in counted if p - 1 not in counted.tolist()]
        for run, end in zip(entry["predicts"], [*positions[1:], len(example.labels)], strict=True):
            of_run = counted[(counted >= run["position"]) & (counted < end)]
            assert run["text"] == provenance.decode(example.labels[of_run])
        assert entry["is_next"] == (None if example.sequence_label is None else not example.sequence_label)
    assert found["documents"] == merged({index: provenance.documents(index) for index in range(32, 40)})


WORDS = {
    "causal_lm": ["predicts 32 of 32 positions: 0: "],
    "prefix_lm": ["reads prefix_lengths: "],
    "fill_in_the_middle": ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
    "masked_lm": ["reads tokens: [CLS]", "[MASK]", "[SEP]", "predicts"],
    "masked_lm_nsp": ["reads segments: ", "[MASK]", "the second part follows the first", "does not follow the first"],
    "span_corruption": ["<extra_id_0>", "reads decoder_tokens: [PAD]<extra_id_0>"],
    "bart_denoising": ["[MASK]", "reads decoder_tokens: [SEP][CLS]", "predicts 32 of 32 positions"],
    "ul2": ["[NLU]", "[NLG]", "<extra_id_0>"],
}


@pytest.mark.parametrize("name", list(ObjectiveName))
def test_for_a_person(sources: Path, tmp_path: Path, capsys: Capture, name: str) -> None:
    config = config_of_run(sources, name)
    write_run(tmp_path, config, 10)
    assert main(["trace", str(tmp_path), "--step", "2", "--text", "--samples", "8"]) == 0
    output = capsys.readouterr().out
    assert f"step 2 of {tmp_path}: 8 samples, 8 to 15\n" in output
    missing = [word for word in WORDS[name] if word not in output]
    assert missing == []
    assert "documents of all 8 samples: " in output


def test_what_is_shown_without_text(sources: Path, tmp_path: Path, capsys: Capture) -> None:
    config = config_of_run(sources)
    config.data.seq_length = 600
    write_run(tmp_path, config, 10)
    assert main(["trace", str(tmp_path), "--step", "1", "--samples", "2"]) == 0
    output = capsys.readouterr().out
    assert output.count("\nsample ") == 2
    assert "6 more samples; show them with --samples 8" in output
    texts = [line for line in output.split("\n") if line.startswith("  text: ")]
    assert all(line.endswith(" ...") and len(line) == 8 + 300 + 4 for line in texts)
    assert "reads tokens" not in output
    documents = output.partition("documents of all 8 samples: ")[2].split("\n")
    assert documents[21].endswith("more; --json gives all")
    found = traced(capsys, tmp_path, "--step", 1)
    assert int(documents[0]) == len(found["documents"]) == 20 + int(documents[21].split()[0])


def test_documents_are_found_in_the_original_files(sources: Path, tmp_path: Path, capsys: Capture) -> None:
    write_run(tmp_path, config_of_run(sources), 10)
    texts = (sources / "one.txt").read_text().split("\n\n")
    rows = [json.loads(line)["text"] for line in (sources / "two.jsonl").read_text().splitlines()]
    originals = {str(sources / "one.txt"): texts, str(sources / "two.jsonl"): rows}
    found = traced(capsys, tmp_path, "--step", 7, "--samples", 8)
    assert {one["file"] for one in found["documents"]} == set(originals)
    for sample in found["samples"]:
        wanted = [originals[part["file"]][part["document"]] for part in sample["documents"]]
        pieces = sample["text"].split("<|endoftext|>")
        for piece, original in zip(pieces, wanted, strict=False):
            assert piece in original


def test_one_sample(sources: Path, tmp_path: Path, capsys: Capture) -> None:
    config = config_of_run(sources)
    write_run(tmp_path, config, 1)
    found = traced(capsys, tmp_path, "--sample", 123456)
    provenance, _ = opened(config)
    assert found["samples"][0]["text"] == provenance.text(123456)
    assert found["step"] is None
    assert found["documents"] == merged({123456: provenance.documents(123456)})
    assert main(["trace", str(tmp_path), "--sample", "5"]) == 0
    assert capsys.readouterr().out.startswith(f"sample 5 of {tmp_path}\n")


def test_steps_without_a_line_follow_from_the_one_before(sources: Path, tmp_path: Path, capsys: Capture) -> None:
    """And from the batch ramp, where there is none; the line of step 20 says that the batch was changed."""
    config = config_of_run(sources)
    config.train.log_interval = 10
    config.train.batch_ramp = BatchRampConfig(start=4, increment=2, samples=16)
    prepared = write_run(tmp_path, config, 0)
    assert prepared.train_documents
    lines = [{"step": 10, "samples": 72, "global_batch_size": 8}, {"step": 20, "samples": 232, "global_batch_size": 16}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # 4 + 4 samples of the first size, 6 + 6 of the second, then 8 each
    expected = {
        1: (0, 4),
        2: (4, 8),
        3: (8, 14),
        4: (14, 20),
        5: (20, 28),
        11: (72, 80),
        20: (216, 232),
        29: (296, 304),
    }
    for step, window in expected.items():
        assert traced(capsys, tmp_path, "--step", step)["ranges"] == [list(window)]
    assert "step 30 of" in refusal(capsys, tmp_path, "--step", 30)


@pytest.fixture
def rolled_back(sources: Path, tmp_path: Path) -> Path:
    """20 steps. Step 10 spiked, and from step 8 the run went on without samples 64 to 79; then step 12, and from step 6
    it went on without 96 to 111."""
    config = config_of_run(sources)
    write_run(tmp_path, config, 0)
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    for branch, (first, last) in enumerate([(1, 10), (9, 12), (7, 20)]):
        metrics.rewind(first - 1, branch)
        for step in range(first, last + 1):
            known = {"rollbacks": branch} if branch else {}
            metrics.write(step, {"samples": 8 * step, "global_batch_size": 8, **known})
    metrics.close()
    windows = [Rollback(Window(64, 80), 10, 8, "loss"), Rollback(Window(96, 112), 12, 6, "gradient norm")]
    write_rollbacks(tmp_path, windows)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "expected", "rollback"),
    [
        (["--step", 8], [[56, 64]], None),
        (["--step", 9], [[80, 88]], None),
        (["--step", 10], [[88, 96]], None),
        (["--step", 11], [[112, 120]], None),
        (["--step", 10, "--rolled-back"], [[88, 96]], 2),
        (["--step", 10, "--rolled-back", 1], [[72, 80]], 1),
        (["--step", 7, "--rolled-back"], [[48, 56]], 2),
        (["--step", 12, "--rolled-back"], [[104, 112]], 2),
    ],
)
def test_samples_that_rollbacks_leave_out(
    rolled_back: Path, capsys: Capture, words: list[Any], expected: list[list[int]], rollback: int | None
) -> None:
    found = traced(capsys, rolled_back, *words)
    assert found["ranges"] == expected
    assert found["rollback"] == rollback


def test_a_step_around_a_window_has_two_ranges(sources: Path, tmp_path: Path, capsys: Capture) -> None:
    write_run(tmp_path, config_of_run(sources), 5)
    write_rollbacks(tmp_path, [Rollback(Window(18, 30), 4, 2, "loss")])
    found = traced(capsys, tmp_path, "--step", 3, "--samples", 8)
    assert found["ranges"] == [[16, 18], [30, 36]]
    assert [one["sample"] for one in found["samples"]] == [16, 17, *range(30, 36)]
    assert main(["trace", str(tmp_path), "--step", "3"]) == 0
    assert "step 3 of" in (output := capsys.readouterr().out)
    assert ": 8 samples, 16 to 17 and 30 to 35\n" in output


def test_version_whose_line_lacks_its_samples(rolled_back: Path, capsys: Capture) -> None:
    path = rolled_back / "rolled_back.jsonl"
    path.write_text(path.read_text().replace('"samples": ', '"samples": -'))
    assert main(["trace", str(rolled_back), "--step", "9", "--rolled-back"]) == 2
    *warnings, error = capsys.readouterr().err.splitlines()
    assert set(warnings) == {f"warning: 8 values of {path} are not numbers and are left out"}
    assert f"step 9 of {rolled_back} was not rolled back: " in error


@obeys(
    "launch/tracing.py:_samples",
    "megatron_lite/train/step_samples.py:rolled_back_samples",
    "megatron_lite/train/step_samples.py:samples_of_step",
)
def test_versions_that_are_not_there(rolled_back: Path, capsys: Capture) -> None:
    message = refusal(capsys, rolled_back, "--step", 9, "--rolled-back", 3)
    assert message == (
        f"step 9 of {rolled_back} was not rolled back by rollback 3: it was by rollback 1 and 2; give another step or "
        "rollback, or omit --rolled-back"
    )
    for words in ([9, "--rolled-back", 2], [7, "--rolled-back"], [9]):
        traced(capsys, rolled_back, "--step", *words)
    assert "rolled_back.jsonl holds steps 7 to 12" in refusal(capsys, rolled_back, "--step", 3, "--rolled-back")
    assert "--rolled-back asks for a version of a step" in refusal(capsys, rolled_back, "--sample", 3, "--rolled-back")
    (rolled_back / "metrics.jsonl").write_text('{"step": 8, "samples": 64, "global_batch_size": 8}\n')
    assert "or --rolled-back for the version that" in refusal(capsys, rolled_back, "--step", 12)
    traced(capsys, rolled_back, "--step", 12, "--rolled-back")


@obeys("launch/tracing.py:trace", "launch/tracing.py:_samples", "megatron_lite/train/step_samples.py:samples_of_step")
@pytest.mark.parametrize(
    ("words", "message", "mended"),
    [
        (["--step", "0"], "--step 0 is not a step of the run; give one from 1 to train.steps=40", "1"),
        (["--step", "41"], "--step 41 is not a step of the run; give one from 1 to train.steps=40", "10"),
        (
            ["--step", "11"],
            "metrics.jsonl ends with step 10; give an earlier one, or --sample 80 for the first sample",
            "10",
        ),
        (["--step", "11"], "or --sample 80 for the first sample that it will read", ["--sample", "80"]),
        (["--sample", "-1"], "--sample -1 is negative; give 0 or more", "0"),
        (["--step", "1", "--samples", "-1"], "--samples -1 is negative; give 0 or more", "0"),
        (["--sample", "3", "--rolled-back"], "not of --sample 3; give --step", ["--step", "3"]),
        (
            ["--step", "1", "--rolled-back"],
            "the run has not rolled back; give another step or rollback, or omit --rolled-back",
            ["--step", "1"],
        ),
        (["--step", "1", "--data", "/nowhere"], "/nowhere holds no prepared data of", ["--step", "1"]),
    ],
)
def test_errors(
    sources: Path, tmp_path: Path, capsys: Capture, words: list[str], message: str, mended: str | list[str]
) -> None:
    """And with the last word, or all of them, corrected."""
    write_run(tmp_path, config_of_run(sources), 10)
    assert message in refusal(capsys, tmp_path, *words)
    traced(capsys, tmp_path, *([*words[:-1], mended] if isinstance(mended, str) else mended))


@obeys("megatron_lite/train/step_samples.py:config_of")
def test_no_run_folder(sources: Path, tmp_path: Path, capsys: Capture) -> None:
    message = refusal(capsys, tmp_path / "none", "--step", 1)
    assert message == f"{tmp_path}/none has no config-*.yaml (looked from {Path.cwd()}); give the folder of a run"
    write_run(tmp_path / "none", config_of_run(sources), 1)
    traced(capsys, tmp_path / "none", "--step", 1)


@obeys("launch/tracing.py:_prepared")
def test_data_that_is_gone_is_made_again_by_the_named_command(sources: Path, tmp_path: Path, capsys: Capture) -> None:
    config = config_of_run(sources)
    config.data.cache_dir = str(tmp_path / "cache")
    prepared = write_run(tmp_path / "run", config, 3)
    before = traced(capsys, tmp_path / "run", "--step", 2)
    prepared.folder.rename(tmp_path / "elsewhere")
    message = refusal(capsys, tmp_path / "run", "--step", 2)
    assert message.startswith(f"{prepared.folder} holds no prepared data of {tmp_path}/run")
    moved = traced(capsys, tmp_path / "run", "--step", 2, "--data", tmp_path / "elsewhere")
    assert moved["documents"] == before["documents"]
    command = message.partition("`python -m megatron_lite.data ")[2].partition("`")[0]
    assert data_main(command.split(" ")) == 0
    capsys.readouterr()
    assert traced(capsys, tmp_path / "run", "--step", 2) == before


@obeys("launch/tracing.py:_prepared", "launch/tracing.py:_own_folder")
def test_other_data_and_sources_that_are_gone(sources: Path, tmp_path: Path, capsys: Capture) -> None:
    text = tmp_path / "text.txt"
    text.write_text((sources / "one.txt").read_text())
    config = config_of_run(sources)
    config.data.source, config.data.cache_dir = str(text), str(tmp_path / "cache")
    prepared, old = write_run(tmp_path / "run", config, 3), text.read_text()
    text.write_text(old.replace("5:", "V:", 1))
    prepare(config, report=lambda line: None)
    message = refusal(capsys, tmp_path / "run", "--step", 2)
    assert "data.source or its tokenizer has changed since; bring the old one back and make it again with" in message
    text.write_text(old)
    assert data_main(message.partition("`python -m megatron_lite.data ")[2].partition("`")[0].split(" ")) == 0
    capsys.readouterr()
    assert traced(capsys, tmp_path / "run", "--step", 2)["ranges"] == [[8, 16]]
    text.unlink()
    message = refusal(capsys, tmp_path / "run", "--step", 2)
    assert message.endswith("or name the prepared folder with --data, which needs no source")
    assert traced(capsys, tmp_path / "run", "--step", 2, "--data", prepared.folder)["ranges"] == [[8, 16]]


def test_a_step_has_the_settings_of_its_attempt(sources: Path, tmp_path: Path) -> None:
    first = config_of_run(sources, "masked_lm")
    second = replace(first, objective=replace(first.objective, masked_fraction=0.3))
    old, new = freeze(first, tmp_path), freeze(second, tmp_path)
    attempts = [("start", 0, old), ("resume", 10, new), ("resume", 20, old)]
    events = [{"event": event, "step": step, "config": path.name} for event, step, path in attempts]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert [config_of(tmp_path, step) for step in (1, 10, 11, 20, 21, None)] == [old, old, new, new, old, old]
    (tmp_path / "events.jsonl").unlink()
    os.utime(old, (0, 0))
    assert config_of(tmp_path, 11) == new  # the newest file


def test_it_needs_no_torch(sources: Path, tmp_path: Path) -> None:
    write_run(tmp_path, config_of_run(sources, "masked_lm_nsp"), 3)
    code = (
        "import sys; from launch.cli import main; "
        f"assert main(['trace', {str(tmp_path)!r}, '--step', '2', '--text']) == 0; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_a_reader_that_has_seen_enough(sources: Path, tmp_path: Path) -> None:
    write_run(tmp_path, config_of_run(sources), 3)
    command = [sys.executable, "-m", "launch", "trace", str(tmp_path), "--step", "2", "--samples", "8"]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0

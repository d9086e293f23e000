"""`python -m launch evaluate` gives the loss of the run's own validation in any layout, and writes nothing there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.checkpoint.folder import folder_name
from megatron_lite.observe.metrics import EVENTS_FILE, read_metrics
from megatron_lite.observe.run_lock import Role, take
from tests.integration.runs import TINY, Finished, run_warm

STEPS = 4


@pytest.fixture(scope="module")
def run_dir(request: pytest.FixtureRequest, corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of this script on two data-parallel ranks."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = (f"train.steps={STEPS}", "train.save_interval=2", "train.eval_batches=2", "train.generate_tokens=0")
    layout = ("parallel=dp2_tp1_pp1", f"train.run_dir={folder}")
    run_warm([*TINY, *corpus, *words, *layout], script=request.param).require_success()
    return folder


@pytest.fixture
def evaluate(run_dir: Path, tmp_path: Path) -> Any:
    def call(*words: str, checkpoint: Path = run_dir) -> Finished:
        return run_warm([str(checkpoint), f"train.run_dir={tmp_path / 'evaluation'}", *words], script="evaluate")

    return call


def figures(finished: Finished) -> dict[str, Any]:
    return json.loads(finished.require_success().out)


def validated(run_dir: Path) -> dict[str, float]:
    """The figures that the run printed last."""
    events = [event for event in read_metrics(run_dir / EVENTS_FILE) if event["event"] == "evaluation"]
    assert events[-1]["step"] == STEPS
    return events[-1]


def state_of(folder: Path) -> Iterator[tuple[str, int, int]]:
    for path in sorted(folder.rglob("*")):
        yield str(path), path.stat().st_mtime_ns, path.stat().st_size


@pytest.mark.parametrize("run_dir", ["pretrain_gpt", "pretrain_bert"], indirect=True)
def test_the_runs_own_number_under_two_layouts(run_dir: Path, evaluate: Any) -> None:
    """Runs while another process holds the run folder's lock, and does not change the folder."""
    lock = take(run_dir, Role.rank, "a training run")
    try:
        before = list(state_of(run_dir))
        found = [figures(evaluate("--json")), figures(evaluate("--json", "parallel=dp1_tp2_pp2"))]
        assert list(state_of(run_dir)) == before
    finally:
        lock.release()
    last = validated(run_dir)
    for one in found:
        assert one["step"] == STEPS
        assert one["checkpoint"] == str(run_dir / "checkpoints" / folder_name(STEPS))
        assert one["samples"] == 16
        assert one["loss"] == pytest.approx(last["validation_loss"], rel=1e-6)
        assert one["token_loss"] == pytest.approx(last["validation_token_loss"], rel=1e-6)
        assert one["perplexity"] == pytest.approx(last["validation_perplexity"], rel=1e-6)
        assert one["accuracy"] == pytest.approx(last["validation_accuracy"], abs=1e-9)
        assert one["sequence_accuracy"] == pytest.approx(last.get("validation_sequence_accuracy"), abs=1e-9)


@pytest.mark.parametrize("run_dir", ["pretrain_gpt"], indirect=True)
def test_all_of_another_text_and_an_earlier_step(run_dir: Path, evaluate: Any, tmp_path: Path) -> None:
    """Every sample counts once, whatever the number of ranks; the text is tokenized as in the run."""
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"The {word} is not a keyword. It is a name. Names are bound." for word in "abcdefghijk")
    )
    step = run_dir / "checkpoints" / folder_name(2)
    words = ("--all", "--json", f"data.source={text}", f"data.cache_dir={tmp_path / 'cache'}")
    one, two = (
        figures(evaluate(*words, layout, "train.eval_batches=1", checkpoint=step))
        for layout in ("parallel=dp1_tp1_pp1", "parallel=dp4_tp1_pp1")
    )
    assert one["step"] == 2
    assert one["text"] == str(text)
    assert one["samples"] % 8 != 0, "the case would not need samples without weight"
    assert (two["samples"], two["tokens"]) == (one["samples"], one["tokens"])
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert two["accuracy"] == pytest.approx(one["accuracy"], abs=1e-9)


@pytest.mark.parametrize("run_dir", ["pretrain_gpt"], indirect=True)
def test_what_cannot_be_evaluated_is_one_line(run_dir: Path, evaluate: Any, tmp_path: Path) -> None:
    tiny = tmp_path / "tiny.txt"
    tiny.write_text("few words")
    cases = {f"{tiny} has": evaluate(f"data.source={tiny}", f"data.cache_dir={tmp_path / 'cache'}")}
    flipped = tmp_path / "flipped"
    shutil.copytree(run_dir / "checkpoints" / folder_name(STEPS), flipped)
    with (flipped / "model.safetensors").open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"\xff")
    cases["model.safetensors has other content than the manifest says"] = evaluate(checkpoint=flipped)
    for part, finished in cases.items():
        assert finished.code == 2, finished.err
        assert part in finished.err
        assert finished.err.count("error:") == 1
        assert "Traceback" not in finished.out + finished.err
        assert finished.out == ""

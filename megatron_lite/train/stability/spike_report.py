"""The samples and figures behind a spike, as a file for people and for the report; only the writing rank writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.folder import candidates, quick_problem, step_of
from megatron_lite.data.samples.provenance import Provenance, merged
from megatron_lite.data.samples.skips import stretches
from megatron_lite.errors import DataError
from megatron_lite.files import replace_file
from megatron_lite.observe.console import Console
from megatron_lite.observe.metrics import SPIKE_EVENT, to_json
from megatron_lite.observe.spikes import Judgement, SpikeKind
from megatron_lite.observe.trackers import Trackers
from megatron_lite.train.loop import StepRecord

FOLDER = "spikes"
TEXT_CHARACTERS = 2000  # of a sequence, in the spike report
NAMED_DOCUMENTS = 3  # on the console


@dataclass
class SpikeReport:
    """What all ranks know about a spike."""

    record: StepRecord
    judgement: Judgement
    action: str
    rollbacks: int
    """Number in the run so far: a step that is trained again after a rollback may be a spike again."""
    samples: list[int]
    """Global numbers of the samples of the whole batch."""
    losses: list[float]
    """Loss of each sample, nats per token."""
    layer_grad_norm: dict[int, dict[str, float]]
    """Step -> layer -> norm before clipping: of the steps before, of this one, and later of those after."""

    @property
    def step(self) -> int:
        return self.record.step

    @property
    def name(self) -> str:
        branch = f"_branch_{self.rollbacks}" if self.rollbacks else ""
        return f"{FOLDER}/step_{self.step:08d}{branch}.json"

    def worst(self, count: int) -> list[tuple[int, float]]:
        """Sample and loss of the sequences with the highest losses, NaN first."""
        ranked = sorted(
            zip(self.samples, self.losses, strict=True), key=lambda one: math.inf if one[1] != one[1] else one[1]
        )
        return ranked[::-1][:count]

    @property
    def figures(self) -> dict[str, Any]:
        """The figures that the event in events.jsonl has as well."""
        result, judgement = self.record.result, self.judgement
        return {
            "kinds": [str(kind) for kind in judgement.kinds],
            "action": self.action,
            "loss": result.loss,
            "usual_loss": judgement.usual_loss,
            "loss_deviations": judgement.loss_deviations,
            "grad_norm": result.grad_norm,
            "usual_grad_norm": judgement.usual_grad_norm,
            "grad_norm_deviations": judgement.grad_norm_deviations,
            "loss_scale": result.loss_scale,
        }


@dataclass
class SpikeReports:
    """Writes spike reports and announces them on the console and in all trackers.

    A report that cannot be written does not end the run.

    Args:
        worst_sequences: how many sequences are shown with their text.
    """

    run_dir: Path
    provenance: Provenance
    trackers: Trackers
    console: Console
    worst_sequences: int

    def open(self, spike_report: SpikeReport) -> None:
        """Write and announce the report of a step that has just turned out to be a spike."""
        text = summary_line(spike_report, self.write(spike_report))
        alert = {"title": f"Spike at step {spike_report.step}", "text": text}
        self.trackers.event(
            SPIKE_EVENT, spike_report.step, {**spike_report.figures, "spike_report": spike_report.name, **alert}
        )
        self.trackers.alert(**alert)
        self.console.print(f"{text}; {self.run_dir / spike_report.name}")

    def write(self, spike_report: SpikeReport) -> list[dict[str, Any]]:
        """Write or rewrite the file; returns the sequences in it."""
        path = self.run_dir / spike_report.name
        try:
            document = self._document(spike_report)
            path.parent.mkdir(exist_ok=True)
            replace_file(path, (json.dumps(to_json(document), indent=1, ensure_ascii=False) + "\n").encode())
        except (OSError, DataError) as error:
            self.console.print(f"{path} cannot be written ({error}); the run continues without it")
            return []
        sequences: list[dict[str, Any]] = document["sequences"]
        return sequences

    def _document(self, spike_report: SpikeReport) -> dict[str, Any]:
        return {
            "step": spike_report.step,
            **spike_report.figures,
            "learning_rate": spike_report.record.learning_rate,
            "samples": [list(stretch) for stretch in stretches(spike_report.samples)],
            "documents": merged({index: self.provenance.documents(index) for index in spike_report.samples}),
            "sequences": [self._sequence(sample, loss) for sample, loss in spike_report.worst(self.worst_sequences)],
            "layer_grad_norm": {str(step): norms for step, norms in sorted(spike_report.layer_grad_norm.items())},
            "checkpoint": self._checkpoint_before(spike_report.step),
        }

    def _checkpoint_before(self, step: int) -> str | None:
        """The newest one that is complete, judging by file sizes."""
        earlier = (folder for folder in candidates(self.run_dir / "checkpoints") if step_of(folder) < step)
        return next((folder.name for folder in earlier if quick_problem(folder) is None), None)

    def _sequence(self, sample: int, loss: float) -> dict[str, Any]:
        return {
            "sample": sample,
            "loss": loss,
            "documents": merged({sample: self.provenance.documents(sample)}),
            "text": self.provenance.text(sample)[:TEXT_CHARACTERS],
        }


def summary_line(spike_report: SpikeReport, sequences: Sequence[dict[str, Any]]) -> str:
    """One line about a spike, without the path of the file.

    Args:
        sequences: as in the file, worst first.
    """
    result, judgement = spike_report.record.result, spike_report.judgement
    facts = []
    if SpikeKind.not_finite in judgement.kinds:
        facts.append(f"loss {result.loss:g} and gradient norm {result.grad_norm:g}")
    if SpikeKind.loss in judgement.kinds:
        facts.append(
            f"loss {result.loss:.3f}, usually {judgement.usual_loss:.3f} ({judgement.loss_deviations:.0f} deviations)"
        )
    if SpikeKind.grad_norm in judgement.kinds:
        facts.append(
            f"gradient norm {result.grad_norm:.3g}, usually {judgement.usual_grad_norm:.3g} "
            f"({judgement.grad_norm_deviations:.0f} deviations)"
        )
    if SpikeKind.loss_scale in judgement.kinds:
        facts.append(f"loss scale down to {result.loss_scale:g}")
    worst = [entry for sequence in sequences for entry in sequence["documents"]]
    names = list(dict.fromkeys(f"{entry['file']} #{entry['document']}" for entry in worst))[:NAMED_DOCUMENTS]
    if names:
        facts.append(f"highest loss in {', '.join(names)}")
    return f"spike at step {spike_report.step}: {'; '.join(facts)}"

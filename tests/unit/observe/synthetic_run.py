"""Run folders as a run would leave them, with everything that there is to show, written without training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from megatron_lite.config.compose import compose
from megatron_lite.config.derived import resolve
from megatron_lite.config.frozen import freeze
from megatron_lite.observe.metrics_writer import EventWriter, MetricsWriter
from megatron_lite.observe.step_measures import STEP_MEASURES

BATCH, SEQUENCE, LAYERS = 32, 64, 6
HOSTILE = (
    "the end.</pre></script><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\"> go"
)
WORDS = (
    "it",
    "was",
    "the",
    "best",
    "of",
    "times",
    "and",
    "we",
    "had",
    "everything",
    "before",
    "us",
    "worst",
    "nothing",
)
FLOPS_PER_TOKEN, PEAK_FLOPS = 9.6e6, 2.1e11


class SyntheticRun:
    """A run of `steps` steps that writes what the parts of a real one write; the same for the same seed."""

    def __init__(self, path: Path, *, steps: int, words: tuple[str, ...] = (), seed: int = 0) -> None:
        self.path, self.steps, self.rollbacks = path, steps, 0
        self.random = random.Random(seed)
        settings = [
            f"train.run_dir={path}", f"train.steps={steps}", "parallel=dp2_tp2_pp2", f"train.global_batch_size={BATCH}",
            f"model.num_layers={LAYERS}", f"data.seq_length={SEQUENCE}", *words,
        ]  # fmt: skip
        self.config = resolve(compose("pretrain_gpt", settings), device="cpu")
        freeze(self.config, path)
        self.events = EventWriter(path / "events.jsonl")
        self.metrics = MetricsWriter(path / "metrics.jsonl")

    def begin(self, kind: str = "start", step: int = 0) -> None:
        versions = {"megatron_lite": "8f14e45fceea167a", "torch": "2.13.0", "deepspeed": "0.19.8", "python": "3.11.2"}
        self.events.write(kind, step, {"data_fingerprint": "c4ca4238a0b9", "world_size": 8, "versions": versions})
        self.events.write("speed_terms", step, {"flops_per_token": FLOPS_PER_TOKEN, "peak_flops": PEAK_FLOPS})

    def resume(self, step: int) -> None:
        """After a kill, from the checkpoint of this step."""
        self.metrics.rewind(step, self.rollbacks)
        self.begin("resume", step)

    def train(self, first: int, last: int, *, spikes: dict[int, float] | None = None) -> None:
        """Steps first .. last; spikes: step -> what its loss is raised by."""
        for step in range(first, last + 1):
            self.metrics.write(step, self.figures(step, (spikes or {}).get(step, 0.0)))
            if step % 25 == 0:
                loss = self.curve(step) + 0.06
                self.events.write(
                    "evaluation", step,
                    {"validation_loss": loss, "validation_token_loss": loss, "validation_accuracy": 0.25},
                )  # fmt: skip
            if step % 50 == 0:
                self.save(step)

    def curve(self, step: int) -> float:
        return 2.6 + 6.4 * math.exp(-step / (0.14 * self.steps)) + 1.2 * math.exp(-step / (0.6 * self.steps))

    def figures(self, step: int, rise: float) -> dict[str, Any]:
        noise = self.random.gauss
        grad_norm = (0.9 + 2.5 * math.exp(-step / 30)) * math.exp(noise(0, 0.12)) * (1 + 3 * rise)
        seconds = 0.41 * math.exp(abs(noise(0, 0.05)))
        tokens_per_second = BATCH * SEQUENCE / seconds
        bubble = abs(noise(0.24, 0.015))
        figures: dict[str, Any] = {
            "loss": self.curve(step) + noise(0, 0.05) + rise,
            "grad_norm": grad_norm,
            **{measure.name: 1e-3 * (1 + rise) for measure in STEP_MEASURES},
            "learning_rate": 3e-4 * min(step / 20, 0.5 + 0.5 * math.cos(math.pi * step / self.steps)),
            "samples": step * BATCH,
            "tokens": step * BATCH * SEQUENCE,
            "global_batch_size": BATCH,
            "tokens_per_second": tokens_per_second,
            "model_flops_utilization": FLOPS_PER_TOKEN * tokens_per_second / PEAK_FLOPS,
            "step_seconds": seconds,
            "data_seconds": 0.004,
            "loss_scale": 1.0,
            "skipped": False,
            "rollbacks": self.rollbacks,
            "spike": rise > 0,
            "share_data": 0.01,
            "share_compute": 0.93 - bubble - 0.09 - 0.05,
            "share_pipeline": bubble,
            "share_reduce": abs(noise(0.09, 0.01)),
            "share_optimizer": 0.05,
            "ideal_bubble": 0.2,
        }
        if step % 10 == 0:
            figures["layer_grad_norm"] = self.layers(grad_norm, 0.0)
            figures["layer_update_ratio"] = {name: 1e-3 * norm for name, norm in self.layers(1.0, 0.0).items()}
            figures["stage_memory_bytes"] = [int(1.1e9 + 2e7 * self.random.random()), int(8.2e8)]
        return figures

    def layers(self, grad_norm: float, rise: float) -> dict[str, float]:
        names = ["embedding", *(f"layers.{layer}" for layer in range(LAYERS)), "final_norm"]
        norms = {
            name: grad_norm * (0.55 - 0.04 * place) * math.exp(self.random.gauss(0, 0.05))
            for place, name in enumerate(names)
        }
        norms["layers.3"] *= 1 + 8 * rise
        return norms

    def save(self, step: int) -> None:
        figures = {"folder": f"step_{step:08d}", "stall_seconds": 0.04, "total_seconds": 0.9, "bytes": 167_000_000}
        self.events.write("save", step, figures)

    def spike(self, step: int, *, action: str = "warn", text: str = "", checkpoint: int | None = None) -> None:
        """The event of a step that was a spike, and its spike report."""
        usual = self.curve(step)
        judged = {
            "kinds": ["loss", "grad_norm"], "loss": usual + 4.1, "usual_loss": usual, "loss_deviations": 61.5,
            "grad_norm": 14.2, "usual_grad_norm": 1.1, "grad_norm_deviations": 22.3, "loss_scale": 1.0,
            "action": action,
        }  # fmt: skip
        name = f"spikes/step_{step:08d}.json"
        line = f"loss {usual + 4.1:.2f}, usual is {usual:.2f}; layers.3 jumped most"
        self.events.write("spike", step, {**judged, "spike_report": name, "text": line})
        first = (step - 1) * BATCH
        document = {"source": "web", "file": "web-0003.jsonl", "document": 1731, "first_token": 0, "tokens": 65,
                    "samples": [first + 7]}  # fmt: skip
        others = [
            {**document, "source": "books", "file": "books.parquet", "document": 40 + place, "samples": [first + place]}
            for place in range(4)
        ]
        words = " ".join(self.random.choice(WORDS) for _ in range(60))
        sequences = [
            {"sample": first + 7, "loss": 11.21, "documents": [document], "text": text or "buy buy buy " * 24},
            {"sample": first + 2, "loss": usual + 0.3, "documents": others[2:3], "text": words},
        ]
        norms = {str(at): self.layers(1.1, 1.0 if at == step else 0.0) for at in range(step - 2, step + 2)}
        spike_report = {
            "step": step, **judged, "learning_rate": 2.8e-4, "samples": [[first, first + BATCH]],
            "documents": [document, *others], "sequences": sequences, "layer_grad_norm": norms,
            "checkpoint": None if checkpoint is None else f"step_{checkpoint:08d}",
        }  # fmt: skip
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(spike_report))

    def roll_back(self, step: int, to_step: int) -> None:
        """From a spike to the checkpoint before it, and past the samples in between."""
        self.rollbacks += 1
        first, stop = (step - 2) * BATCH, step * BATCH
        text = f"back to step {to_step}; samples {first} to {stop - 1} are left out"
        figures = {"to_step": to_step, "first_sample": first, "stop_sample": stop, "rollbacks": self.rollbacks}
        self.events.write("rollback", step, {**figures, "text": text})
        window = {"window": {"first": first, "stop": stop}, "step": step, "to_step": to_step, "reason": "loss spike"}
        path = self.path / "skipped_samples.json"
        earlier = json.loads(path.read_text())["rollbacks"] if path.exists() else []
        path.write_text(json.dumps({"format": 1, "rollbacks": [*earlier, window]}))
        self.metrics.rewind(to_step, self.rollbacks)

    def finish(self) -> None:
        self.events.write("finish", self.steps, {"seconds": 170.0})
        self.close()

    def close(self) -> None:
        self.metrics.close()
        self.events.close()


def eventful_run(path: Path, text: str = "") -> SyntheticRun:
    """400 steps with a resume after a kill, a spike that was only reported, and one that was rolled back."""
    run = SyntheticRun(path, steps=400)
    run.begin()
    skipped = [{"kind": "not JSON", "count": 1200, "examples": [f"web.jsonl:7: {text}"]}]
    run.events.write("rows", 0, {"sources": [{"source": "web", "documents": 98765, "skipped": skipped}]})
    run.train(1, 118, spikes={90: 4.1})
    run.spike(90)
    run.resume(100)
    run.train(101, 233, spikes={229: 0.5, 230: 1.2, 231: 2.3, 232: 3.4, 233: 4.1})
    run.spike(233, action="rollback", text=text, checkpoint=200)
    run.roll_back(233, 200)
    run.train(201, 400)
    run.finish()
    return run

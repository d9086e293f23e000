"""The models that `make bench-gpu` trains, and each system that trains them.

A system is a function that builds a model on a device and returns its training step: forward and backward passes over
all micro-batches, clipping by the global norm at 1.0 and AdamW. Weights and arithmetic of forward and backward are
bf16, with fp32 weights and moments in the optimizer; nanoGPT alone trains as its own script does, with fp32 weights
under autocast.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_lite.config.compose import compose
from megatron_lite.config.derived import resolve
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import Recompute
from megatron_lite.data.samples.batch import MicroBatch
from megatron_lite.data.special import SpecialTokens, Vocabulary
from megatron_lite.planning.flops import flops_of_run

SEED = 1234
LEARNING_RATE = 1e-4
CLIP = 1.0
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1

Step = Callable[[], float]
"""Trains one global batch and returns its loss."""


@dataclass(frozen=True)
class Case:
    """A model with its batch."""

    name: str
    preset: str
    """A preset of the group `model`."""
    vocab_size: int
    seq_length: int
    micro_batch_size: int
    num_micro_batches: int
    recompute: Recompute = Recompute.none

    @property
    def tokens_per_step(self) -> int:
        return self.seq_length * self.micro_batch_size * self.num_micro_batches

    def config(self, device: str, compiled: bool) -> ResolvedConfig:
        """The configuration of one rank."""
        overrides = [
            f"model={self.preset}",
            f"model.vocab_size={self.vocab_size}",
            "parallel=single",
            f"parallel.recompute={self.recompute.value}",
            f"data.seq_length={self.seq_length}",
            f"train.micro_batch_size={self.micro_batch_size}",
            f"train.global_batch_size={self.micro_batch_size * self.num_micro_batches}",
            "train.precision=bf16",
            f"train.seed={SEED}",
            f"launcher.device={device}",
            *(["train.compile=blocks"] if compiled else []),
        ]
        return resolve(compose("pretrain_gpt", overrides), world_size=1, device=device)

    def batches(self) -> list[MicroBatch]:
        """Random tokens [b, s]: speed does not depend on their values."""
        generator = torch.Generator().manual_seed(SEED)
        made = []
        for _ in range(self.num_micro_batches):
            shape = (self.micro_batch_size, self.seq_length + 1)
            tokens = torch.randint(0, self.vocab_size, shape, generator=generator)
            inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            made.append(MicroBatch((inputs,), labels, torch.ones(inputs.shape)))
        return made


FULL = (
    Case("GPT 1.3B", "gpt3_1b3", 50257, seq_length=2048, micro_batch_size=4, num_micro_batches=4),
    Case("LLaMA 7B", "llama_7b", 32000, 2048, micro_batch_size=2, num_micro_batches=4, recompute=Recompute.full),
)
"""One H200 holds each of them with all of its optimizer states."""
TINY = (
    Case("GPT tiny", "gpt_tiny", 512, seq_length=128, micro_batch_size=2, num_micro_batches=2),
    Case("LLaMA tiny", "llama_tiny", 512, 128, micro_batch_size=2, num_micro_batches=2, recompute=Recompute.full),
)
"""The same program in seconds on a CPU."""
CASES = {case.name: case for case in (*FULL, *TINY)}


@dataclass(frozen=True)
class Model:
    """FLOPs of one token's forward and backward pass, by two formulas."""

    parameters: int
    needed: float
    """What the model needs: causal attention counts half, embeddings nothing (`planning/flops.py`)."""
    customary: float
    """6 N + 12 L h s, with all N parameters and the full square of attention (PaLM, arXiv 2204.02311, appendix B)."""

    @classmethod
    def of(cls, case: Case, parameters: int) -> Model:
        config = case.config("cpu", compiled=False)
        model = config.model
        heads = model.num_attention_heads * model.head_size
        return cls(
            parameters=parameters,
            needed=flops_of_run(config, case.vocab_size).training,
            customary=6 * parameters + 12 * model.num_layers * heads * config.data.seq_length,
        )


def engine(case: Case, device: torch.device, compiled: bool, nanogpt: Path | None) -> tuple[Step, int]:
    """Our engine on one rank, ZeRO-1; the configuration decides whether blocks are compiled."""
    from megatron_lite.engine.build import build_engine
    from megatron_lite.engine.task import build_task
    from megatron_lite.optim.batch_ramp import BatchStep
    from megatron_lite.parallel.context import ParallelContext
    from megatron_lite.parallel.topology import Topology
    from megatron_lite.train.distributed import ProcessEnvironment, start_process_group

    config = case.config(device.type, compiled)
    start_process_group(device, ProcessEnvironment(0, 0, 1, 1), timeout_seconds=600)
    context = ParallelContext.build(Topology(), device=device, sequence_parallel=False, seed=SEED)
    task = build_task(config, context, Vocabulary(case.vocab_size))
    built = build_engine(config, context, task, global_batch_size=config.train.global_batch_size)
    batches, batch = case.batches(), BatchStep(0, config.train.global_batch_size)
    parameters = sum(weight.numel() for weight in built.module.parameters())
    return lambda: built.train_step(batches, batch, LEARNING_RATE).loss, parameters


def transformers(case: Case, device: torch.device, compiled: bool, nanogpt: Path | None) -> tuple[Step, int]:
    """The same model in transformers, in a plain loop: SDPA, bf16 weights with fp32 copies in a fused AdamW."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_lite.config.hf.export import hf_config

    config = case.config(device.type, compiled=False)
    settings = hf_config(config.model, vocab_size=case.vocab_size, tokens=SpecialTokens(eod=0), dtype="bfloat16")
    with device:  # drawing billions of weights on the CPU would take minutes
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**settings, use_cache=False), attn_implementation="sdpa", dtype=torch.bfloat16
        )
    model.train()
    if case.recompute is not Recompute.none:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    forward = torch.compile(model) if compiled else model
    masters = [nn.Parameter(weight.detach().float()) for weight in model.parameters()]
    optimizer = _adamw(masters)
    weights = list(model.parameters())
    batches = _on_device(case.batches(), device)

    def step() -> float:
        total = torch.zeros((), device=device)
        for tokens, labels in batches:
            logits = forward(input_ids=tokens).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()) / len(batches)
            loss.backward()
            total += loss.detach()
            _add_gradients(masters, weights)
        nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        for master in masters:
            assert master.grad is not None
            master.grad.zero_()
        return total.item()

    return step, sum(weight.numel() for weight in weights)


def nanogpt(case: Case, device: torch.device, compiled: bool, nanogpt: Path | None) -> tuple[Step, int]:
    """nanoGPT's model of the same shape, trained as its script does: fp32 weights, autocast, fused AdamW."""
    assert nanogpt is not None
    sys.path.insert(0, str(nanogpt))
    from model import GPT, GPTConfig  # nanoGPT's, from a checkout of the user

    config = case.config(device.type, compiled=False).model
    with device:
        model = GPT(
            GPTConfig(
                block_size=case.seq_length,
                vocab_size=case.vocab_size,
                n_layer=config.num_layers,
                n_head=config.num_attention_heads,
                n_embd=config.hidden_size,
                dropout=0.0,
                bias=True,
            )
        )
    forward = torch.compile(model) if compiled else model
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, device.type)
    batches = _on_device(case.batches(), device)

    def step() -> float:
        total = torch.zeros((), device=device)
        for tokens, labels in batches:
            with torch.autocast(device.type, torch.bfloat16):
                loss = forward(tokens, labels)[1] / len(batches)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item()

    return step, sum(weight.numel() for weight in model.parameters())


SYSTEMS: dict[str, Callable[[Case, torch.device, bool, Path | None], tuple[Step, int]]] = {
    "engine": engine,
    "transformers": transformers,
    "nanogpt": nanogpt,
}


def applies(system: str, case: Case, nanogpt_folder: Path | None) -> str | None:
    """Why a system cannot train a case; None = it can."""
    if system != "nanogpt":
        return None
    if not case.preset.startswith("gpt"):
        return "nanoGPT has no such model"
    return None if nanogpt_folder else "give a checkout of nanoGPT: --nanogpt DIR"


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with decay on matrices alone, in the fused form that exists on this device."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)


def _add_gradients(masters: Iterable[nn.Parameter], weights: Iterable[nn.Parameter]) -> None:
    """Add bf16 gradients to the fp32 ones, and free them."""
    for master, weight in zip(masters, weights, strict=True):
        assert weight.grad is not None
        master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
        weight.grad = None


def _on_device(batches: list[MicroBatch], device: torch.device) -> list[tuple[Any, Any]]:
    return [(batch.inputs[0].to(device), batch.labels.to(device)) for batch in batches]

"""The range of every number of the schema: the values that work, whatever the other settings are.

`tests/unit/config/test_ranges.py` checks that each number of the schema has an entry, so that a new one cannot be
forgotten. Upper bounds are no recommendations: they are far above useful values, and below the limits of int32, int64,
fp32, a system call or the time for a loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_lite.config.keys import get_value, shown
from megatron_lite.config.schema import RunConfig

FP32_SMALLEST = 1.2e-38  # slightly above the smallest normal number, 2^-126
FP32_LARGEST = 3.4e38
INT32_LARGEST = 2**31 - 1
INT64_LARGEST = 2**63 - 1
MOST_STEPS = 10**8 - 1  # checkpoint names have eight digits
MOST_PROCESSES = 2**17
LONGEST_SEQUENCE = 2**24
LARGEST_BATCH = 2**24
LONGEST_WAIT_SECONDS = 10_000_000.0  # 115 days: timers count milliseconds in C
TINY = 1e-30  # a smaller bound only keeps a number from being 0 in fp32
NEXT_TO_ONE = 1 - 2e-7  # fp32 rounds closer numbers to 1


@dataclass(frozen=True)
class Range:
    """The values of one number. The message is `rule` if a value makes no sense, else the bound that it exceeds."""

    least: float
    most: float
    means: Callable[[float], bool]
    """Whether a value makes sense at all; the bounds are within these values."""
    rule: str
    why_least: str = "the smallest number that fp32 holds"
    why_most: str = "the most that is possible"

    def __str__(self) -> str:
        """`at least 1, at most 65535 (...)`."""
        least = "more than 0" if 0 < self.least < TINY else f"at least {self.least:g}"
        return f"{least}, at most {self._most()} ({self.why_most})"

    def _most(self) -> str:
        return str(self.most) if isinstance(self.most, int) else format(self.most, ".7g")

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, to follow `key=value`."""
        if not isinstance(value, int | float):
            return "is not a number; give one"
        if not self.means(value):
            return self.rule
        if value < self.least:
            return f"is less than {self.least:g}, {self.why_least}; use {self.least:g} or more"
        if value > self.most:
            return f"is more than {self._most()}, {self.why_most}; use at most {self._most()}"
        return None


def _count(most: int, why_most: str) -> Range:
    return Range(1, most, lambda value: value >= 1, "must be at least 1; use 1 or more", why_most=why_most)


def _from_0(most: float, why_most: str) -> Range:
    return Range(0, most, lambda value: value >= 0, "must be a number >= 0; use 0 or more", why_most=why_most)


def _from_1(most: float, why_most: str) -> Range:
    return Range(1, most, lambda value: value >= 1, "must be a number >= 1; use 1 or more", why_most=why_most)


def _positive(most: float, why_most: str, least: float = FP32_SMALLEST, why_least: str = "") -> Range:
    return Range(
        least,
        most,
        lambda value: value > 0,
        "must be a positive number; use a value above 0",
        why_least or Range.why_least,
        why_most,
    )


def _fraction() -> Range:
    rule = "must be at least 0 and less than 1; use a fraction such as 0.1"
    return Range(0, NEXT_TO_ONE, lambda value: 0 <= value < 1, rule, why_most="which fp32 tells from 1")


SHARE = Range(
    0, 1, lambda value: 0 <= value <= 1, "must be at least 0 and at most 1; use a fraction such as 0.1"
)  # fmt: skip
PART = Range(
    1e-6,
    1 - 1e-6,
    lambda value: 0 < value < 1,
    "must be more than 0 and less than 1; use a fraction such as 0.15",
    "which no sequence is long enough for",
    "which leaves no text",
)
ANY_NUMBER = Range(-1e30, 1e30, lambda value: abs(value) < math.inf, "must be a number; give a finite one")
ZERO_STAGE = Range(0, 3, lambda value: value in (0, 1, 2, 3), "is not known; use 0, 1, 2 or 3")
LOSS_SCALE_POWER = Range(
    0, 32, lambda value: value >= 0, "must be a number >= 0; use 16",
    why_most="where the scale overflows any fp16 gradient",
)  # fmt: skip
PORT = Range(1, 65535, lambda value: 1 <= value <= 65535, "is not a port; use 1 to 65535, or null for a free one")

LAYERS = _count(10_000, "which a plan can list")
WIDTH = _count(2**24, "whose matrices int64 can count")
INNER_WIDTH = _count(INT32_LARGEST, "the largest int32")
HEADS = _count(2**16, "whose matrices int64 can count")
VOCABULARY = _count(INT32_LARGEST, "the largest int32, which holds a token")
LENGTH = _count(LONGEST_SEQUENCE, "the longest sequence that is planned for")
OFFSET = _from_0(2**16, "the most that a table has")
PROCESSES = _count(MOST_PROCESSES, "the most that a plan can list")
THREADS = _count(4096, "the most that a machine runs")
BATCH = _count(LARGEST_BATCH, "the largest batch that is planned for")
BATCH_OR_0 = _from_0(LARGEST_BATCH, "the largest batch that is planned for")
STEPS = _count(MOST_STEPS, "the largest step that a checkpoint's name of eight digits holds")
STEPS_OR_0 = _from_0(MOST_STEPS, "the largest step that a checkpoint's name of eight digits holds")
RATE = _positive(1000.0, "where no update is small any more")
RATE_OR_0 = _from_0(1000.0, "where no update is small any more")
SMALL = _positive(1.0, "which would not be small beside what it is added to")
DEVIATIONS = _positive(1e9, "which nothing reaches")
SECONDS = _positive(LONGEST_WAIT_SECONDS, "115 days", 1e-3, "the shortest time that timers tell")
SPAN = _from_1(LONGEST_SEQUENCE, "the longest sequence that is planned for")

RANGES: dict[str, Range] = {
    "model.num_layers": LAYERS,
    "model.num_decoder_layers": LAYERS,
    "model.hidden_size": WIDTH,
    "model.num_attention_heads": HEADS,
    "model.num_query_groups": HEADS,
    "model.head_size": HEADS,
    "model.ffn_hidden_size": INNER_WIDTH,
    "model.max_position_embeddings": LENGTH,
    "model.vocab_size": replace(VOCABULARY, rule="must be at least 1; use null for the size of the tokenizer"),
    "model.vocab_pad_multiple": _count(2**20, "the most that a vocabulary is padded by"),
    "model.norm_epsilon": SMALL,
    "model.position_offset": OFFSET,
    "model.rotary_base": _positive(1e12, "where neighbouring positions look the same", 1.0, "where angles grow"),
    "model.relative_buckets": _count(2**16, "the most that a table has"),
    "model.relative_max_distance": LENGTH,
    "model.num_segments": OFFSET,
    "model.embedding_dropout": _fraction(),
    "model.attention_dropout": _fraction(),
    "model.hidden_dropout": _fraction(),
    "model.ffn_dropout": _fraction(),
    "model.final_dropout": _fraction(),
    "model.init_std": _positive(100.0, "where every layer overflows the next"),
    "parallel.tensor_parallel_size": PROCESSES,
    "parallel.pipeline_parallel_size": PROCESSES,
    "parallel.data_parallel_size": PROCESSES,
    "parallel.zero_stage": ZERO_STAGE,
    "data.weights": ANY_NUMBER,
    "data.tokenizer_vocab_size": VOCABULARY,
    "data.seq_length": LENGTH,
    "data.validation_fraction": _fraction(),
    "data.max_bad_fraction": SHARE,
    "data.max_document_bytes": _count(2**40, "the longest document that is read"),
    "data.max_epochs": _count(10**6, "the most passes that are counted"),
    "data.num_workers": THREADS,
    "objective.masked_fraction": PART,
    "objective.mask_token_fraction": SHARE,
    "objective.random_token_fraction": SHARE,
    "objective.next_fraction": SHARE,
    "objective.short_fraction": SHARE,
    "objective.fim_fraction": SHARE,
    "objective.fim_spm_fraction": SHARE,
    "objective.noise_density": PART,
    "objective.mean_span_length": SPAN,
    "objective.infill_fraction": PART,
    "objective.infill_span_length": _positive(
        LONGEST_SEQUENCE, "the longest sequence that is planned for", 1e-3, "where hardly a span has a token"
    ),
    "objective.ul2_weights": ANY_NUMBER,
    "objective.ul2_span_lengths": ANY_NUMBER,
    "objective.ul2_noise_densities": ANY_NUMBER,
    "objective.ul2_s_density": PART,
    "objective.decoder_seq_length": LENGTH,
    "optimizer.learning_rate": RATE,
    "optimizer.min_learning_rate": RATE_OR_0,
    "optimizer.warmup_steps": STEPS_OR_0,
    "optimizer.decay_steps": STEPS,
    "optimizer.decay_fraction": SHARE,
    "optimizer.beta1": _fraction(),
    "optimizer.beta2": _fraction(),
    "optimizer.epsilon": SMALL,
    "optimizer.momentum": _fraction(),
    "optimizer.weight_decay": RATE_OR_0,
    "optimizer.z_loss_weight": _from_0(FP32_LARGEST, "the largest number that fp32 holds"),
    "optimizer.clip_grad_norm": _from_0(FP32_LARGEST, "the largest number that fp32 holds"),
    "train.steps": STEPS,
    "train.micro_batch_size": BATCH,
    "train.global_batch_size": BATCH,
    "train.batch_ramp.start": BATCH_OR_0,
    "train.batch_ramp.increment": BATCH_OR_0,
    "train.batch_ramp.samples": _from_0(2**53, "the most that is counted exactly"),
    "train.seed": _from_0(INT64_LARGEST, "the largest int64"),
    "train.loss_scale.initial_power": LOSS_SCALE_POWER,
    "train.loss_scale.window": STEPS,
    "train.loss_scale.hysteresis": STEPS,
    "train.loss_scale.minimum": _count(2**32, "where the scale overflows any fp16 gradient"),
    "train.head_chunk": _count(INT32_LARGEST, "the largest int32"),
    "train.log_interval": STEPS,
    "train.eval_interval": STEPS_OR_0,
    "train.eval_batches": STEPS,
    "train.save_interval": STEPS_OR_0,
    "train.keep_last": STEPS_OR_0,
    "train.keep_every": STEPS_OR_0,
    "train.keep_best": STEPS_OR_0,
    "train.generate_tokens": _from_0(2**16, "the most that a summary shows"),
    "train.max_non_finite_steps": STEPS,
    "train.timeout_seconds": SECONDS,
    "stability.window": _count(2**16, "the most whose median is taken at each step"),
    "stability.min_steps": _count(2**16, "the most whose median is taken at each step"),
    "stability.loss_deviations": DEVIATIONS,
    "stability.min_loss_rise": _from_0(1e9, "which nothing reaches"),
    "stability.grad_norm_deviations": DEVIATIONS,
    "stability.min_grad_norm_factor": _from_1(1e9, "which nothing reaches"),
    "stability.loss_scale_halvings": _count(1000, "more than there are between the largest scale and the smallest"),
    "stability.lead_in_steps": STEPS_OR_0,
    "stability.look_ahead_steps": STEPS_OR_0,
    "stability.max_rollbacks": _from_0(30, "each of which may leave out twice as many samples as the one before"),
    "stability.layer_interval": STEPS_OR_0,
    "stability.worst_sequences": _from_0(1024, "the most whose text a spike report shows"),
    "launcher.num_processes": PROCESSES,
    "launcher.threads_per_process": THREADS,
    "launcher.master_port": PORT,
    "launcher.nodes": PROCESSES,
    "launcher.gpus_per_node": THREADS,
    "launcher.processes_per_node": THREADS,
    "launcher.grace_seconds": SECONDS,
    "launcher.node_rank": _from_0(MOST_PROCESSES, "the most that a plan can list"),
    "launcher.chain": _count(1000, "the most jobs that are submitted at once"),
    "launcher.max_requeues": _from_0(10**6, "more than a job lives through"),
    "launcher.max_stalled_requeues": _from_0(10**6, "more than a job lives through"),
}


def out_of_range(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(key, message) of each number that is out of range by itself; in a list, of each of its numbers."""
    for key, allowed in RANGES.items():
        value = get_value(config, key)
        values = {f"{key}[{i}]": number for i, number in enumerate(value)} if isinstance(value, list) else {key: value}
        for name, number in values.items():
            problem = None if number is None else allowed.problem(number)
            if problem is not None:
                shown_value = shown(str(number)) if isinstance(number, int) else format(number, "g")
                yield key, f"{name}={shown_value} {problem}"

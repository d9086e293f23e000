"""Rules between the settings of batches, optimizer, precision and data."""

from __future__ import annotations

import os
from collections.abc import Iterator

from megatron_lite.config.ranges import INT64_LARGEST
from megatron_lite.config.rules.case import SIZES, Case, divisors, either, nearest_multiples
from megatron_lite.config.schema import Compile, Precision
from megatron_lite.config.stability import OnSpike

FP16_ON_CPU = "MEGATRON_LITE_FP16_ON_CPU"  # =1 lets tests exercise loss scaling where fp16 arithmetic is only emulated


def batch_is_whole(case: Case) -> Iterator[str]:
    """global_batch_size = micro_batch_size x micro-batches x data-parallel size."""
    train = case.config.train
    if not case.sound(*SIZES, "train.global_batch_size", "train.micro_batch_size"):
        return
    step = train.micro_batch_size * case.data
    if train.global_batch_size % step:
        yield (
            f"train.global_batch_size={train.global_batch_size} must be a multiple of train.micro_batch_size x "
            f"data-parallel size = {train.micro_batch_size} x {case.data} = {step}; "
            f"use {either(nearest_multiples(train.global_batch_size, step))}"
        )


def ramp_is_whole(case: Case) -> Iterator[str]:
    train, ramp = case.config.train, case.config.train.batch_ramp
    keys = ("train.batch_ramp.start", "train.batch_ramp.increment", "train.batch_ramp.samples")
    if not case.sound(*SIZES, *keys, "train.global_batch_size", "train.micro_batch_size"):
        return
    if ramp.start == 0:
        for key in ("increment", "samples"):
            if getattr(ramp, key):
                yield (
                    f"train.batch_ramp.{key}={getattr(ramp, key)} has no effect while train.batch_ramp.start=0; "
                    "give the first batch as train.batch_ramp.start"
                )
        return
    yield from _ramp_steps(train.global_batch_size, ramp.start, ramp.increment, train.micro_batch_size * case.data)
    if ramp.samples == 0:
        yield "train.batch_ramp.samples=0 must be positive while there is a ramp; give the sequences that it lasts"


def _ramp_steps(full: int, start: int, increment: int, step: int) -> Iterator[str]:
    key = "train.batch_ramp"
    if start > full:
        yield f"{key}.start={start} is more than train.global_batch_size={full}; use at most {full}"
        return
    uneven = [(name, value) for name, value in (("start", start), ("increment", increment)) if value % step]
    for name, value in uneven:
        yield (
            f"{key}.{name}={value} must be a multiple of train.micro_batch_size x data-parallel size = {step}; "
            f"use {either(nearest_multiples(value, step))}"
        )
    if increment == 0:
        yield f"{key}.increment=0 must be positive while there is a ramp; use {step}"
    elif not uneven and (full - start) % increment:
        whole = [divisor for divisor in divisors(full - start) if divisor % step == 0]
        yield (
            f"{key}.increment={increment} must divide train.global_batch_size - {key}.start = {full} - {start} = "
            f"{full - start}; use {either(whole or [step])}"
        )


def tokens_are_counted(case: Case) -> Iterator[str]:
    """The tokens of a whole run are counted in an int64."""
    train, length = case.config.train, case.config.data.seq_length
    if not case.sound("train.steps", "train.global_batch_size", "data.seq_length"):
        return
    tokens = train.steps * train.global_batch_size * length
    if tokens > INT64_LARGEST:
        yield (
            f"train.steps={train.steps} x train.global_batch_size={train.global_batch_size} x data.seq_length={length} "
            f"are {tokens} tokens, more than an int64 counts; use train.steps={INT64_LARGEST * train.steps // tokens} "
            "or less"
        )


def fp16_needs_a_gpu(case: Case) -> Iterator[str]:
    config = case.config
    on_cpu = config.launcher.device == "cpu" and os.environ.get(FP16_ON_CPU) != "1"
    if config.train.precision is Precision.fp16 and on_cpu:
        yield "train.precision=fp16 does not run on a CPU; use train.precision=bf16"


def compiled_blocks_hold_their_weights(case: Case) -> Iterator[str]:
    config = case.config
    if config.train.compile is Compile.blocks and config.parallel.zero_stage == 3:
        yield (
            "train.compile=blocks needs parallel.zero_stage=2 or less, not 3: a graph takes the weights of a whole "
            "layer at once, and ZeRO-3 gathers them module by module inside it; use train.compile=none or "
            f"parallel.zero_stage={2 if case.pipeline == 1 else 1}"
        )


def warmup_ends(case: Case) -> Iterator[str]:
    warmup, steps = case.config.optimizer.warmup_steps, case.config.train.steps
    if case.sound("optimizer.warmup_steps", "train.steps") and warmup >= steps:
        yield f"optimizer.warmup_steps={warmup} must be less than train.steps={steps}; use at most {steps - 1}"


def decay_follows_warmup(case: Case) -> Iterator[str]:
    optimizer = case.config.optimizer
    if optimizer.decay_steps is None or not case.sound("optimizer.warmup_steps", "optimizer.decay_steps"):
        return
    if optimizer.decay.form.has_end and optimizer.decay_steps <= optimizer.warmup_steps:
        yield (
            f"optimizer.decay_steps={optimizer.decay_steps} must be more than optimizer.warmup_steps="
            f"{optimizer.warmup_steps}, where the decay starts; use null for train.steps"
        )


def minimum_rate_is_lower(case: Case) -> Iterator[str]:
    low, peak = case.config.optimizer.min_learning_rate, case.config.optimizer.learning_rate
    if case.sound("optimizer.min_learning_rate", "optimizer.learning_rate") and low > peak:
        yield f"optimizer.min_learning_rate={low:g} is more than optimizer.learning_rate={peak:g}; use at most {peak:g}"


def loss_scale_minimum_is_lower(case: Case) -> Iterator[str]:
    scale = case.config.train.loss_scale
    keys = ("train.loss_scale.minimum", "train.loss_scale.initial_power")
    if case.sound(*keys) and scale.minimum > 2.0**scale.initial_power:
        yield (
            f"train.loss_scale.minimum={scale.minimum:g} is more than the first scale 2^{scale.initial_power}; "
            f"use at most {2.0**scale.initial_power:g}"
        )


def source_is_given(case: Case) -> Iterator[str]:
    data = case.config.data
    for key, source in (("data.source", data.source), ("data.validation_source", data.validation_source)):
        if source == [] or (source is None and key == "data.source"):
            shown = "null" if source is None else source
            yield f"{key}={shown} names no text; give a file or a list of files, or use {key}=embedded"


def something_is_held_out(case: Case) -> Iterator[str]:
    data = case.config.data
    if data.validation_source is None and data.validation_fraction == 0:
        yield "data.validation_fraction=0 holds nothing out; use a fraction such as 0.02, or set data.validation_source"


def weights_match_sources(case: Case) -> Iterator[str]:
    weights, source = case.config.data.weights, case.config.data.source
    if weights is None or not case.sound("data.weights"):
        return
    count = len(source) if isinstance(source, list) else 1
    if len(weights) != count:
        yield f"data.weights={weights} has {len(weights)} numbers for {count} data.source; give one weight a source"
    elif min(weights) < 0 or sum(weights) <= 0:
        yield f"data.weights={weights} must be 0 or more and not all 0; give each source its share"


def prompt_is_given(case: Case) -> Iterator[str]:
    train = case.config.train
    if train.generate_tokens > 0 and not train.generate_prompt:
        yield "train.generate_prompt='' is empty; give the text that the sample starts from, or train.generate_tokens=0"


def kept_checkpoints_exist(case: Case) -> Iterator[str]:
    """Checkpoints that keep_every and keep_best name must be written, and would otherwise be deleted."""
    train = case.config.train
    if not case.sound("train.keep_last", "train.keep_every", "train.keep_best", "train.save_interval"):
        return
    for key in ("keep_every", "keep_best"):
        if getattr(train, key) and train.keep_last == 0:
            yield (
                f"train.{key}={getattr(train, key)} has no effect while train.keep_last=0 keeps all checkpoints; set "
                "train.keep_last to the number of the newest ones to keep"
            )
    if train.keep_every and train.save_interval and train.keep_every % train.save_interval:
        multiples = either(nearest_multiples(train.keep_every, train.save_interval))
        yield (
            f"train.keep_every={train.keep_every} must be a multiple of train.save_interval={train.save_interval}, "
            f"after which checkpoints are written; use {multiples}"
        )
    if train.keep_best and train.eval_interval == 0:
        yield (
            f"train.keep_best={train.keep_best} has no effect while train.eval_interval=0: no checkpoint but the last "
            f"gets a validation loss; set train.eval_interval={train.save_interval or 100}"
        )


def window_holds_enough(case: Case) -> Iterator[str]:
    stability = case.config.stability
    if case.sound("stability.window", "stability.min_steps") and stability.min_steps > stability.window:
        yield (
            f"stability.min_steps={stability.min_steps} is more than stability.window={stability.window}, which never "
            f"holds as many; use at most {stability.window}"
        )


def rollback_has_checkpoints(case: Case) -> Iterator[str]:
    config = case.config
    if config.stability.on_spike is OnSpike.rollback and config.train.save_interval == 0:
        yield (
            "stability.on_spike=rollback goes back to a checkpoint, and train.save_interval=0 writes none before the "
            "end; set train.save_interval to the steps that you can afford to lose, such as 100"
        )

"""Rules on one value alone: what is wrong whatever the other settings are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_lite.config.keys import get_value
from megatron_lite.config.schema import RunConfig

POSITIVE = (
    "model.num_layers",
    "model.num_decoder_layers",
    "model.hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.head_size",
    "model.ffn_hidden_size",
    "model.max_position_embeddings",
    "model.vocab_size",
    "model.vocab_pad_multiple",
    "model.relative_buckets",
    "model.relative_max_distance",
    "parallel.data_parallel_size",
    "parallel.tensor_parallel_size",
    "parallel.pipeline_parallel_size",
    "data.tokenizer_vocab_size",
    "data.seq_length",
    "data.num_workers",
    "data.max_document_bytes",
    "objective.decoder_seq_length",
    "optimizer.decay_steps",
    "train.steps",
    "train.max_unsound_steps",
    "stability.window",
    "stability.min_steps",
    "stability.loss_scale_halvings",
    "data.max_epochs",
    "launcher.nodes",
    "launcher.chain",
    "launcher.gpus_per_node",
    "launcher.processes_per_node",
    "train.micro_batch_size",
    "train.global_batch_size",
    "train.log_interval",
    "train.eval_batches",
    "train.loss_scale.window",
    "train.loss_scale.hysteresis",
    "train.loss_scale.minimum",
    "launcher.num_processes",
    "launcher.threads_per_process",
)
NOT_NEGATIVE = (
    "model.position_offset",
    "model.num_segments",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.clip_grad_norm",
    "optimizer.min_learning_rate",
    "train.batch_ramp.start",
    "train.batch_ramp.increment",
    "train.batch_ramp.samples",
    "train.seed",
    "train.eval_interval",
    "train.save_interval",
    "train.keep_last",
    "train.keep_every",
    "train.keep_best",
    "train.generate_tokens",
    "stability.min_loss_rise",
    "stability.lead_in_steps",
    "stability.look_ahead_steps",
    "stability.max_rollbacks",
    "stability.layer_interval",
    "stability.worst_sequences",
    "train.loss_scale.initial_power",
    "launcher.node_rank",
    "launcher.max_requeues",
    "launcher.max_stalled_requeues",
)
ABOVE_ZERO = (
    "model.norm_epsilon",
    "model.rotary_base",
    "model.init_std",
    "objective.infill_span_length",
    "optimizer.learning_rate",
    "optimizer.epsilon",
    "train.timeout_seconds",
    "stability.loss_deviations",
    "stability.grad_norm_deviations",
    "launcher.grace_seconds",
)
FRACTIONS = (  # [0, 1)
    "model.embedding_dropout",
    "model.attention_dropout",
    "model.hidden_dropout",
    "model.ffn_dropout",
    "model.final_dropout",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.momentum",
    "data.validation_fraction",
)
SHARES = (  # [0, 1]
    "objective.mask_token_fraction",
    "objective.random_token_fraction",
    "objective.next_fraction",
    "objective.short_fraction",
    "objective.fim_fraction",
    "objective.fim_spm_fraction",
    "data.max_bad_fraction",
)
PARTS = (  # (0, 1)
    "objective.masked_fraction",
    "objective.noise_density",
    "objective.infill_fraction",
    "objective.ul2_s_density",
)
AT_LEAST_ONE = ("objective.mean_span_length", "stability.min_grad_norm_factor")
CHOICES: dict[str, tuple[object, ...]] = {
    "parallel.zero_stage": (0, 1, 2, 3),
    "launcher.device": ("auto", "cpu", "cuda"),
}
MAX_LOSS_SCALE_POWER = 32  # 2^32 overflows any fp16 gradient; a larger power only costs skipped steps
PORTS = range(1, 65536)


def out_of_range(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(key, message) of each value that is wrong whatever the others are."""
    tables: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
        (POSITIVE, lambda value: value >= 1, "must be at least 1; use 1 or more"),
        (NOT_NEGATIVE, lambda value: 0 <= value < float("inf"), "must be a number of at least 0; use 0 or more"),
        (ABOVE_ZERO, lambda value: 0 < value < float("inf"), "must be a positive number; use a value above 0"),
        (FRACTIONS, lambda value: 0 <= value < 1, "must be at least 0 and less than 1; use a fraction such as 0.1"),
        (SHARES, lambda value: 0 <= value <= 1, "must be at least 0 and at most 1; use a fraction such as 0.1"),
        (PARTS, lambda value: 0 < value < 1, "must be more than 0 and less than 1; use a fraction such as 0.15"),
        (AT_LEAST_ONE, lambda value: 1 <= value < float("inf"), "must be a number of at least 1; use 1 or more"),
    )
    for keys, is_right, text in tables:
        for key in keys:
            value = get_value(config, key)
            if value is not None and not is_right(value):
                yield key, f"{key}={value if isinstance(value, int) else format(value, 'g')} {text}"
    for key, choices in CHOICES.items():
        value = get_value(config, key)
        if value not in choices:
            yield key, f"{key}={value} is not known; use {', '.join(map(str, choices[:-1]))} or {choices[-1]}"
    if config.train.loss_scale.initial_power > MAX_LOSS_SCALE_POWER:
        key, value = "train.loss_scale.initial_power", config.train.loss_scale.initial_power
        yield key, f"{key}={value} is more than {MAX_LOSS_SCALE_POWER}; use 16"
    port = config.launcher.master_port
    if port is not None and port not in PORTS:
        yield "launcher.master_port", f"launcher.master_port={port} is no port; use 1 to 65535, or null for a free one"

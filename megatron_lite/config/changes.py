"""What may change between the attempts of one run: every setting has a grade.

A run resumes from its newest checkpoint with any safe change, reports what a change resets, and refuses changes that
would make it another run. A new setting must be in exactly one of the tables below; a test checks that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from megatron_lite.config.decays import settings_of_schedules
from megatron_lite.config.keys import as_word, get_value, leaf_keys
from megatron_lite.config.same_weights import same_weights
from megatron_lite.config.schema import ModelConfig, OptimizerName, Precision, RunConfig

Consequence = Callable[[RunConfig, RunConfig], str]
"""Maps the configurations before and after the change to what it resets; empty = nothing, for these values."""


class Grade(StrEnum):
    safe = "safe"
    resets = "resets"
    forbidden = "forbidden"


class RunPart(StrEnum):
    """Parts of a run that restart with new values; a resume prints one line for each."""

    schedule = "schedule"
    masks = "masks"
    batches = "batches"


@dataclass(frozen=True)
class Reset:
    """The effect of another value of a setting on a resumed run."""

    consequence: Consequence
    part: RunPart | None = None
    moves_losses: bool = False
    """Whether losses or gradient norms jump, so that those of earlier steps are not comparable."""


@dataclass(frozen=True)
class Change:
    """One setting that has changed."""

    key: str
    before: Any
    after: Any
    grade: Grade
    consequence: str
    """The effect; for a forbidden change the rule that it breaks. Empty if there is nothing to report."""
    remedy: str = ""
    """What to do instead; only for forbidden changes."""
    part: RunPart | None = None
    """Only for changes that reset something."""
    moves_losses: bool = False
    """As in `Reset`."""

    def __str__(self) -> str:
        text = f"{self.key}: {as_typed(self.before)} -> {as_typed(self.after)}"
        return f"{text}; {self.consequence}" if self.consequence else text


SAFE = (
    "debug",
    "model.name",
    "model.check_init",
    "model.vocab_pad_multiple",  # checkpoints contain no padding
    "parallel.pipeline_parallel_size",
    "parallel.stages",
    "parallel.data_parallel_size",
    "parallel.zero_stage",
    "parallel.offload_optimizer",
    "parallel.recompute",
    "data.max_epochs",
    "data.cache_dir",
    "data.num_workers",
    "data.max_bad_fraction",  # it may stop a preparation, but does not change the documents
    "train.loss_scale.initial_power",  # the scale has long moved away from it
    "train.log_interval",
    "train.eval_interval",
    "train.save_interval",
    "train.keep_last",
    "train.keep_every",
    "train.keep_best",
    "train.async_save",
    "train.generate_tokens",
    "train.generate_prompt",
    "train.run_dir",
    "train.max_non_finite_steps",
    "train.timeout_seconds",
    "stability.on_spike",
    "stability.window",
    "stability.min_steps",
    "stability.loss_deviations",
    "stability.min_loss_rise",
    "stability.grad_norm_deviations",
    "stability.min_grad_norm_factor",
    "stability.loss_scale_halvings",
    "stability.lead_in_steps",
    "stability.look_ahead_steps",
    "stability.max_rollbacks",
    "stability.layer_interval",
    "stability.worst_sequences",
    "tracking.progress",
    "tracking.wandb",
    "tracking.wandb_project",
    "tracking.wandb_name",
    "tracking.tensorboard",
    "tracking.plot",
    "launcher.name",
    "launcher.num_processes",
    "launcher.threads_per_process",
    "launcher.master_address",
    "launcher.master_port",
    "launcher.nodes",
    "launcher.gpus_per_node",
    "launcher.processes_per_node",
    "launcher.grace_seconds",
    "launcher.node_rank",
    "launcher.rendezvous",
    "launcher.rendezvous_id",
    "launcher.hostfile",
    "launcher.time",
    "launcher.partition",
    "launcher.account",
    "launcher.qos",
    "launcher.job_name",
    "launcher.chain",
    "launcher.max_requeues",
    "launcher.max_stalled_requeues",
    "launcher.modules",
    "launcher.setup",
    "launcher.environment",
    "launcher.pass_environment",
    "launcher.container",
    "launcher.container_mounts",
    "launcher.sbatch_options",
    "launcher.srun_arguments",
)


def _always(text: str) -> Consequence:
    return _described(lambda before, after: text, text)


def _described(consequence: Consequence, text: str) -> Consequence:
    """The consequence with the docstring that `on_resume` shows."""
    consequence.__doc__ = text
    return consequence


def _masks(*dropouts: str) -> Consequence:
    """Dropout masks are functions of (seed, first sample of the micro-batch, layer, site), some also of the rank."""

    def consequence(before: RunConfig, after: RunConfig) -> str:
        used = [name for name in dropouts if _dropout(before.model, name) or _dropout(after.model, name)]
        return f"other masks of {' and '.join(f'model.{name}' for name in used)} from here on" if used else ""

    return _described(consequence, "other dropout masks from here on, where there is dropout")


def _dropout(model: ModelConfig, name: str) -> float:
    value = getattr(model, name)
    assert isinstance(value, float)
    return value


# For activations that are sharded by sequence parallelism: each rank draws the masks of its own positions.
_OF_POSITIONS = ("embedding_dropout", "hidden_dropout", "final_dropout")


def _tensor_size(before: RunConfig, after: RunConfig) -> str:
    """other dropout masks from here on, where there is dropout"""
    # Each rank draws for its own attention heads, and under sequence parallelism for its own positions.
    cut = before.parallel.sequence_parallel or after.parallel.sequence_parallel
    return _masks("attention_dropout", *(_OF_POSITIONS if cut else ()))(before, after)


def _steps(before: RunConfig, after: RunConfig) -> str:
    """the learning rate decays until the new last step, unless optimizer.decay_steps is set"""
    optimizer = after.optimizer
    stretched = optimizer.decay_steps is None and optimizer.decay.form.has_end
    if not stretched:
        return ""
    return (
        f"the learning rate now decays until step {after.train.steps:,}; optimizer.decay_steps={before.train.steps} "
        "keeps the earlier course"
    )


def _decay_steps(before: RunConfig, after: RunConfig) -> str:
    """the learning rate decays until this step"""
    ends = [one.optimizer.decay_steps or one.train.steps for one in (before, after)]
    has_end = after.optimizer.decay.form.has_end
    return f"the learning rate now decays until step {ends[1]:,}" if has_end and ends[0] != ends[1] else ""


def _of_schedule(name: str) -> Consequence:
    """Only for decays that read the setting."""
    return _described(lambda before, after: _SCHEDULE if after.optimizer.decay.form.depends_on(name) else "", _SCHEDULE)


def _precision(before: RunConfig, after: RunConfig) -> str:
    """the loss scale of fp16 starts anew, or is dropped"""
    if after.train.precision is Precision.fp16:
        return f"fp16's loss scale starts at 2^{after.train.loss_scale.initial_power}"
    return "fp16's loss scale is dropped" if before.train.precision is Precision.fp16 else ""


def _loss_scale(text: str) -> Consequence:
    both = Precision.fp16
    return _described(
        lambda before, after: text if before.train.precision is after.train.precision is both else "", f"fp16: {text}"
    )


def _of_optimizer(name: OptimizerName, text: str) -> Consequence:
    """For a setting that only one optimizer reads."""
    return _described(lambda before, after: text if after.optimizer.name is name else "", f"{name.value}: {text}")


_SCHEDULE = "the schedule goes on with the new values from here"
_UPDATES = "updates from here on have the new value"
_BATCH = "steps from here on take batches of the new size; the data goes on with the next sample"
_RATE = "this dropout has the new rate from here on"


def _validation(before: RunConfig, after: RunConfig) -> str:
    """validations are over another number of samples"""
    was, now = (one.train.eval_batches * one.train.global_batch_size for one in (before, after))
    return f"validation is over {now:,} samples instead of {was:,}" if was != now else ""


def _batch(before: RunConfig, after: RunConfig) -> str:
    """steps from here on take batches of the new size; validations are over as many more samples"""
    return "; ".join(filter(None, (_BATCH, _validation(before, after))))


RESETS: dict[str, Reset] = {
    "parallel.tensor_parallel_size": Reset(_tensor_size, RunPart.masks),
    "parallel.sequence_parallel": Reset(_masks(*_OF_POSITIONS), RunPart.masks),
    # CPU and GPU random generators differ.
    "launcher.device": Reset(_masks("attention_dropout", "ffn_dropout", *_OF_POSITIONS), RunPart.masks),
    "model.embedding_dropout": Reset(_always(_RATE), moves_losses=True),
    "model.attention_dropout": Reset(_always(_RATE), moves_losses=True),
    "model.hidden_dropout": Reset(_always(_RATE), moves_losses=True),
    "model.ffn_dropout": Reset(_always(_RATE), moves_losses=True),
    "model.final_dropout": Reset(_always(_RATE), moves_losses=True),
    "optimizer.name": Reset(_always("moments start from zero")),
    **{f"optimizer.{name}": Reset(_of_schedule(name), RunPart.schedule) for name in settings_of_schedules()},
    "optimizer.decay_steps": Reset(_decay_steps, RunPart.schedule),
    "optimizer.beta1": Reset(_of_optimizer(OptimizerName.adamw, _UPDATES)),
    "optimizer.beta2": Reset(_of_optimizer(OptimizerName.adamw, _UPDATES)),
    "optimizer.epsilon": Reset(_of_optimizer(OptimizerName.adamw, _UPDATES)),
    "optimizer.momentum": Reset(_of_optimizer(OptimizerName.sgd, _UPDATES)),
    "optimizer.weight_decay": Reset(_always(_UPDATES)),
    "optimizer.z_loss_weight": Reset(_always(_UPDATES), moves_losses=True),
    "optimizer.clip_grad_norm": Reset(_always(_UPDATES)),
    "train.steps": Reset(_steps, RunPart.schedule),
    "train.micro_batch_size": Reset(_masks("attention_dropout", "ffn_dropout", *_OF_POSITIONS), RunPart.masks),
    "train.global_batch_size": Reset(_batch, RunPart.batches, moves_losses=True),
    "train.batch_ramp.start": Reset(_always(_BATCH), RunPart.batches, moves_losses=True),
    "train.batch_ramp.increment": Reset(_always(_BATCH), RunPart.batches, moves_losses=True),
    "train.batch_ramp.samples": Reset(_always(_BATCH), RunPart.batches, moves_losses=True),
    "train.eval_batches": Reset(_validation),
    "train.precision": Reset(_precision, moves_losses=True),
    "train.loss_scale.window": Reset(_loss_scale("the loss scale keeps its value and follows the new rule")),
    "train.loss_scale.hysteresis": Reset(_loss_scale("the loss scale keeps its value and follows the new rule")),
    "train.loss_scale.minimum": Reset(_loss_scale("the loss scale keeps its value and follows the new rule")),
}


@dataclass(frozen=True)
class Refusal:
    """Why some settings cannot change within a run."""

    rule: str
    weights_fit: bool
    """Whether another run can start from these weights."""
    keys: tuple[str, ...]


FORBIDDEN = (
    Refusal("the weights have the shapes of the earlier value", False, (
        "model.architecture", "model.num_layers", "model.num_decoder_layers", "model.hidden_size",
        "model.num_attention_heads", "model.num_query_groups", "model.head_size", "model.ffn_hidden_size",
        "model.max_position_embeddings", "model.vocab_size", "model.normalization", "model.norm_placement",
        "model.embedding_norm",
        "model.position_embedding", "model.position_offset", "model.relative_buckets", "model.num_segments",
        "model.attention_bias", "model.mlp_bias", "model.tie_embeddings", "model.head_transform", "model.head_bias",
    )),
    Refusal("the first weights came from the earlier value", False, (
        "model.init", "model.init_std", "model.init_from",
    )),
    Refusal("the model has learnt the tokens of the earlier value", False, (
        "data.tokenizer", "data.tokenizer_vocab_size", "data.add_bos", "data.eod_token",
    )),
    Refusal("the weights are trained to compute with the earlier value", True, (
        "model.norm_epsilon", "model.activation", "model.rotary_base",
        "model.relative_max_distance", "model.attention_scale", "model.scale_tied_head",
    )),
    Refusal("it decides which samples there are, and so which of them are left to train on", True, (
        "data.source", "data.weights", "data.text_key", "data.document_separator", "data.dataset_split",
        "data.dataset_config", "data.max_document_bytes", "data.seq_length", "data.validation_fraction",
        "data.validation_source", "objective.decoder_seq_length",
    )),
    Refusal("it decides what the model is trained to predict", True, (
        "script", "data.mask_loss_after_eod", "objective.name", "objective.masked_fraction",
        "objective.mask_token_fraction", "objective.random_token_fraction", "objective.whole_word",
        "objective.next_fraction", "objective.short_fraction", "objective.fim_fraction", "objective.fim_spm_fraction",
        "objective.noise_density", "objective.mean_span_length", "objective.infill_fraction",
        "objective.infill_span_length", "objective.permute_sentences", "objective.ul2_mode_tokens",
        "objective.ul2_weights", "objective.ul2_span_lengths", "objective.ul2_noise_densities",
        "objective.ul2_s_density",
    )),
    Refusal("the order of the data follows from it, and so which samples are left to train on", True, ("train.seed",)),
)  # fmt: skip

DATA_KEYS = (
    "data.source", "data.weights", "data.text_key", "data.document_separator", "data.dataset_split",
    "data.dataset_config", "data.validation_fraction", "data.validation_source", "data.tokenizer",
    "data.tokenizer_vocab_size",
)  # fmt: skip
"""Settings that matter only through the resulting tokens: a change has no effect if the data keeps its fingerprint,
such as a renamed file, or a separator if no text file is read."""
UNDECIDED = "the run goes on only with the tokens that it had, which shows when the data is ready"


def on_resume(key: str) -> tuple[Grade, str]:
    """The grade of a setting and its effect on a resumed run, for any values."""
    if key in RESETS:
        return Grade.resets, RESETS[key].consequence.__doc__ or ""
    refusal = next((refusal for refusal in FORBIDDEN if key in refusal.keys), None)
    if refusal is None:
        return Grade.safe, "the run goes on with the new value"
    text = refusal.rule
    if key in DATA_KEYS:
        text += "; another spelling of the same tokens is safe"
    if refusal.weights_fit:
        text += "; a new run can begin with the weights: model.init_from=CHECKPOINT"
    return Grade.forbidden, text


def grade_changes(
    previous: RunConfig,
    current: RunConfig,
    checkpoint: Path | None = None,
    *,
    same: Collection[str] = (),
    undecided: Collection[str] = (),
) -> list[Change]:
    """Every setting that differs between two resolved configurations of one run, in the order of the schema.

    Args:
        checkpoint: of the run; the remedy suggests starting another run from it.
        same: those of DATA_KEYS that are known to give the same tokens, even if spelled differently.
        undecided: those of DATA_KEYS for which that is not known yet.
    """
    differing = [key for key in leaf_keys() if get_value(previous, key) != get_value(current, key)]
    graded = []
    for key in differing:
        settled = _may_be_respelled(key, previous, current) and (key in same or key in undecided)
        text = UNDECIDED if settled and key in undecided else ""
        safe = Change(key, get_value(previous, key), get_value(current, key), Grade.safe, text)
        graded.append(safe if settled else _graded(key, previous, current, checkpoint))
    return graded


def _may_be_respelled(key: str, before: RunConfig, after: RunConfig) -> bool:
    """Whether the data's fingerprint determines the whole effect of a setting.

    A trained tokenizer also determines the model's vocabulary size, which the tokens alone do not show.
    """
    trained = [config.data.tokenizer == "train" for config in (before, after)]
    if key == "data.tokenizer":
        return trained[0] == trained[1]
    return key != "data.tokenizer_vocab_size" or not any(trained)


def refusals(changes: Sequence[Change], where: str) -> list[str]:
    """One message for each change that is forbidden: `key=value rule; remedy`.

    Args:
        where: where the earlier settings were used, for messages.
    """
    return [
        f"{change.key}={as_typed(change.after)} cannot go on from {as_typed(change.before)} of {where}: "
        f"{change.consequence}; {change.remedy}"
        for change in changes
        if change.grade is Grade.forbidden
    ]


def table(changes: Sequence[Change]) -> list[str]:
    """A line for each change; changes that reset something come first."""
    order = [Grade.forbidden, Grade.resets, Grade.safe]
    return [f"{change.grade:<10} {change}" for change in sorted(changes, key=lambda change: order.index(change.grade))]


def as_typed(value: Any) -> str:
    """A value as the user would type it, without secrets."""
    if value is None or isinstance(value, bool):
        return as_word(value)
    if isinstance(value, list):
        return f"[{','.join(map(as_typed, value))}]"
    if isinstance(value, dict):  # launcher.environment, whose values may be secrets
        return f"{{{','.join(f'{name}: ...' for name in value)}}}"
    text = str(value)
    return text if text and text.isprintable() and " " not in text else repr(text)


def _graded(key: str, previous: RunConfig, current: RunConfig, checkpoint: Path | None) -> Change:
    before, after = get_value(previous, key), get_value(current, key)
    if key == "model.init_from" and (reason := same_weights(before, after)) is not None:
        return Change(key, before, after, Grade.safe, reason)
    refusal = next((refusal for refusal in FORBIDDEN if key in refusal.keys), None)
    if refusal is None:
        reset = RESETS.get(key, Reset(_always("")))
        consequence = reset.consequence(previous, current)
        grade = Grade.resets if consequence else Grade.safe
        return Change(key, before, after, grade, consequence, part=reset.part, moves_losses=reset.moves_losses)
    remedy = f"keep {key}={as_typed(before)}, or begin another run in a new train.run_dir"
    if refusal.weights_fit and checkpoint is not None:
        remedy += f" with model.init_from={checkpoint}"
    return Change(key, before, after, Grade.forbidden, refusal.rule, remedy)

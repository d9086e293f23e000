"""What another value of a setting does to a run that resumes: the effects that fields of the schema name.

A run resumes from its newest checkpoint with any safe change, reports what a change resets, and refuses changes that
would make it another run. `changes.py` compares two configurations by these.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_lite.config.choices import OptimizerName, Precision
from megatron_lite.config.setting import Consequence, Forbidden, Resets, RunPart

if TYPE_CHECKING:
    from megatron_lite.config.model import ModelConfig
    from megatron_lite.config.schema import RunConfig

# Forbidden

NAMES = Forbidden("the run's checkpoints have the tensor names of the earlier value", weights_fit=False)
SHAPES = Forbidden("the weights have the shapes of the earlier value", weights_fit=False)
FIRST_WEIGHTS = Forbidden("the first weights came from the earlier value", weights_fit=False)
TOKENS = Forbidden("the model was trained on the tokens of the earlier value", weights_fit=False)
TOKENIZER = replace(TOKENS, same_tokens_are_safe=True)
COMPUTATION = Forbidden("the weights were trained with the earlier value", weights_fit=True)
SAMPLES = Forbidden("it determines the samples, and so which of them are left to train on", weights_fit=True)
SOURCES = replace(SAMPLES, same_tokens_are_safe=True)
TARGETS = Forbidden("it decides what the model is trained to predict", weights_fit=True)
ORDER = Forbidden("it determines the order of the data, and so which samples are left to train on", weights_fit=True)


# Resets


def _always(text: str) -> Consequence:
    return _described(lambda before, after, key: text, text)


def _described(consequence: Consequence, text: str) -> Consequence:
    """The consequence with the docstring that `explain` shows."""
    consequence.__doc__ = text
    return consequence


def _masks(*dropouts: str) -> Consequence:
    """Dropout masks are functions of (seed, first sample of the micro-batch, layer, site), some also of the rank."""

    def consequence(before: RunConfig, after: RunConfig, key: str) -> str:
        used = [name for name in dropouts if _dropout(before.model, name) or _dropout(after.model, name)]
        return f"different masks for {' and '.join(f'model.{name}' for name in used)} from here on" if used else ""

    return _described(consequence, "different dropout masks from here on, if there is dropout")


def _dropout(model: ModelConfig, name: str) -> float:
    value = getattr(model, name)
    assert isinstance(value, float)
    return value


# For activations that are sharded by sequence parallelism: each rank draws the masks of its own positions.
_OF_POSITIONS = ("embedding_dropout", "hidden_dropout", "final_dropout")


def _tensor_size(before: RunConfig, after: RunConfig, key: str) -> str:
    """different dropout masks from here on, if there is dropout"""
    # Each rank draws for its own attention heads, and under sequence parallelism for its own positions.
    cut = before.parallel.sequence_parallel or after.parallel.sequence_parallel
    return _masks("attention_dropout", *(_OF_POSITIONS if cut else ()))(before, after, key)


def _steps(before: RunConfig, after: RunConfig, key: str) -> str:
    """the learning rate decays until the new last step, unless optimizer.decay_steps is set"""
    optimizer = after.optimizer
    stretched = optimizer.decay_steps is None and optimizer.decay.form.has_end
    if not stretched:
        return ""
    return (
        f"the learning rate now decays until step {after.train.steps:,}; optimizer.decay_steps={before.train.steps} "
        "keeps the earlier schedule"
    )


def _decay_steps(before: RunConfig, after: RunConfig, key: str) -> str:
    """the learning rate decays until this step"""
    ends = [one.optimizer.decay_steps or one.train.steps for one in (before, after)]
    has_end = after.optimizer.decay.form.has_end
    return f"the learning rate now decays until step {ends[1]:,}" if has_end and ends[0] != ends[1] else ""


def _schedule(before: RunConfig, after: RunConfig, key: str) -> str:
    """the schedule continues with the new values"""
    is_read = after.optimizer.decay.form.depends_on(key.removeprefix("optimizer."))
    return "the schedule continues with the new values" if is_read else ""


def _precision(before: RunConfig, after: RunConfig, key: str) -> str:
    """fp16's loss scale restarts, or is dropped"""
    if after.train.precision is Precision.fp16:
        return f"fp16's loss scale starts at 2^{after.train.loss_scale.initial_power}"
    return "fp16's loss scale is dropped" if before.train.precision is Precision.fp16 else ""


def _loss_scale(text: str) -> Consequence:
    both = Precision.fp16
    return _described(
        lambda before, after, key: text if before.train.precision is after.train.precision is both else "",
        f"fp16: {text}",
    )


def _of_optimizer(name: OptimizerName, text: str) -> Consequence:
    """For a setting that only one optimizer reads."""
    return _described(lambda before, after, key: text if after.optimizer.name is name else "", f"{name.value}: {text}")


def _validation(before: RunConfig, after: RunConfig, key: str) -> str:
    """validations are over another number of samples"""
    was, now = (one.train.eval_batches * one.train.global_batch_size for one in (before, after))
    return f"validation is over {now:,} samples instead of {was:,}" if was != now else ""


_UPDATES = "updates from here on use the new value"
_BATCH = "steps from here on use batches of the new size; the data continues with the next sample"


def _batch(before: RunConfig, after: RunConfig, key: str) -> str:
    """steps from here on use batches of the new size, and so do validations"""
    return "; ".join(filter(None, (_BATCH, _validation(before, after, key))))


TENSOR_MASKS = Resets(_tensor_size, RunPart.masks)
POSITION_MASKS = Resets(_masks(*_OF_POSITIONS), RunPart.masks)
MASKS = Resets(_masks("attention_dropout", "ffn_dropout", *_OF_POSITIONS), RunPart.masks)
DROPOUT = Resets(_always("this dropout has the new rate from here on"), moves_losses=True)
MOMENTS = Resets(_always("moments start from zero"))
UPDATES = Resets(_always(_UPDATES))
ADAMW_UPDATES = Resets(_of_optimizer(OptimizerName.adamw, _UPDATES))
SGD_UPDATES = Resets(_of_optimizer(OptimizerName.sgd, _UPDATES))
LOSS = Resets(_always(_UPDATES), moves_losses=True)
SCHEDULE = Resets(_schedule, RunPart.schedule)
DECAY_STEPS = Resets(_decay_steps, RunPart.schedule)
LAST_STEP = Resets(_steps, RunPart.schedule)
BATCH = Resets(_batch, RunPart.batches, moves_losses=True)
BATCH_RAMP = Resets(_always(_BATCH), RunPart.batches, moves_losses=True)
VALIDATION = Resets(_validation)
PRECISION = Resets(_precision, moves_losses=True)
LOSS_SCALE = Resets(_loss_scale("the loss scale keeps its value and follows the new rule"))

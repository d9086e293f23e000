"""`model.check_init`: whether the initial weights give the same logits here as in transformers.

Tensors and settings can match in every name and shape and still belong to another model: with a config.json that was
renamed to another family, everything loads but computes something else. Only comparing logits shows it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence

import psutil
import torch.distributed as dist

from megatron_lite.checkpoint.fit import require_fit
from megatron_lite.checkpoint.parity import Parity, compare_start, require_transformers
from megatron_lite.config.derived import has_next_sentence_head, parameter_counts
from megatron_lite.config.hf.families import of_type
from megatron_lite.config.hf.folder import Weights, foreign_tokenizers
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import CheckInit, RunConfig
from megatron_lite.errors import CheckpointError, ConfigError, MegatronLiteError
from megatron_lite.files import size_text
from megatron_lite.parallel.agreement import agreed

MEMORY_SHARE = 0.5
"""Share of the free memory that the fp32 model may take under `auto`: the ranks need memory, too."""
LARGEST_PARAMETERS = 8 * 10**9
"""Limit for `auto`: the other ranks wait meanwhile, and train.timeout_seconds ends a wait that is too long."""
NAMED_ZEROS = 3


def check_start(config: ResolvedConfig, report: Callable[[str], None]) -> None:
    """Reject initial weights that do not fit. Rank 0 checks; an error is raised on all. A collective of all ranks.

    Args:
        report: called with a line about what was compared, or why nothing was.
    Raises:
        ConfigError, CheckpointError: on every rank alike.
    """
    if config.model.init_from is None:
        return
    problem: MegatronLiteError | None = None
    if dist.get_rank() == 0:
        try:
            report(_check(config))
        except MegatronLiteError as error:
            problem = error
    problem = agreed(problem)
    if problem is not None:
        raise problem


def _check(config: ResolvedConfig) -> str:
    """What was found, for the console."""
    weights = require_fit(config)  # the launcher has checked it, but maybe days ago and on another machine
    name, wanted = config.model.init_from, config.model.check_init
    reason = _reason_against(config, weights)
    if wanted is CheckInit.always and weights.has_hf_names:
        require_transformers(f"model.check_init=always compares model.init_from={name} with it", ConfigError)
    elif reason is not None:
        signs = _warnings([*foreign_tokenizers(weights), *_of_activation(weights, config)])
        return f"model.init_from={name}: logits are not compared with those of transformers: {reason}{signs}"
    found = compare_start(weights.folder, config)
    if not found.difference <= found.allowed:  # so that NaN fails as well
        raise CheckpointError(
            f"model.init_from={name} gives other {found.outputs} here than with {found.reader} (largest "
            f"difference {found.difference:.3g}, {found.allowed:.3g} is allowed): its config.json describes another "
            "model than its tensors belong to, or transformers computes it differently; give the folder with the "
            "config.json that was saved with it, or set model.check_init=never to start from these weights anyway"
        )
    unproven = [*_of_logits(found), *foreign_tokenizers(weights)]
    if unproven and wanted is CheckInit.always:
        raise CheckpointError(
            f"model.init_from={name} cannot be checked, as model.check_init=always requires: {'; '.join(unproven)}; "
            "give the folder as it was saved, or set model.check_init=auto to start from these weights anyway"
        )
    notes = _warnings([*unproven, *_of_zeros(found), *_of_activation(weights, config)])
    return (
        f"model.init_from={name}: {found.reader} computes the same {found.outputs} (to {found.difference:.2g}){notes}"
    )


def _warnings(notes: Sequence[str]) -> str:
    return f"; warning: {'; '.join(notes)}" if notes else ""


def _of_logits(found: Parity) -> Iterator[str]:
    if not found.tells_something:
        yield (
            f"its logits hardly depend on the input (they differ by {found.spread:.2g} at most), so equal logits "
            "prove nothing"
        )


def _of_zeros(found: Parity) -> Iterator[str]:
    if found.zeros and found.tells_something:
        more = len(found.zeros) - NAMED_ZEROS
        named = ", ".join(found.zeros[:NAMED_ZEROS]) + (f" and {more} more" if more > 0 else "")
        yield f"all zero, so equal logits prove nothing about these tensors: {named}"


def _of_activation(weights: Weights, config: RunConfig) -> Iterator[str]:
    """An activation that no published model of the family has, unless this project wrote it: ours may have one."""
    for family in of_type(weights.model_type)[:1]:
        doubt = family.doubtful.get(config.model.activation)
        if doubt is not None and not weights.is_own:
            yield (
                f"{doubt}, and computes something else from the same tensors; if config.json was changed to "
                f"model_type={family.model_type}, start from another folder"
            )


def _reason_against(config: ResolvedConfig, weights: Weights) -> str | None:
    """Why `auto` compares nothing, or None."""
    if config.model.check_init is CheckInit.never:
        return "model.check_init=never"
    if not weights.has_hf_names:
        return "it does not have this model"
    if importlib.util.find_spec("transformers") is None:
        return "it is not installed"
    vocab_size = weights.settings["vocab_size"]
    count = parameter_counts(config.model, vocab_size, next_sentence=has_next_sentence_head(config)).total
    if count > LARGEST_PARAMETERS:
        return f"{count:,} parameters take too long; model.check_init=always compares them anyway"
    free = psutil.virtual_memory().available
    if 4 * count > MEMORY_SHARE * free:
        needed = f"it needs {size_text(4 * count)}, more than half of the {size_text(free)} of free memory"
        return f"{needed}; model.check_init=always compares anyway"
    return None

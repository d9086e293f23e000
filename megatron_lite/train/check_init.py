"""`model.check_init`: whether the weights that a run begins with compute here what they compute in transformers.

Tensors and settings can fit each other and still be another model's: a config.json that was renamed to another family
leaves nothing over and computes something else. Only logits tell.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence

import psutil
import torch.distributed as dist

from megatron_lite.checkpoint.fit import require_fit
from megatron_lite.checkpoint.parity import Parity, compare_start, require_transformers
from megatron_lite.config.derived import has_next_sentence_head, parameter_counts
from megatron_lite.config.hf.families import LLAMA
from megatron_lite.config.hf.folder import Weights, foreign_tokenizers
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import Activation, CheckInit, RunConfig
from megatron_lite.errors import CheckpointError, ConfigError, MegatronLiteError
from megatron_lite.files import size_text
from megatron_lite.parallel.agreement import agreed

MEMORY_SHARE = 0.5
"""Of the memory that is free, which a model in fp32 may take for `auto`: the ranks need theirs, too."""
LARGEST_PARAMETERS = 8 * 10**9
"""For `auto`: the other ranks wait, and train.timeout_seconds ends what waits too long."""
NAMED_ZEROS = 3


def check_start(config: ResolvedConfig, report: Callable[[str], None]) -> None:
    """Refuse weights that the run cannot begin with; one rank looks, and all end. A collective of all ranks.

    Args:
        report: is told what was compared, or why nothing was.
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
    weights = require_fit(config)  # again: on the machine that trains, maybe days after the launcher looked
    name, wanted = config.model.init_from, config.model.check_init
    reason = _reason_against(config, weights)
    if wanted is CheckInit.always and weights.has_hf_names:
        require_transformers(f"model.check_init=always compares model.init_from={name} with it", ConfigError)
    elif reason is not None:
        signs = _warnings([*foreign_tokenizers(weights), *_of_gates(weights, config)])
        return f"model.init_from={name}: logits are not compared with those of transformers: {reason}{signs}"
    found = compare_start(weights.folder, config)
    if not found.difference <= found.allowed:  # NaN is no agreement
        raise CheckpointError(
            f"model.init_from={name} computes other {found.outputs} here than {found.reader} reads from it (largest "
            f"difference {found.difference:.3g}, and {found.allowed:.3g} is allowed): its config.json describes "
            "another model than its tensors are of, or transformers computes by other rules; give the folder with the "
            "config.json that was saved with it, or set model.check_init=never to begin with what is computed here"
        )
    unproven = [*_of_logits(found), *foreign_tokenizers(weights)]
    if unproven and wanted is CheckInit.always:
        raise CheckpointError(
            f"model.init_from={name} cannot be checked, as model.check_init=always wants: {'; '.join(unproven)}; give "
            "the folder as it was saved, or set model.check_init=auto to begin with what is computed here"
        )
    notes = _warnings([*unproven, *_of_zeros(found), *_of_gates(weights, config)])
    return (
        f"model.init_from={name}: {found.reader} computes the same {found.outputs} (to {found.difference:.2g}){notes}"
    )


def _warnings(notes: Sequence[str]) -> str:
    return f"; warning: {'; '.join(notes)}" if notes else ""


def _of_logits(found: Parity) -> Iterator[str]:
    if not found.tells_something:
        yield (
            f"its logits hardly depend on what is read (they differ by {found.spread:.2g} at most), so equal ones "
            "prove nothing"
        )


def _of_zeros(found: Parity) -> Iterator[str]:
    if found.zeros and found.tells_something:
        more = len(found.zeros) - NAMED_ZEROS
        named = ", ".join(found.zeros[:NAMED_ZEROS]) + (f" and {more} more" if more > 0 else "")
        yield f"all zero, so that equal logits prove nothing of what they do: {named}"


def _of_gates(weights: Weights, config: RunConfig) -> Iterator[str]:
    """Our own models may have them as well."""
    if weights.kind == LLAMA.architecture and config.model.activation is Activation.geglu and not weights.is_own:
        yield (
            "no LLaMA of transformers has a gate of GELU, as Gemma has, which computes something else from the same "
            "tensors; if config.json was changed to model_type=llama, begin with another folder"
        )


def _reason_against(config: ResolvedConfig, weights: Weights) -> str | None:
    """Why `auto` compares nothing, or None."""
    if config.model.check_init is CheckInit.never:
        return "model.check_init=never"
    if not weights.has_hf_names:
        return "it has no such model"
    if importlib.util.find_spec("transformers") is None:
        return "it is not installed"
    vocab_size = weights.settings["vocab_size"]
    count = parameter_counts(config.model, vocab_size, next_sentence=has_next_sentence_head(config)).total
    if count > LARGEST_PARAMETERS:
        return f"{count:,} parameters take too long; model.check_init=always compares them all the same"
    free = psutil.virtual_memory().available
    if 4 * count > MEMORY_SHARE * free:
        needed = f"{size_text(4 * count)} of {size_text(free)} free memory are more than half of it"
        return f"{needed}; model.check_init=always compares all the same"
    return None

"""Check that the initial weights of a run fit its model: every tensor of the files is used or reported.

The file headers are enough for nearly all checks. Bytes are compared only for tensors that may be stored twice, and for
those that must be zero. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_lite.checkpoint.folder import candidates
from megatron_lite.checkpoint.tensors import difference, is_zero
from megatron_lite.config.derived import has_next_sentence_head
from megatron_lite.config.hf.families import Family, counterpart
from megatron_lite.config.hf.folder import Weights, read_weights
from megatron_lite.config.hf.headers import TensorEntry
from megatron_lite.config.hf.start import contradictions
from megatron_lite.config.resolved import ResolvedConfig, ResolvedModel
from megatron_lite.config.schema import CheckInit
from megatron_lite.errors import ConfigError
from megatron_lite.models.hf import NoCounterpart, stored_form
from megatron_lite.models.hf.extras import flag_of, is_passed_over, twins
from megatron_lite.models.hf.forms import (
    NAMED_FAULTS,
    Fault,
    Located,
    find_name,
    left_over,
    locate,
    require_none,
    search,
)
from megatron_lite.models.shapes import parameter_shapes
from megatron_lite.models.stored import StoredForm, same_names


def require_start(config: ResolvedConfig) -> None:
    """Refuse weights that the run cannot start from, before any process starts.

    A run that resumes from its own checkpoint no longer needs them.

    Args:
        config: resolved.
    Raises:
        ConfigError: the weights are those of another model than the configuration describes.
        CheckpointError: a file is damaged, or tensors do not fit; lists all of them.
    """
    if config.model.init_from is None or candidates(config.run_dir / "checkpoints"):
        return
    require_fit(config)


def require_fit(config: ResolvedConfig) -> Weights:
    """The weights of model.init_from, checked against the model that the configuration describes.

    Raises:
        ConfigError, CheckpointError: as `require_start`.
    """
    name, weights = config.model.init_from, weights_of(config)
    problems = list(contradictions(config.model, weights))
    if problems:
        raise ConfigError(problems)
    vocab_size = weights.settings["vocab_size"]
    shapes = parameter_shapes(config.model, vocab_size, next_sentence=has_next_sentence_head(config))
    try:
        form = stored_form(config.model, shapes) if weights.has_hf_names else same_names(shapes)
    except NoCounterpart as reason:
        raise ConfigError(
            f"model.init_from={name} ({weights.kind}) cannot initialise this run: {reason}; change that setting, or "
            "set model.init_from=null"
        ) from None
    fitting(form, weights.tensors, config.model if weights.has_hf_names else None, f"model.init_from={name}")
    return weights


def weights_of(config: ResolvedConfig) -> Weights:
    """Read the headers and settings of model.init_from."""
    assert config.model.init_from is not None
    return read_weights(config.model.init_from, unknown_keys=config.model.check_init is CheckInit.always)


def fitting(
    form: StoredForm, tensors: Mapping[str, TensorEntry], model: ResolvedModel | None, where: str
) -> Mapping[str, TensorEntry]:
    """The file entry of each stored tensor that the model needs.

    Args:
        tensors: the tensors of the files, by their names there.
        model: the model, if the files have transformers' names; None if they have ours.
        where: what is read, for messages.
    Raises:
        CheckpointError: lists every tensor that is missing, left over, or has another shape, kind or content.
    """
    if model is None:
        return locate(form, tensors, where)
    pairs = any(piece.source == "next_sentence.pooler.weight" for piece in form.pieces)
    family = counterpart(model, next_sentence=pairs)
    located = search(form, tensors)
    faults = [*located.faults, *_of_others(form, located, tensors, family, model)]
    named = [_with_flag(fault, family, model, tensors) for fault in faults[:NAMED_FAULTS]]
    require_none([*named, *faults[NAMED_FAULTS:]], where)
    return located.entries


def _of_others(
    form: StoredForm, located: Located, tensors: Mapping[str, TensorEntry], family: Family, model: ResolvedModel
) -> Iterator[Fault]:
    """Faults of the tensors that none of our parameters uses."""
    left = dict.fromkeys(located.unused)
    second = {there: read for name, read in twins(family, model).items() if (there := find_name(name, left))}
    spare = {there for name in form.shapes if name not in located.entries and (there := find_name(name, left))}
    for name in left:
        read = located.entries.get(second.get(name, ""))
        if is_passed_over(name, family):
            continue
        if name in spare and is_zero(tensors[name]):
            continue
        if read is not None:
            found = difference(read, tensors[name])
            if found is not None:
                yield Fault(name, f"differs from {read.name} ({found}), but the model has one tensor for both")
        elif name in spare:
            yield Fault(name, "is not zero, but our model has no such parameter")
        else:
            yield left_over(name, tensors[name])


def _with_flag(fault: Fault, family: Family, model: ResolvedModel, tensors: Mapping[str, TensorEntry]) -> Fault:
    """Add the related setting of config.json to a fault."""
    flag = flag_of(fault.name, family, model, tensors) if fault.follows_settings else None
    return fault if flag is None else fault._replace(what=f"{fault.what} (config.json: {flag})")

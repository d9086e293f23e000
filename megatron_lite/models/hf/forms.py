"""The stored form of a model: its weights with the names and shapes of transformers."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_lite.config.hf.families import FAMILIES, NoCounterpart, counterpart
from megatron_lite.config.hf.headers import TensorEntry
from megatron_lite.config.resolved import ResolvedModel
from megatron_lite.errors import CheckpointError
from megatron_lite.models.hf.builder import build_form
from megatron_lite.models.stored import Shape, StoredForm

FLOATS = ("F32", "BF16", "F16", "F64")
NAMED_FAULTS = 5  # faults listed in a message
_BODIES = tuple(sorted({family.body for family in FAMILIES} - {""}))  # a model saved without its head lacks them
_OLD_NORMS = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
_COPIES = {
    f"{family.tensors['embedding'].names[0]}.weight": tuple(f"{copy}.weight" for copy in family.copies)
    for family in FAMILIES
    if family.copies
}


def stored_form(model: ResolvedModel, shapes: Mapping[str, Shape]) -> StoredForm:
    """Map every element of our parameters to its one place in transformers' tensors.

    Args:
        shapes: full, unpadded shapes of all our parameters, by global name.
    Raises:
        NoCounterpart: transformers has no model with these settings, or its model has no place for some parameters.
    """
    family = counterpart(model, next_sentence="next_sentence.pooler.weight" in shapes)
    form = build_form(family, model, shapes)
    left = sorted(shapes.keys() - {piece.source for piece in form.pieces})
    if left:
        raise NoCounterpart(f"{family.architecture} of transformers has no place for the parameters {', '.join(left)}")
    return form


class Fault(NamedTuple):
    """What is wrong with a tensor in the files."""

    name: str
    what: str
    follows_settings: bool = True
    """Changing settings may fix it."""

    def __str__(self) -> str:
        return f"{self.name} {self.what}"


@dataclass(frozen=True)
class Located:
    """Where the tensors of a form lie in files."""

    entries: Mapping[str, TensorEntry]
    """By their names in the form."""
    unused: tuple[str, ...]
    """Names of all other tensors in the files."""
    faults: tuple[Fault, ...]
    """Tensors that are missing, or have another shape or dtype than the form needs."""


def search(form: StoredForm, tensors: Mapping[str, TensorEntry]) -> Located:
    """Find the file entry of each tensor of the form that holds some of our elements.

    Args:
        tensors: of the files, as `config.hf.headers.tensors_of` reads them.
    """
    found, faults, taken = {}, [], set()
    for name in dict.fromkeys(piece.target for piece in form.pieces):
        there = find_name(name, tensors)
        if there is None:
            faults.append(Fault(name, f"{list(form.shapes[name])} is missing"))
            continue
        entry = found[name] = tensors[there]
        taken.add(there)
        if entry.shape != form.shapes[name]:
            faults.append(Fault(there, f"is {list(entry.shape)}, and the model's is {list(form.shapes[name])}"))
        elif entry.dtype not in FLOATS:
            what = f"is of type {entry.dtype}, and weights are {', '.join(FLOATS)}"
            faults.append(Fault(there, what, follows_settings=False))
    return Located(found, tuple(name for name in tensors if name not in taken), tuple(faults))


def locate(form: StoredForm, tensors: Mapping[str, TensorEntry], where: str) -> Mapping[str, TensorEntry]:
    """Like `search`, but the files must hold exactly the form and nothing else, as a checkpoint does.

    Args:
        where: what is being read, for messages: `model.init_from=DIR`, or a checkpoint folder.
    Raises:
        CheckpointError: lists every tensor that is missing, unexpected, or has another shape or dtype.
    """
    located = search(form, tensors)
    left = [left_over(name, tensors[name]) for name in located.unused if name not in form.shapes]
    require_none([*located.faults, *left], where)
    return located.entries


def left_over(name: str, entry: TensorEntry) -> Fault:
    return Fault(name, f"{list(entry.shape)} is left over: no part of the model takes it")


def require_none(faults: Sequence[Fault], where: str) -> None:
    """Raise one error that lists the faults, if there are any.

    Raises:
        CheckpointError: there are faults.
    """
    if not faults:
        return
    named = "; ".join(map(str, faults[:NAMED_FAULTS]))
    more = f"; and {len(faults) - NAMED_FAULTS} more" if len(faults) > NAMED_FAULTS else ""
    raise CheckpointError(
        f"{where} does not hold the weights of this model: {named}{more}; give the folder of such a model, with the "
        "config.json that was saved with it"
    )


def find_name(name: str, available: Container[str]) -> str | None:
    """The name of a stored form's tensor in files that another version or class of transformers wrote.

    Files of a model without its head lack the body's prefix (GPT-2's do); old BERT files call a norm's weights gamma
    and beta; the shared word table of T5 and BART may be stored as the table of one stack.
    """
    return next((candidate for candidate in spellings(name) if candidate in available), None)


def spellings(name: str) -> Iterator[str]:
    for whole in (name, *(name.removeprefix(body) for body in _BODIES if name.startswith(body))):
        yield whole
        for ours, old in _OLD_NORMS.items():
            if whole.endswith(ours):
                yield whole.removesuffix(ours) + old
        for table, copies in _COPIES.items():
            if whole.endswith(table):
                yield from (whole.removesuffix(table) + copy for copy in copies)

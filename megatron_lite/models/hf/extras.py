"""Extra tensors in files of transformers, and which of them may be ignored.

Any other tensor must be one of our weights: an unused tensor means that the files hold another model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from megatron_lite.config.hf.family import Family
from megatron_lite.config.keys import as_word
from megatron_lite.config.resolved import ResolvedModel
from megatron_lite.models.hf.forms import spellings

_FIELDS = {
    "head.weight": "tie_embeddings",
    "embedding.weight": "vocab_size",
    "position_embedding.weight": "max_position_embeddings",
    "segment_embedding.weight": "num_segments",
}
"""Our parameter -> the field that decides whether it exists, or how long it is."""


def is_passed_over(name: str, family: Family) -> bool:
    return re.fullmatch(family.ignored, name) is not None


def twins(family: Family, model: ResolvedModel) -> dict[str, str]:
    """Tensors that may be stored twice -> the one that we read: both must be equal."""
    table, head = (f"{family.tensors[name].names[0]}.weight" for name in ("embedding", "head"))
    found = {head: table} if model.tie_embeddings else {}
    found |= {f"{copy}.weight": table for copy in family.copies}
    if (bias := family.tensors.get("head_bias")) is not None:
        tied, untied = (f"{name}.bias" for name in bias.names)
        found |= {untied: tied} if model.tie_embeddings else {tied: untied}
    return found


def flag_of(name: str, family: Family, model: ResolvedModel, names: Iterable[str]) -> str | None:
    """The config.json key, with its value, that decides whether this tensor exists: `num_hidden_layers=2`.

    Args:
        names: of all tensors in the files.
    """
    field = _field_of(name, family, model, names)
    keys = {field: key for key, entry in family.keys.items() for field in entry.fields}
    key = {"vocab_size": "vocab_size", "tie_embeddings": "tie_word_embeddings"}.get(field, keys.get(field))
    return None if key is None else f"{key}={as_word(getattr(model, field))}"


def _field_of(name: str, family: Family, model: ResolvedModel, names: Iterable[str]) -> str:
    """The field of the model that decides it; empty if no single field does."""
    stack, index = _layer_of(name, family)
    if index is not None:
        decoder = stack == "decoder."
        said = model.decoder_layers if decoder else model.num_layers
        layers = (_layer_of(other, family) for other in names)
        there = [number for other, number in layers if other == stack and number is not None]
        if index >= min(said, max(there, default=-1) + 1):
            return "num_decoder_layers" if decoder else "num_layers"
    source = _source_of(name, family)
    if index is not None and source.endswith(".bias"):
        return "mlp_bias" if ".mlp." in source else "attention_bias"
    return _FIELDS.get(re.sub(r"^(encoder|decoder)\.", "", source), "")


def _layer_of(name: str, family: Family) -> tuple[str, int | None]:
    """(prefix of our stack, index of the layer in it): ("decoder.", 2); None = not in a layer."""
    for source, place in family.tensors.items():
        if "*" not in source:
            continue
        for start in _beginnings(place.names[0].partition("*")[0], family):
            if found := re.match(re.escape(start) + r"(\d+)\.", name):
                return source.partition("layers.*")[0], int(found[1])
    return "", None


def _beginnings(start: str, family: Family) -> Iterator[str]:
    yield start
    if family.body:
        yield start.removeprefix(family.body)


def _source_of(name: str, family: Family) -> str:
    """Our name of a tensor, with `*` for the index of its layer; empty if we have no such parameter."""
    for source, place in family.tensors.items():
        for target in place.names:
            for kind in (".weight", ".bias"):
                patterns = (re.escape(one).replace(r"\*", r"\d+") for one in spellings(target + kind))
                if any(re.fullmatch(pattern, name) for pattern in patterns):
                    return source + kind
    return ""

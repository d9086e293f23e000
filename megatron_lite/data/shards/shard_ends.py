"""Detect what documents of existing shards begin and end with: a saved model's tokenizer has to do the same."""

from __future__ import annotations

from dataclasses import replace

from megatron_lite.config.schema import DataConfig
from megatron_lite.data.corpus.sources import Source
from megatron_lite.data.shards.indexed import IndexedReader
from megatron_lite.data.tokenizer.tokenizer import Tokenizer
from megatron_lite.errors import DataError

LOOKED_AT = 100  # documents of each pair that are examined


def as_in_shards(data: DataConfig, sources: list[Source], tokenizer: Tokenizer, *, is_decoder: bool) -> DataConfig:
    """Replace data.add_bos and data.eod_token, if they are null, by what existing shards use.

    Args:
        tokenizer: opened with these settings.
    Raises:
        DataError: documents of different sources begin differently, or contradict data.add_bos.
    """
    readers = {str(source): IndexedReader(source.paths[0].resolve()) for source in sources if not source.is_text}
    special = tokenizer.special
    begin = special.begin or (() if special.bos in (None, special.eod) else (special.bos,))
    if is_decoder and begin and readers:
        data = replace(data, add_bos=_adds_bos(data, readers, [token for token in begin if token is not None]))
    ends = {_last_token(reader) for reader in readers.values()}
    if data.eod_token is None and special.eos is not None and ends == {special.eos}:
        data = replace(data, eod_token=tokenizer.decode([special.eos]))
    return data


def _adds_bos(data: DataConfig, readers: dict[str, IndexedReader], begin: list[int]) -> bool:
    found = {source: _all_begin_with(reader, begin) for source, reader in readers.items()}
    wanted = next(iter(found.values())) if data.add_bos is None else data.add_bos
    other = next((source for source, has_it in found.items() if has_it is not wanted), None)
    if other is None:
        return wanted
    does, others = ("with", "without") if found[other] else ("without", "with")
    raise DataError(
        f"{other}: its documents begin {does} a beginning-of-text token, but those of others {others} it "
        f"(data.add_bos={data.add_bos}); set data.add_bos={str(found[other]).lower()}, and name only sources that agree"
    )


def _all_begin_with(reader: IndexedReader, begin: list[int]) -> bool:
    numbers = range(min(reader.num_documents, LOOKED_AT))
    return all(reader.document(i)[: len(begin)].tolist() == begin for i in numbers if len(reader.document(i)))


def _last_token(reader: IndexedReader) -> int | None:
    """The token that all examined documents end with; None if they differ."""
    documents = (reader.document(i) for i in range(min(reader.num_documents, LOOKED_AT)))
    ends = {int(document[-1]) for document in documents if len(document)}
    return ends.pop() if len(ends) == 1 else None

"""Pairs of sentences for next-sentence prediction (BERT, arXiv 1810.04805), with random access by number.

The documents are cut into chunks: two or more whole sentences that reach the target length (the last chunk of a
document may be shorter). Each epoch is a permutation of all chunks by (seed, epoch). A sample cuts its chunk in two at
a random sentence; with probability 1 - next_fraction, sentences of another document replace the second part.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megatron_lite.data.sampler import Permutation, raw_bits, stream_key
from megatron_lite.data.samples.dataset import EPOCHS_IN_MEMORY, Stretch, checked_ids, damaged_sentences
from megatron_lite.data.samples.sample_types import Ids, PairShape, SentencePair
from megatron_lite.data.shards.indexed import IndexedReader
from megatron_lite.data.shards.prepared import Shard, documents_of_part
from megatron_lite.data.shards.sentences import read_sentences

BLOCK_SENTENCES = 2**21  # sentences indexed at a time: about 100 bytes of memory per sentence
FEW_DOCUMENTS = 64
SHORT, SHORT_LENGTH, SPLIT, IS_NEXT, OTHER_DOCUMENT, OTHER_SENTENCE, CUT = range(
    7
)  # streams: what a random number decides

Range = tuple[int, int]
Places = npt.NDArray[np.int64]


class PairDataset:
    """Pairs of one shard.

    Args:
        seed: decides the order and the pairs, together with the source's number, so that sources differ.
        eod_id: the end-of-document token; left out of pairs, because it would reveal where a document ends.
    Raises:
        DataError: the files are damaged.
    Attributes:
        samples_per_epoch: number of chunks; 0 if no document has two sentences, or if pairs of different documents are
            needed and only one document has.
        skipped_documents: number of documents with fewer than two sentences. They are in no pair: they could only be
            second parts, and so reveal that the second part does not follow the first.
    """

    def __init__(self, shard: Shard, shape: PairShape, seed: int, eod_id: int | None = None) -> None:
        assert shard.sentences is not None
        assert shape.tokens >= 2
        self.shard = shard
        self._shape = shape
        self._eod_id = eod_id
        self._key = stream_key(seed, shard.source_index)
        self._reader = IndexedReader(shard.prefix)
        self._sentences = read_sentences(shard.sentences, shard.sentences_bytes)
        _check_sentences(self._sentences, self._reader.num_tokens, shard)
        documents = documents_of_part(self._reader, shard.part, shard.validation_fraction)
        starts = self._reader.document_starts[documents]
        first = np.searchsorted(self._sentences, starts)
        last = np.searchsorted(self._sentences, starts + self._reader.document_lengths[documents])
        usable = last - first >= 2
        self.skipped_documents = int((~usable).sum())
        self._first, self._last = first[usable], last[usable]  # sentences of each document [documents]
        self._chunk_first, self._chunk_last = chunks_of(self._sentences, self._first, self._last, shape.tokens)
        needed = 1 if shape.next_fraction >= 1 else 2
        self.samples_per_epoch = len(self._chunk_first) if len(self._first) >= needed else 0
        self._order = lru_cache(maxsize=EPOCHS_IN_MEMORY)(self._build_order)

    def sample(self, index: int) -> SentencePair:
        """A pair with at most shape.tokens tokens in total; neither part is empty."""
        first, second, is_next = self._parts(index)
        return SentencePair(self._read(first), self._read(second), is_next)

    def stretches(self, index: int) -> list[Stretch]:
        """Two stretches: the first and the second part."""
        first, second, _ = self._parts(index)
        return [self._stretch(first, 0), self._stretch(second, first[1] - first[0])]

    def _parts(self, index: int) -> tuple[Range, Range, bool]:
        """The token ranges of both parts, and whether the second follows the first."""
        epoch, place = divmod(index, self.samples_per_epoch)
        chunk = self._order(epoch)(place)
        key = stream_key(self._key, index)
        begin, end = int(self._chunk_first[chunk]), int(self._chunk_last[chunk])
        target = self._shape.tokens
        if _uniform(key, SHORT) < self._shape.short_fraction:
            target = 2 + _below(target - 2, key, SHORT_LENGTH) if target > 2 else 2
            end = max(begin + 2, self._run(begin, end, target))
        split = begin + 1 + _below(end - begin - 1, key, SPLIT)
        first = self._tokens_of(begin, split)
        is_next = _uniform(key, IS_NEXT) < self._shape.next_fraction
        second = self._tokens_of(split, end) if is_next else self._of_another(begin, target - first[1] + first[0], key)
        return *truncated(first, second, target, key), is_next

    def samples_in(self, epochs: int) -> int:
        return epochs * self.samples_per_epoch

    def _of_another(self, sentence: int, wanted: int, key: int) -> Range:
        """Sentences of a random document other than that of `sentence`: about `wanted` tokens, at least a sentence."""
        own = int(self._first.searchsorted(sentence, side="right")) - 1
        document = _below(len(self._first) - 1, key, OTHER_DOCUMENT)
        document += document >= own
        first, last = int(self._first[document]), int(self._last[document])
        begin = first + _below(last - first, key, OTHER_SENTENCE)
        return self._tokens_of(begin, self._run(begin, last, max(wanted, 1)))

    def _run(self, begin: int, end: int, tokens: int) -> int:
        """The first sentence after `tokens` tokens from sentence `begin` on; `end` if there are fewer."""
        return begin + int(self._sentences[begin:end].searchsorted(self._sentences[begin] + tokens))

    def _tokens_of(self, begin: int, end: int) -> Range:
        """The token range of the sentences [begin, end), without the end-of-document token."""
        stop = int(self._sentences[end]) if end < len(self._sentences) else self._reader.num_tokens
        start = int(self._sentences[begin])
        if stop - start > 1 and self._reader.tokens[stop - 1] == self._eod_id:
            stop -= 1
        return start, stop

    def _stretch(self, tokens: Range, place: int) -> Stretch:
        starts = self._reader.document_starts
        document = int(starts.searchsorted(tokens[0], side="right")) - 1
        return Stretch(self.shard, document, tokens[0] - int(starts[document]), tokens[1] - tokens[0], place)

    def _read(self, tokens: Range) -> Ids:
        return checked_ids(self._reader.tokens[tokens[0] : tokens[1]].astype(np.int64), self.shard)

    def _build_order(self, epoch: int) -> Permutation:
        return Permutation(self.samples_per_epoch, self._key, epoch, 2)


def _check_sentences(sentences: Places, num_tokens: int, shard: Shard) -> None:
    """Check that sentence positions ascend. They are all read for the chunks anyway, so this costs little."""
    places = range(0, len(sentences), BLOCK_SENTENCES)
    ascend = all(np.all(np.diff(sentences[place : place + BLOCK_SENTENCES + 1]) > 0) for place in places)
    if len(sentences) and not (ascend and sentences[0] >= 0 and sentences[-1] < num_tokens):
        raise damaged_sentences(shard)


def chunks_of(sentences: Places, first: Places, last: Places, tokens: int) -> tuple[Places, Places]:
    """Cut documents into chunks: each the shortest run of two or more sentences that has `tokens` tokens.

    The rest at the end of a document is a chunk, too; a single remaining sentence joins the chunk before it.

    Args:
        sentences: position of the first token of each sentence of the file.
        first, last: each document has the sentences [first, last) [documents]; at least two.
    Returns:
        first, last: each chunk has the sentences [first, last) [chunks]
    """
    bounds = np.searchsorted(np.cumsum(last - first), np.arange(0, int((last - first).sum()), BLOCK_SENTENCES))
    blocks = np.unique([*bounds.tolist(), len(first)]).tolist()
    found = [_chunks_of_block(sentences, first[a:b], last[a:b], tokens) for a, b in pairwise(blocks)]
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return np.concatenate([a for a, _ in found]), np.concatenate([b for _, b in found])


def _chunks_of_block(sentences: Places, first: Places, last: Places, tokens: int) -> tuple[Places, Places]:
    """`chunks_of` for a few documents: compute the chunk length from every sentence, then walk all documents at once.

    The few documents that still remain after many steps are walked one by one.
    """
    sizes = last - first
    ends = np.cumsum(sizes)  # of documents, among the sentences of this block
    numbers = np.arange(ends[-1])
    left = np.repeat(ends, sizes) - numbers  # sentences from here to the end of the document
    ids = np.repeat(last, sizes) - left  # in the file
    base = int(first[0])
    starts = sentences[base : int(last[-1])]
    steps = base + starts.searchsorted(starts[ids - base] + tokens) - ids
    steps = np.minimum(np.maximum(steps, 2), left)
    steps[left - steps == 1] += 1
    found, here = [], ends - sizes
    while len(here) > FEW_DOCUMENTS:
        found.append(here)
        here = (here + steps[here])[steps[here] < left[here]]
    alone = [place for start in here.tolist() for place in _walk(start, int(start + left[start]), steps)]
    chosen = np.sort(np.concatenate([*found, np.array(alone, np.int64)]))
    return ids[chosen], ids[chosen] + steps[chosen]


def _walk(place: int, end: int, steps: Places) -> Iterator[int]:
    while place < end:
        yield place
        place += steps.item(place)


def truncated(first: Range, second: Range, most: int, key: int) -> tuple[Range, Range]:
    """Shorten both ranges to at most `most` tokens in total.

    As in BERT: remove one token at a time from the longer range (from the second if they are equal), at random from
    its front or its back. This computes the result of all removals at once.
    """
    lengths = first[1] - first[0], second[1] - second[0]
    excess = sum(lengths) - most
    if excess <= 0:
        return first, second
    apart = min(abs(lengths[0] - lengths[1]), excess)
    longer = [apart, 0] if lengths[0] > lengths[1] else [0, apart]
    drops = longer[0] + (excess - apart) // 2, longer[1] + (excess - apart + 1) // 2
    bits = int.from_bytes(raw_bits(excess // 64 + 1, key, CUT).tobytes(), "little")
    fronts = (bits & ((1 << drops[0]) - 1)).bit_count(), ((bits >> drops[0]) & ((1 << drops[1]) - 1)).bit_count()
    return (
        (first[0] + fronts[0], first[1] - drops[0] + fronts[0]),
        (second[0] + fronts[1], second[1] - drops[1] + fronts[1]),
    )


def _uniform(key: int, decision: int) -> float:
    """A uniform number in [0, 1), determined by (key, decision)."""
    return (stream_key(key, decision) >> 11) * 2.0**-53


def _below(count: int, key: int, decision: int) -> int:
    """A uniform integer in range(count), determined by (key, decision)."""
    return (stream_key(key, decision) * count) >> 64

"""Train a byte-level BPE, in time linear in the size of any text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.config.schema import DataConfig
from megatron_lite.data.progress_lines import ProgressLines
from megatron_lite.data.tokenizer.framing import END_OF_DOCUMENT_KEY
from megatron_lite.data.tokenizer.roles import END_OF_TEXT, STANDARD_NAMES, trained_names
from megatron_lite.data.tokenizer.tokenizer import Tokenizer, open_tokenizer
from megatron_lite.data.tokenizer.tokenizer_files import NAMING_KEYS, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, encoded
from megatron_lite.errors import DataError, library_edge

LONGEST_WORD = 1024  # characters: each merge costs the trainer time proportional to the length of its word
_LONG_RUN = re.compile(rf"\S{{{LONGEST_WORD + 1},}}|\s{{{LONGEST_WORD + 1},}}")


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    folder: Path,
    data: DataConfig | None = None,
    *,
    report: Callable[[str], None] = lambda line: None,
) -> Tokenizer:
    """Train a byte-level BPE (Radford et al. 2019, GPT-2) and save it as a Hugging Face tokenizer folder.

    It has the special tokens of every objective, so that one set of shards serves all of them. A small text may not
    have enough words for `vocab_size` tokens; the vocabulary is then smaller.

    Args:
        data: decides what documents begin and end with, see `open_tokenizer`.
        report: receives progress lines.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=trained_names(),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    amount = _Amount()
    with (
        ProgressLines(report, amount.line),
        library_edge(
            DataError, "a tokenizer cannot be trained on data.source", "name an existing tokenizer in data.tokenizer"
        ),
    ):
        backend.train_from_iterator(in_short_words(amount.counted(texts)), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / TOKENIZER_FILE))
    named = {f"{role}_token": name for role, name in STANDARD_NAMES.items() if f"{role}_token" in NAMING_KEYS}
    ends: dict[str, str | None] = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if data is not None and data.eod_token not in (None, END_OF_TEXT):
        ends[END_OF_DOCUMENT_KEY] = data.eod_token
    (folder / TOKENIZER_CONFIG_FILE).write_bytes(encoded(kind | ends | named))
    return open_tokenizer(str(folder), data)


@dataclass
class _Amount:
    """Progress of the training: the library reads all texts, and then merges pairs without any report."""

    characters: int = 0
    is_read: bool = False

    def counted(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            self.characters += len(text)
            yield text
        self.is_read = True

    def line(self, seconds: float, is_done: bool) -> str:
        doing = "trained" if is_done else "merging pairs" if self.is_read else "reading"
        return f"tokenizer: {doing}, {self.characters / 1e6:.1f} M characters, {seconds:.1f} s"


def in_short_words(texts: Iterable[str]) -> Iterator[str]:
    """The same texts, cut so that no word is longer than LONGEST_WORD characters.

    The trainer takes time proportional to the square of the length of a word, so one long line of a single letter
    would take days. No token is that long, so only the pairs at the cuts are lost for training.
    """
    for text in texts:
        begin = 0
        for run in _LONG_RUN.finditer(text):
            for cut in range(run.start() + LONGEST_WORD, run.end(), LONGEST_WORD):
                yield text[begin:cut]
                begin = cut
        yield text[begin:]

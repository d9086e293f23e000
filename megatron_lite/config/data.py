"""Settings of the data and of what the model is trained to predict. Parts of `schema.RunConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_lite.config import ranges, texts
from megatron_lite.config import resume_effects as effects
from megatron_lite.config.choices import ObjectiveName
from megatron_lite.config.setting import SAFE, setting


@dataclass
class DataConfig:
    """Where the text comes from and how it becomes samples."""

    source: Any = setting("embedded", text=texts.path, resume=effects.SOURCES)
    """`embedded`, one path or dataset name or a list: .txt, .jsonl (also .gz, .bz2, .xz, .zst), .parquet (`*` joins
    files into one source), a Megatron .bin/.idx prefix, or a Hugging Face dataset name/path. See docs/data.md."""
    weights: list[float] | None = setting(None, range=ranges.ANY_NUMBER, resume=effects.SOURCES)
    """Share of samples drawn from each source; None = proportional to its tokens."""
    text_key: str = setting("text", text=texts.filled, resume=effects.SOURCES)
    """Field or column that holds the text in .jsonl, .parquet and Hugging Face datasets."""
    document_separator: str | None = setting("\n\n", text=texts.filled, resume=effects.SOURCES)
    """What separates documents in a .txt file; None = one document per file. `\\n`, `\\t`, `\\uXXXX` and `\\\\`
    are escapes on the command line."""
    dataset_split: str = setting("train", text=texts.line, resume=effects.SOURCES)
    """Split of a Hugging Face dataset."""
    dataset_config: str | None = setting(None, text=texts.line, resume=effects.SOURCES)
    """Configuration name of a Hugging Face dataset."""
    max_bad_fraction: float = setting(
        0.01, range=ranges.SHARE, resume=SAFE
    )  # it may stop a preparation, but does not change the documents
    """Largest share of bad rows among a source's non-empty rows: they are counted, shown and left out. If there are
    more, the preparation fails. Null and empty rows are counted and shown too, but never too many."""
    max_document_bytes: int = setting(16 * 2**20, range=ranges.DOCUMENT_BYTES, resume=effects.SAMPLES)
    """Longest row, in bytes of the unpacked file: a line of .jsonl with all its fields, a document of .txt, a cell of
    a column. Longer ones are left out as bad rows and never held in memory."""
    tokenizer: str = setting("train", text=texts.path, resume=effects.TOKENIZER)
    """`train` a byte-level BPE on the sources, or the folder (or hub name) of a Hugging Face tokenizer."""
    tokenizer_vocab_size: int = setting(8192, range=ranges.VOCABULARY, resume=effects.TOKENIZER)
    """Size of a trained tokenizer, special tokens included."""
    add_bos: bool | None = setting(None, resume=effects.TOKENS)
    """Begin every document with the tokenizer's beginning-of-text token (decoders only); None = if the tokenizer does
    so for a text. The tokenizer of a checkpoint then does the same."""
    eod_token: str | None = setting(None, text=texts.line, resume=effects.TOKENS)
    """The token that every document ends with; None = the tokenizer's eos_token, or where that ends a turn of a chat,
    such as <|im_end|> or <|eot_id|>, its <|endoftext|> or <|end_of_text|>."""
    seq_length: int = setting(128, range=ranges.LENGTH, resume=effects.SAMPLES)
    """Tokens of one sample."""
    validation_fraction: float = setting(0.02, range=ranges.FRACTION, resume=effects.SOURCES)
    """Share of documents held out."""
    validation_source: Any = setting(None, text=texts.path, resume=effects.SOURCES)
    """A separate source (same forms) to validate on; None = hold out validation_fraction of the documents."""
    max_epochs: int | None = setting(None, range=ranges.EPOCHS, resume=SAFE)
    """Passes over any source, after which the run ends as out of data; None = as many as train.steps needs."""
    mask_loss_after_eod: bool = setting(False, resume=effects.TARGETS)
    """Exclude from the loss the token after an end-of-document token (the first one of another document)."""
    cache_dir: str = setting("data", text=texts.path, resume=SAFE)
    """Folder of prepared shards; each data set is in a subfolder named by the hash of what it was made from."""
    num_workers: int | None = setting(None, range=ranges.THREADS, resume=SAFE)
    """Threads that tokenise; None = the number of cores of this machine."""


@dataclass
class ObjectiveConfig:
    """What the model is trained to predict. Defaults are those of the papers; each objective reads its own fields."""

    name: ObjectiveName = setting(ObjectiveName.causal_lm, resume=effects.TARGETS)
    """Which objective; each script trains those of its architecture."""
    masked_fraction: float = setting(0.15, range=ranges.PART, resume=effects.TARGETS)
    """masked_lm, masked_lm_nsp (BERT, arXiv 1810.04805): share of positions that are predicted."""
    mask_token_fraction: float = setting(0.8, range=ranges.SHARE, resume=effects.TARGETS)
    """Of these, the share that becomes the mask token ..."""
    random_token_fraction: float = setting(0.1, range=ranges.SHARE, resume=effects.TARGETS)
    """... and the share that becomes a random token; the rest stays."""
    whole_word: bool = setting(False, resume=effects.TARGETS)
    """Mask all tokens of a word together."""
    next_fraction: float = setting(0.5, range=ranges.SHARE, resume=effects.TARGETS)
    """masked_lm_nsp: share of pairs whose second part really follows the first."""
    short_fraction: float = setting(0.1, range=ranges.SHARE, resume=effects.TARGETS)
    """masked_lm_nsp: share of pairs that are cut to a random shorter length."""
    fim_fraction: float = setting(0.5, range=ranges.SHARE, resume=effects.TARGETS)
    """fill_in_the_middle (arXiv 2207.14255): share of documents that are rearranged."""
    fim_spm_fraction: float = setting(0.5, range=ranges.SHARE, resume=effects.TARGETS)
    """Of these, the share in the order suffix, prefix, middle instead of prefix, suffix, middle."""
    noise_density: float = setting(0.15, range=ranges.PART, resume=effects.TARGETS)
    """span_corruption (T5, arXiv 1910.10683): share of tokens that are replaced by sentinels."""
    mean_span_length: float = setting(3.0, range=ranges.SPAN, resume=effects.TARGETS)
    """span_corruption: tokens of a replaced span, on average."""
    infill_fraction: float = setting(0.3, range=ranges.PART, resume=effects.TARGETS)
    """bart_denoising (arXiv 1910.13461): share of tokens that lie in masked spans."""
    infill_span_length: float = setting(3.0, range=ranges.POISSON_MEAN, resume=effects.TARGETS)
    """bart_denoising: lambda of the Poisson distribution of span lengths."""
    permute_sentences: bool = setting(True, resume=effects.TARGETS)
    """bart_denoising: shuffle the sentences of the input."""
    ul2_mode_tokens: bool = setting(True, resume=effects.TARGETS)
    """ul2 (arXiv 2205.05131): begin the input with the token of its denoiser, [NLU], [S2S] or [NLG]."""
    ul2_weights: list[float] = setting(
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], range=ranges.ANY_NUMBER, resume=effects.TARGETS
    )
    """ul2 (arXiv 2205.05131, table 1): weights of its seven denoisers: two R, one S, four X."""
    ul2_span_lengths: list[float] = setting(
        [3.0, 8.0, 3.0, 8.0, 64.0, 64.0], range=ranges.ANY_NUMBER, resume=effects.TARGETS
    )
    """ul2: tokens of a span on average, of its two R- and four X-denoisers."""
    ul2_noise_densities: list[float] = setting(
        [0.15, 0.15, 0.5, 0.5, 0.15, 0.5], range=ranges.ANY_NUMBER, resume=effects.TARGETS
    )
    """ul2: share of tokens that these six take out."""
    ul2_s_density: float = setting(0.25, range=ranges.PART, resume=effects.TARGETS)
    """ul2: share of tokens that the S-denoiser predicts, on average: the suffix begins at a random position."""
    decoder_seq_length: int | None = setting(None, range=ranges.LENGTH, resume=effects.SAMPLES)
    """ul2 only: positions of the decoder; None = half of data.seq_length. The other objectives compute them."""

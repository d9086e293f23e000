"""Tokenizer folders of every family, as `save_pretrained` or the hub has them, in miniature."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

PROSE = "the quick brown fox jumps over a lazy dog while alpha beta gamma delta run and it's 12 or 345 größe 漢字"
WORDS = PROSE.split(" ")
TEXTS = [" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(30)) for i in range(40)]
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def gpt2(folder: Path) -> Path:
    backend = _byte_level(["<|endoftext|>"])
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return _saved(
        folder, backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>", tokenizer_class="GPT2Tokenizer"
    )


def llama3(folder: Path) -> Path:
    backend = _byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], LLAMA3_PATTERN)
    bos = "<|begin_of_text|>"
    template = _template(backend, f"{bos} $A", f"{bos} $A {bos}:1 $B:1", bos)
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return _saved(folder, backend, bos_token=bos, eos_token="<|end_of_text|>")


def llama3_chat(folder: Path) -> Path:
    llama3(folder)
    return changed(folder, eos_token="<|eot_id|>", chat_template=CHAT_TEMPLATE)


def qwen_chat(folder: Path) -> Path:
    backend = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], LLAMA3_PATTERN)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    _saved(folder, backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None, add_bos_token=False)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def smollm_chat(folder: Path) -> Path:
    """SmolLM2-Instruct: bos 1, eos 2, and a pad that is the eos."""
    backend = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    _saved(
        folder, backend, **names, unk_token="<|endoftext|>", additional_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "special_tokens_map.json").write_text(json.dumps({**names, "mask_token": "<absent>"}))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "LICENSE").write_text("Apache-2.0")
    sampling = {"temperature": 0.2, "top_p": 0.9, "do_sample": True}
    ids = {"bos_token_id": 5, "eos_token_id": 6, "_from_model_config": True}  # of another vocabulary
    (folder / "generation_config.json").write_text(json.dumps({**sampling, **ids}))
    return folder


def llama2(folder: Path) -> Path:
    """SentencePiece's BPE: a normalizer puts ▁ ahead of every text, which is one word."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    backend.train_from_iterator([word for text in TEXTS for word in text.split()], trainer)
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [entry for entry in spec["added_tokens"] if entry["id"] < 3]
    backend = Backend.from_str(json.dumps(spec))
    strips = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(strips)
    backend.post_processor = _template(backend, "<s> $A", "<s> $A <s>:1 $B:1", "<s>")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _saved(folder, backend, **names, add_bos_token=True, add_eos_token=False, tokenizer_class="LlamaTokenizer")


def bert(folder: Path) -> Path:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=_ids(backend, "[CLS]", "[SEP]")
    )
    names = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    return _saved(folder, backend, **names, do_lower_case=True, tokenizer_class="BertTokenizer")


def roberta(folder: Path) -> Path:
    backend = _byte_level(["<s>", "<pad>", "</s>", "<unk>"])
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True, normalized=False)])
    ids = dict(_ids(backend, "<s>", "</s>"))
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), add_prefix_space=False
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>", "pad_token": "<pad>"}
    return _saved(folder, backend, **names, mask_token="<mask>", unk_token="<unk>", tokenizer_class="RobertaTokenizer")


def t5(folder: Path) -> Path:
    letters = sorted({letter for text in TEXTS for letter in text} - {" "})
    pieces = [(f"▁{word}", -2.0 - i / 10) for i, word in enumerate(WORDS)]
    vocab = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -3.0),
        *pieces,
        *((letter, -9.0) for letter in letters),
    ]
    backend = Backend(models.Unigram(list(dict(vocab).items()), unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens(["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(100))])
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=_ids(backend, "</s>")
    )
    return _saved(
        folder, backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", tokenizer_class="T5Tokenizer"
    )


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "gpt2": gpt2,
    "llama2": llama2,
    "llama3": llama3,
    "llama3_chat": llama3_chat,
    "qwen_chat": qwen_chat,
    "smollm_chat": smollm_chat,
    "bert": bert,
    "roberta": roberta,
    "bart": roberta,
    "t5": t5,
}


def changed(folder: Path, **settings: Any) -> Path:
    """With other settings in its tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def _byte_level(special: list[str], pattern: str | None = None) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def _template(backend: Backend, single: str, pair: str, *names: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=_ids(backend, *names))


def _ids(backend: Backend, *names: str) -> list[tuple[str, int]]:
    return [(name, backend.token_to_id(name)) for name in names]


def _saved(folder: Path, backend: Backend, **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings})
    )
    return folder

"""Names of special tokens: those of a tokenizer that is trained here, and those that other tokenizers use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count, takewhile
from typing import Any

from megatron_lite.config.lengths import TRAINED_SENTINELS

END_OF_TEXT = "<|endoftext|>"
EOD_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")  # tried if the folder names no eos_token
CHAT_ENDS = (  # end a chat turn: the eos_token of chat models, but not the end-of-document token of their pretraining
    "<|im_end|>",
    "<|eot_id|>",
    "<|eot|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<|endofturn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|return|>",
)
DOCUMENT_ENDS = (END_OF_TEXT, "<|end_of_text|>", "<eos>", "<|eos|>", "<EOS_TOKEN>", "</s>")
"""End documents if the eos_token is one of CHAT_ENDS: in Qwen and Phi, Llama 3, Gemma, Cohere, Mistral."""

STANDARD_NAMES = {
    "cls": "[CLS]",
    "sep": "[SEP]",
    "mask": "[MASK]",
    "pad": "[PAD]",
    "mode_r": "[NLU]",
    "mode_s": "[S2S]",
    "mode_x": "[NLG]",
    "fim_prefix": "<fim_prefix>",
    "fim_suffix": "<fim_suffix>",
    "fim_middle": "<fim_middle>",
}
"""Role -> name of a token that we add."""

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "cls": ("<cls>", "<s>"),
    "sep": ("<sep>", "</s>"),
    "mask": ("<mask>", "<|mask|>"),
    "pad": ("<pad>", "<|pad|>", "<|padding|>"),
    "fim_prefix": ("<fim-prefix>", "<|fim_prefix|>", "▁<PRE>", "<\uff5cfim▁begin\uff5c>"),
    "fim_suffix": ("<fim-suffix>", "<|fim_suffix|>", "▁<SUF>", "<\uff5cfim▁hole\uff5c>"),
    "fim_middle": ("<fim-middle>", "<|fim_middle|>", "▁<MID>", "<\uff5cfim▁end\uff5c>"),
}
"""Role -> names in RoBERTa, BART and T5, and in SantaCoder, Qwen, CodeLlama and DeepSeek."""
SETTING_OF_ROLE = {role: f"{role}_token" for role in ("cls", "sep", "mask", "pad")}
"""Role -> key of a tokenizer_config.json that names its token."""


def sentinel_name(number: int) -> str:
    return f"<extra_id_{number}>"


def trained_names() -> list[str]:
    """Special tokens of a tokenizer that is trained here, in the order of their ids."""
    return [END_OF_TEXT, *STANDARD_NAMES.values(), *map(sentinel_name, range(TRAINED_SENTINELS))]


def named_tokens(settings: Mapping[str, Any], keys: tuple[str, ...]) -> Iterator[str]:
    """Tokens that a tokenizer_config.json names under these keys: as a string, or as the fields of an AddedToken."""
    for key in keys:
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token:
            yield str(token)


def resolve_names(known: set[str], settings: Mapping[str, Any], unknown: str | None) -> dict[str, str]:
    """The token of each role except eod and sentinels: from the settings, else by the usual names.

    The token for unknown text gets no role, even if the settings name it, because text encodes to it.
    """
    found = {}
    for role, standard in STANDARD_NAMES.items():
        named = named_tokens(settings, (SETTING_OF_ROLE[role],)) if role in SETTING_OF_ROLE else ()
        candidates = (*named, standard, *OTHER_NAMES.get(role, ()))
        name = next((name for name in candidates if name in known and name != unknown), None)
        if name is not None:
            found[role] = name
    return found


def sentinel_names(known: set[str]) -> list[str]:
    """Sentinels from number 0 to the last before a gap; in SentencePiece they may begin with a space."""
    spellings = ((sentinel_name(number), "▁" + sentinel_name(number)) for number in count())
    found = (next((name for name in names if name in known), "") for names in spellings)
    return list(takewhile(bool, found))


def names_text(names: list[str]) -> str:
    """Names for a message; a long list is shortened in the middle."""
    if len(names) <= 8:
        return ", ".join(names)
    return f"{', '.join(names[:6])} ... {names[-1]} ({len(names)} tokens)"

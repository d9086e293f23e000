"""Special tokens by role: those that objectives put around and into a text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a plan imports this module and has to be fast
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids by role; None or empty = the vocabulary has no such token."""

    eod: int | None = None
    """Ends every document in the shards."""
    begin: tuple[int, ...] = ()
    """Every document in the shards begins with these tokens; empty = documents begin with their text."""
    bos: int | None = None
    """The tokenizer's bos_token, whether it adds it to texts or not."""
    eos: int | None = None
    """The tokenizer's eos_token if that is not `eod`, as in chat models; None = `eod`."""
    cls: int | None = None
    """Begins an input of BERT, RoBERTa and BART."""
    sep: int | None = None
    """Ends a segment of such an input."""
    mask: int | None = None
    pad: int | None = None
    """Pads inputs, and begins the decoder's input of T5."""
    sentinels: tuple[int, ...] = ()
    """Replace the spans that T5 and UL2 remove, in this order."""
    mode_r: int | None = None
    """[NLU], for UL2's R-denoisers: short spans, low rate."""
    mode_s: int | None = None
    """[S2S], for UL2's S-denoiser: a prefix language model."""
    mode_x: int | None = None
    """[NLG], for UL2's X-denoisers: long spans or high rate."""
    fim_prefix: int | None = None
    fim_suffix: int | None = None
    fim_middle: int | None = None

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> SpecialTokens:
        """From the tokenizer facts of a manifest or a sidecar; the oldest ones contain only `eod_id`."""
        roles = facts.get("special") or {}
        rows = {name: tuple(roles.get(name, ())) for name in ("sentinels", "begin")}
        return cls(**{**roles, **rows}, eod=facts["eod_id"])

    def to_facts(self) -> dict[str, Any]:
        """The inverse of `from_facts`."""
        roles = asdict(self)
        return {"eod_id": roles.pop("eod"), "special": roles}


@dataclass(frozen=True)
class Vocabulary:
    """What objectives know about the tokens."""

    size: int
    special: SpecialTokens = field(default_factory=SpecialTokens)
    is_special: npt.NDArray[np.bool_] | None = None
    """[size]: tokens that never encode text, and ids without a token. None = unknown (shards without their
    tokenizer)."""
    begins_word: npt.NDArray[np.bool_] | None = None
    """[size]: tokens that begin a word, see `Pieces.begins_word`. None = unknown."""

    def enlarged(self, size: int) -> Vocabulary:
        """Add ids without a token up to `size`: the vocabulary of a model may be larger than its tokenizer's."""
        import numpy as np

        def padded(table: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.bool_] | None:
            return None if table is None else np.pad(table, (0, size - self.size), constant_values=True)

        return replace(self, size=size, is_special=padded(self.is_special), begins_word=padded(self.begins_word))

"""The tokens that objectives put around and into a text, by their role."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a plan needs the names in milliseconds
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class SpecialTokens:
    """Ids by role; None or empty = the vocabulary has no such token."""

    eod: int | None = None
    """Ends every document in the shards."""
    begin: tuple[int, ...] = ()
    """Every document in the shards begins with these; empty = with its text."""
    bos: int | None = None
    """What the tokenizer calls its beginning-of-text token, whether it adds that to texts or not."""
    eos: int | None = None
    """What the tokenizer calls its end token where that is not `eod`, as in chat models; None = `eod`."""
    cls: int | None = None
    """Begins an input of BERT, RoBERTa and BART."""
    sep: int | None = None
    """Ends a part of such an input."""
    mask: int | None = None
    pad: int | None = None
    """Fills up inputs, and begins the decoder's input of T5."""
    sentinels: tuple[int, ...] = ()
    """Stand for the spans that T5 and UL2 take out, in this order."""
    mode_r: int | None = None
    """[NLU], of UL2's R-denoisers: short spans, low rate."""
    mode_s: int | None = None
    """[S2S], of its S-denoiser: a prefix language model."""
    mode_x: int | None = None
    """[NLG], of its X-denoisers: long spans or high rate."""
    fim_prefix: int | None = None
    fim_suffix: int | None = None
    fim_middle: int | None = None

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> SpecialTokens:
        """From what a manifest or a sidecar says of a tokenizer; the oldest ones tell the end of documents only."""
        roles = facts.get("special") or {}
        rows = {name: tuple(roles.get(name, ())) for name in ("sentinels", "begin")}
        return cls(**{**roles, **rows}, eod=facts["eod_id"])

    def to_facts(self) -> dict[str, Any]:
        """As `from_facts` reads it."""
        roles = asdict(self)
        return {"eod_id": roles.pop("eod"), "special": roles}


@dataclass(frozen=True)
class Vocabulary:
    """What objectives know of the tokens."""

    size: int
    special: SpecialTokens = field(default_factory=SpecialTokens)
    is_special: npt.NDArray[np.bool_] | None = None
    """[size]: tokens that no text is made of, and ids without a token. None = unknown: shards without their
    tokenizer."""
    begins_word: npt.NDArray[np.bool_] | None = None
    """[size]: tokens that begin a word, see `pieces.begins_word`. None = unknown."""

    def enlarged(self, size: int) -> Vocabulary:
        """With ids up to `size` that have no token: the true vocabulary of a model may be larger."""
        import numpy as np

        def padded(table: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.bool_] | None:
            return None if table is None else np.pad(table, (0, size - self.size), constant_values=True)

        return replace(self, size=size, is_special=padded(self.is_special), begins_word=padded(self.begins_word))

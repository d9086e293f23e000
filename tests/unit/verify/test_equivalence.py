"""The vocabulary that layouts are compared with."""

from __future__ import annotations

import pytest

from megatron_lite.errors import ConfigError
from megatron_lite.verify.synthetic import synthetic_vocabulary


def test_synthetic_vocabulary_has_the_sentinels_that_are_needed() -> None:
    assert [len(synthetic_vocabulary(300, needed).special.sentinels) for needed in (0, 30, 64)] == [30, 30, 64]
    vocabulary = synthetic_vocabulary(300, 64)
    assert vocabulary.is_special is not None
    assert vocabulary.is_special.sum() == 11 + 64
    with pytest.raises(ConfigError) as error:
        synthetic_vocabulary(75, 64)
    assert str(error.value) == (
        "model.vocab_size=75 is too small for 11 special tokens, 64 sentinels and text; use 76 or more"
    )

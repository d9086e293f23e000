"""The special tokens that each objective needs, checked for a tokenizer or added to it."""

from __future__ import annotations

import shlex
from pathlib import Path

from megatron_lite.config.lengths import TRAINED_SENTINELS, sentinels_needed
from megatron_lite.config.schema import ObjectiveConfig, ObjectiveName, RunConfig
from megatron_lite.data.special import SpecialTokens
from megatron_lite.data.tokenizer.roles import END_OF_TEXT, STANDARD_NAMES, names_text, sentinel_name
from megatron_lite.data.tokenizer.tokenizer import Tokenizer, open_tokenizer, save_extended
from megatron_lite.data.tokenizer.vocabulary import TRAIN
from megatron_lite.errors import ConfigError, DataError

MODES = ("mode_r", "mode_s", "mode_x")
NEEDS: dict[ObjectiveName, tuple[str, ...]] = {
    ObjectiveName.causal_lm: (),
    ObjectiveName.prefix_lm: (),
    ObjectiveName.fill_in_the_middle: ("eod", "fim_prefix", "fim_suffix", "fim_middle"),
    ObjectiveName.masked_lm: ("cls", "sep", "mask"),
    ObjectiveName.masked_lm_nsp: ("cls", "sep", "mask", "pad"),
    ObjectiveName.bart_denoising: ("eod", "cls", "sep", "mask", "pad"),
    ObjectiveName.span_corruption: ("eod", "pad"),
    ObjectiveName.ul2: ("eod", "pad"),
}
"""Objective -> roles. In addition: sentinels, UL2's modes, and end of document if data.mask_loss_after_eod is set."""
NAMES = {**STANDARD_NAMES, "eod": END_OF_TEXT}
NEED_SENTINELS = frozenset({ObjectiveName.span_corruption, ObjectiveName.ul2})
NEED_TOKENIZER = frozenset({ObjectiveName.masked_lm, ObjectiveName.masked_lm_nsp})
"""Objectives that read `Vocabulary.is_special`, because they mask and draw only ordinary tokens. Only the tokenizer
itself knows which tokens are special."""


def needs_sentences(objective: ObjectiveConfig) -> bool:
    """Whether an objective needs to know where sentences begin."""
    if objective.name is ObjectiveName.bart_denoising:
        return objective.permute_sentences
    return objective.name is ObjectiveName.masked_lm_nsp


def no_sentences(source: str) -> DataError:
    return DataError(
        f"{source} has no sentence boundaries, which this objective needs: these shards came without a tokenizer; "
        "name its folder in data.tokenizer"
    )


def missing_tokens(
    special: SpecialTokens, objective: ObjectiveName, num_sentinels: int, mode_tokens: bool = True
) -> list[str]:
    """Names of the tokens that an objective needs and a vocabulary lacks, as `add_tokens` would add them."""
    needs = (*NEEDS.get(objective, ()), *(MODES if objective is ObjectiveName.ul2 and mode_tokens else ()))
    roles = [role for role in needs if getattr(special, role) is None]
    sentinels = range(len(special.sentinels), num_sentinels if objective in NEED_SENTINELS else 0)
    return [NAMES[role] for role in roles] + [sentinel_name(number) for number in sentinels]


def require_tokens_of_run(config: RunConfig, special: SpecialTokens, folder: Path | None) -> None:
    """Refuse data that lacks a special token which the run needs, or the tokenizer itself.

    Args:
        folder: folder of the tokenizer; None = the shards came without it.
    Raises:
        ConfigError: naming data.tokenizer, what asks for it, and the remedy.
    """
    if config.data.mask_loss_after_eod and special.eod is None:
        raise ConfigError(
            "data.mask_loss_after_eod=true needs the end-of-document token, but the shards came without a tokenizer; "
            "name its folder in data.tokenizer"
        )
    objective = config.objective
    require_tokens(
        special,
        objective.name,
        tokenizer=config.data.tokenizer,
        folder=folder,
        num_sentinels=sentinels_needed(objective, config.data.seq_length),
        mode_tokens=objective.ul2_mode_tokens,
    )


def require_tokens(
    special: SpecialTokens,
    objective: str,
    *,
    tokenizer: str,
    folder: Path | None,
    num_sentinels: int = 1,
    mode_tokens: bool = True,
) -> None:
    """Refuse data that lacks a special token that the objective needs, or the tokenizer itself where that is needed.

    Args:
        special: the tokens that have a role; known from a sidecar, too.
        objective: objective.name.
        tokenizer: data.tokenizer.
        folder: folder of the tokenizer, which the suggested command extends if data.tokenizer=train; None = the shards
            came without it.
        num_sentinels: largest number of spans in a sample; each span needs its own sentinel.
        mode_tokens: objective.ul2_mode_tokens.
    Raises:
        ConfigError: names data.tokenizer, the objective, what is missing, and the remedy: the command that adds tokens.
    """
    name = ObjectiveName(objective)
    missing = missing_tokens(special, name, num_sentinels, mode_tokens)
    if not missing:
        if folder is None and name in NEED_TOKENIZER:
            raise ConfigError(
                f"data.tokenizer={tokenizer} provides no tokenizer, which objective.name={name} needs to mask only "
                "ordinary tokens: the shards came without theirs; name its folder in data.tokenizer"
            )
        return
    lacks = f"data.tokenizer={tokenizer} lacks {names_text(missing)}, which objective.name={name} needs"
    if folder is None:
        raise ConfigError(f"{lacks}: the shards came without their tokenizer; name its folder in data.tokenizer")
    source = folder if tokenizer == TRAIN else tokenizer
    sentinels = f" --sentinels {num_sentinels}" if num_sentinels > TRAINED_SENTINELS else ""
    command = f"python -m megatron_lite.data add-tokens --objective {name}{sentinels} {shlex.quote(str(source))} FOLDER"
    raise ConfigError(f"{lacks}; add them with `{command}` and set data.tokenizer=FOLDER")


def add_tokens(
    source: str, destination: Path, objective: str, num_sentinels: int = TRAINED_SENTINELS
) -> tuple[list[str], Tokenizer]:
    """Write a copy of a tokenizer with the special tokens that an objective needs appended to its vocabulary.

    Existing ids do not change, so shards that were made with the original can be used with the copy.

    Returns:
        the tokens that were added, and the copy
    Raises:
        ConfigError: the source cannot be opened, or the destination is not empty.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConfigError(f"{destination} exists and will not be overwritten; name a new folder")
    if source == TRAIN:
        raise ConfigError(
            f"data.tokenizer={TRAIN} is not an existing tokenizer; name a folder, such as `tokenizer` in prepared data"
        )
    opened = open_tokenizer(source)
    missing = missing_tokens(opened.special, ObjectiveName(objective), num_sentinels)
    return missing, save_extended(opened, missing, destination)

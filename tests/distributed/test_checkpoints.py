"""Save in any layout, resume in any other: bitwise the same state, the same losses, the same files.

Chains of random layouts. Each link resumes from what the previous one has saved, saves it again at once (the tensor
files must be identical byte by byte), trains, saves, and trains on without a restart: the losses that the next link
must repeat.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_lite.checkpoint.folder import read_manifest
from megatron_lite.config.schema import RunConfig
from tests.distributed.checkpoint_ranks import Link, copy_rank, link_rank
from tests.distributed.equivalence_cases import VOCAB_SIZE, run_config
from tests.distributed.harness import run_ranks

SEED = 20261125
AHEAD, BEHIND = 1, 5  # steps of a link before and after its second save
LOSSES = 5  # number of losses that the next link must repeat
CHAIN_LENGTH = 12  # layouts; one less pair
LARGEST_WORLD = 4
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Case:
    """One layout."""

    dp: int
    tp: int
    pp: int
    zero_stage: int
    sequence_parallel: bool
    is_lopsided: bool = False
    """Whether the pipeline is cut unevenly, instead of by work."""

    @property
    def world_size(self) -> int:
        return self.dp * self.tp * self.pp

    def config(self, model: str) -> RunConfig:
        config = run_config(
            model,
            dp=self.dp,
            tp=self.tp,
            pp=self.pp,
            zero_stage=self.zero_stage,
            sequence_parallel=self.sequence_parallel,
            is_lopsided=self.is_lopsided,
        )
        return replace(config, train=replace(config.train, steps=AHEAD * CHAIN_LENGTH + BEHIND))


def random_layouts(model: str, count: int) -> list[Case]:
    """No two consecutive layouts are the same; each chain contains a 2 x 2 x 2."""
    draw = random.Random(f"{SEED} {model}")
    found: list[Case] = []
    while len(found) < count:
        tp, pp = draw.choice([1, 2, 2, 4]), draw.choice([1, 1, 2, 4])
        dp = draw.choice([1, 2, 2, 4])
        stage = draw.choice([0, 1, 1]) if pp > 1 else draw.choice([0, 1, 2, 3])
        cut = pp > 1 and len(found) % 2 == 0
        case = Case(dp, tp, pp, stage, tp > 1 and model != "t5" and draw.random() < 0.5, cut)
        fits = case.world_size <= LARGEST_WORLD and (model not in ("llama",) or tp <= 2)
        if fits and (not found or case != found[-1]):
            found.append(case)
    found[count // 2] = Case(2, 2, 2, 1, sequence_parallel=False)
    return found


def files(folder: Path, step: int) -> dict[str, str]:
    """Hashes of a checkpoint's tensor files."""
    records = read_manifest(folder / f"step_{step:08d}")
    return {name: record.xxh3 for name, record in records.items() if name.endswith(".safetensors")}


def run_chain(
    configs: list[RunConfig], folder: Path, steps: tuple[int, int], mutation: str | None = None
) -> list[Link]:
    """Each link resumes from the previous one's checkpoint. Checks that nothing is lost on the way."""
    links = []
    for index, config in enumerate(configs):
        copy = folder / f"copy{index}"
        arguments = (config, VOCAB_SIZE, folder / "run", copy, steps, mutation)
        ranks = run_ranks(link_rank, config.topology.world_size, *arguments)
        link = ranks[0]
        assert sum(rank.written for rank in ranks) == link.elements, "each element is written once, by one rank"
        assert link.loaded_step == index * steps[0]
        if index:
            saved = files(folder / "run", link.loaded_step)
            assert len(saved) > 3, "several files of each kind"
            assert files(copy, link.loaded_step) == saved, "the layout has changed a weight, a moment or a file"
        links.append(link)
    return links


@pytest.mark.parametrize("model", ["gpt2", "llama", "bert", "t5"])
def test_chains_of_random_layouts(model: str, tmp_path: Path) -> None:
    layouts = random_layouts(model, CHAIN_LENGTH)
    links = run_chain([case.config(model) for case in layouts], tmp_path, (AHEAD, BEHIND))
    for (before, unbroken), (after, resumed) in pairwise(zip(layouts, links, strict=True)):
        expected = unbroken.losses[AHEAD : AHEAD + LOSSES]
        assert len(expected) == LOSSES
        assert resumed.losses[:LOSSES] == pytest.approx(expected, rel=TOLERANCE), f"{before} -> {after}"


def test_there_and_back_again_is_bitwise_the_same(tmp_path: Path) -> None:
    one, other = (case.config("gpt2") for case in (Case(1, 2, 2, 1, True), Case(2, 1, 1, 3, False)))
    run_ranks(link_rank, 4, one, VOCAB_SIZE, tmp_path / "a", tmp_path, (1, 1), None)
    run_ranks(copy_rank, 2, other, VOCAB_SIZE, tmp_path / "a", tmp_path / "b")
    run_ranks(copy_rank, 4, one, VOCAB_SIZE, tmp_path / "b", tmp_path / "a again")
    saved = files(tmp_path / "a", 1)
    assert saved
    assert files(tmp_path / "b", 1) == files(tmp_path / "a again", 1) == saved

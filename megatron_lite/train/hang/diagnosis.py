"""Find the rank that causes a hang: a pure function of all ranks' heartbeats.

In a hang all ranks stop, but usually only one of them is the cause. In this order it is

1. a rank without a recent heartbeat: its process is stopped or its node is down;
2. a rank that has been for a long time in a phase that needs no other rank (data, save, a computation) while others
   wait;
3. the rank that is furthest behind: in the earliest step, then, among ranks that enter the same phases in the same
   order, the one that has entered the fewest. A stage that waits to send or receive is not blamed: another stage keeps
   it waiting.

If none of this tells the ranks apart, they wait for each other, and the finding says so.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from megatron_lite.observe.heartbeat import Beat, Phase

WAITS = frozenset({Phase.MEET, Phase.SEND, Phase.RECEIVE, Phase.REDUCE})
# A GPU's collectives are asynchronous and not on the Python stack: a rank in one of these phases may be waiting, too.
MAY_WAIT = frozenset({Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER, Phase.EVALUATE, Phase.SAMPLE})
BETWEEN_STAGES = frozenset({Phase.SEND, Phase.RECEIVE})


class HangKind(StrEnum):
    """Why a rank is reported as the cause."""

    SILENT = "silent"
    BUSY = "busy"
    BEHIND = "behind"


@dataclass(frozen=True)
class Finding:
    """The cause of a hang."""

    kind: HangKind
    ranks: list[int]
    """The figures below are those of the first."""
    node: str | None
    """The node to exclude; None = several nodes, an unknown one, or its ranks only wait."""
    phase: str | None
    """None = the rank has sent no heartbeat in this attempt."""
    seconds: float
    """Time in the phase, or since the last heartbeat."""
    step: int
    """The step of the waiting ranks; 0 = before the first step."""
    message: str


def find_culprit(
    beats: Mapping[int, Beat], world_size: int, *, now: float, limit_seconds: float, started: float
) -> Finding:
    """
    Args:
        beats: the latest heartbeat of each rank that has sent one.
        now, started: seconds since the epoch; a heartbeat older than `started` belongs to an earlier attempt.
        limit_seconds: train.timeout_seconds, which some rank's phase has exceeded.
    """
    heard = {rank: beat for rank, beat in beats.items() if beat.time >= started}
    seconds = {rank: beat.seconds_at(now) for rank, beat in heard.items()}
    unheard = [rank for rank in range(world_size) if rank not in heard]
    silent = [rank for rank, beat in heard.items() if now - beat.time > limit_seconds / 2 and not _ended(beat)]
    ended = [rank for rank, beat in heard.items() if _ended(beat)]
    job = _Job(heard, seconds, world_size)
    if unheard:
        return job.finding(HangKind.SILENT, unheard, "{has} sent no heartbeat in this attempt", now - started)
    if silent:
        longest = max(now - heard[rank].time for rank in silent)
        return job.finding(HangKind.SILENT, silent, f"{{has}} sent no heartbeat for {longest:.0f} s", longest)
    if ended:
        longest = max(now - heard[rank].time for rank in ended)
        return job.finding(HangKind.SILENT, ended, "{has} ended", longest)
    busy = _busy(heard, seconds, limit_seconds)
    if busy:
        longest = seconds[busy[0]]
        return job.finding(HangKind.BUSY, busy, f"{{has}} been in '{heard[busy[0]].what}' for {longest:.0f} s", longest)
    behind = _behind(heard)
    longest = max(seconds[rank] for rank in behind)
    return job.finding(HangKind.BEHIND, behind, _wait(behind, heard, longest, world_size), longest)


def _ended(beat: Beat) -> bool:
    return beat.phase == Phase.ENDED


def _busy(heard: Mapping[int, Beat], seconds: Mapping[int, float], limit_seconds: float) -> list[int]:
    """Ranks that compute for too long, the longest first; only those in the same phase as the first."""
    working = [
        rank
        for rank, beat in heard.items()
        if beat.call is None and beat.phase not in WAITS and seconds[rank] > limit_seconds / 2
    ]
    surely = [rank for rank in working if heard[rank].phase not in MAY_WAIT]
    found = surely or (working if len(working) < len(heard) else [])
    found = sorted(found, key=lambda rank: -seconds[rank])
    return [rank for rank in found if heard[rank].what == heard[found[0]].what]


def _behind(heard: Mapping[int, Beat]) -> list[int]:
    """If all ranks wait: those that the others wait for, or all if that is unknown."""
    first_step = min(beat.step for beat in heard.values())
    found = [rank for rank, beat in heard.items() if beat.step == first_step]
    found = [rank for rank in found if heard[rank].phase not in BETWEEN_STAGES] or found
    stages = defaultdict(list)
    for rank in found:
        stages[heard[rank].pipeline].append(heard[rank].position)
    late = [rank for rank in found if heard[rank].position < max(stages[heard[rank].pipeline])]
    return late or found


def _wait(ranks: Collection[int], heard: Mapping[int, Beat], seconds: float, world_size: int) -> str:
    """The predicate of a message about ranks that all wait."""
    beats = [heard[rank] for rank in ranks]
    steps = sorted({beat.step for beat in beats})
    phases = Counter(f"'{beat.what}'" + (f" ({beat.call})" if beat.call else "") for beat in beats)
    if len(beats) == 1:
        return f"is furthest behind: in {next(iter(phases))} of step {steps[0]} for {seconds:.0f} s"
    doing = ", ".join(f"{count} in {phase}" for phase, count in phases.most_common())
    verb = "wait for each other" if len(beats) == world_size else "are furthest behind"
    return f"{verb} in step {steps[0]} for {seconds:.0f} s: {doing}"


@dataclass(frozen=True)
class _Job:
    """All ranks' heartbeats, from which messages about some ranks are written."""

    heard: Mapping[int, Beat]
    seconds: Mapping[int, float]
    world_size: int

    def finding(self, kind: HangKind, ranks: list[int], predicate: str, seconds: float) -> Finding:
        beat = self.heard.get(ranks[0])
        nodes = self._nodes(ranks)
        predicate = predicate.format(has="has" if len(ranks) == 1 else "have")
        return Finding(
            kind=kind,
            ranks=ranks,
            node=nodes[0] if len(nodes) == 1 and kind is not HangKind.BEHIND else None,
            phase=beat.phase if beat else None,
            seconds=round(seconds, 1),
            step=self._step(ranks),
            message=f"{self._subject(ranks)} {predicate}{self._others(ranks)}",
        )

    def _subject(self, ranks: list[int]) -> str:
        nodes = self._nodes(ranks)
        where = f"node {nodes[0]}" if len(nodes) == 1 else f"nodes {', '.join(nodes)}" if nodes else ""
        beat = self.heard.get(ranks[0])
        if len(ranks) == 1 and beat:
            where += f", tp{beat.tensor} pp{beat.pipeline} dp{beat.data}"
        who = f"all {len(ranks)} ranks" if 1 < len(ranks) == self.world_size else ranks_text(ranks)
        return f"{who} ({where})" if where else who

    def _others(self, ranks: list[int]) -> str:
        count = self.world_size - len(ranks)
        if count == 0:
            return ""
        step = self._step(ranks)
        who = "1 other waits" if count == 1 else f"{count} others wait"
        return f"; {who} " + (f"in step {step}" if step else "before the first step")

    def _step(self, ranks: list[int]) -> int:
        """The step that most of the other ranks are in."""
        others = [beat.step for rank, beat in self.heard.items() if rank not in ranks]
        steps = others or [beat.step for beat in self.heard.values()] or [0]
        return Counter(steps).most_common(1)[0][0]

    def _nodes(self, ranks: Iterable[int]) -> list[str]:
        return list(dict.fromkeys(self.heard[rank].node for rank in ranks if rank in self.heard))


def ranks_text(ranks: Collection[int]) -> str:
    """`rank 5`, or `ranks 0-3, 7`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    spelled = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {spelled}"

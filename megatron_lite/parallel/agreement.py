"""Broadcast rank 0's decision to all ranks.

Whatever a rank reads from a clock or a disk may differ between ranks; if ranks then branch differently, one enters a
collective that the others never call, and the job hangs.
"""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def agreed(answer: T) -> T:
    """Rank 0's `answer`, on every rank. A collective of all ranks."""
    answers = [answer]
    dist.broadcast_object_list(answers)
    return answers[0]

"""Broadcast one rank's answer to all ranks."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def agreed(answer: T) -> T:
    """The writing rank's value, on every rank; a collective of all ranks."""
    answers = [answer]
    dist.broadcast_object_list(answers)
    return answers[0]

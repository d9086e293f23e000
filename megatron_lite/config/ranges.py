"""Ranges of numbers: the values that work, whatever the other settings are.

A field of the schema names one: `range=ranges.LAYERS`. Upper bounds are not recommendations: they are far above useful
values, and below the limits of int32, int64, fp32, a system call or the time for a loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

FP32_SMALLEST = 1.2e-38  # slightly above the smallest normal number, 2^-126
FP32_LARGEST = 3.4e38
INT32_LARGEST = 2**31 - 1
INT64_LARGEST = 2**63 - 1
MOST_STEPS = 10**8 - 1  # checkpoint names have eight digits
MOST_PROCESSES = 2**17
LONGEST_SEQUENCE = 2**24
LARGEST_BATCH = 2**24
LONGEST_WAIT_SECONDS = 10_000_000.0  # 115 days: timers count milliseconds in C
TINY = 1e-30  # a smaller bound only keeps a number from being 0 in fp32
NEXT_TO_ONE = 1 - 2e-7  # fp32 rounds closer numbers to 1


@dataclass(frozen=True)
class Range:
    """The values of one number. The message is `rule` if a value makes no sense, else the bound that it exceeds."""

    least: float
    most: float
    means: Callable[[float], bool]
    """Whether a value makes sense at all; the bounds are within these values."""
    rule: str
    why_least: str = "the smallest number that fp32 holds"
    why_most: str = "the most that is possible"

    def __str__(self) -> str:
        """`at least 1, at most 65535 (...)`."""
        least = "more than 0" if 0 < self.least < TINY else f"at least {self.least:g}"
        return f"{least}, at most {self._most()} ({self.why_most})"

    def _most(self) -> str:
        return str(self.most) if isinstance(self.most, int) else format(self.most, ".7g")

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, to follow `key=value`."""
        if not isinstance(value, int | float):
            return "is not a number; give one"
        if not self.means(value):
            return self.rule
        if value < self.least:
            return f"is less than {self.least:g}, {self.why_least}; use {self.least:g} or more"
        if value > self.most:
            return f"is more than {self._most()}, {self.why_most}; use at most {self._most()}"
        return None


def count(most: int, why_most: str) -> Range:
    return Range(1, most, lambda value: value >= 1, "must be at least 1; use 1 or more", why_most=why_most)


def from_0(most: float, why_most: str) -> Range:
    return Range(0, most, lambda value: value >= 0, "must be a number >= 0; use 0 or more", why_most=why_most)


def from_1(most: float, why_most: str) -> Range:
    return Range(1, most, lambda value: value >= 1, "must be a number >= 1; use 1 or more", why_most=why_most)


def positive(most: float, why_most: str, least: float = FP32_SMALLEST, why_least: str = "") -> Range:
    return Range(
        least,
        most,
        lambda value: value > 0,
        "must be a positive number; use a value above 0",
        why_least or Range.why_least,
        why_most,
    )


FRACTION = Range(
    0, NEXT_TO_ONE, lambda value: 0 <= value < 1, "must be at least 0 and less than 1; use a fraction such as 0.1",
    why_most="which fp32 tells from 1",
)  # fmt: skip
SHARE = Range(
    0, 1, lambda value: 0 <= value <= 1, "must be at least 0 and at most 1; use a fraction such as 0.1"
)  # fmt: skip
PART = Range(
    1e-6,
    1 - 1e-6,
    lambda value: 0 < value < 1,
    "must be more than 0 and less than 1; use a fraction such as 0.15",
    "which no sequence is long enough for",
    "which leaves no text",
)
ANY_NUMBER = Range(-1e30, 1e30, lambda value: abs(value) < math.inf, "must be a number; give a finite one")
ZERO_STAGE = Range(0, 3, lambda value: value in (0, 1, 2, 3), "is not known; use 0, 1, 2 or 3")
LOSS_SCALE_POWER = Range(
    0, 32, lambda value: value >= 0, "must be a number >= 0; use 16",
    why_most="where the scale overflows any fp16 gradient",
)  # fmt: skip
PORT = Range(1, 65535, lambda value: 1 <= value <= 65535, "is not a port; use 1 to 65535, or null for a free one")

LAYERS = count(10_000, "which a plan can list")
WIDTH = count(2**24, "whose matrices int64 can count")
INNER_WIDTH = count(INT32_LARGEST, "the largest int32")
HEADS = count(2**16, "whose matrices int64 can count")
VOCABULARY = count(INT32_LARGEST, "the largest int32, which holds a token")
VOCABULARY_OR_NULL = replace(VOCABULARY, rule="must be at least 1; use null for the size of the tokenizer")
PADDING = count(2**20, "the most that a vocabulary is padded by")
LENGTH = count(LONGEST_SEQUENCE, "the longest sequence that is planned for")
BUCKETS = count(2**16, "the most that a table has")
OFFSET = from_0(2**16, "the most that a table has")
ROTARY_BASE = positive(1e12, "where neighbouring positions look the same", 1.0, "where angles grow")
INIT_STD = positive(100.0, "where every layer overflows the next")
PROCESSES = count(MOST_PROCESSES, "the most that a plan can list")
NODE_RANK = from_0(MOST_PROCESSES, "the most that a plan can list")
THREADS = count(4096, "the most that a machine runs")
BATCH = count(LARGEST_BATCH, "the largest batch that is planned for")
BATCH_OR_0 = from_0(LARGEST_BATCH, "the largest batch that is planned for")
TOKENS = count(INT32_LARGEST, "the largest int32")
STEPS = count(MOST_STEPS, "the largest step that a checkpoint's name of eight digits holds")
STEPS_OR_0 = from_0(MOST_STEPS, "the largest step that a checkpoint's name of eight digits holds")
RATE = positive(1000.0, "where no update is small any more")
RATE_OR_0 = from_0(1000.0, "where no update is small any more")
SMALL = positive(1.0, "which would not be small beside what it is added to")
DEVIATIONS = positive(1e9, "which nothing reaches")
SECONDS = positive(LONGEST_WAIT_SECONDS, "115 days", 1e-3, "the shortest time that timers tell")
SPAN = from_1(LONGEST_SEQUENCE, "the longest sequence that is planned for")
POISSON_MEAN = positive(
    LONGEST_SEQUENCE, "the longest sequence that is planned for", 1e-3, "where hardly a span has a token"
)
DOCUMENT_BYTES = count(2**40, "the longest document that is read")
EPOCHS = count(10**6, "the most passes that are counted")
FP32_OR_0 = from_0(FP32_LARGEST, "the largest number that fp32 holds")
SAMPLES_OR_0 = from_0(2**53, "the most that is counted exactly")
SEED = from_0(INT64_LARGEST, "the largest int64")
LOSS_SCALE = count(2**32, "where the scale overflows any fp16 gradient")
GENERATED_TOKENS = from_0(2**16, "the most that a summary shows")
MEDIAN_WINDOW = count(2**16, "the most whose median is taken at each step")
LOSS_RISE = from_0(1e9, "which nothing reaches")
NORM_FACTOR = from_1(1e9, "which nothing reaches")
HALVINGS = count(1000, "more than there are between the largest scale and the smallest")
ROLLBACKS = from_0(30, "each of which may leave out twice as many samples as the one before")
SHOWN_SEQUENCES = from_0(1024, "the most whose text a spike report shows")
JOBS = count(1000, "the most jobs that are submitted at once")
REQUEUES = from_0(10**6, "more than a job lives through")

"""Bytes on the wire: of the collectives that a rank calls, and the fewest that its layout has to send.

A rank of a group of g sends, with ring algorithms, which reach the lower bound:

    all-reduce of n bytes        2 (g - 1) / g x n
    reduce-scatter of n in all       (g - 1) / g x n
    all-gather to n in all           (g - 1) / g x n
    broadcast, reduce of n           (g - 1) / g x n   (of each rank on average, as a ring pipelines them)
    send of n                                      n
"""

from __future__ import annotations

from dataclasses import dataclass

FACTORS = {
    "all_reduce": 2.0,
    "reduce_scatter": 1.0,
    "all_gather": 1.0,
    "broadcast": 1.0,
    "reduce": 1.0,
    "all_to_all": 1.0,
}


def sent_bytes(operation: str, size: int, ranks: int) -> float:
    """Bytes that one rank sends.

    Args:
        operation: a key of FACTORS, `send`, or another name, which sends nothing (`receive`, `barrier`).
        size: bytes of the whole tensor, on all ranks together where each holds a part.
        ranks: of the group.
    """
    if operation == "send":
        return float(size)
    return FACTORS.get(operation, 0.0) * size * (ranks - 1) / ranks


@dataclass(frozen=True)
class Layout:
    """What the formulas of `minimum_bytes` need, for one rank."""

    data: int
    tensor: int
    sequence_parallel: bool
    zero_stage: int
    micro_batches: int
    """Of one step, on each data-parallel rank."""
    weight_bytes: int
    """Of one element of weights and activations."""
    gradient_bytes: int
    """Of one element of the gradient that data-parallel ranks add up."""
    recomputes: bool
    """Whole layers run forward once more in the backward pass."""


@dataclass(frozen=True)
class Stage:
    """The part of a model that one rank holds, in elements; activations are those of one micro-batch."""

    parameters: int
    """That this rank holds (its tensor-parallel slice)."""
    tied: int
    """Of these, in weights that another stage holds as well."""
    tied_stages: int
    """How many stages hold them."""
    sums: int
    """Activations that tensor-parallel ranks add up in the forward pass: [b, s, h] after each row-parallel layer and
    after the vocabulary-parallel embedding."""
    gathers: int
    """Activations whose gradients they add up in the backward pass: the inputs of column-parallel layers."""
    sums_again: int
    gathers_again: int
    """The parts of these two that recomputation repeats."""
    loss_elements: int
    """fp32 numbers that the softmax over a split vocabulary adds up or compares; 0 but on the last stage."""
    sent: int
    """Activations that cross to the next stage."""
    received: int
    """Activations that come from the stage before; their gradients go back."""


def minimum_bytes(layout: Layout, stage: Stage) -> dict[str, float]:
    """By group, the fewest bytes that this rank sends in one step.

    Sums of a handful of numbers (the norm, the loss, the number of tokens) are left out: they are below a per mille of
    any model that is trained.
    """
    return {
        "data": _data(layout, stage),
        "tensor": _tensor(layout, stage),
        "pipeline": _pipeline(layout, stage),
        "stages": 2 * (1 - 1 / stage.tied_stages) * stage.tied * layout.gradient_bytes,  # one all-reduce a step
    }


def _data(layout: Layout, stage: Stage) -> float:
    """ZeRO-0: each gradient is all-reduced once a step. ZeRO-1: reduced to the rank that owns it, and the new weights
    are gathered. ZeRO-2 keeps only its own share of the gradient, so it reduces in every micro-batch; ZeRO-3 besides
    keeps only its share of the weights, and gathers them for each forward and each backward pass (DeepSpeed keeps
    weights that it uses again soon, so that small models send less)."""
    share = 1 - 1 / layout.data
    reduced = layout.gradient_bytes * stage.parameters * share
    gathered = layout.weight_bytes * stage.parameters * share
    if layout.zero_stage == 0:
        return 2 * reduced
    if layout.zero_stage == 1:
        return reduced + gathered
    if layout.zero_stage == 2:
        return layout.micro_batches * reduced + gathered
    return layout.micro_batches * (reduced + 2 * gathered)


def _tensor(layout: Layout, stage: Stage) -> float:
    """An all-reduce sends what a reduce-scatter and an all-gather send together, so sequence parallelism sends no more,
    except that it gathers the inputs of column-parallel layers once more in the backward pass, because it did not keep
    them whole (arXiv 2205.05198, section 4.2.2)."""
    activations = 2 * (stage.sums + stage.gathers)
    if layout.sequence_parallel:
        activations += stage.gathers
    if layout.recomputes:
        repeated = stage.sums_again + stage.gathers_again if layout.sequence_parallel else 2 * stage.sums_again
        activations += repeated
    sent = activations * layout.weight_bytes + 2 * stage.loss_elements * 4
    return layout.micro_batches * (1 - 1 / layout.tensor) * sent


def _pipeline(layout: Layout, stage: Stage) -> float:
    """An activation forward, its gradient backward. Tensor-parallel ranks hold the same activation, so each has to send
    only its share across (arXiv 2104.04473, section 4.1)."""
    return layout.micro_batches * layout.weight_bytes * (stage.sent + stage.received) / layout.tensor

"""Speed in tokens per second and as a fraction of the hardware's peak."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Throughput:
    """Speed of one step.

    `model_flops_utilization` is MFU (PaLM, arXiv 2204.02311, appendix B): the FLOPs that the model needs, without
    recomputation, divided by the peak FLOPs of the devices in that time; None if the peak is unknown.
    """

    tokens_per_second: float
    model_flops_utilization: float | None

    @classmethod
    def of(cls, tokens: int, seconds: float, flops_per_token: float, peak_flops: float | None) -> Throughput:
        """Args:
        tokens: consumed by the step over all ranks.
        flops_per_token: forward and backward, of the whole model.
        peak_flops: dense FLOP/s of all devices of the job together, in the dtype of the matrix products.
        """
        tokens_per_second = tokens / seconds
        utilization = flops_per_token * tokens_per_second / peak_flops if peak_flops else None
        return cls(tokens_per_second, utilization)

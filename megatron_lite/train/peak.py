"""The peak FLOP/s of the job: the denominator of MFU."""

from __future__ import annotations

import torch

from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.engine.engine import DTYPES
from megatron_lite.observe.hardware import measure_gemm_peak, usable_cores
from megatron_lite.planning.flops import dense_peak_flops


def job_peak_flops(config: ResolvedConfig, device: torch.device, world_size: int) -> float:
    """Dense FLOP/s that all ranks together could reach.

    For a GPU it is the figure of the data sheet, or measured if the GPU is not in our table. For CPUs one core is
    measured, and all ranks are assumed to share one machine: eight ranks on two cores have the peak of two cores.
    """
    dtype = DTYPES[config.train.precision]
    if device.type == "cuda":
        listed = dense_peak_flops(
            torch.cuda.get_device_name(device),
            config.train.precision,
            allow_tf32=torch.backends.cuda.matmul.allow_tf32,
        )
        return world_size * (listed or measure_gemm_peak(dtype, device))
    return measure_gemm_peak(dtype) * min(world_size * config.launcher.threads_per_process, usable_cores())

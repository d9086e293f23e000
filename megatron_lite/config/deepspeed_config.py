"""The only place with DeepSpeed's configuration keys.

Users set `parallel.*`, `train.*` and `optimizer.*`; this translates them, and gives the reason for every key that does
not obviously correspond to one of theirs. The optimizer, its schedule and the data are ours, so those keys are absent.
"""

from __future__ import annotations

from typing import Any

from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import Precision, RunConfig


def deepspeed_config(config: ResolvedConfig, *, global_batch_size: int, pin_memory: bool = False) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Args:
        global_batch_size: sequences of the first optimizer step (a batch ramp changes it later through the engine).
        pin_memory: offloaded states are in page-locked memory; only where there is a GPU.
    """
    settings: dict[str, Any] = {
        "train_batch_size": global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.num_micro_batches(global_batch_size),
        "zero_optimization": _zero(config, pin_memory),
        # Under ZeRO-0 DeepSpeed drops replicated parameters of later stages from the norm: the engine clips itself.
        "gradient_clipping": config.optimizer.clip_grad_norm if config.parallel.zero_stage else 0.0,
        "zero_allow_untested_optimizer": True,  # plain SGD
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's CPU Adam must be compiled at first use; torch's need not
        "wall_clock_breakdown": False,
        # Its throughput timer waits for the device before each forward pass and after each step.
        "timers": {"throughput": {"enabled": False}},
        "pipeline": {
            # Stages exchange whole activations: same result, same speed, and no stale metadata when shapes change.
            "pipe_partitioned": False,
            "grad_partitioned": False,
            "activation_checkpoint_interval": 0,  # the layers recompute themselves
            "use_reentrant": False,
        },
    }
    settings.update(_precision(config))
    return settings


def _zero(config: RunConfig, pin_memory: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.parallel.zero_stage}
    if config.parallel.zero_stage == 1:
        # Otherwise each step allocates a buffer of 5e8 elements and copies all gradients into and out of it: 7 % of a
        # one-rank step on a CPU. Without it, gradients are flattened once, with only as many elements as there are.
        zero["contiguous_gradients"] = False
    if config.parallel.zero_stage >= 2:
        zero["overlap_comm"] = False  # gloo has no streams to overlap, and all devices reduce in the same order
    if config.parallel.zero_stage == 3:
        # Otherwise DeepSpeed's thresholds leave small models unpartitioned, and tests never exercise stage 3.
        zero["stage3_param_persistence_threshold"] = 0
    if config.parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin_memory}
    return zero


def _precision(config: RunConfig) -> dict[str, Any]:
    if config.train.precision is Precision.bf16:
        # bf16 sums lose small gradients; with fp32 accumulation DeepSpeed selects its BF16_Optimizer under ZeRO-1.
        return {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if config.train.precision is Precision.fp16:
        scale = config.train.loss_scale
        return {
            "fp16": {
                "enabled": True,
                "loss_scale": 0,  # 0 = dynamic
                "initial_scale_power": scale.initial_power,
                "loss_scale_window": scale.window,
                "hysteresis": scale.hysteresis,
                "min_loss_scale": scale.minimum,
            }
        }
    return {}

"""Builds a torch optimizer over one rank's parameters from the configuration."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from megatron_lite.config.schema import OptimizerConfig, OptimizerName
from megatron_lite.optim.adafactor import Adafactor
from megatron_lite.optim.groups import parameter_groups
from megatron_lite.optim.sgd import DecoupledSGD
from megatron_lite.parallel.context import ParallelContext

_FUSED_DEVICES = ("cpu", "cuda")


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, context: ParallelContext
) -> torch.optim.Optimizer:
    """An optimizer whose `lr` the engine sets before each step from `learning_rate_at`.

    AdamW uses torch's fused version where the device has it: one pass over each parameter instead of about ten.

    Raises:
        ConfigError: Adafactor with parameters that are not fp32.
    """
    groups = parameter_groups(named_parameters, config.weight_decay)
    if config.name is OptimizerName.adamw:
        return torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=context.device.type in _FUSED_DEVICES,
        )
    if config.name is OptimizerName.sgd:
        return DecoupledSGD(groups, lr=config.learning_rate, momentum=config.momentum)
    return Adafactor(groups, lr=config.learning_rate, tensor_group=context.tensor_group)
